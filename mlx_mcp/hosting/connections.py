"""The engine process's side of its socket: who connects, one MCP server for each, and when the process may end.

Guarantees:
    - Only this user's processes are heard: the kernel says who is at the other end.
    - Every connection is a group of callers of its own: however many calls one has, the others get their turns.
    - The end of a connection cancels its calls and no others.
    - When this process is to end, nobody new is taken on. Calls that run have `shutdown_timeout_s` to end, and each
      request that was read is answered on the wire, or is named to its relay as one for the next engine.
    - A relay hears from this process every ALIVE_S, however long a step takes.

One event loop serves all connections; nothing here is touched by another thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from mcp_types import CLIENT_INFO_META_KEY, JSONRPCMessage
from starlette.types import Receive, Scope, Send

from mlx_mcp import __version__
from mlx_mcp.api.http.app import http_app
from mlx_mcp.api.http.token import auth_settings
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config, refuse_unknown
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.errors import ConfigError, MlxMcpError
from mlx_mcp.hosting.http import HttpServer, end
from mlx_mcp.hosting.lifetime import CUT_OFF_S, let_end
from mlx_mcp.hosting.session_files import SessionFiles
from mlx_mcp.hosting.stdio import OpenRequests, StreamLines, serve_lines
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.daemon import engine_settings
from mlx_mcp.process.lines import ALIVE, ALIVE_S, ENDING, notice
from mlx_mcp.process.place import peer
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service

logger = logging.getLogger(__name__)

HELLO_S = 10.0
MAX_HELLO_BYTES = 1 << 16
CLOSE_S = 2.0
LOOK_S = 0.25  # how often is looked whether the process may end


@dataclass(eq=False)
class Connection:
    """A window or a listener."""

    number: int
    kind: str  # "stdio" or "http"
    pid: int
    hello: dict[str, Any]
    model: str = ""
    host: str = ""  # the client's name, as it says itself
    since: float = field(default_factory=time.monotonic)
    activity: Activity = field(default_factory=Activity)
    requests: OpenRequests = field(default_factory=OpenRequests)  # of a window

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""
        return self.requests.waiting or self.activity.busy

    @property
    def takes_notices(self) -> bool:
        """Whether it knows what is not for its host."""
        return bool(self.hello.get("notices"))


class Connections:
    """Serves whoever connects on one engine client, until `stop` or until nothing was to do for `engine_idle_s`."""

    def __init__(self, client: EngineClient, config: Config, listener: socket.socket) -> None:
        self._client, self._config, self._listener = client, config, listener
        self._path = str(listener.getsockname())
        self._inode = os.stat(self._path).st_ino
        self._settings = engine_settings()
        self._session_files = SessionFiles(client, config, reply)
        self._connections: dict[int, Connection] = {}
        self._named: dict[str, ModelSpec] = {}  # the windows' models, which sessions may be taken up with by others
        self._https: list[HttpServer] = []
        self._until_the_end: list[socket.socket] = []  # of those who wait for the system to close them
        self._count = 0
        self._began = self._used = time.monotonic()
        self._retiring = ""  # why this process ends once it has nothing to do
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Take on nobody new, and end within `shutdown_timeout_s`. Idempotent."""
        if not self._stopping.is_set():
            if self._reachable():
                os.unlink(self._path)
            self._stopping.set()

    async def serve(self, ending: Callable[[], None]) -> None:
        """Serve until the end; `ending` is called when it begins."""
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
                            await anyio.sleep(LOOK_S)
                        else:
                            tasks.start_soon(self._meet, connection)

            async def watch() -> None:
                while not self._stopping.is_set():
                    with anyio.move_on_after(LOOK_S):
                        await self._stopping.wait()
                    self._look()

            tasks.start_soon(accept)
            await watch()
            ending()
            accepting.cancel()
            for server in self._https:
                server.stop_accepting()
            for connection in self._connections.values():
                if connection.takes_notices:
                    connection.requests.return_others()
            activities = [connection.activity for connection in self._connections.values()]
            await let_end(lambda: self._busy, activities, self._config.shutdown_timeout_s)
            for server in self._https:
                server.hang_up()
            await let_end(lambda: bool(self._https), (), CUT_OFF_S)
            tasks.cancel_scope.cancel()
        self._listener.close()

    @property
    def _busy(self) -> bool:
        windows = any(connection.busy for connection in self._connections.values())
        return windows or self._session_files.busy or any(server.busy for server in self._https)

    def _may_end(self) -> bool:
        """Whether nobody would miss this process: no call runs, and no open window has a session that ends with it."""
        sessions = list(self._client.thread.sessions.values())
        return not self._busy and not (self._connections and any(not info.persisted for info in sessions))

    def _reachable(self) -> bool:
        """Whether our socket is where others look for it."""
        with suppress(FileNotFoundError):
            return os.lstat(self._path).st_ino == self._inode
        return False

    def _look(self) -> None:
        """End the process if it is idle for long enough, or only waits for that to make room for another."""
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

    # Those who connect

    async def _meet(self, connection: socket.socket) -> None:
        """Hear who it is and what it wants; a fault of one connection is no other's."""
        fds: list[int] = []
        try:
            connection.setblocking(False)
            pid, uid = peer(connection)
            if uid != os.geteuid():
                logger.warning("refused process %d of user %d", pid, uid)
                await reply(connection, {"error": "This is another user's engine."})
                return
            with anyio.fail_after(HELLO_S):
                hello = await receive_hello(connection, fds)
            if hello is not None:
                await self._welcome(connection, hello, fds, pid)
        except MlxMcpError as error:
            with suppress(OSError):
                await reply(connection, {"error": str(error)})
        except (OSError, TimeoutError):  # it went away, or never said anything
            pass
        except Exception:
            logger.exception("a connection failed")
        finally:
            if connection not in self._until_the_end:
                connection.close()
            for fd in fds:  # that nobody took
                os.close(fd)

    async def _welcome(self, connection: socket.socket, hello: dict[str, Any], fds: list[int], pid: int) -> None:
        kind = hello.get("kind")
        if kind == "status":
            await reply(connection, self._status())
        elif kind == "stop":
            self.stop()
            self._until_the_end.append(connection)
            await reply(connection, {"pid": os.getpid()})
        elif kind == "sessions":
            if not self._stopping.is_set():  # else no reply: it waits for the end, and does it itself
                await self._session_files.answer(connection, hello, fds)
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
            joined = Connection(self._count, kind, pid, hello)
            config, service = self._view(joined)
            joined.model = service.registry.resolve(None).name
            self._connections[joined.number] = joined
            self._used = time.monotonic()
            try:
                told = {"pid": os.getpid(), "model": joined.model, "notes": notes}
                await reply(connection, told | {"silence_s": self._config.engine_silence_s})
                if kind == "stdio":
                    await self._serve_window(connection, joined, config, service)
                else:
                    await self._serve_http(connection, fds, joined, config, service)
            finally:
                del self._connections[joined.number]
                self._used = time.monotonic()
        else:
            raise ConfigError(f"The engine ({__version__}) knows no {kind!r}; `mlx-mcp engine stop` ends it.")

    def _compare(self, hello: dict[str, Any]) -> tuple[list[str], str]:
        """What to tell one whose version or settings are others, and why this process gives way to it at once, if so.

        Another version is to serve as soon as nobody would miss this one. Settings are those of whoever came first,
        as long as anyone is there.
        """
        if hello.get("again"):  # it has told us before, or has served for longer than this process
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
        """The engine as a connection sees it: with its own default model, as a group of callers of its own.

        Raises:
            ConfigError: its settings cannot work, or its model's name stands for another one here.
        """
        names = ("model", "file_roots", "host", "port", "token", "allowed_hosts", "allowed_origins")
        config = Config.load(**{name: joined.hello.get(name) for name in names})
        registry = Registry(config.model, named=self._named)
        spec = registry.resolve(None)
        known = self._named.setdefault(spec.name, spec)
        if known.location != spec.location:
            raise ConfigError(
                f"The running engine knows another folder as {spec.name!r}: {known.location}. Rename one of the two, "
                "or serve with --standalone."
            )
        return config, Service(self._client.beside(registry, str(joined.number)), registry)

    async def _serve_window(
        self, connection: socket.socket, joined: Connection, config: Config, service: Service
    ) -> None:
        """Serve one host's lines until its end."""
        folder = joined.hello.get("folder")
        files = FileReader.of_window(config.file_roots, folder, config.max_file_bytes, config.max_files_bytes)
        server = build_server(service, files, joined.activity)
        lines, stream = await asyncio.open_connection(sock=connection)

        async def write(data: bytes) -> None:
            stream.write(data)
            await stream.drain()

        def seen(message: JSONRPCMessage) -> None:
            self._used = time.monotonic()
            joined.host = joined.host or client_name(message)

        async def show_life() -> None:
            while True:
                await anyio.sleep(ALIVE_S)
                if not stream.transport.get_write_buffer_size():  # else there is enough to read
                    stream.write(notice(ALIVE))

        try:
            limit = self._config.max_request_bytes
            async with anyio.create_task_group() as tasks:
                if joined.takes_notices:
                    tasks.start_soon(show_life)
                await serve_lines(server, StreamLines(lines, limit).next, write, limit, joined.requests, seen)
                tasks.cancel_scope.cancel()
        finally:
            if joined.takes_notices and self._stopping.is_set():
                requests = joined.requests
                stream.write(notice(ENDING, num_read=requests.num_read, returned=requests.returned))
            stream.close()
            # What was said last is on its way still; but nobody is waited for who does not read.
            with anyio.move_on_after(CLOSE_S, shield=True), suppress(OSError):
                await stream.wait_closed()
            stream.transport.abort()

    async def _serve_http(
        self,
        connection: socket.socket,
        fds: list[int],
        joined: Connection,
        config: Config,
        service: Service,
    ) -> None:
        """Serve HTTP on a listening socket that came with the hello, until the connection that brought it ends."""
        if len(fds) != 1:
            raise ConfigError("A listener comes with one socket.")
        listener = socket.socket(joined.hello["family"], socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=fds.pop())
        listener.setblocking(False)
        files = FileReader(config.file_roots or (), config.max_file_bytes, config.max_files_bytes)
        mcp = build_server(service, files, joined.activity, **auth_settings(config))
        app = http_app(mcp, service, config)

        async def used(scope: Scope, receive: Receive, send: Send) -> None:
            self._used = time.monotonic()
            await app(scope, receive, send)

        server = HttpServer(used, config)
        self._https.append(server)
        try:
            async with anyio.create_task_group() as tasks:

                async def until_closed() -> None:
                    with suppress(OSError):
                        await asyncio.get_running_loop().sock_recv(connection, 1)
                    await end(server, joined.activity, self._config.shutdown_timeout_s)

                async def show_life() -> None:
                    with suppress(OSError):
                        while True:
                            await anyio.sleep(ALIVE_S)
                            await asyncio.get_running_loop().sock_sendall(connection, notice(ALIVE))

                tasks.start_soon(until_closed)
                if joined.takes_notices:
                    tasks.start_soon(show_life)
                await server.serve(sockets=[listener])
                tasks.cancel_scope.cancel()
        finally:
            self._https.remove(server)
            listener.close()

    def _status(self) -> dict[str, Any]:
        """What `mlx-mcp engine status` shows."""
        stats, sessions = self._client.stats, self._client.thread.sessions
        now = time.monotonic()

        def shown(joined: Connection) -> dict[str, Any]:
            calls = list(joined.activity.calls.values())
            running = min(len(calls), stats.groups.get(str(joined.number), 0))
            waiting = [call for call in calls if call.phase not in ("prefill", "decode")]
            held = [sessions[handle] for handle in joined.activity.sessions if handle in sessions]
            return {
                "number": joined.number,
                "kind": joined.kind,
                "pid": joined.pid,
                "parent": joined.hello.get("parent"),
                "host": joined.host or joined.hello.get("address") or "",
                "folder": joined.hello.get("folder") or "",
                "model": joined.model,
                "since_s": now - joined.since,
                "running": running,
                "waiting": len(calls) - running,
                "waits_for": next((call.line or call.phase for call in waiting), "") if running < len(calls) else "",
                "sessions": [session.name or session.session_id for session in held],
            }

        return {
            "pid": os.getpid(),
            "version": __version__,
            "up_s": now - self._began,
            "retiring": self._retiring,
            "step_s": self._client.thread.step_s,
            "models": list(stats.models),
            "weights_bytes": stats.weights_bytes,
            "kv_bytes": stats.kv_bytes,
            "cache_bytes": stats.cache_bytes,
            "rows": stats.rows,
            "waiting": stats.waiting,
            "sessions": stats.sessions,
            "connections": [shown(joined) for joined in self._connections.values()],
        }


