"""What it takes to keep sessions on disk, and what it saves after a kill.

Run with `make bench-persistence` (minutes), or `python benchmarks/persistence.py [SECTION …] [--rounds N] [--short]`.
On the llama of benchmarks/llama.py, float32, OpenBLAS in front where it is installed, one thread of it. All figures
are ratios within one run; ends with 1 if a goal is missed. `--short` is small, and without goals.

    restart  (W1, W5) a session is persisted, the server killed with SIGKILL and started again: the time to the first
             token of the next turn, of 16 tokens / of the cold run of its context, at 2000 and 8000 tokens
    rate     blocks of 1 MiB through Store.persist / the same bytes by write and fsync, in turns; bytes a second
    beside   the median step of 8 sessions that generate while another persists 500 MB / while it does not
    start    opening a folder of 10,000 blocks, in seconds; goal 2
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
from engine import MODEL_25M, Loader, make_model  # which puts OpenBLAS in front of MLX
from llama import Texts, make_folder
from processes import running
from servers import ANSWER_S, Ours

from mlx_mcp.core.durable import SessionRecord
from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Tensor
from mlx_mcp.core.ports import PreparedModel, StoredBlock
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.io_thread import IoThread
from mlx_mcp.engine.messages import Cancel, Command, Event, Load, Persist, Persisted, Submit
from mlx_mcp.engine.persistence import Persisting
from mlx_mcp.mlx_backend.layers import KvPayload
from mlx_mcp.mlx_backend.runner import Runner
from mlx_mcp.storage.store import Store

MIB = 1 << 20
LOAD, PERSIST = -1, -2  # calls; generations count from 0
RESTART_GOALS = {2000: 0.1, 8000: 0.05}
RATE_GOAL, BESIDE_GOAL, START_GOAL_S = 0.5, 1.25, 2.0
FULL_SIZES = {"restart": (2000, 8000), "rate": 500, "beside": 500, "start": 10_000}
SHORT_SIZES = {"restart": (300,), "rate": 8, "beside": 8, "start": 100}


def judge(line: str, value: float, goal: float | None, least: bool = False) -> bool:
    """Print a line; returns whether the goal was met, if there is one."""
    met = goal is None or (value >= goal if least else value <= goal)
    said = "" if goal is None else f"   goal {'≥' if least else '≤'} {goal:g}: {'met' if met else 'MISSED'}"
    print(f"{line:70}{value:8.3f}{said}", flush=True)
    return met


def open_store(folder: Path) -> Store:
    """A store without bounds that matter."""
    return Store.open(folder, quota_bytes=1 << 40, daily_bytes=1 << 40)


def blocks(count: int, nbytes: int) -> list[StoredBlock]:
    """A chain of blocks of random bytes."""
    data = memoryview(os.urandom(nbytes))
    keys = [b"root", *(os.urandom(32) for _ in range(count))]
    tokens = tuple(range(64))
    planes = [(f"layers.{i}.{part}", "U8", (nbytes // 32,)) for i in range(16) for part in ("keys", "values")]
    form = Form((LayerCache(CacheKind.FULL),) * 16, tuple(Tensor(*plane) for plane in planes))
    return [StoredBlock(keys[i + 1], keys[i], 64 * i, tokens, 64 * i, True, form, (data,)) for i in range(count)]


def record(chain: list[StoredBlock]) -> SessionRecord:
    """A session of these blocks."""
    num_tokens, keys, now = 64 * len(chain), tuple(block.key for block in chain), time.time()
    return SessionRecord(
        session_id=os.urandom(16).hex(),
        tenant="",
        model="m",
        name="",
        version="",
        fingerprint=b"",
        tokenizer=b"",
        text="",
        tokens=tuple(range(num_tokens)),
        num_kept=num_tokens,
        after="assistant",
        tools=(),
        parent_id="",
        ttl_s=1e6,
        pinned=False,
        ephemeral=False,
        saved_at=now,
        used_at=now,
        blocks=keys,
    )


def restart(sizes: Any, rounds: int, goals: bool) -> bool:
    """W1 after a restart, W5."""
    met = True
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, _ = make_folder(folder / "model", short=not goals)
        print()
        texts = Texts(model)
        for num_tokens in sizes:
            ratios, times = [], []
            for _ in range(rounds):
                cold, warm = asyncio.run(one_restart(folder, model, texts, num_tokens))
                ratios.append(warm / cold)
                times.append(f"{cold:.2f} → {warm:.3f} s")
            goal = RESTART_GOALS.get(num_tokens) if goals else None
            line = f"restart  after SIGKILL at {num_tokens} tokens / cold ({', '.join(times)})"
            met &= judge(line, median(ratios), goal)
    return met


async def one_restart(folder: Path, model: Path, texts: Texts, num_tokens: int) -> tuple[float, float]:
    """Seconds to the first token of the cold run, and of the first turn after the kill."""
    command = [sys.executable, "-m", "mlx_mcp", "serve", "--standalone", "--http", "--port", "0", "--model", str(model)]

    async def served(work: Callable[[Ours], Any]) -> Any:
        with running("mlx-mcp", command, folder) as process:
            address = await Ours.find(process)
            async with httpx2.AsyncClient(timeout=ANSWER_S) as http:
                server = Ours(process, address, http)
                await server.say([("user", texts.text(16))])  # loads the model
                return await work(server)

    async def before(server: Ours) -> tuple[float, str]:
        answer, session = await server.generate(prompt=texts.text(num_tokens), keep=True)
        await server.call("persist_session", session=session)
        server.process.popen.send_signal(signal.SIGKILL)
        return answer.seconds, session

    async def after(server: Ours) -> float:
        answer, _ = await server.generate(session=session, prompt=texts.text(16))
        assert answer.cached_tokens < num_tokens / 2, "it was in memory"
        return answer.seconds

    try:
        cold, session = await served(before)
    except BaseExceptionGroup as group:  # the client loses its server
        raise SystemExit(f"the kill was not survived by this benchmark: {group!r}") from group
    return cold, await served(after)


def rate(num_mib: int, rounds: int, goals: bool) -> bool:
    """Store.persist beside raw writes."""
    ratios, said = [], []
    for _ in range(rounds):
        with TemporaryDirectory() as temporary:
            chain = blocks(num_mib, MIB)
            data = chain[0].data[0]
            start = time.perf_counter()
            fd = os.open(f"{temporary}/raw", os.O_CREAT | os.O_WRONLY)
            for _ in range(num_mib):
                os.write(fd, data)
            os.fsync(fd)
            os.close(fd)
            raw_s = time.perf_counter() - start
            os.unlink(f"{temporary}/raw")
            store = open_store(Path(temporary) / "store")
            start = time.perf_counter()
            store.persist(chain, record(chain))
            ours_s = time.perf_counter() - start
            store.close()
            ratios.append(raw_s / ours_s)
            said.append(f"{num_mib / raw_s:.0f} → {num_mib / ours_s:.0f} MiB/s")
    return judge(
        f"rate     persist / write + fsync ({', '.join(said)})", median(ratios), RATE_GOAL if goals else None, True
    )


def beside(num_mib: int, rounds: int, goals: bool) -> bool:
    """Steps of others while a session is persisted."""
    model, inbox = make_model(MODEL_25M), deque[Command]()
    with TemporaryDirectory() as temporary:
        loader: Any = Loader(model, 2048)
        io = IoThread(inbox.append)
        persisting = Persisting(lambda: open_store(Path(temporary)), io)
        engine = Engine(loader, Limits(), 1, 1 << 34, persisting=persisting)
        nothing: Any = None
        heard: list[Event] = []
        engine.tell(partial(listen, heard))
        engine.handle(Load(LOAD, PreparedModel("m", Path(), {}, nothing, 0)))

        while engine.models.loads or engine.persistence is None or engine.persistence.opening:
            step(engine, inbox)
        for i in range(8):
            prompt = tuple(random.randrange(2048) for _ in range(128))
            engine.handle(Submit(i, "m", prompt, SamplingParams(100_000, temperature=0.0)))
        ratios, said = [], []
        for _ in range(rounds):
            session = large_session(engine, num_mib)
            for _ in range(20):
                step(engine, inbox)
            alone = median(step(engine, inbox) for _ in range(60))
            heard.clear()
            engine.handle(Persist(PERSIST, "", session, ""))
            meanwhile = []
            while not heard:
                meanwhile.append(step(engine, inbox))
            assert isinstance(heard[0], Persisted), heard[0]
            engine.sessions.close(engine.sessions.get("", session))
            ratios.append(median(meanwhile) / alone)
            said.append(f"{alone * 1e3:.1f} → {median(meanwhile) * 1e3:.1f} ms, {len(meanwhile)} steps")
        for i in range(8):
            engine.handle(Cancel(i))
        engine.close(time.monotonic() + 60)
    line = f"beside   a step while {num_mib} MiB are persisted / not ({'; '.join(said)})"
    return judge(line, median(ratios), BESIDE_GOAL if goals else None)


def step(engine: Engine, inbox: deque[Command]) -> float:
    """Do what was sent, and one step; returns the seconds."""
    start = time.perf_counter()
    while inbox:
        engine.handle(inbox.popleft())
    engine.step()
    return time.perf_counter() - start


def listen(heard: list[Event], call_id: int, event: Event) -> bool:
    """Take what is heard of a session that is persisted."""
    if call_id == PERSIST:
        heard.append(event)
    return True


def large_session(engine: Engine, num_mib: int) -> str:
    """A session of blocks of 1 MiB of random numbers, as if it had been computed."""
    import mlx.core as mx  # here, so that engine.py is imported first

    cache = engine.models.by_name["m"].scheduler.cache
    assert cache is not None, "the model can be cut"
    session = engine.sessions.open("", "m", SessionOptions(), (), turn=-1)
    block = cache.root("")
    runner = engine.models.by_name["m"].model.runner
    assert isinstance(runner, Runner)
    codec = runner.rows.codec
    for _ in range(num_mib):
        data = mx.random.normal((16, 4, 64, 64))
        mx.eval(data)
        assert engine.ledger.charge(data.nbytes), "out of memory"
        tokens = tuple(random.randrange(2048) for _ in range(64))
        payload = KvPayload(codec, 64, block.end, True, (data,), (), ())
        made = cache.cache.put(block, tokens, payload, data.nbytes, private=False)
        assert made is not block, "two blocks of one hash"
        block = made
    log = tuple(token for each in reversed(list(block.chain())) for token in each.tokens)
    engine.sessions.finish(session, log, block, "assistant")
    return session.session_id


def start(num_blocks: int, rounds: int, goals: bool) -> bool:
    """Opening a full folder."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "store"
        store = open_store(folder)
        for first in range(0, num_blocks, 20):  # sessions of 20 blocks
            chain = blocks(min(20, num_blocks - first), 4096)
            store.persist(chain, record(chain))
        store.close()
        taken = []
        for _ in range(rounds):
            begin = time.perf_counter()
            open_store(folder).close()
            taken.append(time.perf_counter() - begin)
    return judge(f"start    a folder of {num_blocks} blocks, seconds", median(taken), START_GOAL_S if goals else None)


SECTIONS: dict[str, Callable[[Any, int, bool], bool]] = {
    "restart": restart,
    "rate": rate,
    "beside": beside,
    "start": start,
}


def main() -> None:
    """Run the sections named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="small, one round, without goals")
    args = parser.parse_args()
    random.seed(0)
    sizes, rounds = (SHORT_SIZES, 1) if args.short else (FULL_SIZES, args.rounds)
    met = [SECTIONS[name](sizes[name], rounds, not args.short) for name in args.sections or SECTIONS]
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
