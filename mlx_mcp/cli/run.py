"""`mlx-mcp run`: one prompt, answered in the terminal by an engine of its own."""

from __future__ import annotations

import asyncio
import json
import os
import select
import stat
import sys
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from mlx_mcp.cli.output import show_json
from mlx_mcp.cli.reporting import INTERRUPTED, note
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.files import decoded, framed

if TYPE_CHECKING:
    from mlx_mcp.config import Config
    from mlx_mcp.core.sampling import Sampling
    from mlx_mcp.engine.client import EngineClient
    from mlx_mcp.engine.requests import GenerateRequest, Result

MAX_FILES = 64
SILENT_S = 3.0  # a pipe that says nothing for so long is spoken of
BREAK = "\n\n"  # between files, what came through the pipe, and the prompt


@dataclass(frozen=True)
class Limits:
    """What is read at most, in bytes."""

    file_bytes: int
    total_bytes: int


def whole_prompt(prompt: str | None, files: list[str], limits: Limits) -> str:
    """The files, then what comes through the pipe that stdin is, then the prompt; `-` is stdin, whatever that is.

    Raises:
        InvalidRequest: there is no prompt, or something cannot be read.
    """
    if len(files) > MAX_FILES:
        raise InvalidRequest(f"{len(files)} files are too many: give at most {MAX_FILES}.")
    if prompt in (None, "-") and not is_piped() and sys.stdin is not None and sys.stdin.isatty():
        if prompt is None:
            raise InvalidRequest('Say what the model should do: mlx-mcp run "…", or `… | mlx-mcp run`.')
        note("reading the prompt from the terminal; Ctrl-D ends it.")
    said = stdin_text(limits) if prompt in (None, "-") or is_piped() else ""
    texts, total = [], 0
    for path in files:
        text, num_bytes = read_file(path, limits)
        total += num_bytes
        if total > limits.total_bytes:
            raise InvalidRequest(
                f"The files up to {path!r} have {total} bytes, and {limits.total_bytes} are read at most. Give fewer, "
                "or raise MLX_MCP_MAX_FILES_BYTES."
            )
        texts.append(text)
    own = [part for part in (said, "" if prompt in (None, "-") else prompt) if part and part.strip()]
    if not own:
        raise InvalidRequest('The prompt is empty. Say what the model should do: mlx-mcp run "…".')
    return BREAK.join([*texts, *own])


def is_piped() -> bool:
    """Whether stdin is a pipe or a file: something that was put there to be read.

    Not a socket: programs that start others leave one open, and say nothing.
    """
    if sys.stdin is None:  # it is closed
        return False
    mode = os.fstat(0).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def stdin_text(limits: Limits) -> str:
    """All of stdin.

    Raises:
        InvalidRequest: it is too long, or no text.
    """
    if sys.stdin is None:  # what has its number by now is something else
        raise InvalidRequest("stdin is closed. Give the prompt as an argument.")
    try:
        if not os.isatty(0) and not select.select([0], [], [], SILENT_S)[0]:
            note("waiting for the end of stdin; give </dev/null if nothing comes from there.")
        with open(0, "rb", closefd=False) as stdin:
            data = stdin.read(limits.total_bytes + 1)
    except OSError as error:
        raise InvalidRequest(f"stdin cannot be read: {error.strerror}. Give the prompt as an argument.") from error
    if len(data) > limits.total_bytes:
        raise InvalidRequest(
            f"More than {limits.total_bytes} bytes come through stdin. Send the part that matters, or raise "
            "MLX_MCP_MAX_FILES_BYTES."
        )
    return decoded("stdin", data).strip("\n")


