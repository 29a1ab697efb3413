"""The engine's side of `mlx-mcp sandbox`: one request on each connection.

hello   {"kind": "sandbox", "do": "list" | "get" | "rm", "folder": …, "sandbox": …, "variable": …, "at": version}
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
from mlx_mcp.errors import ConfigError, MlxMcpError
from mlx_mcp.hosting.hello import reply
from mlx_mcp.hosting.session_files import is_same_folder
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

TELL_S = 1.0


async def answer_sandbox(
    connection: socket.socket, hello: dict[str, Any], service: Service, sandboxes: Sandboxes, config: Config
) -> None:
    """Do what a hello asks for. It is given up if the client goes away.

    Raises:
        ConfigError: the request is not known.
    """
    if not is_same_folder(str(hello.get("folder")), config.store_dir):
        await reply(connection, {"elsewhere": True})
        return
    do, sandbox, variable, at = (hello.get(name) for name in ("do", "sandbox", "variable", "at"))

    async def work() -> Any:
        match do:
            case "list":
                return await sandboxes.all_on_disk_and_here()
            case "get" if isinstance(sandbox, str) and isinstance(variable, str):
                return {"value": await sandboxes.value(sandbox, variable, at or "")}
            case "rm" if isinstance(sandbox, str):
                return await sandboxes.remove_for_user(service, sandbox, at)
        raise ConfigError(f"The engine cannot {str(do)[:80]!r} sandboxes so; `mlx-mcp engine stop` ends it.")

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
            message = {"result": await work()}
        except MlxMcpError as error:
            message = {"error": str(error)}
        tasks.cancel_scope.cancel()
    if message:
        await reply(connection, message)
