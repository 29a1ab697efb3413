"""The engine's side of `mlx-mcp sessions`: one request on each connection, with progress until its answer.

hello   {"kind": "sessions", "do": "export", "folder": …, "session": …, "at": version} and one descriptor
reply   {"pid": …}, then about once a second {"done": bytes, "total": bytes}, and last {"result": …} or {"error": …};
{"elsewhere": true} if the engine does not have that folder open
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from mlx_mcp.config import Config
from mlx_mcp.core.durable import SessionRecord, Transfer, session_as_json, session_with_text
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.messages import Export, Heads, Import, Purge, Read, Remove
from mlx_mcp.errors import ConfigError, MlxMcpError, NotKeptHere
from mlx_mcp.hosting.hello import reply


class SessionFiles:
    """Answers the requests of `mlx-mcp sessions`."""

    def __init__(self, client: EngineClient, config: Config) -> None:
        self._client, self._config = client, config
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._count > 0

    async def answer(self, connection: socket.socket, hello: dict[str, Any], fds: list[int]) -> None:
        """Do what a hello asks for. A transfer ends if the client goes away.

        Raises:
            ConfigError: the request is not known.
        """
        if not self._config.max_ssd_bytes or not is_same_folder(str(hello.get("folder")), self._config.store_dir):
            await reply(connection, {"elsewhere": True})
            return
        transfer = Transfer(fds.pop(), str(hello.get("file_name"))) if fds else None
        what = request_of(hello, transfer)
        await reply(connection, {"pid": os.getpid()})

        async def waiting() -> None:
            done, total = (0, 0) if transfer is None else (transfer.done_bytes, transfer.total_bytes)
            await reply(connection, {"done": done, "total": total})

        self._count += 1
        try:
            async with anyio.create_task_group() as tasks:

                async def until_it_goes() -> None:
                    with suppress(OSError):
                        await asyncio.get_running_loop().sock_recv(connection, 1)
                    tasks.cancel_scope.cancel()

                tasks.start_soon(until_it_goes)
                try:
                    message = {"result": as_json(await self._client.on_disk(what, waiting))}
                except NotKeptHere:
                    message = {"elsewhere": True}
                except MlxMcpError as error:
                    message = {"error": str(error)}
                await reply(connection, message)
                tasks.cancel_scope.cancel()
        finally:
            self._count -= 1
            if transfer is not None:
                transfer.stop()


def is_same_folder(folder: str, other: Path) -> bool:
    """Whether two paths lead to one folder."""
    return os.path.realpath(folder) == os.path.realpath(other)


def request_of(hello: dict[str, Any], transfer: Transfer | None) -> Heads | Read | Remove | Purge | Export | Import:
    """The request in a hello.

    Raises:
        ConfigError: the request is not known.
    """
    do, session, at, name = hello.get("do"), hello.get("session"), hello.get("at"), hello.get("name") or ""
    file_name = "" if transfer is None else transfer.file_name
    match do:
        case "list":
            return Heads()
        case "show" if isinstance(session, str):
            return Read(session, at or "")
        case "rm" if isinstance(session, str):
            return Remove(session, at)
        case "purge":
            return Purge()
        case "export" if isinstance(session, str) and transfer and os.path.basename(file_name) == file_name:
            return Export(session, at or "", transfer)
        case "import" if transfer and isinstance(name, str):
            return Import(transfer, name)
    raise ConfigError(f"The engine cannot {str(do)[:80]!r} sessions so; `mlx-mcp engine stop` ends it.")


def as_json(value: Any) -> Any:
    """The result of a request as JSON."""
    match value:
        case list():
            return [session_as_json(head) for head in value]
        case int() | None:
            return value
        case SessionRecord():
            return session_with_text(value)
    return session_as_json(value)
