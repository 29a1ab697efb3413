"""Real hosts and client libraries against this tree, as their users run them.

Run with `make hosts`, or `python -m benchmarks.hosts [--short]` once that has installed the libraries in build/hosts;
`make conformance` is the suite alone, which CI runs. The conformance suite asks for everything that two revisions of
the protocol require; MCP Inspector looks for faults in the tools' schemas; client libraries and Inspector list and call
the tools over stdio and HTTP; clients of OpenAI's API have a streamed answer with a tool; Claude Code connects; and
four hosts are registered with and left again. All but the suite's server are windows on one engine process, which is
not the user's and ends with the checks.

Prints a line for each check, does them all, and ends with 1 if one failed. `--short` leaves out the hosts and all of
Inspector but the schemas. Where PyPI or npm's registry cannot be reached, one line says what is skipped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from benchmarks.hosts import claude_code, conformance, registering
from benchmarks.hosts.inspector import Inspector
from benchmarks.hosts.libraries import CHATTING, PYTHON, chats, tells
from benchmarks.hosts.packages import Unreachable, install
from benchmarks.hosts.place import SERVE, TOKEN, WORK, move_in, served
from mlx_mcp.errors import EngineUnavailable
from mlx_mcp.process.daemon import start_if_needed, stop
from mlx_mcp.process.place import user_place

Check = tuple[str, Callable[[], str]]  # its name; it returns what is worth saying, and raises if it fails
STOP_S = 20.0


def checks(url: str, guarded: str, suite: str, short: bool) -> Iterator[Check]:
    """Every check, given three servers: without a token, with one, and with the suite's fixtures."""
    bearer = f"Authorization: Bearer {TOKEN}"
    http, tokened = [url, "--transport", "http"], [guarded, "--transport", "http", "--header", bearer]
    entries: dict[str, dict[str, Any]] = {
        "stdio": {"command": SERVE[0], "args": SERVE[1:]},
        "HTTP with a token": {"url": guarded, "headers": {"Authorization": f"Bearer {TOKEN}"}},
    }
    yield from conformance_checks(suite)
    for era in ("legacy", "modern"):
        for transport, target in {"stdio": SERVE, "HTTP": http}.items():
            inspector = Inspector(target, era)
            yield f"Inspector, {era}, {transport}", inspector.finds_no_fault if short else inspector.lists_and_calls
        if not short:
            yield f"Inspector's sessions, {era}, HTTP with a token", Inspector(tokened, era).goes_on_in_sessions
    for library in [*PYTHON, "typescript"]:
        for transport, entry in entries.items():
            yield f"{library}, {transport}", partial(tells, library, entry)
    for client in [*CHATTING, "ai_sdk"]:
        yield f"{client}, a chat with a tool", partial(chats, client, f"{guarded.removesuffix('/mcp')}/v1", TOKEN)
    if not short:
        yield "Claude Code", partial(claude_code.connects, url, guarded)
        yield "Claude Code, two at once", claude_code.two_at_once
        for host in registering.PROGRAMS:
            for way in ("command", "file"):
                yield f"install {host}, by its {way}", partial(registering.registers, host, way == "command")


def conformance_checks(suite: str) -> Iterator[Check]:
    """The suite for both revisions, given the server with its fixtures."""
    for revision in conformance.REVISIONS:
        yield f"conformance {revision}", partial(conformance.passes, revision, suite)


def passed(name: str, check: Callable[[], str], log: TextIO) -> bool:
    """Do a check and print a line on how it went; whatever it raises is its failure, and goes to the log as a whole."""
    began = time.monotonic()
    try:
        said, word = check().strip(), "ok"
    except Exception as error:  # a client may fail in any way, and the other checks are still to be done
        said, word = f"{type(error).__name__}: {error}".strip(), "FAILED"
        log.write(f"{name}: {said}\n\n")
    print(f"{word:6} {time.monotonic() - began:5.1f} s  {name}: {said.splitlines()[-1]}", flush=True)
    return word == "ok"


@contextmanager
def engine() -> Iterator[None]:
    """An engine for the block; if it does not end when asked to, it is ended by its id."""
    stop(user_place(), STOP_S)  # one that an earlier run could not end is of an earlier tree
    pid = start_if_needed(user_place())
    try:
        yield
    finally:
        try:
            stop(user_place(), STOP_S)
        except EngineUnavailable:
            os.kill(pid, signal.SIGKILL)
            raise


def suite_server() -> AbstractContextManager[str]:
    """The server that the suite asks."""
    alone = [sys.executable, str(Path(__file__).with_name("fixtures.py")), "serve", "--standalone"]
    return served("suite", *alone, MLX_MCP_STORE_DIR=str(WORK / "suite-store"))


@contextmanager
def conformance_alone() -> Iterator[Iterator[Check]]:
    """The checks of `make conformance`, while their server runs."""
    with suite_server() as suite:
        yield conformance_checks(suite)


@contextmanager
def all_hosts(short: bool) -> Iterator[Iterator[Check]]:
    """The checks of `make hosts`, while the engine and the servers run."""
    with (
        engine(),
        served("plain", *SERVE) as url,
        served("guarded", *SERVE, MLX_MCP_TOKEN=TOKEN) as guarded,
        suite_server() as suite,
    ):
        yield checks(url, guarded, suite, short)


def main() -> None:
    """Install what is missing, start the engine and the servers, do every check, and end with 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description="Checks with real hosts.")
    parser.add_argument("--short", action="store_true", help="without Claude Code and Inspector's calls")
    parser.add_argument("--conformance", action="store_true", help="the conformance suite alone")
    options = parser.parse_args()
    try:
        install(every=not options.conformance)
    except Unreachable as error:
        what = f"{len(conformance.REVISIONS)} checks of conformance" if options.conformance else "all checks of hosts"
        print(f"Skipped: {what}, since a registry cannot be reached: {error}")
        return
    move_in()
    chosen = conformance_alone() if options.conformance else all_hosts(options.short)
    with chosen as every, (WORK / "failures.log").open("w") as log:
        outcomes = [passed(name, check, log) for name, check in every]
    print(f"{outcomes.count(True)} of {len(outcomes)} checks passed")
    if not all(outcomes):
        print(f"What the others said is in {log.name}")
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    main()
