"""`mlx-mcp sessions`: what is on disk of sessions. Looking at it is always possible; to change it no server may run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_mcp.errors import UnknownSession

if TYPE_CHECKING:
    from mlx_mcp.core.durable import SessionHead
    from mlx_mcp.storage.session_log import SessionLog
    from mlx_mcp.storage.store import Store

sessions = typer.Typer(name="sessions", help="Persisted sessions: list, show, remove, move.", no_args_is_help=True)

Session = Annotated[str, typer.Argument(help="Handle or name.")]
Version = Annotated[str, typer.Option(help="A version of it; the session itself if not given.")]


@contextmanager
def opened() -> Iterator[Store]:
    """The configured store.

    Raises:
        StorageError: a server has it open, or it cannot be used.
    """
    from mlx_mcp.config import Config
    from mlx_mcp.storage.store import Store

    config = Config.load()
    store = Store.open(config.store_dir, quota_bytes=config.max_ssd_bytes, daily_bytes=config.max_offload_bytes)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def looked_at() -> Iterator[SessionLog]:
    """The sessions of the configured store, which a server may have open meanwhile.

    Raises:
        StorageError: there is no such folder, or it cannot be read.
    """
    from mlx_mcp.config import Config
    from mlx_mcp.storage.folder import Calls, Glance
    from mlx_mcp.storage.session_log import SessionLog

    folder = Glance.open(Config.load().store_dir, Calls())
    try:
        yield SessionLog(folder)
    finally:
        folder.close()


def chosen(log: SessionLog, session: str, version: str = "") -> SessionHead:
    """The head of a session by its handle or name.

    Raises:
        UnknownSession: there is none.
    """
    for head in log.heads():
        if session in (head.session_id, head.name) and head.version == version:
            return head
    raise UnknownSession(session)


@sessions.command("list")
def list_() -> None:
    """List persisted sessions and their versions, those used last first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("session", "name", "version", "model", "tokens", "kept", "saved", box=None, pad_edge=False)
    with looked_at() as log:
        for head in sorted(log.heads(), key=lambda head: -head.used_at):
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(head.saved_at))
            table.add_row(
                head.session_id, head.name, head.version, head.model, str(head.num_tokens), str(head.num_kept), saved
            )
    Console().print(table)


@sessions.command()
def show(session: Session, version: Version = "") -> None:
    """Show what was said in a session."""
    with looked_at() as log:
        record = log.load(chosen(log, session, version).session_id, version)
    if record is None:
        raise UnknownSession(session, damaged=True)
    typer.echo("".join(part if isinstance(part, str) else part[0] for part in json.loads(record.text or '[""]')))


@sessions.command()
def rm(session: Session, version: Annotated[str | None, typer.Option(help="Only this version of it.")] = None) -> None:
    """Remove a session and its versions from disk, with the bytes that no other needs."""
    with opened() as store:
        heads = store.sessions.heads()
        ids = {head.session_id for head in heads if session in (head.session_id, head.name)}
        if not ids:
            raise UnknownSession(session)
        removed = sum(store.remove(session_id, version) for session_id in ids)
    typer.echo(f"removed {removed}")


@sessions.command()
def purge(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove every session and every cached block from disk."""
    if not yes:
        typer.confirm("Remove every persisted session and every cached block?", abort=True)
    with opened() as store:
        store.purge()
    typer.echo("purged")


@sessions.command()
def export(
    session: Session, file: Annotated[Path, typer.Argument(help="To be written.")], version: Version = ""
) -> None:
    """Write a session, with its keys and values, to a file that another machine can import."""
    with opened() as store:
        size = store.export(chosen(store.sessions, session, version).session_id, file.absolute(), version)
    typer.echo(f"{file}: {size / 1e6:,.1f} MB")


@sessions.command("import")
def import_(file: Annotated[Path, typer.Argument(help="What `export` wrote; import only what you trust.")]) -> None:
    """Take in an exported session, in place of one of the same handle."""
    with opened() as store:
        head = store.import_(file.absolute())
    typer.echo(f"{head.session_id} {head.name}".rstrip())
