"""`mlx-mcp sessions`: what is on disk of sessions; through the engine, if one has the folder open."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mcp.cli.completion import session_names
from mlx_mcp.cli.folder_owner import ask_engine, until_no_engine
from mlx_mcp.cli.options import Json
from mlx_mcp.cli.output import Column, show_json, show_table
from mlx_mcp.cli.reporting import note, reporting_errors
from mlx_mcp.errors import ConfigError, EngineUnavailable, StorageError

if TYPE_CHECKING:
    from mlx_mcp.config import Config
    from mlx_mcp.core.durable import Transfer
    from mlx_mcp.storage.session_log import SessionLog
    from mlx_mcp.storage.store import Store

sessions = typer.Typer(name="sessions", help="Persisted sessions: list, show, remove, move.", no_args_is_help=True)


class ExportForm(StrEnum):
    """What a session is exported as."""

    SESSION = "session"
    PROMPT_CACHE = "prompt-cache"


Session = Annotated[str, typer.Argument(help="Handle or name.", autocompletion=session_names)]
Version = Annotated[str, typer.Option(help="A version of it; the session itself if not given.")]
COLUMNS = (
    Column("session", whole=True),
    Column("name", rank=0),
    Column("version", rank=2),
    Column("model", rank=3),
    Column("tokens", rank=1),
    Column("kept", rank=5),
    Column("saved", rank=4),
)


@contextmanager
def opened(config: Config) -> Iterator[Store]:
    """The configured store.

    Raises:
        StorageError: a server has it open, or it cannot be used.
    """
    from mlx_mcp.storage.store import Store

    store = Store.open(config.store_dir, quota_bytes=config.max_ssd_bytes, daily_bytes=config.max_offload_bytes)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def looked_at(config: Config) -> Iterator[SessionLog]:
    """The sessions of the configured store, which a server may have open meanwhile.

    Raises:
        StorageError: there is no such folder, or it cannot be read.
    """
    from mlx_mcp.storage.folder import Calls, ReadOnlyFolder
    from mlx_mcp.storage.session_log import SessionLog

    folder = ReadOnlyFolder.open(config.store_dir, Calls())
    try:
        yield SessionLog(folder)
    finally:
        folder.close()


def look(work: Callable[[SessionLog], Any], nothing: Any = None, **question: object) -> Any:
    """What the engine answers, if one has the folder open; else what `work` finds in it.

    `nothing`, if given, is the answer where nothing was ever kept, so that there is no folder yet.
    Looking is always possible: also where the engine does not answer, or is too old for the question.
    """
    from mlx_mcp.config import Config

    config, answer = Config.load(), None
    with suppress(EngineUnavailable, ConfigError):
        answer = ask_engine(config, question)
    if answer is not None and "result" in answer:
        return answer["result"]
    if nothing is not None and not config.store_dir.exists():
        return nothing
    with looked_at(config) as log:
        return work(log)


def change(work: Callable[[Store], Any], transfer: Transfer | None = None, **question: object) -> Any:
    """Have the engine do it, if one has the folder open; else do it here, while no engine can start."""
    from mlx_mcp.config import Config

    config = Config.load()
    with meter(transfer) as went_on, until_no_engine(config, question, transfer, went_on) as answer:
        if answer is not None:
            return answer["result"]
        if transfer is not None:
            transfer.between = lambda: went_on(transfer.done_bytes, transfer.total_bytes)
        with opened(config) as store:
            return work(store)


@contextmanager
def meter(transfer: Transfer | None) -> Iterator[Callable[[int, int], None]]:
    """What takes how many of how many bytes are done, and shows that, if stderr is a terminal."""
    if transfer is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from mlx_mcp.cli.progress import bytes_bar

    with bytes_bar(Path(transfer.file_name).name) as went_on:
        yield went_on


def note_old() -> None:
    """Say so where there are sessions that an earlier version kept in another form."""
    from mlx_mcp.config import Config
    from mlx_mcp.core.durable import old_sessions_warning
    from mlx_mcp.storage.session_log import OLD_SUFFIX

    num_old = len(list(Config.load().store_dir.glob(f"*{OLD_SUFFIX}")))
    if num_old:
        note(old_sessions_warning(num_old))


@sessions.command("list")
@reporting_errors
def list_(as_json: Json = False) -> None:
    """List persisted sessions and their versions, those used last first."""
    from mlx_mcp.core.durable import session_as_json

    found = look(lambda log: [session_as_json(head) for head in log.heads()], nothing=[], do="list")
    note_old()
    found.sort(key=lambda head: -head["used_at"])
    if as_json:
        show_json(found)
        return
    if not found:
        note("No session is on disk.")
        return
    names = ("session", "name", "version", "model", "tokens", "kept_tokens")
    show_table(
        COLUMNS,
        [
            [
                *(str(head[name]) for name in names),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(head["saved_at"])),
            ]
            for head in found
        ],
    )


@sessions.command()
@reporting_errors
def show(session: Session, version: Version = "", as_json: Json = False) -> None:
    """Show what was said in a session.

    Before each turn stands when it was asked for, and by which client.
    """
    from mlx_mcp.core.durable import find_heads, session_with_text

    def read(log: SessionLog) -> dict[str, Any]:
        (head,) = find_heads(log.heads(), session, version)
        record = log.load(head.session_id, version)
        if record is None:
            raise StorageError(
                f"What was kept of session {session[:80]!r} is damaged. Remove it: "
                f"`mlx-mcp sessions rm {session[:80]}`."
            )
        return session_with_text(record)

    note_old()
    found = look(read, do="show", session=session, at=version)
    if as_json:
        show_json(found)
    else:
        typer.echo(with_origins(found["text"], found.get("turns", [])))


def with_origins(text: str, turns: list[dict[str, Any]]) -> str:
    """The text of a session, with a line before each turn that says when it was asked for, and by which client."""
    from mlx_mcp.core.origin import Origin

    for turn in reversed(turns):
        before, after = text[: turn["begin"]], text[turn["begin"] :]
        text = f"{before}\n[{Origin(turn['who'], turn['at']).line}]\n{after}"
    return text.lstrip("\n")


@sessions.command()
@reporting_errors
def rm(session: Session, version: Annotated[str | None, typer.Option(help="Only this version of it.")] = None) -> None:
    """Remove a session and its versions from disk, with the bytes that no other needs; one in use ends."""
    from mlx_mcp.core.durable import find_heads

    def remove(store: Store) -> int:
        return store.remove(find_heads(store.sessions.heads(), session, version)[0].session_id, version)

    typer.echo(f"removed {change(remove, do='rm', session=session, at=version)}")


@sessions.command()
@reporting_errors
def purge(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove every session and every cached block from disk; sessions that are persisted and in use end."""
    if not yes:
        typer.confirm("Remove every persisted session and every cached block?", abort=True)
    change(lambda store: store.purge(), do="purge")
    typer.echo("purged")


