"""`mlx-mcp launch claude-code`: Claude Code, with a model of this server in place of Anthropic's."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from mlx_mcp.cli.options import Model
from mlx_mcp.cli.reporting import reporting_errors
from mlx_mcp.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from mlx_mcp.config import Config

SERVING = re.compile(r"serving '(.+)' at (\S+)/mcp")  # what `serve` says once it is there
SAID_LINES = 20  # of a server that does not come up, which are shown
END_S = 30.0  # for it to end by itself
HOW_TO_INSTALL = "npm install -g @anthropic-ai/claude-code"
# Claude Code asks for models by several names, for its sub-agents and for small tasks too; here all are one model.
MODELS = (
    "ANTHROPIC_MODEL",
    "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "ANTHROPIC_DEFAULT_FABLE_MODEL",
    "ANTHROPIC_SMALL_FAST_MODEL",
    "CLAUDE_CODE_SUBAGENT_MODEL",
)
FIXED = {
    "ANTHROPIC_API_KEY": "",  # of Anthropic's own service, which Claude Code would prefer
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # a line that differs by conversation, before the system prompt
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "API_TIMEOUT_MS": "3600000",  # a local model may read a long prompt for minutes
}

launch = typer.Typer(help="Start a program on a model of this server.", no_args_is_help=True)


@launch.callback()
def group() -> None:
    """Start a program on a model of this server."""


@launch.command("claude-code")
@reporting_errors
def claude_code(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENT]...", help="Arguments of Claude Code, after `--`.")
    ] = None,
    model: Model = None,
    url: Annotated[
        str | None, typer.Option("--url", help="A server that runs (`serve --http`), in place of one of its own.")
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="Print the environment, for a shell; start nothing.")] = False,
) -> None:
    """Start Claude Code on a model of this server, which serves HTTP on loopback for as long as that runs."""
    from mlx_mcp.config import Config

    config = Config.load(model=model)
    token = "none" if config.token is None else config.token.get_secret_value()
    if show:
        at = url or f"http://{config.host}:{config.port}"
        for name, value in environment(at, token, name_of(config), context_of(config)).items():
            typer.echo(f"export {name}={shlex.quote(value)}")
        return
    program = shutil.which("claude")
    if program is None:
        raise InvalidRequest(f"Claude Code is not here: no `claude` is on the PATH. Install it: {HOW_TO_INSTALL}.")
    if url is not None:
        own = environment(url.rstrip("/"), token, name_of(config), context_of(config))
        raise typer.Exit(run([program, *(arguments or ())], own))
    token = token if config.token is not None else secrets.token_urlsafe(32)
    with serving(model, token) as (name, address):
        own = environment(address, token, name, context_of(config))
        status = run([program, *(arguments or ())], own)
    raise typer.Exit(status)


def environment(url: str, token: str, model: str, context_tokens: int | None) -> dict[str, str]:
    """What Claude Code is told of the server; without the model's context, it takes that for as long as it thinks."""
    known = {} if context_tokens is None else {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(context_tokens)}
    return {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": token, **dict.fromkeys(MODELS, model), **FIXED, **known}


def name_of(config: Config) -> str:
    """The name of the model that serves."""
    from mlx_mcp.wiring import registry_of

    return registry_of(config).resolve(None).name


def context_of(config: Config) -> int | None:
    """The tokens of its context, if that is known before it is loaded."""
    from mlx_mcp.wiring import registry_of

    registry = registry_of(config)
    return registry.entry(registry.resolve(None)).context_tokens


@contextmanager
def serving(model: str | None, token: str) -> Iterator[tuple[str, str]]:
    """A server on a free port of loopback, until the end of the block; yields the name of its model, and its address.

    It is a process without a terminal of its own, so that Ctrl-C there is Claude Code's alone. The engine behind it is
    the user's one.

    Raises:
        ConfigError: it does not come up; with what it said.
    """
    command = [sys.executable, "-m", "mlx_mcp", "serve", "--http", "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(
        [*command, *(() if model is None else ("--model", model))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"MLX_MCP_TOKEN": token},
        start_new_session=True,
    )
    assert server.stderr is not None, "it is a pipe"
    try:
        yield first_words(server.stderr)
    finally:
        server.terminate()
        try:
            server.wait(END_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def first_words(said: IO[str]) -> tuple[str, str]:
    """Read what a server says until it serves; returns the name of its model, and its address.

    Raises:
        ConfigError: it ended before.
    """
    lines: deque[str] = deque(maxlen=SAID_LINES)
    for line in said:
        found = SERVING.search(line)
        if found is not None:
            # Read on, since a full pipe would stop it, and Claude Code has the terminal.
            threading.Thread(target=said.read, daemon=True).start()
            return found[1], found[2]
        lines.append(line.rstrip())
    raise ConfigError(
        f"Claude Code has no server to ask. Change what is wrong there: {' '.join(lines) or 'it said nothing'}"
    )


def run(command: list[str], own: dict[str, str]) -> int:
    """Run a command in this terminal with some variables more; returns its exit status as a shell has it.

    Signals go to it. Ctrl-C comes to both from the terminal, and what it means is for the command to say.
    """
    child: subprocess.Popen[bytes] | None = None
    waiting: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        if child is None:
            waiting.append(number)
        else:
            child.send_signal(number)

    before = {each: signal.signal(each, pass_on) for each in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which it would inherit
    try:
        child = subprocess.Popen(command, env=os.environ | own)
        for number in waiting:
            child.send_signal(number)
        status = child.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return status if status >= 0 else 128 - status
