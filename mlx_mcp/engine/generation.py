"""One generation as its caller sees it: load and encode, submit, follow, and cancel when the caller goes away.

Owns what lies between text and tokens: loading on first use, the chat template, grammars, streaming text and stop
strings. Knows nothing of MCP or MLX.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mlx_mcp.chat.prompt import AUTO, NO_BUDGET, NO_OFF, NO_SWITCH, NONE, Holding, Prompt, Reasoning
from mlx_mcp.core.origin import Origin
from mlx_mcp.core.ports import LoadedModel, ModelRegistry, ModelSpec
from mlx_mcp.core.sequence import Constraint, FinishReason, SamplingParams
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.engine.answer import Answer
from mlx_mcp.engine.loading import Hold, Models, queued
from mlx_mcp.engine.mailbox import CHECK_S, Mailbox, repeated
from mlx_mcp.engine.messages import (
    Cancel,
    EncodeAgain,
    Encoded,
    Finish,
    Finished,
    Prefilled,
    Submit,
    Token,
    Turn,
    Waiting,
)
from mlx_mcp.engine.requests import Delta, GenerateRequest, Progress, Result, Update, sampling_params, without_tokens
from mlx_mcp.engine.spellings import Spellings
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import EngineDead, InvalidRequest, UnknownSession

T = TypeVar("T")


@dataclass(frozen=True)
class EncodedRequest:
    """A request as tokens, for a model that is in memory and a session as it is now."""

    spec: ModelSpec
    model: LoadedModel
    session: SessionInfo | None
    prompt: Prompt

    @property
    def num_before(self) -> int:
        """Tokens of the session that come before the prompt."""
        return 0 if self.session is None else self.session.num_tokens

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, with those of the session."""
        return self.num_before + len(self.prompt.ids)


@dataclass(frozen=True)
class Ready(EncodedRequest):
    """The same, with how its answer is drawn and what that is held to."""

    params: SamplingParams
    constraint: Constraint | None


