"""What calls take through the whole engine: the first token cold, cached and from disk, and a fan-out."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass
from statistics import median

from mlx_mcp.bench.effort import Effort
from mlx_mcp.bench.report import Figure
from mlx_mcp.chat.message import Message
from mlx_mcp.core.ports import LoadedModel
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.requests import Count, GenerateRequest, Result
from mlx_mcp.errors import StorageError

ONE = Sampling(max_tokens=1, temperature=0.0)
FEW = Sampling(max_tokens=8, temperature=0.0)
ANSWERS_TOKENS = 192  # of a context that questions, answers and the template may take
SAMPLE_LINES = 16


@dataclass(frozen=True)
class Primed:
    """What the first engine has made, for one that is started after it."""

    figures: list[Figure]
    sessions: list[str]  # persisted


async def load(client: EngineClient) -> LoadedModel:
    """Have the model in memory.

    Raises:
        ModelError: it cannot be loaded, or does not fit.
    """
    found = None
    async with aclosing(client.load_model(None)) as steps:
        async for step in steps:
            found = step
    assert isinstance(found, LoadedModel), "a load ends with the model or an error"
    return found


async def first_calls(client: EngineClient, effort: Effort) -> Primed:
    """The first token cold and from memory, and a fan-out; leaves persisted sessions for `calls_after_restart`."""
    loaded = await load(client)
    lines = await lines_for(client, min(effort.call_tokens, loaded.context_tokens - ANSWERS_TOKENS))
    await answer(client, asked(told(0, lines), "Ready?"))  # kernels are compiled, buffers grow
    cold, cached, sessions, num_tokens, num_cached = [], [], [], 0, 0
    for i in range(1, effort.samples + 1):
        taken, result = await answer(client, asked(told(i, lines), "What is item 3?", opens=SessionOptions()))
        assert result.session is not None, "a call that opens a session returns it"
        session, num_tokens = result.session.session_id, result.prompt_tokens
        cold.append(taken)
        taken, result = await answer(client, asked("What is item 7?", session=session, keep=False))
        cached.append(taken)
        sessions.append(session)
        num_cached = result.cached_tokens
    figures = [
        Figure("first token", "cold", median(cold), "s", note=f"a prompt of {num_tokens} tokens"),
        Figure("first token", "cached", median(cached), "s", note=f"{num_cached} tokens were in memory"),
    ]
    figures += await fan_out(client, told(effort.samples + 1, lines), effort.calls)
    try:
        for session in sessions:
            await client.persist("", session)
    except StorageError as error:
        return Primed([*figures, left_out(str(error))], [])
    return Primed(figures, sessions)


async def calls_after_restart(client: EngineClient, sessions: list[str]) -> list[Figure]:
    """The first token of sessions that an earlier engine has persisted; the load of the model is not counted."""
    if not sessions:
        return []
    await load(client)
    taken, num_restored = [], 0
    for session in sessions:
        seconds, result = await answer(client, asked("What is item 7?", session=session, keep=False))
        taken.append(seconds)
        num_restored = result.restored_tokens
    if not num_restored:
        return [left_out("the engine computed these tokens again rather than read them")]
    note = f"{num_restored} tokens came from disk, or from what the system keeps of it"
    return [Figure("first token", "from disk", median(taken), "s", note=note)]


async def fan_out(client: EngineClient, text: str, num_calls: int) -> list[Figure]:
    """So many calls at once with one text and a question of their own: seconds, and how many tokens were computed."""
    requests = [asked(text, f"What is item {i}?", sampling=FEW) for i in range(num_calls)]
    start = time.perf_counter()
    answers = await asyncio.gather(*(answer(client, request) for request in requests))
    taken = time.perf_counter() - start
    results = [result for _, result in answers]
    total = sum(result.prompt_tokens for result in results)
    computed = total - sum(result.cached_tokens + result.restored_tokens for result in results)
    name = f"{num_calls} calls, one context"
    return [
        Figure("fan-out", name, taken, "s", note=f"until the last of {num_calls} answers of up to 8 tokens"),
        Figure("fan-out", "tokens of the prompts", float(total), "tokens"),
        Figure("fan-out", "computed of these", float(computed), "tokens"),
    ]


def left_out(why: str) -> Figure:
    """The line of sessions from disk, where there is none."""
    return Figure("first token", "from disk", None, "s", note=why)


def told(number: int, lines: int) -> str:
    """A text that differs from those of other numbers from its beginning on."""
    items = "\n".join(f"Item {i} of list {number} is number {i * 37 + number}." for i in range(lines))
    return f"This is list {number}.\n{items}"


def asked(
    *texts: str, session: str = "", keep: bool = True, opens: SessionOptions | None = None, sampling: Sampling = ONE
) -> GenerateRequest:
    """A call that says these texts in one message."""
    message = Message("user", "\n\n".join(texts))
    return GenerateRequest((message,), sampling=sampling, session=session, keep=keep, opens=opens)


async def lines_for(client: EngineClient, num_tokens: int) -> int:
    """How many lines of `told` make a prompt of about so many tokens."""
    sizes = []
    for lines in (SAMPLE_LINES, 2 * SAMPLE_LINES):
        async with aclosing(client.count(asked(told(1, lines)))) as steps:
            sizes += [step.prompt_tokens async for step in steps if isinstance(step, Count)]
    per_line = (sizes[1] - sizes[0]) / SAMPLE_LINES
    return max(1, int(SAMPLE_LINES + (num_tokens - sizes[0]) / per_line))


async def answer(client: EngineClient, request: GenerateRequest) -> tuple[float, Result]:
    """Seconds until a call is answered, and the answer."""
    start = time.perf_counter()
    async with aclosing(client.generate(request)) as updates:
        result = [update async for update in updates][-1]
    assert isinstance(result, Result), "a generation ends with a result or an error"
    return time.perf_counter() - start, result
