"""The engine process's side of its socket: one MCP server for each connection, and when the process may end.

Guarantees:
    - Only this user's processes are served: the kernel says who is at the other end.
    - Every connection is a group of callers of its own. However many calls one has, the others are served too.
    - The end of a connection cancels its calls and no others.
    - When this process is to end, it accepts no new connection. Calls that run have `shutdown_timeout_s` to end, and
      each request that was read is answered on the wire, or is named to its relay as one for the next engine.
    - A relay hears from this process every ALIVE_S, however long a step takes.

One event loop serves all connections. No other thread uses anything here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio

from mlx_mcp import __version__
from mlx_mcp.config import Config, refuse_unknown
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.errors import ConfigError, MlxMcpError
from mlx_mcp.hosting.access import access_of
from mlx_mcp.hosting.allowances import limiter_of
from mlx_mcp.hosting.connection import Connection, Serving, serve_listener, serve_window
from mlx_mcp.hosting.hello import receive_hello, reply
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.hosting.lifetime import LAST_ANSWERS_S, drain
from mlx_mcp.hosting.logs import log_generations
from mlx_mcp.hosting.sandbox_files import answer_sandbox
from mlx_mcp.hosting.sandboxes import sandboxes_of
from mlx_mcp.hosting.session_files import SessionFiles
from mlx_mcp.hosting.status import status_of, top_of
from mlx_mcp.hosting.tls import tls_context
from mlx_mcp.hosting.warm import warm_of
from mlx_mcp.process.environment import OF_LISTENER, engine_settings
from mlx_mcp.process.place import peer
from mlx_mcp.service.jobs import Jobs
from mlx_mcp.service.observing import Observer
from mlx_mcp.service.service import Lifecycle, Service
from mlx_mcp.wiring import registry_of

logger = logging.getLogger(__name__)

HELLO_S = 10.0
CHECK_S = 0.25  # how often it is checked whether the process may end


class Connections:
    """Serves all connections with one engine client, until `stop`, or until it was idle for `engine_idle_s`."""

    def __init__(self, client: EngineClient, config: Config, listener: socket.socket) -> None:
        self._client, self._config, self._listener = client, config, listener
        self._path = str(listener.getsockname())
        self._inode = os.stat(self._path).st_ino
        self._settings = engine_settings()
        self._session_files = SessionFiles(client, config)
        self._jobs, self._warm, self._limits = Jobs(config.result_ttl_s), warm_of(config), limiter_of(config)
        self._observer, self._lifecycle = Observer(), Lifecycle(config.ready_step_s)
        self._sandboxes = sandboxes_of(config)
        log_generations(self._observer)
        self._connections: dict[int, Connection] = {}
        self._named: dict[str, ModelSpec] = {}  # the windows' models; other windows may continue sessions of them
        self._http_servers: list[HttpServer] = []
        self._awaiting_exit: list[socket.socket] = []  # their peers wait for the system to close them at the exit
        self._count = 0
        self._began = self._used = time.monotonic()
        self._retiring = ""  # why this process is to end as soon as it is idle; empty if it is not
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Accept no new connection, and end within `shutdown_timeout_s`. Idempotent."""
        if not self._stopping.is_set():
            if self._reachable():
                os.unlink(self._path)
            self._lifecycle.draining = True
            self._stopping.set()

    async def serve(self, ending: Callable[[], None]) -> None:
        """Serve until the end. `ending` is called when the end begins."""
        async with anyio.create_task_group() as tasks:
            accepting = anyio.CancelScope()

            async def accept() -> None:
                with accepting:
                    loop = asyncio.get_running_loop()
                    while True:
                        try:
                            connection, _ = await loop.sock_accept(self._listener)
                        except OSError:  # out of descriptors
                            logger.exception("a connection could not be accepted")
                            await anyio.sleep(CHECK_S)
                        else:
                            tasks.start_soon(self._receive, connection)

            async def watch() -> None:
                while not self._stopping.is_set():
                    with anyio.move_on_after(CHECK_S):
                        await self._stopping.wait()
                    self._check_end()

            tasks.start_soon(accept)
            await watch()
            ending()
            accepting.cancel()
            for server in self._http_servers:
                server.stop_accepting()
            for connection in self._connections.values():
                if connection.takes_notices:
                    connection.requests.return_others()
            activities = [connection.activity for connection in self._connections.values()] + [self._jobs.activity]
            await drain(lambda: self._busy, activities, self._config.shutdown_timeout_s)
            for server in self._http_servers:
                server.hang_up()
            await drain(lambda: bool(self._http_servers), (), LAST_ANSWERS_S)
            tasks.cancel_scope.cancel()
        await self._sandboxes.end()
        self._listener.close()

    @property
    def _busy(self) -> bool:
        windows = any(connection.busy for connection in self._connections.values())
        return (
            windows or self._jobs.busy or self._session_files.busy or any(server.busy for server in self._http_servers)
        )

    def _note_use(self) -> None:
        self._used = time.monotonic()

    def _may_end(self) -> bool:
        """Whether nothing is lost with this process.

        No call or job runs, each result was fetched, and no open window has a session or a sandbox only in memory.
        """
        sessions = list(self._client.thread.sessions.values())
        in_memory_only = bool(self._connections) and (
            any(not info.persisted for info in sessions) or self._sandboxes.num_in_memory_only > 0
        )
        return not self._busy and not self._jobs.num_unfetched and not in_memory_only

    def _reachable(self) -> bool:
        """Whether our socket is still in its place."""
        with suppress(FileNotFoundError):
            return os.lstat(self._path).st_ino == self._inode
        return False

    def _check_end(self) -> None:
        """Stop if the process was idle for long enough, or is idle and is to be replaced by another."""
        now = time.monotonic()
        if self._client.thread.dead is not None:  # another process can do what this one cannot
            logger.warning("ending: %s", self._client.thread.dead)
            self.stop()
            return
        if not self._retiring and not self._reachable():
            self._retiring = "its socket was taken away"
        if not self._may_end():
            self._used = now
        elif self._retiring:
            logger.warning("ending: %s", self._retiring)
            self.stop()
        elif now - self._used > self._config.engine_idle_s:
            logger.warning("ending: nothing was to do for %g s", self._config.engine_idle_s)
            self.stop()

    # Connections

    async def _receive(self, connection: socket.socket) -> None:
        """Receive the hello of a connection and answer it. An error in one connection concerns no other."""
        fds: list[int] = []
        try:
            connection.setblocking(False)
            pid, uid = peer(connection)
            if uid != os.geteuid():
                logger.warning("refused process %d of user %d", pid, uid)
                await reply(
                    connection,
                    {"error": "This is another user's engine. Set MLX_MCP_STATE_DIR to a folder of your own."},
                )
                return
            with anyio.fail_after(HELLO_S):
                hello = await receive_hello(connection, fds)
            if hello is not None:
                await self._answer_hello(connection, hello, fds, pid)
        except MlxMcpError as error:
            with suppress(OSError):
                await reply(connection, {"error": str(error)})
        except (OSError, TimeoutError):  # it went away, or never sent a hello
            pass
        except Exception:  # a fault in one connection must not end the process of all others
            logger.exception("a connection failed")
        finally:
            if connection not in self._awaiting_exit:
                connection.close()
            for fd in fds:  # those that nobody has taken over
                os.close(fd)

    async def _answer_hello(self, connection: socket.socket, hello: dict[str, Any], fds: list[int], pid: int) -> None:
        kind = hello.get("kind")
        if kind == "status":
            connections, began = self._connections.values(), self._began
            await reply(connection, status_of(self._client, connections, self._jobs, began, self._retiring))
        elif kind == "top":
            await reply(connection, top_of(self._service(self._client, self._client.registry), self._retiring))
        elif kind == "stop":
            self.stop()
            self._awaiting_exit.append(connection)
            await reply(connection, {"pid": os.getpid()})
        elif kind == "sessions":
            if not self._stopping.is_set():  # else no reply: it waits for the end, and does it itself
                await self._session_files.answer(connection, hello, fds)
        elif kind == "sandbox":
            if not self._stopping.is_set():
                service = self._service(self._client, self._client.registry)
                await answer_sandbox(connection, hello, service, self._sandboxes, self._config)
        elif kind in ("stdio", "http") and isinstance(hello.get("version"), str):
            if self._stopping.is_set():
                return  # no reply: it starts another
            if hello["version"] == __version__:  # another one may have other settings
                refuse_unknown(hello.get("settings") or {})
            notes, leaving = self._compare(hello)
            if leaving:
                self.stop()
                await reply(connection, {"leaving": leaving})
                return
            self._count += 1
            joined = Connection(self._count, kind, pid, hello, connection)
            own, service = self._view(joined)
            joined.model = service.registry.resolve(None).name
            self._connections[joined.number] = joined
            self._note_use()
            try:
                told = {"pid": os.getpid(), "model": joined.model, "notes": notes}
                await reply(connection, told | {"silence_s": self._config.engine_silence_s})
                serving = Serving(own, service, self._config, self._sandboxes, self._note_use)
                if kind == "stdio":
                    await serve_window(joined, serving, self._stopping)
                else:
                    await serve_listener(joined, fds, serving, self._http_servers)
            finally:
                del self._connections[joined.number]
                self._note_use()
        else:
            raise ConfigError(f"The engine ({__version__}) knows no {kind!r}; `mlx-mcp engine stop` ends it.")

    def _compare(self, hello: dict[str, Any]) -> tuple[list[str], str]:
        """What to tell a window of another version or other settings; and why this process ends for it, if it does.

        Another version replaces this one as soon as nothing is lost by that. The settings of the first window are valid
        as long as any window is there.
        """
        if hello.get("again"):  # it was told before, or is older than this process
            return [], ""
        theirs, mine = hello.get("settings") or {}, self._settings
        names = ", ".join(sorted(name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name)))
        if hello.get("version") != __version__:
            why = f"the engine of version {__version__} makes room for {hello.get('version')}"
            if self._may_end():
                return [], f"{why}."
            self._retiring = why
            return [f"Joined the running engine; {why} as soon as it is idle."], ""
        if names and not self._connections and not self._client.thread.sessions:
            return [], f"the engine is started again for other settings: {names}."
        if names:
            return [
                f"Joined the running engine, whose settings are not the same: {names}. They are those of the window "
                "that started it; `mlx-mcp engine stop` has it started with yours."
            ], ""
        return [], ""

    def _view(self, joined: Connection) -> tuple[Config, Service]:
        """A connection's settings, and the service for it: with its default model, as a group of callers of its own.

        Raises:
            ConfigError: its settings are invalid, or its model's name means another model here.
        """
        names = ("model", "file_roots", "wait_s", *OF_LISTENER)
        config = Config.load(**{name: joined.hello.get(name) for name in names})
        if joined.kind == "http":
            access_of(config)  # which refuses to serve others without a token
            tls_context(config)
        registry = registry_of(config, self._named)
        spec = registry.resolve(None)
        known = self._named.setdefault(spec.name, spec)
        if known.location != spec.location:
            raise ConfigError(
                f"The running engine knows another folder as {spec.name!r}: {known.location}. Rename one of the two, "
                "or serve with --standalone."
            )
        client = self._client.for_connection(registry, str(joined.number))
        return config, self._service(client, registry)

    def _service(self, client: EngineClient, registry: Any) -> Service:
        """The service for a client of the engine."""
        jobs, warm, limits, observer = self._jobs, self._warm, self._limits, self._observer
        return Service(client, registry, jobs, warm, limits, observer=observer, lifecycle=self._lifecycle)
