"""The command line: flags → Config → wiring. Only this folder sees every layer.

Imports little at the top: a host waits three seconds for the first answer of `serve`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_mcp import __version__
from mlx_mcp.cli.engine import engine
from mlx_mcp.cli.options import Model, OpenBlas
from mlx_mcp.cli.reporting import note, reporting_errors
from mlx_mcp.cli.sessions import sessions
from mlx_mcp.errors import InvalidRequest, NoSharedEngine

if TYPE_CHECKING:
    from mlx_mcp.engine.client import EngineClient

app = typer.Typer(
    name="mlx-mcp",
    help="Local MLX language models for agent hosts, over MCP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
                from mlx_mcp.cli.serving import share_http

                share_http(model, host, port, openblas)
            else:
                from mlx_mcp.process.relay import serve

                serve(model, openblas)
            return
        except NoSharedEngine as error:
            note(f"No engine can be shared here, since {error}; serving in this process alone, as with --standalone.")
    from mlx_mcp.cli.serving import serve_http, serve_stdio
    from mlx_mcp.config import Config

    config = Config.load(model=model, host=host, port=port, openblas=openblas)
    (serve_http if http else serve_stdio)(config)


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


app.add_typer(engine, name="engine")
app.add_typer(sessions, name="sessions")