class Generation:
    """Carries out one request."""

    def __init__(
        self,
        thread: EngineThread,
        registry: ModelRegistry,
        models: Models,
        spellings: Spellings,
        find_session: Callable[[str, str, bool], Awaitable[SessionInfo]],
        request: GenerateRequest,
        group: str,
    ) -> None:
        self._thread, self._registry, self._models, self._find_session = thread, registry, models, find_session
        self._spellings, self._request, self._group = spellings, request, group
        self._ended = True  # whether the engine has nothing of it

    async def run(self) -> AsyncGenerator[Update, None]:
        """Yield progress and text, and last the Result; see EngineClient.generate."""
        with Mailbox(self._thread, next(self._thread.ids)) as mailbox:
            call_id, again = mailbox.call_id, False
            try:
                while True:
                    ready: Ready | None = None
                    with Hold(self._thread) as hold:
                        # `aclosing`: a bare `async for` would leave it open until the garbage collector comes.
                        async with aclosing(self._get_ready(hold)) as steps:
                            async for step in steps:
                                if isinstance(step, Ready):
                                    ready = step
                                else:
                                    yield step
                        assert ready is not None, "getting ready ends with tokens or an error"
                        self._thread.send(
                            self._encoded(call_id, ready, hold) if again else self._submit(call_id, ready, hold)
                        )
                        again, self._ended = True, False
                    async with aclosing(self._follow(mailbox, ready)) as updates:
                        async for update in updates:
                            yield update
                            if isinstance(update, Result):
                                return
                    del ready, step  # they would keep the weights of a model that has to go
            finally:
                if not self._ended:
                    with suppress(EngineDead):  # then no row is left to free
                        self._thread.send(Cancel(call_id))

    async def encode(self, hold: Hold) -> AsyncGenerator[Progress | EncodedRequest, None]:
        """Yield progress of a load, and last the request as tokens, for a model that stays until it is handed over."""
        request = self._request
        # Looked up again each time: another turn may have gone on with it.
        session = await self._find_session(request.tenant, request.session, False) if request.session else None
        name = request.model if session is None else request.model or session.model
        spec = self._registry.at_hand(name)
        if spec is None:
            spec = await asyncio.to_thread(self._registry.resolve, name)
        model: LoadedModel | None = None
        async with aclosing(self._models.get(spec, hold)) as steps:
            async for step in steps:
                if isinstance(step, LoadedModel):
                    model = step
                else:
                    yield step
        assert model is not None, "loading ends with a model or an error"
        # On threads: templates and grammars may take long, and the loop serves everyone.
        async with on_thread(encode, model, request, session, self._spellings) as encoding:
            while not (await asyncio.wait([encoding], timeout=CHECK_S))[0]:
                yield Progress("queued", "encoding the prompt")
            prompt = encoding.result()
        yield EncodedRequest(spec, model, session, prompt)

    async def _get_ready(self, hold: Hold) -> AsyncGenerator[Progress | Ready, None]:
        """Yield progress, and last the request as tokens, with what its answer is held to."""
        request, encoded = self._request, None
        async with aclosing(self.encode(hold)) as steps:
            async for step in steps:
                if isinstance(step, EncodedRequest):
                    encoded = step
                else:
                    yield step
        assert encoded is not None, "encoding ends with tokens or an error"
        model, session, prompt = encoded.model, encoded.session, encoded.prompt
        params = sampling_params(request, encoded.num_prompt, model)
        tools = request.tools if session is None else session.tools
        holding = holding_of(request, tools)
        if holding.tool_choice == NONE:
            params = without_tokens(params, model.tokenizer.call_tokens if tools else ())
        if holding.thinking_tokens is not None and not model.tokenizer.knows_thoughts:
            prompt = replace(prompt, notes=(*prompt.notes, NO_BUDGET))
        constraint = None
        if holding.anything and not request.context:
            async with on_thread(model.tokenizer.hold, prompt, holding, model.vocab_size) as compiling:
                while not (await asyncio.wait([compiling], timeout=CHECK_S))[0]:
                    yield Progress("queued", "compiling the grammar")
                constraint = compiling.result()
        yield Ready(encoded.spec, model, session, prompt, params, constraint)

    def _submit(self, call_id: int, ready: Ready, hold: Hold) -> Submit:
        request = self._request
        return Submit(
            call_id,
            ready.model.name,
            ready.prompt.ids,
            ready.params,
            request.lane,
            ready.constraint,
            turn_of(request, ready.session),
            self._group,
            hold.hand_over(),
        )

    def _encoded(self, call_id: int, ready: Ready, hold: Hold) -> Encoded:
        after = turn_of(self._request, ready.session).after
        return Encoded(call_id, ready.prompt.ids, ready.params, ready.constraint, after, hold.hand_over())

    async def _follow(self, mailbox: Mailbox, ready: Ready) -> AsyncGenerator[Update, None]:
        """Yield what comes of the call; ends without a Result if the prompt has to be encoded again."""
        request = self._request
        tools = request.tools if ready.session is None else ready.session.tools
        tools = () if request.tool_choice == NONE else tools
        answer = Answer(ready.model, ready.prompt, ready.num_before, request, tools)
        num_prompt = answer.num_prompt
        total = num_prompt + ready.params.max_tokens
        progress = Progress("queued", "queued", 0, total)
        session: SessionInfo | None = None
        reason: FinishReason | None
        ending = request.ending
        ending.wake = mailbox.wake
        while not self._ended:
            deltas: list[Delta] = []
            reason = None
            if ending.wanted:  # again and again: the engine has nothing to end before there is a row
                self._thread.send(Finish(mailbox.call_id, answer.num_tokens))
            match await mailbox.next():
                case Waiting() as waiting:
                    progress = Progress("queued", queued(waiting), 0, total)
                case Prefilled(done) as prefilled:
                    answer.prefilled(prefilled)
                    told = f"reading the prompt: {done} of {num_prompt} tokens"
                    progress = Progress("prefill", told, done, total, admitted_at=prefilled.admitted_at)
                case Token() as token if not (answer.stopped or ending.wanted):
                    deltas = answer.add(token)
                    done = answer.num_tokens
                    progress = Progress("decode", f"{done} tokens", num_prompt + done, total)
                    if answer.stopped:  # what was computed is kept for whoever goes on with it
                        self._thread.send(Finish(mailbox.call_id, answer.num_tokens))
                case Finished(reason, session):
                    self._ended = True
                    reason = FinishReason.LENGTH if ending.wanted else reason
                    deltas = answer.finish(reason)
                    if session is not None and session.num_tokens > answer.num_prompt + answer.num_tokens:
                        session = await self._shortened(session)
                case EncodeAgain(loaded):
                    if not loaded:
                        self._models.forget(ready.spec)
                    return
                case _:  # nothing new for a while
                    progress = repeated(self._thread, progress)
            for delta in deltas:
                yield delta
            if reason is not None:
                if ready.session is None:
                    self._spellings.remember(request.tenant, ready.model, ready.prompt.ids, answer.ids)
                yield answer.result(reason, session)
                return
            if not deltas:
                yield replace(progress, num_prompt=answer.num_prompt, num_cached=answer.num_cached)

    async def _shortened(self, session: SessionInfo) -> SessionInfo:
        """A session that ended by itself before the engine took the Finish that shortens it, as that leaves it."""
        with suppress(UnknownSession, EngineDead):  # it is closed by now, and the answer is whole all the same
            return await self._find_session(self._request.tenant, session.session_id, True)
        return session


def turn_of(request: GenerateRequest, session: SessionInfo | None) -> Turn:
    """What the engine has to know of a request's session."""
    turn = Turn(request.tenant, shorten=request.shorten, origin=Origin(request.who, time.time()))
    if session is None:
        context = ""
        if request.context:
            context = "assistant" if request.messages[-1].role == "assistant" else "user"
        return replace(turn, opens=request.opens, tools=request.tools, context=context)
    shorten = request.shorten or request.sampling.max_tokens is None
    turn = replace(turn, session=session.session_id, after=session.after)
    return replace(turn, keep=request.keep, queue=request.queue, shorten=shorten)


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
    tokenizer, messages = model.tokenizer, list(request.messages)
    quiet = request.grammar is not None and request.reasoning is None  # a grammar does without thoughts
    reasoning = Reasoning.OFF if quiet else request.reasoning
    if request.raw is not None:
        prompt = tokenizer.encode_raw(request.raw, gone)
    elif session is not None:
        prompt = tokenizer.encode_turn(messages, session.after, session.tools, reasoning, gone)
    elif request.context:
        prompt = tokenizer.encode_context(messages, request.tools, gone)
    else:
        prompt = tokenizer.encode_chat(messages, request.tools, reasoning, gone)
    if quiet:  # nobody asked for a switch
        prompt = replace(prompt, notes=tuple(note for note in prompt.notes if note not in (NO_SWITCH, NO_OFF)))
    if session is not None:
        return prompt
    return replace(prompt, ids=spellings.respelt(request.tenant, model, prompt.ids))


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
