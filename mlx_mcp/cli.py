"""The command line: flags → Config → wiring. The only file that sees every layer.

Imports little at the top: a host waits three seconds for the first answer of `serve`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from mlx_mcp import __version__
from mlx_mcp.cli_sessions import sessions
from mlx_mcp.errors import InvalidRequest, MlxMcpError, NoSharedEngine

if TYPE_CHECKING:
    import socket

    import anyio

    from mlx_mcp.config import Config

P = ParamSpec("P")
ANSWER_S = 0.1  # how long the last answers may take from a tool's end to the wire

app = typer.Typer(
    name="mlx-mcp",
    help="Local MLX language models for agent hosts, over MCP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

engine = typer.Typer(help="The one engine process that all windows share.", no_args_is_help=True)
app.add_typer(engine, name="engine")

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="`embedded`, a folder, or a hub id. The embedded model if nothing is set."),
]
OpenBlas = Annotated[
    bool | None,
    typer.Option("--openblas/--no-openblas", help="Use an installed OpenBLAS on Linux CPUs (default: yes)."),
]


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Show this package's errors as one line and exit with 2."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except MlxMcpError as error:
            typer.echo(f"mlx-mcp: {error}", err=True)
            raise typer.Exit(2) from error

    return run


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Local MLX language models for agent hosts, over MCP."""
    if show:
        typer.echo(f"mlx-mcp {__version__}")
        raise typer.Exit


@app.command()
@reporting_errors
def serve(
    model: Model = None,
    http: Annotated[bool, typer.Option("--http", help="Serve streamable HTTP at /mcp instead of stdio.")] = False,
    host: Annotated[str | None, typer.Option(help="Address for --http; 127.0.0.1 if not given.")] = None,
    port: Annotated[int | None, typer.Option(help="Port for --http; 8080 if not given, 0 for a free one.")] = None,
    openblas: OpenBlas = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Keep the engine in this process, and share it with nobody.")
    ] = False,
) -> None:
    """Serve MCP over stdio (for hosts that start it) or HTTP (for hosts that connect), on one engine for all."""
    if not http and (host or port is not None):
        raise InvalidRequest("--host and --port go with --http; over stdio there is nothing to connect to.")
    if not standalone:
        try:
            if http:
                share_http(model, host, port, openblas)
            else:
                from mlx_mcp.process.relay import serve

                serve(model, openblas)
            return
        except NoSharedEngine as error:
            note(f"No engine can be shared here, since {error}; serving in this process alone, as with --standalone.")
    from mlx_mcp.config import Config

    config = Config.load(model=model, host=host, port=port, openblas=openblas)
    (serve_http if http else serve_stdio)(config)


def note(text: str) -> None:
    """Tell the user something beside the output."""
    typer.echo(f"mlx-mcp: {text}", err=True)


def share_http(model: str | None, host: str | None, port: int | None, openblas: bool | None) -> None:
    """Have the user's engine serve HTTP until a signal comes.

    Raises:
        NoSharedEngine: there can be no such process here.
    """
    from mlx_mcp.config import Config
    from mlx_mcp.process.daemon import window
    from mlx_mcp.process.listener import hold, listen
    from mlx_mcp.process.place import user_place

    if openblas is not None:
        os.environ["MLX_MCP_OPENBLAS"] = "1" if openblas else "0"
    place, config = user_place(), Config.load(model=model, host=host, port=port)
    listener = listen(config.host, config.port)
    address = address_of(config.host, listener)
    token = None if config.token is None else config.token.get_secret_value()
    own = {name: getattr(config, name) for name in ("host", "port", "allowed_hosts", "allowed_origins")}
    hello = window("http", model) | own | {"token": token, "address": address}

    def serving(reply: dict[str, object]) -> None:
        typer.echo(f"mlx-mcp {__version__} serving {reply['model']!r} at {address}/mcp", err=True)

    hold(place, hello, listener, note, serving, 2 * config.shutdown_timeout_s + 1)


