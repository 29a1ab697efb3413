"""What the sharing benchmark asks of every server, and what of the answers' times goes into its table."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import mean, median

from llama import Messages, Texts
from processes import ServerFailed
from servers import Answer, Ours, Server
from table import (
    BURST,
    FORK,
    FORK_ALONE,
    PRIMED,
    REPEAT,
    ROUND_2,
    ROUND_2_WORST,
    ROUND_TRIP,
    SECOND_TURN,
    SENT_AGAIN,
    STORED,
    Line,
    Sample,
)

from mlx_mcp.core.cache.blocks import BlockHash, BlockPool
from mlx_mcp.core.layout import Form
from mlx_mcp.core.session import SessionOptions, SessionStore
from mlx_mcp.core.slots import Ledger


@dataclass(frozen=True)
class Sizes:
    """How long the texts are, in tokens, and how many there are."""

    prompt: int = 2500
    prefix: int = 2000
    tail: int = 32
    children: int = 8
    system: int = 800
    brief: int = 400
    turn: int = 16  # of an agent in round 2
    agents: int = 14
    forked: tuple[int, int] = (80, 8000)
    forks: int = 50


SHORT = Sizes(prompt=300, prefix=200, tail=16, children=3, system=130, brief=60, agents=3, forked=(80, 400), forks=5)


@dataclass(frozen=True)
class Bench:
    """What a workload runs with."""

    texts: Texts
    sizes: Sizes
    token_bytes: int  # keys and values of one token

    def check_cold(self, server: Server, answer: Answer, messages: Messages) -> float:
        """The seconds of a cold run, which must have been one, of the length that was meant."""
        expected = len(self.texts.tokens(messages))
        if answer.prompt_tokens != expected or answer.cached_tokens > expected / 4:
            raise ServerFailed(f"{server.process.name} was to read {expected} new tokens, and what it did is {answer}.")
        return answer.seconds

    async def cold(self, server: Server, messages: Messages) -> float:
        """Seconds that texts take which the server has not seen."""
        return self.check_cold(server, await server.say(messages), messages)

    def texts_of(self, count: int, num_tokens: int) -> list[str]:
        """New texts."""
        return [self.texts.text(num_tokens) for _ in range(count)]


async def w1(server: Server, bench: Bench) -> dict[Line, Sample]:
    """A long prompt, the same again, and a second turn."""
    prompt: Messages = [("user", bench.texts.text(bench.sizes.prompt))]
    first, go_on = await server.begin(prompt)
    cold = bench.check_cold(server, first, prompt)
    taken = {REPEAT: (cold, (await server.say(prompt)).seconds)}
    if isinstance(server, Ours):
        taken[SECOND_TURN] = (cold, (await go_on(bench.texts.text(bench.sizes.tail))).seconds)
    more = [("assistant", first.text), ("user", bench.texts.text(bench.sizes.tail))]
    taken[SENT_AGAIN] = (cold, (await server.say([*prompt, *more])).seconds)
    return taken


async def w2(server: Server, bench: Bench) -> dict[Line, Sample]:
    """Children of a primed parent, at once."""
    sizes, text = bench.sizes, bench.texts.text
    cold = await bench.cold(server, [("system", text(sizes.prefix)), ("user", text(sizes.tail))])
    taken: dict[Line, Sample] = {}
    for way, prime in server.primings.items():
        children = await prime(text(sizes.prefix), sizes.children)
        tails = bench.texts_of(sizes.children, sizes.tail)
        answers = await asyncio.gather(*(child(tail) for child, tail in zip(children, tails, strict=True)))
        times = [answer.seconds for answer in answers]
        typical, last = PRIMED[way]
        taken |= {typical: (cold, median(times)), last: (cold, max(times))}
    return taken


async def w3(server: Server, bench: Bench) -> dict[Line, Sample]:
    """Calls at once that share a prefix nobody primed."""
    sizes, text = bench.sizes, bench.texts.text
    cold = await bench.cold(server, [("system", text(sizes.prefix)), ("user", text(sizes.tail))])
    prefix, tails = text(sizes.prefix), bench.texts_of(sizes.children, sizes.tail)
    answers = await asyncio.gather(*(server.say([("system", prefix), ("user", tail)]) for tail in tails))
    return {BURST: (cold, max(answer.seconds for answer in answers))}


async def swarm(server: Server, bench: Bench) -> dict[Line, Sample]:
    """W4 and W7: agents in turn, and what they leave in memory."""
    sizes, texts = bench.sizes, bench.texts
    system = ("system", texts.text(sizes.system))
    briefs, prompts = bench.texts_of(sizes.agents, sizes.brief), bench.texts_of(sizes.agents, sizes.turn)
    before = await server.bytes_before()
    begun = [await server.begin([system, ("user", brief)]) for brief in briefs]
    times = [(await go_on(prompt)).seconds for (_, go_on), prompt in zip(begun, prompts, strict=True)]
    stored = await server.bytes_stored()

    said: list[Messages] = [
        [system, ("user", brief), ("assistant", first.text), ("user", prompt)]
        for brief, (first, _), prompt in zip(briefs, begun, prompts, strict=True)
    ]
    cold = await bench.cold(server, texts.alike(said[0]))
    taken = {ROUND_2: (cold, median(times)), ROUND_2_WORST: (cold, max(times))}
    if stored is not None:
        num_bytes, kept = stored
        tokens = [texts.tokens(messages) for messages in said]
        common = next(i for i, ids in enumerate(zip(*tokens, strict=False)) if len(set(ids)) > 1)
        agents = sizes.agents if kept is None else min(kept, sizes.agents)
        needed = (common + agents * mean(len(each) - common for each in tokens)) * bench.token_bytes
        taken[STORED] = needed, num_bytes - before
    return taken


async def fork(server: Server, bench: Bench) -> dict[Line, Sample]:
    """What a fork takes; nothing to compare on their side."""
    if not isinstance(server, Ours):
        return {}
    short, long = [
        (await server.call("create_session", system=bench.texts.text(n)))[0]["session"] for n in bench.sizes.forked
    ]
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(bench.sizes.forks):
        for session in (short, long):
            forked, seconds = await server.call("fork_session", session=session)
            taken[session].append(seconds)
            await server.call("close_session", sessions=forked["sessions"])
        taken["list_models"].append((await server.call("list_models"))[1])
    took = median(taken[long])
    alone = [median(fork_seconds(n) for _ in range(bench.sizes.forks)) for n in bench.sizes.forked]
    return {
        FORK: (median(taken[short]), took),
        ROUND_TRIP: (median(taken["list_models"]), took),
        FORK_ALONE: (alone[0], alone[1]),
    }


def fork_seconds(num_tokens: int) -> float:
    """What a fork of a session of so many tokens takes in the engine itself."""
    pool = BlockPool(Ledger(1 << 40), 64)
    store, block = SessionStore(pool, time.monotonic, 10, 1e9), pool.root(b"root", BlockHash(b"root"))
    session = store.open("", "model", SessionOptions(), (), turn=1)
    for start in range(0, num_tokens, 64):
        tokens = tuple(range(start, min(start + 64, num_tokens)))
        block = pool.add(block, BlockHash(str(start).encode()), tokens, Nothing())
    store.finish(session, tuple(range(num_tokens)), block, "assistant")
    start_s = time.perf_counter()
    store.fork(session, 1, ())
    return time.perf_counter() - start_s


class Nothing:
    """A payload of no bytes."""

    nbytes, window_start, has_state = 0, 0, True

    def pack(self) -> tuple[Form, tuple[memoryview, ...]]:
        """See Payload.pack."""
        return Form((), ()), ()


WORKLOADS: dict[str, Callable[[Server, Bench], Awaitable[dict[Line, Sample]]]] = {
    "W4": swarm,  # first, since W7 is about what is in memory: with theirs nothing else must be
    "W7": swarm,
    "W1": w1,
    "W2": w2,
    "W3": w3,
    "fork": fork,
}
