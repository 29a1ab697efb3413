"""Who may do something to the cache folder: the user's engine, if it has that open; else the command itself.

While a command does it no engine can start on the folder, and one that is just ending is waited for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlx_mcp.errors import EngineUnavailable, InvalidRequest, NoSharedEngine

if TYPE_CHECKING:
    from mlx_mcp.config import Config
    from mlx_mcp.core.durable import Transfer
    from mlx_mcp.process.place import Place

SILENT_S = 30.0  # an engine says something every second
POLL_S = 0.05

Answer = dict[str, Any]
WentOn = Callable[[int, int], None]  # takes how many of how many bytes are done


def ask_engine(
    config: Config,
    question: dict[str, object],
    transfer: Transfer | None = None,
    went_on: WentOn = lambda done, total: None,
) -> Answer | None:
    """What the engine says to a question about sessions on disk: a `result`, or that the folder is `elsewhere`.

    None if there is no engine. However long a transfer takes, it is waited for as long as the engine says that it goes
    on.

    Raises:
        InvalidRequest: it cannot be done; the text is the engine's.
        EngineUnavailable: it does not answer, or ended meanwhile.
    """
    from mlx_mcp import __version__
    from mlx_mcp.process.daemon import greet

    place = place_of_engine()
    if place is None:
        return None
    hello = {"kind": "sessions", "version": __version__, "folder": os.path.realpath(config.store_dir)} | question
    fds: tuple[int, ...] = ()
    if transfer is not None:
        hello["file_name"], fds = transfer.file_name, (transfer.fd,)
    joined = greet(place, hello, fds)
    if joined is None:
        return None
    with joined.connection as connection, connection.makefile("rb") as lines:
        answer = joined.reply
        connection.settimeout(SILENT_S)
        try:
            while not answer.keys() & {"result", "error", "elsewhere"}:
                if "total" in answer:
                    went_on(int(str(answer["done"])), int(str(answer["total"])))
                answer = json.loads(lines.readline() or b"null") or {"error": ENDED}
        except TimeoutError as error:
            raise EngineUnavailable(
                f"The engine has said nothing for {SILENT_S:g} s. `mlx-mcp engine stop` ends it."
            ) from error
        except OSError:
            answer = {"error": ENDED}
    if "error" in answer:
        raise InvalidRequest(str(answer["error"]))
    return answer


ENDED = "The engine ended before that was done. Run the command again."


@contextmanager
def until_no_engine(
    config: Config, question: dict[str, object], transfer: Transfer | None, went_on: WentOn
) -> Iterator[Answer | None]:
    """The engine's answer; or None, and until the end of the block no engine starts.

    Raises:
        MlxMcpError: as `ask_engine`.
    """
    from mlx_mcp.process.locks import try_lock

    place = place_of_engine()
    deadline = time.monotonic() + 2 * config.shutdown_timeout_s + 10
    while True:
        answer = ask_engine(config, question, transfer, went_on)
        if answer is not None:
            yield answer if "result" in answer else None
            return
        if place is None or not is_made(place):
            yield None
            return
        with try_lock(place.life_lock) as held:
            if held or time.monotonic() > deadline:
                yield None
                return
        time.sleep(POLL_S)


def is_made(place: Place) -> bool:
    """Whether the folder of the engine's place is there, or could be made."""
    try:
        place.prepare()
    except (NoSharedEngine, EngineUnavailable):
        return False
    return True


def place_of_engine() -> Place | None:
    """Where the user's engine would be; None where there can be none."""
    from mlx_mcp.process.place import user_place

    try:
        return user_place()
    except NoSharedEngine:
        return None