async def receive_hello(connection: socket.socket, fds: list[int]) -> dict[str, Any] | None:
    """The first line of a connection; None if it only looked whether we listen. Descriptors that come go to `fds`.

    Raises:
        ConfigError: it is no hello.
    """
    loop, line = asyncio.get_running_loop(), b""
    while not line.endswith(b"\n"):
        await readable(loop, connection)
        data, more, _, _ = socket.recv_fds(connection, MAX_HELLO_BYTES, 1)
        fds += more
        line += data
        if not data and not line:
            return None
        if not data or len(line) > MAX_HELLO_BYTES:
            break
    try:
        hello = json.loads(line)
    except ValueError:
        hello = None
    if not isinstance(hello, dict):
        raise ConfigError("The engine was not greeted right; connect with `mlx-mcp serve`.")
    return hello


async def readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    """Wait until there is something to read."""
    ready: asyncio.Future[None] = loop.create_future()

    def set_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, set_readable)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


async def reply(connection: socket.socket, message: dict[str, Any]) -> None:
    """Answer a hello."""
    await asyncio.get_running_loop().sock_sendall(connection, json.dumps(message).encode() + b"\n")


def client_name(message: JSONRPCMessage) -> str:
    """Who the client of a message says it is: in its `initialize`, or in any request of the newer era."""
    params: Any = getattr(message, "params", None) or {}
    with suppress(AttributeError, TypeError):
        told = params.get("clientInfo") or (params.get("_meta") or {}).get(CLIENT_INFO_META_KEY) or {}
        return f"{told.get('name', '')} {told.get('version', '')}".strip()[:80]
    return ""
