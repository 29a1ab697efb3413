"""`mlx-mcp token`: who may call over HTTP. A running server obeys a change at its next request."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from mlx_mcp.cli.options import Json
from mlx_mcp.cli.output import Column, show_json, show_table
from mlx_mcp.cli.reporting import NOTHING, note, reporting_errors
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.storage.token_file import Token, TokenFile

UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
COLUMNS = (
    Column("token", whole=True),
    Column("made", rank=2),
    Column("expires", rank=0),
    Column("limits of its own", rank=1),
)

token = typer.Typer(help="The tokens by which callers over HTTP are known.", no_args_is_help=True)


def limit(help_text: str) -> Any:
    """A flag with a limit of a token's own."""
    return typer.Option(min=0, help=f"{help_text}; 0 for no limit.")


@token.command()
@reporting_errors
def add(
    name: Annotated[str, typer.Argument(help="Whom it is for; sessions are kept under this name.")],
    expires: Annotated[
        str | None, typer.Option(help="How long it is valid, as 12h, 30d or 8w, or until when, as 2027-01-31.")
    ] = None,
    requests_per_minute: Annotated[int | None, limit("Requests a minute")] = None,
    tokens_per_minute: Annotated[int | None, limit("Tokens computed a minute")] = None,
    calls_at_once: Annotated[int | None, limit("Generations at once")] = None,
    waiting: Annotated[int | None, limit("Generations that may wait")] = None,
    sessions: Annotated[int | None, limit("Sessions")] = None,
    session_bytes: Annotated[int | None, limit("Memory that its sessions may hold, in bytes")] = None,
    disk_bytes: Annotated[int | None, limit("Disk that its persisted sessions may take, in bytes")] = None,
) -> None:
    """Make a token and show it, once: only its digest is kept. Limits not given are those of the settings."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "calls_at_once": calls_at_once,
        "waiting": waiting,
        "sessions": sessions,
        "session_bytes": session_bytes,
        "disk_bytes": disk_bytes,
    }
    expires_at = None if expires is None else moment(expires, time.time())
    limits = {each: value for each, value in given.items() if value is not None}
    made = prepared().add(name, expires_at, limits)
    note(f"The token of {name}{until(expires_at)}. It is shown this once; send it as `Authorization: Bearer TOKEN`.")
    typer.echo(made)


@token.command("list")
@reporting_errors
def list_tokens(as_json: Json = False) -> None:
    """Show who has a token, until when, and with which limits; the tokens themselves are not known any more."""
    file = prepared()
    tokens, now = file.tokens(), time.time()
    if as_json:
        show_json([shown(each, now) for each in tokens])
        return
    if not tokens:
        typer.echo("There are no tokens. `mlx-mcp token add NAME` makes one.")
        if file.exists:
            note(f"Callers need one all the same, also on this machine, as long as {file.path} is there.")
        raise typer.Exit(NOTHING)
    rows = [
        [
            each.name,
            day(each.created_at),
            "expired" if each.has_expired(now) else day(each.expires_at),
            ", ".join(f"{name} {number or 'unlimited'}" for name, number in each.limits.items()),
        ]
        for each in tokens
    ]
    show_table(COLUMNS, rows)


@token.command()
@reporting_errors
def revoke(name: Annotated[str, typer.Argument(help="Whose token it is.")]) -> None:
    """Have a token let nobody in any more. Its sessions stay, for the next token of that name."""
    prepared().revoke(name)
    typer.echo(f"The token of {name} is not valid any more.")


def prepared() -> TokenFile:
    """The file of tokens, in the user's state folder, which is made if it is missing."""
    from mlx_mcp.process.place import user_place

    place = user_place()
    place.prepare()
    return TokenFile(place.folder)


def moment(expires: str, now: float) -> float:
    """The moment that an option names, in seconds since 1970.

    Raises:
        InvalidRequest: it names none, or one that is over.
    """
    length = re.fullmatch(r"(\d{1,6})([mhdw])", expires)
    try:
        at = now + int(length[1]) * UNITS[length[2]] if length else datetime.fromisoformat(expires).timestamp()
    except ValueError as error:
        raise InvalidRequest(
            f"--expires {expires[:40]!r} is no time. Give a length, as 12h, 30d or 8w, or a day, as 2027-01-31."
        ) from error
    if at <= now:
        raise InvalidRequest(f"--expires {expires[:40]!r} is over already. Give a moment that is to come.")
    return at


def shown(token: Token, now: float) -> dict[str, Any]:
    """A token as JSON; times are in seconds since 1970."""
    return {
        "name": token.name,
        "created_at": token.created_at,
        "expires_at": token.expires_at,
        "expired": token.has_expired(now),
        "limits": dict(token.limits),
    }


def day(at: float | None) -> str:
    """A moment for a table."""
    return "never" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def until(at: float | None) -> str:
    """Until when a token is valid, in a sentence."""
    return "" if at is None else f", valid until {day(at)} UTC"
