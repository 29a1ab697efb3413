"""`mlx-mcp engine`: the one process that all windows share, started, looked at and ended."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from mlx_mcp.cli.options import Json
from mlx_mcp.cli.output import Column, show_json, show_table
from mlx_mcp.cli.reporting import NOTHING, note, reporting_errors, say
from mlx_mcp.errors import NoSharedEngine

SLOW_STEP_S = 5.0
KILL_S = 30.0  # for the system to take back the process's memory

CONNECTIONS = (
    Column("host", rank=0),
    Column("by", rank=6),
    Column("process", whole=True),
    Column("model", rank=3),
    Column("running", rank=1),
    Column("waiting", rank=2),
    Column("waits for", rank=4),
    Column("folder", rank=5),
)
SESSIONS = (Column("process", whole=True), Column("session", whole=True))

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
def status(as_json: Json = False) -> None:
    """Show the engine process: its models, memory and sessions, and of each connection what it does and waits for."""
    from mlx_mcp.process.daemon import ask
    from mlx_mcp.process.endings import told
    from mlx_mcp.process.place import user_place

    place = user_place()
    state: Any = ask(place, "status")
    if as_json:
        show_json(state)
    elif state is None:
        typer.echo(f"There is no engine process (at {place.socket}).")
    else:
        show_status(state)
        if said := told(place):
            typer.echo(f"Note: {said}.")
    if state is None:
        raise typer.Exit(NOTHING)


def show_status(state: dict[str, Any]) -> None:
    """Print what an engine says of itself."""
    kept_bytes = state["kv_bytes"] + state["cache_bytes"]
    for line in (
        f"mlx-mcp {state['version']}, process {state['pid']}, up {state['up_s']:.0f} s",
        f"models: {', '.join(state['models']) or 'no model yet'} ({state['weights_bytes'] / 1e6:,.1f} MB)",
        f"calls: {state['rows']} in the batch, {state['waiting']} waiting",
        f"long calls: {state['long_calls']} go on, {state['results']} results wait to be fetched"
        if state["long_calls"] or state["results"]
        else "",
        f"sessions: {state['sessions']}, {kept_bytes / 1e6:,.1f} MB of keys and values, of "
        f"{state['max_kv_bytes'] / 1e6:,.1f} MB",
        f"memory: {state['max_memory_bytes'] / 1e6:,.1f} MB in all at most" if state["max_memory_bytes"] else "",
        f"It ends when it is idle: {state['retiring']}." if state["retiring"] else "",
        f"Its current step has taken {state['step_s']:.0f} s." if state["step_s"] > SLOW_STEP_S else "",
    ):
        if line:
            typer.echo(line)
    connections = state["connections"]
    rows = [
        [
            c["host"] or "?",
            *(str(c[name]) for name in ("kind", "pid", "model", "running", "waiting", "waits_for", "folder")),
        ]
        for c in connections
    ]
    held = [[str(c["pid"]), session] for c in connections for session in c["sessions"]]
    for columns, lines in ((CONNECTIONS, rows), (SESSIONS, held)):
        if lines:
            typer.echo()
            show_table(columns, lines)


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
    from mlx_mcp.hosting.serving import serve_engine
    from mlx_mcp.process.daemon import NO_SOCKETS, START_S
    from mlx_mcp.process.locks import take_life_lock
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
    serve_engine(config, listener, None if ready_fd is None else place.log, ready_fd, say)