def address_of(host: str, listener: socket.socket) -> str:
    """The URL of a listener."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def serve_stdio(config: Config) -> None:
    """Serve one host over stdin and stdout in this process until it goes away or a signal comes."""
    from mlx_mcp.server.stdio import serve_stdio, take_stdio

    wire_in, wire_out = take_stdio()

    import anyio

    from mlx_mcp.process.place import project_folder
    from mlx_mcp.server.app import build_server
    from mlx_mcp.server.files import FileReader
    from mlx_mcp.server.lifetime import exit_within, until_signal
    from mlx_mcp.wiring import wire

    client, registry = wire(config)
    files = FileReader.of_window(config.file_roots, project_folder(), config.max_file_bytes, config.max_files_bytes)
    server = build_server(client, registry, files)

    async def main() -> None:
        async def stop(scope: anyio.CancelScope) -> None:
            exit_within(3 * config.shutdown_timeout_s + 1)
            await client.drain(config.shutdown_timeout_s)
            await anyio.sleep(ANSWER_S)
            scope.cancel()

        await until_signal(lambda: serve_stdio(server, wire_in, wire_out, config.max_request_bytes), stop)

    anyio.run(main)
    exit_within(2 * config.shutdown_timeout_s + 1)
    client.close(config.shutdown_timeout_s)


def serve_http(config: Config) -> None:
    """Serve any number of hosts over HTTP in this process until a signal comes."""
    import anyio

    from mlx_mcp.process.listener import listen
    from mlx_mcp.server.app import build_server
    from mlx_mcp.server.files import FileReader
    from mlx_mcp.server.http import auth_settings, http_app, http_server
    from mlx_mcp.server.lifetime import exit_within, until_signal
    from mlx_mcp.wiring import wire

    listener = listen(config.host, config.port)
    client, registry = wire(config)
    files = FileReader(config.file_roots or (), config.max_file_bytes, config.max_files_bytes)
    mcp = build_server(client, registry, files, **auth_settings(config))
    server = http_server(http_app(mcp, client, config), config)
    address = address_of(config.host, listener)
    typer.echo(f"mlx-mcp {__version__} serving {registry.resolve(None).name!r} at {address}/mcp", err=True)

    async def main() -> None:
        async def stop(_: anyio.CancelScope) -> None:
            exit_within(3 * config.shutdown_timeout_s + 1)
            server.should_exit = True
            await client.drain(config.shutdown_timeout_s)

        await until_signal(lambda: server.serve(sockets=[listener]), stop)

    anyio.run(main)
    client.close(config.shutdown_timeout_s)


@engine.command()
@reporting_errors
def start() -> None:
    """Start the engine process, if it does not run; `serve` does that by itself."""
    from mlx_mcp.process.daemon import start_if_needed
    from mlx_mcp.process.place import user_place

    typer.echo(f"The engine is process {start_if_needed(user_place())}.")


@engine.command()
@reporting_errors
def stop() -> None:
    """End the engine process; running calls have shutdown_timeout_s to end. The next call of a window starts one."""
    from mlx_mcp.config import Config
    from mlx_mcp.process.daemon import stop
    from mlx_mcp.process.place import user_place

    pid = stop(user_place(), 2 * Config.load().shutdown_timeout_s + 10)
    typer.echo("There is no engine process." if pid is None else f"Process {pid} has ended.")


@engine.command()
@reporting_errors
def status() -> None:
    """Show the engine process: its models, memory and sessions, and of each connection what it does and waits for."""
    from mlx_mcp.process.daemon import ask
    from mlx_mcp.process.place import user_place

    place = user_place()
    state: Any = ask(place, "status")
    if state is None:
        typer.echo(f"There is no engine process (at {place.socket}).")
        raise typer.Exit(1)
    from rich.console import Console
    from rich.table import Table

    console = Console()
    models = ", ".join(state["models"]) or "no model yet"
    console.print(
        f"mlx-mcp {state['version']}, process {state['pid']}, up {state['up_s']:.0f} s: {models} "
        f"({state['weights_bytes'] / 1e6:,.1f} MB), {state['rows']} calls in the batch, {state['waiting']} waiting, "
        f"{state['sessions']} sessions, {(state['kv_bytes'] + state['cache_bytes']) / 1e6:,.1f} MB of keys and values",
        highlight=False,
        soft_wrap=True,
    )
    if state["retiring"]:
        console.print(f"It ends when it is idle: {state['retiring']}.", highlight=False, soft_wrap=True)
    columns = ("host", "by", "process", "model", "running", "waiting", "waits for", "sessions", "folder")
    table = Table(*columns, box=None, pad_edge=False)
    for c in state["connections"]:
        counts = (c["model"], str(c["running"]), str(c["waiting"]), c["waits_for"], ", ".join(c["sessions"]))
        table.add_row(c["host"] or "?", c["kind"], str(c["pid"]), *counts, c["folder"])
    if state["connections"]:
        console.print(table)


@engine.command()
@reporting_errors
def logs(lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many, from the end.")] = 100) -> None:
    """Show the end of the engine process's log, and where it is."""
    from mlx_mcp.process.daemon import tail
    from mlx_mcp.process.place import user_place

    place = user_place()
    note(place.log)
    typer.echo(tail(place, lines=lines, label=""))


@engine.command("run", hidden=True)
@reporting_errors
def run_engine(
    ready_fd: Annotated[int | None, typer.Option(help="Written to and closed once the engine listens.")] = None,
) -> None:
    """Be the engine process; what `start` starts."""
    from mlx_mcp.config import Config
    from mlx_mcp.process.daemon import NO_SOCKETS, START_S, take_life_lock
    from mlx_mcp.process.place import user_place

    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)
    config, place = Config.load(), user_place()
    take_life_lock(place, START_S / 2)
    try:
        listener = place.listen()
    except NoSharedEngine as error:
        note(str(error))
        raise typer.Exit(NO_SOCKETS) from error
    serve_engine(config, listener, ready_fd)


