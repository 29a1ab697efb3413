"""What the server says of itself, in both eras: the files that relays answer from. `make surface` writes them."""

import asyncio
import json
import os
from typing import Any

import anyio
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, MODERN_PROTOCOL_VERSIONS

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.hosting.open_requests import OpenRequests
from mlx_mcp.hosting.stdio import serve_lines
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.front import CAPABILITIES, CLIENT_INFO, FOLDER, HANDSHAKE, MODERN, VERSION
from mlx_mcp.process.lines import ACKNOWLEDGED
from mlx_mcp.service.service import Service
from tests.fakes import fake_client

LISTS = ("tools/list", "prompts/list", "resources/list", "resources/templates/list")
CLIENT = {"name": "test", "version": "1"}


async def conversation(*lines: bytes) -> list[dict[str, Any]]:
    """The server's messages to a client that says these lines and waits for the first answer to each request."""
    engine = fake_client()
    to_server: asyncio.Queue[bytes] = asyncio.Queue()
    said: list[dict[str, Any]] = []
    answered = anyio.Event()

    async def write(data: bytes) -> None:
        nonlocal answered
        said.append(json.loads(data))
        if "id" in said[-1] or said[-1]["method"] == ACKNOWLEDGED:
            answered.set()
            answered = anyio.Event()

    try:
        async with anyio.create_task_group() as tasks:
            server = build_server(Service(engine, Registry(None)))
            tasks.start_soon(serve_lines, server, to_server.get, write, 1 << 22, OpenRequests())
            for line in lines:
                waiting = answered
                to_server.put_nowait(line + b"\n")
                if b'"id"' in line:
                    with anyio.fail_after(30):
                        await waiting.wait()
            tasks.cancel_scope.cancel()
    finally:
        engine.close()
    return said


def request(id_: Any, method: str, **params: Any) -> bytes:
    """A request as a line."""
    return json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, "params": params}).encode()


def answers(first: bytes, methods: tuple[str, ...], **params: Any) -> dict[str, Any]:
    """What the server answers to a first request, and then to these methods."""
    lines = [first, *(request(id_, method, **params) for id_, method in enumerate(methods, 1))]
    by_id = {message["id"]: message["result"] for message in asyncio.run(conversation(*lines)) if "id" in message}
    return {json.loads(line)["method"]: by_id[json.loads(line)["id"]] for line in lines}


def handshake(version: str) -> dict[str, Any]:
    """The results by method in a version with a handshake."""
    first = request(0, "initialize", protocolVersion=version, capabilities={}, clientInfo=CLIENT)
    return answers(first, (*LISTS, "ping"))


def modern(version: str) -> dict[str, Any]:
    """The results by method in a version without."""
    meta = {VERSION: version, CLIENT_INFO: CLIENT, CAPABILITIES: {}}
    return answers(request(0, "server/discover", _meta=meta), LISTS, _meta=meta)


def made() -> dict[str, dict[str, Any]]:
    """What the files have to say."""
    eras = {HANDSHAKE: (HANDSHAKE_PROTOCOL_VERSIONS, handshake), MODERN: (MODERN_PROTOCOL_VERSIONS, modern)}
    return {era: {"versions": list(versions), "results": ask(versions[-1])} for era, (versions, ask) in eras.items()}


def main() -> None:
    """Write the files anew."""
    for era, surface in made().items():
        with open(os.path.join(FOLDER, f"{era}.json"), "w", encoding="utf-8") as file:
            json.dump(surface, file, ensure_ascii=False, separators=(",", ":"))
            file.write("\n")


if __name__ == "__main__":
    main()
