"""`mlx-mcp sandbox`: sandboxes and their variables; through the engine, if one runs, else as they are on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mcp.cli.completion import sandbox_names
from mlx_mcp.cli.folder_owner import ask_engine, until_no_engine
from mlx_mcp.cli.options import Json
from mlx_mcp.cli.output import Column, show_json, show_table
from mlx_mcp.cli.reporting import note, reporting_errors
from mlx_mcp.cli.sessions import opened as opened_sessions
from mlx_mcp.errors import ConfigError, EngineUnavailable, NotOnDisk

if TYPE_CHECKING:
    from mlx_mcp.config import Config
    from mlx_mcp.core.durable_sandbox import SandboxHead, SandboxRecord

sandbox = typer.Typer(name="sandbox", help="Sandboxes: list, get their variables, remove.", no_args_is_help=True)

Sandbox = Annotated[str, typer.Argument(help="Handle or name.", autocompletion=sandbox_names)]
COLUMNS = (
    Column("sandbox", whole=True),
    Column("name", rank=0),
    Column("version", rank=2),
    Column("kept", rank=3),
    Column("variables", rank=1),
    Column("saved", rank=4),
)


def asked(**question: object) -> Any:
    """What the engine says, if one runs that has the folder; else None.

    Raises:
        InvalidRequest: it cannot be done; the text is the engine's.
    """
    from mlx_mcp.config import Config

    with suppress(EngineUnavailable, ConfigError):
        return (ask_engine(Config.load(), {"kind": "sandbox"} | question) or {}).get("result")
    return None


@contextmanager
def heads_in(config: Config) -> Iterator[tuple[list[SandboxHead], Any]]:
    """What is on disk of sandboxes, which a server may have open meanwhile, and what reads it."""
    from mlx_mcp.storage.sandbox_log import SandboxLog

    if not config.sandbox_dir.exists():
        yield [], None
        return
    with closing(SandboxLog.look(config.sandbox_dir)) as log:
        yield log.heads(), log


@sandbox.command("list")
@reporting_errors
def list_(as_json: Json = False) -> None:
    """List sandboxes and their versions, those saved last first."""
    from mlx_mcp.config import Config
    from mlx_mcp.core.durable_sandbox import sandbox_as_json

    found = asked(do="list")
    if found is None:
        with heads_in(Config.load()) as (heads, _):
            found = [sandbox_as_json(head) for head in heads]
    found.sort(key=lambda head: -head["saved_at"])
    if as_json:
        show_json(found)
    elif not found:
        note("There is no sandbox.")
    else:
        show_table(COLUMNS, [row(head) for head in found])


def row(head: dict[str, Any]) -> list[str]:
    """A sandbox as a line of the table."""
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(head["saved_at"])) if head["saved_at"] else "-"
    kept = "persisted" if head["persisted"] else "saved" if head["saved_at"] else "in memory"
    return [head["sandbox"], head["name"], head["version"], kept, ", ".join(head["variables"]), saved]


@sandbox.command()
@reporting_errors
def get(
    sandbox: Sandbox,
    variable: Annotated[str, typer.Argument(help="Its name.")],
    version: Annotated[str, typer.Option(help="As it is in this version of the sandbox.")] = "",
) -> None:
    """Write a variable to stdout, whole: a text as it is, everything else as JSON."""
    found = asked(do="get", sandbox=sandbox, variable=variable, at=version)
    value = read_value(sandbox, variable, version) if found is None else found["value"]
    if isinstance(value, str):
        typer.echo(value.encode("utf-8", "surrogatepass"), nl=sys.stdout.isatty())
    else:
        show_json(value)


def read_value(sandbox: str, variable: str, version: str) -> Any:
    """The value of a variable as it is on disk, read by an interpreter of this process.

    Raises:
        NotOnDisk: there is no such sandbox, or no such version.
        MlxMcpError: the sandbox cannot be read, or has no such variable.
    """
    import asyncio
    from pathlib import Path

    from mlx_mcp.config import Config
    from mlx_mcp.core.durable_sandbox import find_sandbox
    from mlx_mcp.process.place import sandbox_folder
    from mlx_mcp.workflows.sandbox.keeping import state_from
    from mlx_mcp.workflows.sandbox.opening import open_runtime
    from mlx_mcp.workflows.sandbox.reading import value_of

    config = Config.load()
    with heads_in(config) as (heads, log):
        head = find_sandbox(heads, sandbox, version)
        record: SandboxRecord | None = log.load(head.sandbox_id, version)
    if record is None:
        raise NotOnDisk(sandbox, version, kind="sandbox")
    state = state_from(record)

    async def read() -> Any:
        runtime = await open_runtime(Path(sandbox_folder()), config.sandbox_python)
        try:
            return await value_of(runtime, state, variable)
        finally:
            await runtime.close()

    return asyncio.run(read())


@sandbox.command()
@reporting_errors
def rm(sandbox: Sandbox, version: Annotated[str | None, typer.Option(help="Only this version of it.")] = None) -> None:
    """Remove a sandbox and its versions, with what they remember; a program that runs in it is ended."""
    from mlx_mcp.config import Config

    config = Config.load()
    removed = change(config, lambda: remove(config, sandbox, version), do="rm", sandbox=sandbox, at=version)
    typer.echo(f"removed {removed}")


@sandbox.command()
@reporting_errors
def purge(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove every sandbox, from disk too, with what they remember; programs that run are ended."""
    from mlx_mcp.config import Config

    if not yes:
        typer.confirm("Remove every sandbox?", abort=True)
    config = Config.load()
    change(config, lambda: remove_all(config), do="purge")
    typer.echo("purged")


def change(config: Config, work: Callable[[], Any], **question: object) -> Any:
    """Have the engine do it, if one runs; else do it here, while no engine can start."""
    asked_for: dict[str, object] = {"kind": "sandbox"} | question
    with until_no_engine(config, asked_for, None, lambda done, total: None) as answer:
        return work() if answer is None else answer["result"]


def remove(config: Config, sandbox: str, version: str | None) -> int:
    """Remove a sandbox, or one version, from a folder that no server has open; returns how many versions went.

    Raises:
        NotOnDisk: there is no such sandbox, or no such version.
        StorageError: a server has the folder open, or it cannot be changed.
    """
    from mlx_mcp.core.durable_sandbox import versions_of
    from mlx_mcp.storage.sandbox_log import SandboxLog

    if not config.sandbox_dir.exists():
        raise NotOnDisk(sandbox, kind="sandbox")
    with closing(SandboxLog.open(config.sandbox_dir, quota_bytes=config.max_sandbox_disk_bytes)) as log:
        heads = versions_of(log.heads(), sandbox, version)
        removed = log.remove(heads[0].sandbox_id, version)
    forget(config, heads)
    return removed


def remove_all(config: Config) -> None:
    """Remove all sandboxes from a folder that no server has open.

    Raises:
        StorageError: a server has the folder open, or it cannot be changed.
    """
    from mlx_mcp.storage.sandbox_log import SandboxLog

    if config.sandbox_dir.exists():
        with closing(SandboxLog.open(config.sandbox_dir, quota_bytes=config.max_sandbox_disk_bytes)) as log:
            heads = log.heads()
            log.clear()
        forget(config, heads)


def forget(config: Config, heads: list[SandboxHead]) -> None:
    """Remove the sessions of what removed sandboxes remembered; some may have ended before."""
    sessions = {session for head in heads for session in head.remembered.values()}
    if sessions:
        with opened_sessions(config) as store:
            for session in sessions:
                store.remove(session)
