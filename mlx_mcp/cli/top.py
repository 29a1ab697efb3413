"""`mlx-mcp top`: what an engine does and waits for, drawn again and again; by its socket, or over HTTP."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from mlx_mcp.cli.options import Json
from mlx_mcp.cli.output import show_json
from mlx_mcp.cli.reporting import NOTHING, reporting_errors
from mlx_mcp.cli.top_lines import Rates, State, lines
from mlx_mcp.errors import ConfigError, EngineUnavailable

ANSWER_S = 5.0
MAX_STATE_BYTES = 8 << 20


@reporting_errors
def top(
    url: Annotated[
        str | None, typer.Option("--http", help="A server's address, such as http://127.0.0.1:8080; else your engine.")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Its token; better in MLX_MCP_TOKEN.", envvar="MLX_MCP_TOKEN")
    ] = None,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once; rates are those of one interval.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the engine does, what waits and for what, sessions and memory, until Ctrl-C; nothing that was said."""
    look = (lambda: over_http(url, token)) if url else by_socket
    state = look()
    if state is None:
        typer.echo("There is no engine process.", err=True)
        raise typer.Exit(NOTHING)
    rates = Rates()
    rates.take(state)
    if as_json:
        show_json(state) if once else stream_json(look, state, interval_s)
    elif once or not sys.stdout.isatty():
        time.sleep(interval_s)
        again = look() or state
        rates.take(again)
        size = shutil.get_terminal_size((80, 24))
        for line, _ in lines(again, rates, size.columns, size.lines - 1):
            typer.echo(line)
    else:
        live(look, state, rates, interval_s)


def stream_json(look: Callable[[], State | None], state: State | None, interval_s: float) -> None:
    """Print the state again and again, one JSON object a line, until the engine is gone."""
    while state is not None:
        typer.echo(json.dumps(state))
        sys.stdout.flush()
        time.sleep(interval_s)
        state = look()


def live(look: Callable[[], State | None], state: State | None, rates: Rates, interval_s: float) -> None:
    """Draw the state on the whole terminal again and again, until Ctrl-C or until the engine is gone."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)

    def drawn(state: State) -> Text:
        text = Text(no_wrap=True)
        for i, (line, style) in enumerate(lines(state, rates, console.width, console.height)):
            text.append(("\n" if i else "") + line, style)
        return text

    with Live(console=console, screen=True, auto_refresh=False) as screen:
        while state is not None:
            screen.update(drawn(state), refresh=True)
            time.sleep(interval_s)
            state = look()
            if state is not None:
                rates.take(state)


def by_socket() -> State | None:
    """The state of the user's engine; None if there is none.

    Raises:
        EngineUnavailable: it does not answer.
        ConfigError: it is of a version that knows no `top`.
    """
    from mlx_mcp.process.daemon import ask
    from mlx_mcp.process.place import user_place

    return ask(user_place(), "top")


def over_http(url: str, token: str | None) -> State:
    """The state of a server.

    Raises:
        EngineUnavailable: it does not answer, or something else does.
        ConfigError: the address is none, or the token is not the right one.
    """
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address: give one such as http://127.0.0.1:8080 with --http.")
    request = Request(f"{url.rstrip('/')}/page/state", headers={"accept": "application/json"})
    if token:
        request.add_header("authorization", f"Bearer {token}")
    try:
        with urlopen(request, timeout=ANSWER_S) as answer:
            state = json.loads(answer.read(MAX_STATE_BYTES))
    except HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise ConfigError(f"{url} wants another token: set MLX_MCP_TOKEN to a right one.") from error
        raise EngineUnavailable(f"{url} answers with status {error.code}. Give the address of an mlx-mcp.") from error
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise EngineUnavailable(f"{url} cannot be reached ({reason}). Start the server, or give --http.") from error
    except ValueError as error:
        raise EngineUnavailable(f"What answers at {url} is no mlx-mcp. Give the address of one.") from error
    if not isinstance(state, dict) or "tokens" not in state:
        raise EngineUnavailable(f"What is at {url} has no state to show. Give the address of an mlx-mcp.")
    return state
