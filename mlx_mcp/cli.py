"""The command line: flags → Config → wiring. The only file that sees every layer.

Imports little at the top: a host waits three seconds for the first answer of `serve`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from mlx_mcp import __version__
from mlx_mcp.cli_sessions import sessions
from mlx_mcp.errors import InvalidRequest, MlxMcpError

if TYPE_CHECKING:
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
) -> None:
    """Serve MCP over stdio (for hosts that start it) or HTTP (for hosts that connect)."""
    from mlx_mcp.config import Config

    if not http and (host or port is not None):
        raise InvalidRequest("--host and --port go with --http; over stdio there is nothing to connect to.")
    config = Config.load(model=model, host=host, port=port, openblas=openblas)
    (serve_http if http else serve_stdio)(config)


def serve_stdio(config: Config) -> None:
    """Serve one host over stdin and stdout until it goes away or a signal comes."""
    from mlx_mcp.server.stdio import serve_stdio, take_stdio

    wire_in, wire_out = take_stdio()

    import anyio

    from mlx_mcp.server.app import build_server
    from mlx_mcp.server.files import FileReader, default_roots
    from mlx_mcp.server.lifetime import exit_within, until_signal
    from mlx_mcp.wiring import wire

    client, registry = wire(config)
    roots = default_roots() if config.file_roots is None else config.file_roots
    files = FileReader(roots, config.max_file_bytes, config.max_files_bytes)
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
    """Serve any number of hosts over HTTP until a signal comes."""
    import anyio

    from mlx_mcp.server.app import build_server
    from mlx_mcp.server.files import FileReader
    from mlx_mcp.server.http import auth_settings, http_app, http_server, listen
    from mlx_mcp.server.lifetime import exit_within, until_signal
    from mlx_mcp.wiring import wire

    listener = listen(config)
    client, registry = wire(config)
    files = FileReader(config.file_roots or (), config.max_file_bytes, config.max_files_bytes)
    mcp = build_server(client, registry, files, **auth_settings(config))
    server = http_server(http_app(mcp, client, config), config)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    typer.echo(f"mlx-mcp {__version__} serving {registry.resolve(None).name!r} at {address}/mcp", err=True)

    async def main() -> None:
        async def stop(_: anyio.CancelScope) -> None:
            exit_within(3 * config.shutdown_timeout_s + 1)
            server.should_exit = True
            await client.drain(config.shutdown_timeout_s)

        await until_signal(lambda: server.serve(sockets=[listener]), stop)

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
app.add_typer(sessions)


def main() -> None:
    """The console script."""
    app()
