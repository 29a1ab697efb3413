"""`mlx-mcp engine`: the one process that all windows share, started, looked at and ended."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from mlx_mcp.cli.reporting import note, reporting_errors
from mlx_mcp.errors import NoSharedEngine

KILL_S = 30.0  # for the system to take back the process's memory

engine = typer.Typer(help="The one engine process that all windows share.", no_args_is_help=True)


@engine.command()
@reporting_errors
def start() -> None:
    """Start the engine process, if it does not run; `serve` does that by itself."""
    from mlx_mcp.process.daemon import start_if_needed
    from mlx_mcp.process.place import user_place

    typer.echo(f"The engine is process {start_if_needed(user_place(), note)}.")


@engine.command()
@reporting_errors
def stop(
    force: Annotated[
        bool, typer.Option("--force", help="Kill it if it does not answer or does not end; persisted sessions stay.")
    ] = False,
) -> None:
    """End the engine process; running calls have shutdown_timeout_s to end. The next call of a window starts one."""
    from mlx_mcp.config import Config
    from mlx_mcp.process.daemon import kill, stop
    from mlx_mcp.process.place import user_place

    # By force it ends whatever the settings say.
    pid = kill(user_place(), KILL_S) if force else stop(user_place(), 2 * Config.load().shutdown_timeout_s + 10)
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
    from mlx_mcp.cli.serving import serve_engine
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