def serve_engine(config: Config, listener: socket.socket, ready_fd: int | None) -> None:
    """Serve whoever connects to the user's socket, until a signal comes or nothing is to do for long enough."""
    import contextlib

    import anyio

    from mlx_mcp.server.connections import Connections
    from mlx_mcp.server.lifetime import exit_within, until_signal
    from mlx_mcp.wiring import wire

    client, _ = wire(config)

    async def main() -> None:
        connections = Connections(client, config, listener)

        async def stop(_: anyio.CancelScope) -> None:
            connections.stop()
            await client.drain(config.shutdown_timeout_s)

        note(f"process {os.getpid()} of version {__version__} listens at {listener.getsockname()}")
        if ready_fd is not None:
            with contextlib.suppress(BrokenPipeError):  # whoever started us has gone; others will come
                os.write(ready_fd, b"ready")
            os.close(ready_fd)
        await until_signal(lambda: connections.serve(lambda: exit_within(2 * config.shutdown_timeout_s + 1)), stop)

    anyio.run(main)
    client.close(config.shutdown_timeout_s)


@app.command()
@reporting_errors
def run(
    prompt: Annotated[str, typer.Argument(help="What the model should do; `-` reads it from stdin.")],
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    openblas: OpenBlas = None,
) -> None:
    """Answer one prompt in the terminal, as it is generated."""
    from mlx_mcp.config import Config
    from mlx_mcp.core.ports import Message, TextKind
    from mlx_mcp.engine.client import EngineClient
    from mlx_mcp.engine.requests import GenerateRequest
    from mlx_mcp.wiring import wire

    text = sys.stdin.read() if prompt == "-" else prompt
    messages = (*([Message("system", system)] if system else []), Message("user", text))
    request = GenerateRequest(messages, None, max_tokens, temperature, top_p, tuple(stop or ()), seed)
    client, _ = wire(Config.load(model=model, openblas=openblas, max_ssd_bytes=0))

    async def stream(client: EngineClient) -> None:
        from rich.console import Console

        from mlx_mcp.engine.requests import Delta, Progress, Result

        console, result = Console(stderr=True), None
        with console.status("starting") as status:
            async for update in client.generate(request):
                match update:
                    case Progress(_, message):
                        status.update(message)
                    case Delta(piece, _, kind):
                        status.stop()
                        typer.echo(piece, nl=False, err=kind is not TextKind.ANSWER)
                    case Result():
                        result = update
        assert result is not None, "a generation ends with a result or an error"
        typer.echo()
        console.print(
            f"{result.model}: {result.prompt_tokens} prompt tokens, {result.completion_tokens} generated, "
            f"ended by {result.finish_reason}",
            style="dim",
            highlight=False,
        )

    try:
        asyncio.run(stream(client))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        client.close()


@app.command()
@reporting_errors
def models(model: Model = None) -> None:
    """List the models that can be served: the embedded one, the configured one, the hub cache."""
    from rich.console import Console
    from rich.table import Table

    from mlx_mcp.config import Config
    from mlx_mcp.models.registry import Registry

    table = Table("name", "weights", "context", "about", box=None, pad_edge=False)
    for entry in Registry(Config.load(model=model).model).entries():
        size = "not downloaded" if entry.weights_bytes is None else f"{entry.weights_bytes / 1e6:,.1f} MB"
        name = f"{entry.spec.name} (default)" if entry.default else entry.spec.name
        table.add_row(name, size, f"{entry.context_tokens or '?'}", entry.spec.summary)
    Console().print(table)


@app.command()
@reporting_errors
def doctor(model: Model = None, openblas: OpenBlas = None) -> None:
    """Check the installation: versions, device, BLAS, settings, and whether the embedded model answers right."""
    from rich.console import Console

    from mlx_mcp.config import Config
    from mlx_mcp.doctor import examine

    console, sound = Console(), True
    for finding in examine(Config.load(model=model, openblas=openblas, max_ssd_bytes=0)):
        mark = {"ok": "[green]ok  [/]", "hint": "[yellow]hint[/]", "fault": "[red]FAULT[/]"}[finding.kind]
        console.print(f"{mark} {finding.text}", highlight=False, soft_wrap=True)
        sound = sound and finding.kind != "fault"
    if not sound:
        raise typer.Exit(1)


for each in sessions.registered_commands:
    assert each.callback is not None, "a command that does nothing"
    each.callback = reporting_errors(each.callback)
app.add_typer(sessions, name="sessions")