def read_file(path: str, limits: Limits) -> tuple[str, int]:
    """A file as the model sees it, and how many bytes it has; any that this user may read, a pipe too.

    Raises:
        InvalidRequest: it is not there, too long, or no text.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(limits.file_bytes + 1)
    except FileNotFoundError as error:
        raise InvalidRequest(f"There is no file {path!r}. Give the path of one.") from error
    except IsADirectoryError as error:
        raise InvalidRequest(f"{path!r} is a folder: give the files in it, one by one.") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{path!r} cannot be read: {why}. Give another file.") from error
    if len(data) > limits.file_bytes:
        raise InvalidRequest(
            f"{path!r} has more than {limits.file_bytes} bytes. Give the part that matters, or raise "
            "MLX_MCP_MAX_FILE_BYTES."
        )
    return framed(path, decoded(path, data)), len(data)


def json_schema(given: str, limits: Limits) -> str:
    """A JSON schema that was given as JSON, or as the path of a file.

    Raises:
        InvalidRequest: it is neither.
    """
    where, text = "--schema", given
    if not given.lstrip().startswith("{"):
        where = repr(given)
        try:
            with open(given, "rb") as file:
                text = decoded(given, file.read(limits.file_bytes))
        except OSError as error:
            raise InvalidRequest(
                f"--schema must be a JSON object, or a file that can be read ({given!r}: {error.strerror})."
            ) from error
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"The schema in {where} is no JSON: {error}. Correct it.") from error
    if not isinstance(schema, dict):
        raise InvalidRequest(f'The schema in {where} must be a JSON object, such as {{"type": "object"}}.')
    return json.dumps(schema)


async def answer(client: EngineClient, request: GenerateRequest, as_json: bool) -> Result:
    """Print the answer as it is generated, or all of the result as JSON; on the way there show how far it is."""
    from mlx_mcp.chat.answer import TextKind
    from mlx_mcp.cli.progress import Display
    from mlx_mcp.engine.requests import Delta, Progress, Result

    result = None
    with Display() as display:
        async with aclosing(client.generate(request)) as updates:
            async for update in updates:
                match update:
                    case Progress():
                        display.show(update)
                    case Delta(piece, _, kind) if not as_json:
                        display.clear()
                        typer.echo(piece, nl=False, err=kind is not TextKind.ANSWER)
                    case Result():
                        result = update
    assert result is not None, "a generation ends with a result or an error"
    if as_json:
        from mlx_mcp.api.web.translate import generation

        show_json(generation(result).model_dump(mode="json", exclude_none=True))
    else:
        typer.echo()
    return result


def request_of(
    config: Config,
    prompt: str | None,
    files: list[str] | None,
    schema: str | None,
    system: str | None,
    sampling: Sampling,
) -> GenerateRequest:
    """What the arguments ask for.

    Raises:
        InvalidRequest: there is no prompt, or something cannot be read.
    """
    from mlx_mcp.chat.message import Message
    from mlx_mcp.chat.prompt import Grammar, GrammarKind
    from mlx_mcp.engine.requests import GenerateRequest

    limits = Limits(config.max_file_bytes, config.max_files_bytes)
    grammar = None if schema is None else Grammar(GrammarKind.JSON_SCHEMA, json_schema(schema, limits))
    user = Message("user", whole_prompt(prompt, files or [], limits))
    return GenerateRequest((*([Message("system", system)] if system else []), user), None, sampling, grammar=grammar)


def generate(config: Config, request: GenerateRequest, as_json: bool) -> None:
    """Answer a request with an engine of this process, which ends with it."""
    from mlx_mcp.core.sequence import FinishReason
    from mlx_mcp.hosting.logs import configure_logs
    from mlx_mcp.wiring import wire

    configure_logs(config)
    client, _ = wire(config)
    try:
        result = asyncio.run(answer(client, request, as_json))
    except KeyboardInterrupt:
        # At once: a thread that imports MLX or fetches a model cannot be stopped, and must not run into the
        # interpreter's end. Nothing is on its way to the disk.
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    finally:
        client.close()
    if not as_json:
        line = (
            f"{result.model}: {result.prompt_tokens} prompt tokens, {result.completion_tokens} generated, "
            f"ended by {result.finish_reason}"
        )
        typer.echo(line, err=True)
        for said in result.notes:
            note(said)
    if request.grammar is not None and result.finish_reason is FinishReason.LENGTH:
        note("the answer was cut off by --max-tokens, so it is not whole JSON. Allow more.")
