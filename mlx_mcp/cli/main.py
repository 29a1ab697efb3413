"""The command line: flags → Config → wiring. Only this folder sees every layer.

Imports little at the top: a host waits three seconds for the first answer of `serve`.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_mcp import __version__
from mlx_mcp.cli.bench import bench
from mlx_mcp.cli.completion import PROGRAM, Commands
from mlx_mcp.cli.engine import engine
from mlx_mcp.cli.install import install, uninstall
from mlx_mcp.cli.launch import launch
from mlx_mcp.cli.models import alias, models, pull, rm
from mlx_mcp.cli.options import Json, Model, OpenBlas, sampling_flags, sampling_of
from mlx_mcp.cli.output import show_json, show_marked
from mlx_mcp.cli.reporting import NOTHING, never_fail_to_print, note, reporting_errors, say
from mlx_mcp.cli.sandbox import sandbox
from mlx_mcp.cli.service import service
from mlx_mcp.cli.sessions import sessions
from mlx_mcp.cli.tokens import token
from mlx_mcp.cli.top import top
from mlx_mcp.errors import InvalidRequest, NoSharedEngine

app = typer.Typer(
    name=PROGRAM,
    cls=Commands,
    help="Local MLX language models for agent hosts, over MCP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(engine, name="engine")
app.add_typer(sessions, name="sessions")
app.add_typer(sandbox, name="sandbox")
app.add_typer(token, name="token")
app.add_typer(launch, name="launch")
app.add_typer(service, name="service")
for command in (models, pull, rm, alias, install, uninstall, bench, top):
    app.command()(command)


def main() -> None:
    """Carry out the process's arguments, and exit."""
    never_fail_to_print()
    app(prog_name=PROGRAM)


@app.callback(invoke_without_command=True)
def options(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Local MLX language models for agent hosts, over MCP."""
    if show:
        version()
        raise typer.Exit


@app.command()
@reporting_errors
def version() -> None:
    """Show the version."""
    typer.echo(f"mlx-mcp {__version__}")


@app.command()
@reporting_errors
def serve(
    model: Model = None,
    http: Annotated[bool, typer.Option("--http", help="Serve streamable HTTP at /mcp instead of stdio.")] = False,
    host: Annotated[str | None, typer.Option(help="Address for --http; 127.0.0.1 if not given.")] = None,
    port: Annotated[int | None, typer.Option(help="Port for --http; 8080 if not given, 0 for a free one.")] = None,
    tls_cert: Annotated[
        str | None, typer.Option(help="Certificate chain to serve HTTPS with, a PEM file; goes with --http.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its private key, if that is in a file of its own.")] = None,
    openblas: OpenBlas = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Keep the engine in this process, and share it with nobody.")
    ] = False,
) -> None:
    """Serve MCP over stdio (for hosts that start it) or HTTP (for hosts that connect), on one engine for all."""
    own = {"host": host, "port": port, "tls_cert": tls_cert, "tls_key": tls_key}
    if not http and any(value is not None for value in own.values()):
        raise InvalidRequest("--host, --port, --tls-cert and --tls-key go with --http: give it, or leave them out.")
    if not standalone:
        try:
            if http:
                from mlx_mcp.hosting.serving import share_http

                share_http(model, own, openblas, say)
            else:
                from mlx_mcp.process.relay import serve

                serve(model, openblas)
            return
        except NoSharedEngine as error:
            note(f"No engine can be shared here, since {error}; serving in this process alone, as with --standalone.")
    from mlx_mcp.config import Config
    from mlx_mcp.hosting.serving import serve_http, serve_stdio

    config = Config.load(model=model, openblas=openblas, **own)
    if http:
        serve_http(config, say)
    else:
        from mlx_mcp.process.relay import tell_a_terminal

        tell_a_terminal()
        serve_stdio(config)


@app.command()
@reporting_errors
@sampling_flags(after="schema")
def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What the model should do. What is piped in comes before it, or is it; `-` reads stdin."),
    ] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", help="A text file that comes before the prompt; repeatable."),
    ] = None,
    schema: Annotated[
        str | None, typer.Option(help="A JSON schema that the answer obeys: a file, or the JSON itself.")
    ] = None,
    as_json: Json = False,
    openblas: OpenBlas = None,
    **drawn: Any,
) -> None:
    """Answer one prompt in the terminal, as it is generated."""
    from mlx_mcp.cli.run import generate, request_of
    from mlx_mcp.config import Config

    config = Config.load(model=model, openblas=openblas, max_ssd_bytes=0)
    request = request_of(config, prompt, files, schema, system, sampling_of(drawn))
    generate(config, request, as_json)


@app.command()
@reporting_errors
def doctor(model: Model = None, openblas: OpenBlas = None, as_json: Json = False) -> None:
    """Check the installation: versions, device, BLAS, settings, and whether the embedded model answers right."""
    from mlx_mcp.config import Config
    from mlx_mcp.doctor import examine, report

    config, findings = Config.load(model=model, openblas=openblas, max_ssd_bytes=0), []
    for finding in examine(config):
        findings.append(finding)
        if not as_json:
            show_marked(*MARKS[finding.kind], finding.text)
    if as_json:
        show_json(report(Config.load(), findings))
    if any(finding.kind == "fault" for finding in findings):
        raise typer.Exit(NOTHING)


MARKS = {"ok": ("ok", "green"), "hint": ("hint", "yellow"), "fault": ("FAULT", "red")}
