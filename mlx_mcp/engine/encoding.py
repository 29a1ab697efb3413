"""A request's words → token ids and a grammar, on threads: templates and grammars may take long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from mlx_mcp.chat.prompt import AUTO, NO_OFF, NO_SWITCH, NONE, Holding, Prompt, Reasoning
from mlx_mcp.core.ports import ChatTokenizer, LoadedModel
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.engine.requests import GenerateRequest
from mlx_mcp.engine.spellings import Spellings
from mlx_mcp.errors import InvalidRequest

T = TypeVar("T")


def encode(
    model: LoadedModel,
    request: GenerateRequest,
    session: SessionInfo | None,
    spellings: Spellings,
    gone: Callable[[], bool],
) -> Prompt:
    """What a request adds to its session's tokens, or the whole prompt of one without.

    In a whole prompt the answers of the model are as it wrote them; see spellings.

    Raises:
        InvalidRequest: the model's template cannot take it.
    """
    prompt = encode_texts(model.tokenizer, request, session, gone)
    if session is not None:
        return prompt
    return replace(prompt, ids=spellings.respelt(request.tenant, model, prompt.ids))


def encode_texts(
    tokenizer: ChatTokenizer, request: GenerateRequest, session: SessionInfo | None, gone: Callable[[], bool]
) -> Prompt:
    """The same, with all texts as the tokenizer has them."""
    if request.raw is not None:
        return tokenizer.encode_raw(request.raw, gone)
    if request.grammar is not None and request.reasoning is None:
        # A grammar does without thoughts; nobody asked for a switch.
        quiet = encode_texts(tokenizer, replace(request, reasoning=Reasoning.OFF), session, gone)
        return replace(quiet, notes=tuple(note for note in quiet.notes if note not in (NO_SWITCH, NO_OFF)))
    reasoning = request.reasoning
    if session is not None:
        return tokenizer.encode_turn(list(request.messages), session.after, session.tools, reasoning, gone)
    if request.context:
        return tokenizer.encode_context(list(request.messages), request.tools, gone)
    return tokenizer.encode_chat(list(request.messages), request.tools, reasoning, gone)


def holding_of(request: GenerateRequest, tools: tuple[dict[str, Any], ...]) -> Holding:
    """What the answer to a request is held to, where these tools are offered.

    A grammar holds all of an answer, unless thoughts were asked for.

    Raises:
        InvalidRequest: a call is asked for, and there are no tools.
    """
    if not tools and request.tool_choice not in (AUTO, NONE):
        raise InvalidRequest("`tool_choice` asks for a call, and there are no tools: give `tools`, or leave it out.")
    quiet = (Reasoning.OFF,) if request.grammar is None else (Reasoning.OFF, None)
    thinks, budget = request.reasoning not in quiet, request.sampling.reasoning_budget
    return Holding(request.grammar, thinks, budget, tools, request.tool_choice)


@asynccontextmanager
async def on_thread(function: Callable[..., T], *args: Any) -> AsyncIterator[asyncio.Future[T]]:
    """Run it on a daemon thread of its own: threads of a pool hold up each other, and the process's exit.

    It gets one more argument, which tells it whether anybody still waits; nobody does after the block.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever waits may be cancelled, this cannot
    gone = threading.Event()

    def run() -> None:
        try:
            future.set_result(function(*args, gone.is_set))
        except BaseException as error:  # it is for whoever waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    waiting = asyncio.wrap_future(future)
    try:
        yield waiting
    finally:
        gone.set()
        waiting.cancel()
