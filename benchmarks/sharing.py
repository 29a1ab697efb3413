"""Our server beside its peers: what a shared context saves, each asked through its own network interface.

Run with `make bench-sharing` (minutes; beside mlx_lm.server), `make bench-peers` (beside vllm-mlx and Rapid-MLX too),
or `python benchmarks/sharing.py [WORKLOAD …] [--rounds N] [--short] [--beside NAME=COMMAND …]`. Such a command serves
OpenAI's chat completions; `{model}` in it stands for the model's folder and `{port}` for where to listen.

Starts all of them as processes of its own and as they come, on one llama that it makes itself (random weights,
float32), with OpenBLAS in front where it is installed, one thread of it. In each round all get the same new texts, one
server after the other; those that are not asked are stopped meanwhile, since some of them poll. A time to first token
is that of a call for one token.

Figures are ratios to the same server's own cold run in the same round, medians over the rounds; the times are there to
tell what the ratios are made of. A goal is met if our ratio is as small as it says and no larger than any other's in
the run. Ends with 1 if one is missed, with 2 if a server fails. `--short` is a tiny model and short texts, without
goals. `--wheel` is a model of 5M parameters with the BLAS that the mlx wheel carries: what is computed counts for more
then, and what a call takes besides for less, as with models and prompts that are larger.

    W1    2500 tokens cold, the same again, and a second turn
    W2    a parent primes 2000 tokens, then 8 children go on with 32 of their own, at once
    W3    8 calls at once with the same 2000 tokens, which nobody primed
    W4    14 agents in turn, 800 tokens in common and 400 of their own: the second turn of each, 16 tokens
    W7    the bytes that W4 leaves in memory / those of the 800 tokens once and of what each agent has for itself;
          for mlx_lm.server by its own log (in GB, with two decimals), and of the agents it still has: 10 by default;
          others do not say
    fork  fork_session on a session of 80 and one of 8000 tokens; list_models is a round trip without it; and what the
          engine itself takes for it, which is to be under 1 ms
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import mlx.core as mx
from engine import MODEL_25M  # and with it the root of this tree on the path, for the imports below
from transformers import PreTrainedTokenizerFast

from mlx_mcp.core.cache.blocks import BlockHash, BlockPool
from mlx_mcp.core.session import SessionOptions, SessionStore
from mlx_mcp.core.slots import Ledger
from mlx_mcp.mlx_backend.blas import find_openblas
from tests.models_made import make_model

BLAS = find_openblas()
START_S = 60  # how long a server may take to start
ANSWER_S = 900  # how long a call may take
CONTEXT_TOKENS = 131_072
MODEL_5M = MODEL_25M | {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

Messages = list[tuple[str, str]]  # role, text
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "sharing", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
GoOn = Callable[[str], Awaitable["Answer"]]  # the next turn of a context, for one token


class ServerFailed(Exception):
    """A server did not start or did not answer; says what it wrote last."""


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    workload: str
    what: str
    goal: float | None = None


REPEAT = Line("W1", "exact repeat", 0.05)
SECOND_TURN = Line("W1", "second turn, in its session")
SENT_AGAIN = Line("W1", "second turn, all of it sent again")
PRIMED = {
    "children": (Line("W2", "children, median", 0.25), Line("W2", "children, last", 0.45)),
    "forks": (Line("W2", "forked children, median", 0.25), Line("W2", "forked children, last", 0.45)),
}
BURST = Line("W3", "last of a burst", 1.3)
ROUND_2 = Line("W4", "second round, median", 0.05)
ROUND_2_WORST = Line("W4", "second round, worst")
STORED = Line("W7", "bytes stored / bytes needed", 1.1)
FORK = Line("fork", "of a long session / of a short one")
ROUND_TRIP = Line("fork", "of a long session / list_models")
FORK_ALONE = Line("fork", "in the engine alone, long / short")

Sample = tuple[float, float]  # the cold run, and what is compared with it: seconds, or bytes for W7


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


class Texts:
    """New texts of any number of tokens, and the tokens that the model's template makes of them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, model_max_length=CONTEXT_TOKENS)
        tokens = (token.removeprefix("Ġ") for token in self.tokenizer.get_vocab() if token.startswith("Ġ"))
        self.words = sorted(word for word in tokens if word.isalpha() and self.count(f" {word}") == 1)

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def text(self, num_tokens: int) -> str:
        """Random words; after the first, which has no space before it, each is one token."""
        words = random.choices(self.words, k=num_tokens)
        while self.count(" ".join(words)) > num_tokens:
            words.pop()
        return " ".join(words)

    def tokens(self, messages: Messages) -> list[int]:
        """What the model reads."""
        chat = [{"role": role, "content": text} for role, text in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def alike(self, messages: Messages) -> Messages:
        """A new system prompt and a new prompt that make as many tokens as `messages`."""
        system = self.text(self.count(messages[0][1]))
        rest = len(self.tokens(messages)) - len(self.tokens([("system", system), ("user", "")]))
        return [("system", system), ("user", self.text(rest))]


@dataclass(frozen=True)
class Answer:
    """One token, and how long it took."""

    text: str
    seconds: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Process:
    """A server that runs."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def failed(self, what: str) -> ServerFailed:
        """The error that says so."""
        code = self.popen.poll()
        state = "It runs." if code is None else f"It has ended with {code}."
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        return ServerFailed(f"{self.name} {what}. {state} The end of what it wrote:\n{tail}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and its children, if it runs."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, number)

    async def started(self, find: Callable[[], Awaitable[str | None]]) -> str:
        """What `find` finds, once it does."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.popen.poll() is None:
            if found := await find():
                return found
            await asyncio.sleep(0.05)
        raise self.failed(f"did not start within {START_S} s" if self.popen.poll() is None else "did not start")


@contextmanager
def running(name: str, command: list[str], folder: Path, blas: bool = True) -> Iterator[Process]:
    """Run a server, with its settings and caches in `folder`; it is ended whatever happens.

    `blas` is whether OpenBLAS is put in front.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLX_MCP_")}
    env |= {"MLX_MCP_CONFIG": str(folder / "config.toml"), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    env |= {"MLX_MCP_STORE_DIR": str(folder / "store"), "HOME": str(folder)}
    if BLAS is not None and blas:
        env["LD_PRELOAD"] = BLAS
    env["MLX_MCP_OPENBLAS"] = str(int(blas))
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, start_new_session=True
        )
    process = Process(name, popen, log)
    try:
        yield process
    finally:
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGCONT)
        try:
            popen.wait(20)
        except subprocess.TimeoutExpired:
            process.signal(signal.SIGKILL)
            popen.wait()


class Server(ABC):
    """What the workloads ask of any server. All answers are of one token."""

    process: Process
    primings: dict[str, Callable[[str, int], Awaitable[list[GoOn]]]]  # the ways to prime a prefix for children

    @abstractmethod
    async def say(self, messages: Messages) -> Answer:
        """Answer a whole conversation."""

    @abstractmethod
    async def begin(self, messages: Messages) -> tuple[Answer, GoOn]:
        """Answer a system prompt and a prompt, and go on from there as this server's users would."""

    @abstractmethod
    async def bytes_before(self) -> int:
        """What `bytes_stored` is counted from."""

    @abstractmethod
    async def bytes_stored(self) -> tuple[int, int | None] | None:
        """What is kept in memory of keys and values, and of how many sequences if not of all; None if it is unknown."""

    @abstractmethod
    async def forget(self) -> None:
        """Let go of what the last workload left open."""


class Ours(Server):
    """mlx-mcp, through MCP: a POST for a call, by the client that the peers are asked with."""

    def __init__(self, process: Process, address: str, http: httpx2.AsyncClient) -> None:
        self.process, self.address, self.http = process, address, http
        self.primings = {"children": self.children, "forks": self.forks}

    @staticmethod
    async def find(process: Process) -> str:
        """The address that it prints."""

        async def look() -> str | None:
            found = re.search(r" at (http://\S+)/mcp\n", process.log.read_text(errors="replace"))
            return found and found[1]

        return await process.started(look)

    async def call(self, tool: str, **arguments: Any) -> tuple[dict[str, Any], float]:
        """What a tool returns, and the seconds until then."""
        params = {"name": tool, "arguments": arguments, "_meta": META}
        asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        headers = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": tool}
        headers["accept"] = "application/json, text/event-stream"
        response, seconds = await post(self, f"{self.address}/mcp", asked, headers)
        result = response.get("result", {"isError": True})
        if result.get("isError"):
            raise self.process.failed(f"refused {tool}: {response}")
        return result["structuredContent"], seconds

    async def generate(self, before_s: float = 0.0, **arguments: Any) -> tuple[Answer, str]:
        """A `generate` for one token, and the session it is kept in; `before_s` is added to its time."""
        result, seconds = await self.call("generate", max_tokens=1, **arguments)
        answer = Answer(result["text"], before_s + seconds, result["prompt_tokens"], result["cached_tokens"])
        return answer, result.get("session", "")

    async def say(self, messages: Messages) -> Answer:
        """Without a session if there is one prompt only; else what comes before is put in one, which counts."""
        *earlier, (_, prompt) = [message for message in messages if message[0] != "system"]
        system = "".join(text for role, text in messages if role == "system")
        if not earlier:
            return (await self.generate(system=system, prompt=prompt))[0]
        turns = [{"role": role, "content": text} for role, text in earlier]
        created, seconds = await self.call("create_session", system=system, messages=turns)
        return (await self.generate(seconds, session=created["session"], prompt=prompt, keep=False))[0]

    async def begin(self, messages: Messages) -> tuple[Answer, GoOn]:
        """In a session."""
        given = {"prompt" if role == "user" else role: text for role, text in messages}
        answer, session = await self.generate(**given, keep=True)
        return answer, self.turn(session)

    def turn(self, session: str, keep: bool = True) -> GoOn:
        """What goes on with a session."""

        async def go_on(prompt: str) -> Answer:
            return (await self.generate(session=session, prompt=prompt, keep=keep))[0]

        return go_on

    async def children(self, prefix: str, count: int) -> list[GoOn]:
        """Calls that leave the parent's session as it is."""
        created, _ = await self.call("create_session", system=prefix)
        return [self.turn(created["session"], keep=False)] * count

    async def forks(self, prefix: str, count: int) -> list[GoOn]:
        """A fork of the parent's session for each."""
        created, _ = await self.call("create_session", system=prefix)
        forked, _ = await self.call("fork_session", session=created["session"], count=count)
        return [self.turn(session) for session in forked["sessions"]]

    async def bytes_before(self) -> int:
        """What is cached from before: it stays."""
        return (await self.bytes_stored())[0]

    async def bytes_stored(self) -> tuple[int, int | None]:
        """As /health says."""
        return (await self.http.get(f"{self.address}/health")).json()["cache_bytes"], None

    async def forget(self) -> None:
        """Close all sessions."""
        await self.call("close_session", all=True)


class Peer(Server):
    """A peer, through OpenAI's chat completions. Every turn sends all that was said before."""

    def __init__(self, process: Process, address: str, model: Path, http: httpx2.AsyncClient) -> None:
        self.process, self.address, self.model, self.http = process, address, model, http
        self.primings = {"children": self.children}

    @staticmethod
    async def find(process: Process, address: str, http: httpx2.AsyncClient) -> str:
        """The address, once it listens."""

        async def look() -> str | None:
            try:
                return address if (await http.get(f"{address}/health", timeout=1)).is_success else None
            except httpx2.TransportError:
                return None

        return await process.started(look)

    async def say(self, messages: Messages) -> Answer:
        """One completion."""
        chat = [{"role": role, "content": text} for role, text in messages]
        asked = {"model": str(self.model), "messages": chat, "max_tokens": 1, "temperature": 0.0}
        body, seconds = await post(self, f"{self.address}/v1/chat/completions", asked, {})
        usage = body["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Answer(body["choices"][0]["message"]["content"], seconds, usage["prompt_tokens"], cached)

    async def begin(self, messages: Messages) -> tuple[Answer, GoOn]:
        """The answer becomes part of what is sent."""
        answer = await self.say(messages)

        async def go_on(prompt: str) -> Answer:
            return await self.say([*messages, ("assistant", answer.text), ("user", prompt)])

        return answer, go_on

    async def children(self, prefix: str, count: int) -> list[GoOn]:
        """Calls that begin as an earlier one did."""
        await self.say([("system", prefix), ("user", "the")])

        async def go_on(prompt: str) -> Answer:
            return await self.say([("system", prefix), ("user", prompt)])

        return [go_on] * count

    async def bytes_before(self) -> int:
        """Nothing: of what was there before, a swarm larger than its cache leaves nothing."""
        return 0

    async def bytes_stored(self) -> tuple[int, int | None] | None:
        """It does not say."""
        return None

    async def forget(self) -> None:
        """It has nothing open."""


class MlxLmServer(Peer):
    """mlx_lm.server, which says in its log what it keeps."""

    async def bytes_stored(self) -> tuple[int, int | None]:
        """As its log says at the beginning of each call, in GB with two decimals."""
        await self.say([("user", "the")])
        found = re.findall(r"Prompt Cache: (\d+) sequences, ([\d.]+) GB", self.process.log.read_text(errors="replace"))
        if not found:
            raise self.process.failed("does not log the size of its cache any more")
        sequences, gigabytes = found[-1]
        return round(float(gigabytes) * 1e9), int(sequences)


async def post(server: Ours | Peer, url: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[Any, float]:
    """What a server answers, and the seconds until then.

    Raises:
        ServerFailed: it does not, or by an error.
    """
    start = time.perf_counter()
    try:
        response = await server.http.post(url, json=body, headers=headers)
    except httpx2.HTTPError as error:
        raise server.process.failed(f"did not answer ({error!r})") from error
    seconds = time.perf_counter() - start
    if not response.is_success:
        raise server.process.failed(f"answered {response.status_code}: {response.text}")
    # A call that takes long is answered by a stream of events, of which the last is the answer.
    events = re.findall("^data: (.*)$", response.text, re.MULTILINE)
    return json.loads(events[-1] if events else response.content), seconds


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
    taken = {}
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


WORKLOADS: dict[str, Callable[[Server, Bench], Awaitable[dict[Line, Sample]]]] = {
    "W4": swarm,  # first, since W7 is about what is in memory: with theirs nothing else must be
    "W7": swarm,
    "W1": w1,
    "W2": w2,
    "W3": w3,
    "fork": fork,
}


async def measure(
    servers: list[Server], bench: Bench, chosen: list[str], rounds: int
) -> dict[tuple[str, Line], list[Sample]]:
    """Run the workloads on all servers, in turns."""
    samples = defaultdict(list)
    workloads = dict.fromkeys(workload for name, workload in WORKLOADS.items() if name in chosen)
    for server in servers:
        await server.say([("system", bench.texts.text(16)), ("user", bench.texts.text(16))])
        server.process.signal(signal.SIGSTOP)
    for workload in workloads:
        for i in range(1 if workload is fork else rounds):
            for server in servers[:: -1 if i % 2 else 1]:
                random.seed(f"{workload.__name__} {i}")  # the same texts for all
                name, start = server.process.name, time.perf_counter()
                server.process.signal(signal.SIGCONT)
                for line, sample in (await workload(server, bench)).items():
                    samples[name, line].append(sample)
                await server.forget()
                server.process.signal(signal.SIGSTOP)
                took = time.perf_counter() - start
                print(f"{workload.__name__}, round {i + 1}: {name} {took:.1f} s", file=sys.stderr, flush=True)
    return samples


def show(samples: dict[tuple[str, Line], list[Sample]], names: list[str], chosen: list[str], verdict: bool) -> bool:
    """Print the table, with goals where there is a verdict; returns whether all of these were met."""
    met = True
    others = "".join(f"{name:>15}" for name in names[1:])
    print(f"{'':42}{names[0]:>10}{'goal':>8}{'':8}{others}   cold → then: {' | '.join(names)}")
    for line in sorted({line: None for _, line in samples}, key=lambda line: line.workload):
        if line.workload not in chosen:
            continue
        taken = [samples.get((name, line)) for name in names]
        ours, *theirs = [median(then / cold for cold, then in each) if each else None for each in taken]
        goal = judged = ""
        if verdict and line.goal is not None:
            reached = ours is not None and ours <= min([line.goal, *(ratio for ratio in theirs if ratio is not None)])
            met, goal, judged = met and reached, f"≤ {line.goal:g}", "met" if reached else "MISSED"
        times = " | ".join(spans(line, each) if each else "–" for each in taken)
        shown = f"{figure(ours):>10}{goal:>8} {judged:7}{''.join(f'{figure(ratio):>15}' for ratio in theirs)}"
        print(f"{line.workload:5}{line.what:37}{shown}   {times}")
    return met


def figure(ratio: float | None) -> str:
    """A ratio, with three digits."""
    return "–" if ratio is None else f"{ratio:.3g}"


def spans(line: Line, samples: list[Sample]) -> str:
    """The medians that a ratio is of."""
    cold, then = (median(values) for values in zip(*samples, strict=True))
    if line is STORED:
        return f"{cold / 1e6:.1f} → {then / 1e6:.1f} MB"
    return f"{cold:.2f} → {then:.3f} s" if cold > 0.1 else f"{cold * 1e3:.3f} → {then * 1e3:.3f} ms"


def make_folder(folder: Path, short: bool, of: dict[str, int] = MODEL_25M) -> tuple[Path, int]:
    """Write the model; returns its folder and the bytes that it keeps of a token.

    It answers in letters only: such an answer reads as the same token when it is sent again, as a real one's would.
    """
    size = {} if short else {key: value for key, value in of.items() if key != "vocab_size"}
    make_model(folder, max_position_embeddings=CONTEXT_TOKENS, **size)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    letters = [token_id for token, token_id in vocabulary.items() if re.fullmatch("[a-z]", token)]
    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    head = mx.zeros_like(weights["lm_head.weight"])
    head[mx.array(letters)] = weights["lm_head.weight"][mx.array(letters)]
    weights["lm_head.weight"] = head
    mx.eval(weights)
    mx.save_safetensors(path, weights, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    per_layer = 2 * config["num_key_value_heads"] * config["head_dim"] * mx.float32.size
    print(f"a llama of {sum(array.size for array in weights.values()) / 1e6:.1f}M parameters, float32", end=", ")
    return folder, config["num_hidden_layers"] * per_layer


async def run(
    processes: list[Process], addresses: list[str], model: Path, bench: Bench, chosen: list[str], rounds: int
) -> Any:
    """Measure on our server, the first, and on the peers, which listen at these addresses, once they are up.

    Raises:
        ServerFailed: one of them did not do what it should.
    """
    async with httpx2.AsyncClient(timeout=ANSWER_S, limits=httpx2.Limits(max_connections=None)) as http:
        servers: list[Server] = [Ours(processes[0], await Ours.find(processes[0]), http)]
        for process, address in zip(processes[1:], addresses, strict=True):
            kind = MlxLmServer if len(servers) == 1 else Peer
            servers.append(kind(process, await kind.find(process, address, http), model, http))
        return await measure(servers, bench, chosen, rounds)


def free_port() -> int:
    """A port that nobody has at the moment: peers cannot choose one themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def filled(command: str, model: Path, port: int) -> list[str]:
    """A command for this model and port."""
    return [part.format(model=model, port=port) for part in shlex.split(command)]


def main() -> None:
    """Run the workloads named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=[[], *WORKLOADS], default=[])  # [] is what none reads as
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="a tiny model, short texts, one round, no verdict")
    parser.add_argument("--wheel", action="store_true", help="a smaller model, and the BLAS of the wheel")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=COMMAND", help="one more peer")
    args = parser.parse_args()
    chosen, rounds = args.workloads or list(WORKLOADS), 1 if args.short else args.rounds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended then, too
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, token_bytes = make_folder(folder / "model", args.short, MODEL_5M if args.wheel else MODEL_25M)
        threads = os.environ["OPENBLAS_NUM_THREADS"]
        blas = f"{BLAS}, threads: {threads}" if BLAS and not args.wheel else "the BLAS of the wheel"
        print(f"{mx.default_device()}, {blas}, mlx-lm {version('mlx-lm')}, rounds: {rounds}", flush=True)
        bench = Bench(Texts(model), SHORT if args.short else Sizes(), token_bytes)
        python = f"{shlex.quote(sys.executable)} -m"
        peers = [f"mlx_lm.server={python} mlx_lm server --port {{port}} --model {{model}}", *args.beside]
        names, commands = zip(*(peer.split("=", 1) for peer in peers), strict=True)
        names = ["mlx-mcp", *names]
        commands = [f"{python} mlx_mcp serve --standalone --http --port 0 --model {{model}}", *commands]
        ports = [free_port() for _ in names]
        try:
            with ExitStack() as stack:
                processes = [
                    stack.enter_context(running(name, filled(command, model, port), folder, not args.wheel))
                    for name, command, port in zip(names, commands, ports, strict=True)
                ]
                addresses = [f"http://127.0.0.1:{port}" for port in ports[1:]]
                samples = asyncio.run(run(processes, addresses, model, bench, chosen, rounds))
        except ServerFailed as error:
            print(error, file=sys.stderr)
            sys.exit(2)
    if not show(samples, names, chosen, verdict=not args.short):
        sys.exit(1)


if __name__ == "__main__":
    main()