@sessions.command()
@reporting_errors
def export(
    session: Session,
    file: Annotated[Path, typer.Argument(help="To be written.")],
    version: Version = "",
    form: Annotated[
        ExportForm, typer.Option("--as", help="For another mlx-mcp, or as a prompt cache for mlx_lm.")
    ] = ExportForm.SESSION,
) -> None:
    """Write a session, with its keys and values, to a file that another machine can import."""
    if form is ExportForm.SESSION:
        typer.echo(f"{file}: {exported(session, version, file) / 1e6:,.1f} MB")
        return
    from mlx_mcp.cli.prompt_cache import write_prompt_cache
    from mlx_mcp.config import Config
    from mlx_mcp.storage.transfer import to_file

    to_file(file)  # else there can be no such file
    with TemporaryDirectory(dir=file.absolute().parent, prefix=".mlx-mcp-") as folder:
        exported(session, version, Path(folder) / file.name)
        size, num_left = write_prompt_cache(Path(folder) / file.name, file, Config.load())
    typer.echo(f"{file}: {size / 1e6:,.1f} MB")
    if num_left:
        note(
            f"The keys and values of its last {num_left} tokens are not computed yet and not in the file. "
            'What goes on from it has to begin with these tokens: they end the list under "tokens" in its metadata.'
        )


def exported(session: str, version: str, file: Path) -> int:
    """Export a session to a file; returns its bytes."""
    from mlx_mcp.core.durable import find_heads
    from mlx_mcp.storage.transfer import to_file

    transfer = to_file(file)

    def write(store: Store) -> int:
        (head,) = find_heads(store.sessions.heads(), session, version)
        return store.export(head.session_id, version, transfer)

    return int(change(write, transfer, do="export", session=session, at=version))


@sessions.command("import")
@reporting_errors
def import_(
    file: Annotated[Path, typer.Argument(help="What `export` or mlx_lm.cache_prompt wrote; only what you trust.")],
    name: Annotated[str, typer.Option(help="What it is called from now on; as it was if not given.")] = "",
    prompt: Annotated[
        str | None, typer.Option(help="Of a prompt cache: the text that mlx_lm.cache_prompt was given; - is stdin.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of a prompt cache: the model, by its name here.")] = None,
) -> None:
    """Take in an exported session, in place of one of the same handle; or a prompt cache of mlx_lm as a new one."""
    from mlx_mcp.cli.prompt_cache import as_export
    from mlx_mcp.config import Config
    from mlx_mcp.core.durable import session_as_json

    with as_export(file, prompt, model, Config.load()) as transfer:
        head = change(lambda store: session_as_json(store.import_(transfer, name)), transfer, do="import", name=name)
    typer.echo(f"{head['session']} {head['name']}".rstrip())
