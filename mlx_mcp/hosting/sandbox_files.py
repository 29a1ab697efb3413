"""The engine's side of `mlx-mcp sandbox`: one request on each connection.

hello   {"kind": "sandbox", "do": "get", "folder": …, "sandbox": …, "variable": …, "at": version}; or list, rm, purge
reply   {"pid": …}, then about once a second {"done": 0, "total": 0}, and last {"result": …} or {"error": …};
{"elsewhere": true} if the engine keeps its sandboxes in another folder

The user sees the sandboxes of all owners, as with `mlx-mcp sessions`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any

import anyio

from mlx_mcp.config import Config
from mlx_mcp.core.durable_sandbox import sandbox_as_json
from mlx_mcp.errors import ConfigError, InvalidRequest, MlxMcpError, NotOnDisk
from mlx_mcp.hosting.hello import reply
from mlx_mcp.hosting.session_files import is_same_folder
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.reading import value_of
from mlx_mcp.workflows.sandbox.sandbox import Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

TELL_S = 1.0


async def answer_sandbox(
    connection: socket.socket, hello: dict[str, Any], service: Service, sandboxes: Sandboxes, config: Config
) -> None:
    """Do what a hello asks for. It is given up if the client goes away."""
    if not is_same_folder(str(hello.get("folder")), config.store_dir):
        await reply(connection, {"elsewhere": True})
        return
    message: dict[str, Any] = {}
    await reply(connection, {"pid": os.getpid()})
    async with anyio.create_task_group() as tasks:

        async def until_it_goes() -> None:
            with suppress(OSError):
                await asyncio.get_running_loop().sock_recv(connection, 1)
            tasks.cancel_scope.cancel()

        async def tell() -> None:
            while True:
                await anyio.sleep(TELL_S)
                await reply(connection, {"done": 0, "total": 0})

        tasks.start_soon(until_it_goes)
        tasks.start_soon(tell)
        try:
            message = {"result": await done(hello, service, sandboxes)}
        except MlxMcpError as error:
            message = {"error": str(error)}
        tasks.cancel_scope.cancel()
    if message:
        await reply(connection, message)


async def done(hello: dict[str, Any], service: Service, sandboxes: Sandboxes) -> Any:
    """What comes of a request.

    Raises:
        ConfigError: it is not known.
        MlxMcpError: it cannot be done.
    """
    do, name, variable, at = (hello.get(each) for each in ("do", "sandbox", "variable", "at"))
    await sandboxes.ready(service)
    match do:
        case "list":
            return await listed(sandboxes)
        case "get" if isinstance(name, str) and isinstance(variable, str):
            return {"value": await value(sandboxes, name, variable, at or "")}
        case "rm" if isinstance(name, str):
            return await remove(service, sandboxes, name, at)
        case "purge":
            for sandbox in sandboxes.all():
                await sandboxes.close(service, sandbox.owner, [sandbox])
            return await sandboxes.keeping.clear()
    raise ConfigError(f"The engine cannot {str(do)[:80]!r} sandboxes so; `mlx-mcp engine stop` ends it.")


async def listed(sandboxes: Sandboxes) -> list[dict[str, Any]]:
    """All sandboxes and their versions, as JSON; what is not on disk was saved at 0."""
    found = {(head.sandbox_id, head.version): sandbox_as_json(head) for head in await sandboxes.keeping.heads()}
    for sandbox in sandboxes.all():
        now = {
            "sandbox": sandbox.sandbox_id,
            "name": sandbox.name,
            "version": "",
            "variables": dict(sandbox.state.variables),
            "remembered": dict(sandbox.state.remembered),
            "parent": sandbox.parent,
            "runtime": sandbox.state.version,
        }
        unsaved = {"persisted": False, "saved_at": 0.0, "used_at": 0.0}
        found[sandbox.sandbox_id, ""] = unsaved | found.get((sandbox.sandbox_id, ""), {}) | now
    return list(found.values())


def the_one(sandboxes: Sandboxes, sandbox: str) -> Sandbox:
    """The sandbox of that handle or name, of any owner.

    Raises:
        NotOnDisk: there is none.
        InvalidRequest: several have that name.
    """
    found = [each for each in sandboxes.all() if sandbox in (each.sandbox_id, each.name)]
    if not found:
        raise NotOnDisk(sandbox, kind="sandbox")
    if len(found) > 1:
        handles = ", ".join(sorted(each.sandbox_id for each in found))
        raise InvalidRequest(f"{len(found)} sandboxes are named {sandbox[:80]!r}: give one of {handles}.")
    return found[0]


async def value(sandboxes: Sandboxes, name: str, variable: str, version: str) -> Any:
    """The value of a variable, as the latest finished run left it, or as it is in a version.

    Raises:
        MlxMcpError: there is no such sandbox, version or variable, or it cannot be read.
    """
    sandbox = the_one(sandboxes, name)
    return await value_of(await sandboxes.runtime(), await sandboxes.keeping.state_of(sandbox, version), variable)


async def remove(service: Service, sandboxes: Sandboxes, name: str, version: str | None) -> int:
    """Remove a sandbox, or one version of it; returns how many versions went.

    Raises:
        MlxMcpError: there is no such sandbox or version, or it cannot be removed.
    """
    sandbox = the_one(sandboxes, name)
    if version:
        if version not in sandbox.kept.versions:
            raise NotOnDisk(name, version, ("", *sorted(sandbox.kept.versions)), kind="sandbox")
        await sandboxes.keeping.remove_version(service, sandbox, version)
        return 1
    num = 1 + len(sandbox.kept.versions)
    await sandboxes.close(service, sandbox.owner, [sandbox])
    return num
