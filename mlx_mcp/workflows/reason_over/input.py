"""What a question is asked over, in a sandbox of its own: files, another sandbox's variables, what a session says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.files import Texts
from mlx_mcp.service.service import Service
from mlx_mcp.service.transcripts import transcript
from mlx_mcp.workflows.asking import Budget, unheard
from mlx_mcp.workflows.sandbox.runtime import Limits
from mlx_mcp.workflows.sandbox.sandbox import Program, Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

NOTHING = "None"  # a program that only takes its inputs


@dataclass(frozen=True)
class Input:
    """One of three: paths and globs of files, the handle or name of a sandbox, or of a session."""

    files: tuple[str, ...] = ()
    sandbox: str = ""
    session: str = ""


@dataclass(frozen=True)
class Filled:
    """A sandbox that has the input as variables, and the files that were read for it."""

    sandbox: Sandbox
    texts: Texts


@asynccontextmanager
async def filled(
    service: Service, caller: Caller, sandboxes: Sandboxes, given: Input, model: str, keep: bool
) -> AsyncIterator[Filled]:
    """A sandbox with the input, which is closed with the block; one that is to be kept, only if the block fails.

    Files are the variable `files`, by path; the text of a single one, or of a session, is `context`. Of a sandbox it is
    a fork, so that the sandbox itself stays as it is.

    Raises:
        InvalidRequest: not one of the three was given, or a file cannot be read.
        MlxMcpError: there is no such sandbox or session, or programs cannot be run here.
    """
    if sum(map(bool, (given.files, given.sandbox, given.session))) != 1:
        raise InvalidRequest("Give one of `files`, `sandbox` and `session`: what the question is asked over.")
    await sandboxes.runtime()
    texts, inputs = Texts(), dict[str, Any]()
    if given.files:
        texts = await asyncio.to_thread(caller.files.texts, list(given.files))
        inputs["files"] = texts.files
        if len(texts.files) == 1:
            [inputs["context"]] = texts.files.values()
    elif given.session:
        inputs["context"] = await said_in(service, caller, given.session)
    if given.sandbox:
        [sandbox] = await sandboxes.fork(service, caller, given.sandbox, 1, ())
        sandbox.kept.temporary = True
    else:
        sandbox = await sandboxes.create(service, caller, model=model, temporary=True)
    whole = False
    try:
        if inputs:
            await fill(service, caller, sandboxes, sandbox, inputs)
        yield Filled(sandbox, texts)
        whole = True
    finally:
        sandbox.kept.temporary = not (keep and whole)
        if sandbox.kept.temporary:
            await sandboxes.close(service, caller.tenant, [sandbox])
        else:
            await sandboxes.keeping.ran(sandbox)


async def fill(
    service: Service, caller: Caller, sandboxes: Sandboxes, sandbox: Sandbox, inputs: dict[str, Any]
) -> None:
    """Give a sandbox variables."""
    await sandboxes.run(service, caller, sandbox, Program(NOTHING, inputs), Limits(), Budget(), unheard)


async def said_in(service: Service, caller: Caller, session: str) -> str:
    """What was said in a session: the role of each message on a line, its text, an empty line."""
    made = await transcript(service, caller, session)
    return "\n\n".join(f"{message.role or 'text'}:\n{message.text}" for message in made.messages)
