"""What `serve` and the engine process do, from settings to the end.

Each function builds what one kind of process serves; `run` is the life cycle of all of them. `say` shows a line to
whoever started the process. Imports little at the top: a host waits three seconds for the first answer of `serve`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from mlx_mcp import __version__

if TYPE_CHECKING:
    import socket

    import anyio

    from mlx_mcp.config import Config
    from mlx_mcp.engine.client import EngineClient
    from mlx_mcp.process.awake import KeepAwake

Say = Callable[[str], None]


def share_http(model: str | None, given: dict[str, Any], openblas: bool | None, say: Say) -> None:
    """Have the user's engine serve HTTP until a signal comes; `given` are settings of the listener.

    Raises:
        NoSharedEngine: there can be no engine process here.
    """
    from mlx_mcp.config import Config
    from mlx_mcp.hosting.access import access_of
    from mlx_mcp.hosting.tls import tls_context
    from mlx_mcp.process.environment import OF_LISTENER, window_hello
    from mlx_mcp.process.listener import hold, listen
    from mlx_mcp.process.place import user_place

    if openblas is not None:
        os.environ["MLX_MCP_OPENBLAS"] = "1" if openblas else "0"
    place, config = user_place(), Config.load(model=model, **given)
    access_of(config)
    tls_context(config)
    listener = listen(config.host, config.port)
    address = address_of(config, listener)
    own = {name: getattr(config, name) for name in OF_LISTENER}
    own["token"] = None if config.token is None else config.token.get_secret_value()
    for name in ("tls_cert", "tls_key"):  # the engine runs in another folder
        own[name] = None if own[name] is None else str(own[name].absolute())
    hello = window_hello("http", model) | own | {"address": address}

    def serving(reply: dict[str, object]) -> None:
        say(f"mlx-mcp {__version__} serving {reply['model']!r} at {address}/mcp")

    hold(place, hello, listener, lambda text: say(f"mlx-mcp: {text}"), serving, end_s(config))


def address_of(config: Config, listener: socket.socket) -> str:
    """The URL of a listener."""
    host, scheme = config.host, "http" if config.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def end_s(config: Config) -> float:
    """How many seconds a process may take to end: for its calls, their answers, and what the engine still writes."""
    return 2 * config.shutdown_timeout_s + 5


def run(
    config: Config,
    client: EngineClient,
    serve: Callable[[], Awaitable[None]],
    stop: Callable[[anyio.CancelScope], Awaitable[None]],
) -> None:
    """Serve until `serve` returns, or until a signal comes, on which `stop` is awaited; then close the engine.

    From the signal on, or from the end of `serve`, the process ends within `end_s`.
    """
    import anyio

    from mlx_mcp.hosting.lifetime import exit_within, run_until_signal
    from mlx_mcp.process.awake import KeepAwake, keeps_awake

    async def stop_in_time(scope: anyio.CancelScope) -> None:
        exit_within(end_s(config))
        await stop(scope)

    awake = KeepAwake() if keeps_awake(config.keep_awake) else None

    async def serve_awake() -> None:
        async with anyio.create_task_group() as tasks:
            if awake is not None:
                tasks.start_soon(keep_awake, awake, client)
            await serve()
            tasks.cancel_scope.cancel()

    try:
        anyio.run(run_until_signal, serve_awake, stop_in_time)
    finally:
        if awake is not None:
            awake.end()
    exit_within(end_s(config))
    client.close(config.shutdown_timeout_s)


async def keep_awake(awake: KeepAwake, client: EngineClient) -> None:
    """Keep the machine awake while calls run or wait, or weights are read; ends when it is cancelled."""
    import anyio

    from mlx_mcp.process.awake import LOOK_S

    while True:
        stats = client.stats
        awake.look(bool(stats.running or stats.waiting or stats.loading))
        await anyio.sleep(LOOK_S)


def serve_stdio(config: Config) -> None:
    """Serve one host over stdin and stdout in this process until it goes away or a signal comes."""
    from mlx_mcp.hosting.open_requests import OpenRequests
    from mlx_mcp.hosting.stdio import serve_stdio, take_stdio

    wire_in, wire_out = take_stdio()

    from mlx_mcp.api.mcp.server import build_server
    from mlx_mcp.hosting.allowances import limiter_of
    from mlx_mcp.hosting.lifetime import drain
    from mlx_mcp.hosting.logs import configure_logs, log_generations
    from mlx_mcp.hosting.sandboxes import sandboxes_of
    from mlx_mcp.hosting.traces import export_traces
    from mlx_mcp.hosting.warm import warm_of
    from mlx_mcp.process.place import project_folder
    from mlx_mcp.service.activity import Activity
    from mlx_mcp.service.files import FileReader
    from mlx_mcp.service.jobs import Jobs
    from mlx_mcp.service.service import Service
    from mlx_mcp.wiring import wire
    from mlx_mcp.workflows.sandbox.sandboxes import closing

    configure_logs(config)
    export_traces(config)
    client, registry = wire(config)
    files = FileReader.of_window(config.file_roots, project_folder(), *config.file_limits)
    activity, requests = Activity(), OpenRequests()
    service = Service(client, registry, Jobs(config.result_ttl_s), warm_of(config), limiter_of(config))
    log_generations(service.observer)
    sandboxes = sandboxes_of(config)
    server = build_server(service, files, activity, config.wait_s, sandboxes=sandboxes)

    async def stop(scope: anyio.CancelScope) -> None:
        activity.closed = True
        await drain(lambda: requests.waiting, [activity, service.jobs.activity], config.shutdown_timeout_s)
        scope.cancel()

    async def serve() -> None:
        async with closing(sandboxes):
            await serve_stdio(server, wire_in, wire_out, config.max_request_bytes, requests)

    run(config, client, serve, stop)


def serve_http(config: Config, say: Say) -> None:
    """Serve any number of hosts over HTTP in this process until a signal comes."""
    from mlx_mcp.hosting.access import access_of
    from mlx_mcp.hosting.allowances import limiter_of
    from mlx_mcp.hosting.faces import web_app
    from mlx_mcp.hosting.http import HttpServer, drain_http
    from mlx_mcp.hosting.logs import configure_logs, log_generations
    from mlx_mcp.hosting.sandboxes import sandboxes_of
    from mlx_mcp.hosting.traces import export_traces
    from mlx_mcp.hosting.warm import warm_of
    from mlx_mcp.process.listener import listen
    from mlx_mcp.service.activity import Activity
    from mlx_mcp.service.jobs import Jobs
    from mlx_mcp.service.service import Lifecycle, Service
    from mlx_mcp.wiring import wire
    from mlx_mcp.workflows.sandbox.sandboxes import closing

    access_of(config)
    configure_logs(config)
    export_traces(config)
    listener = listen(config.host, config.port)
    client, registry = wire(config, say=lambda line: say(f"mlx-mcp: {line}"))
    activity = Activity()
    lifecycle = Lifecycle(config.ready_step_s)
    jobs, limits = Jobs(config.result_ttl_s), limiter_of(config)
    service = Service(client, registry, jobs, warm_of(config), limits, lifecycle=lifecycle)
    log_generations(service.observer)
    sandboxes = sandboxes_of(config)
    server = HttpServer(web_app(service, activity, config, sandboxes=sandboxes), config)
    address = address_of(config, listener)
    say(f"mlx-mcp {__version__} serving {registry.resolve(None).name!r} at {address}/mcp")

    async def stop(_: anyio.CancelScope) -> None:
        lifecycle.draining = True
        await drain_http(server, activity, config.shutdown_timeout_s)

    async def serve() -> None:
        async with closing(sandboxes):
            await server.serve(sockets=[listener])

    run(config, client, serve, stop)


def serve_engine(config: Config, listener: socket.socket, log: str | None, ready_fd: int | None, say: Say) -> None:
    """Serve all connections to the user's socket, until a signal comes or it was idle for long enough.

    `log` is the file that stderr goes to, if it does.
    """
    import contextlib

    from mlx_mcp.hosting.connections import Connections
    from mlx_mcp.hosting.lifetime import exit_within
    from mlx_mcp.hosting.logs import configure_logs
    from mlx_mcp.hosting.traces import export_traces
    from mlx_mcp.process import endings
    from mlx_mcp.process.place import user_place
    from mlx_mcp.wiring import wire

    configure_logs(config, log)
    export_traces(config)
    place = user_place()
    share = endings.begin(place)
    client, _ = wire(config, share, lambda line: say(f"mlx-mcp: {line}"))
    connections = Connections(client, config, listener)
    if share < 1:
        say(f"mlx-mcp: {endings.told(place)}")
        proof = threading.Timer(endings.PROVEN_S, endings.prove, (place,))
        proof.daemon = True
        proof.start()

    async def serve() -> None:
        say(f"mlx-mcp: process {os.getpid()} of version {__version__} listens at {listener.getsockname()}")
        if ready_fd is not None:
            with contextlib.suppress(BrokenPipeError):  # whoever started us has gone; others will come
                os.write(ready_fd, b"ready")
            os.close(ready_fd)
        await connections.serve(lambda: exit_within(end_s(config)))

    async def stop(_: anyio.CancelScope) -> None:
        connections.stop()

    run(config, client, serve, stop)
    endings.end(place)
