"""The engine beside mlx_lm's BatchGenerator, in one process, on one local model that this makes itself.

Run with `make bench-engine` (minutes), or `python benchmarks/engine.py [SECTION …] [--rounds N]`. Float32, OpenBLAS in
front where it is installed, one thread of it. Both sides hold the same rows at the same time and take blocks of steps
in turn, so that what else the machine does falls on both; figures are medians of the blocks, by step. Only the gap is
measured one side after the other.

    equal     1, 4, 8 and 16 rows of one length
    mixed     short rows beside a long one: decode throughput and bytes of keys and values
    gap       a prompt of 2048 tokens arrives while four rows decode: the worst gap between their tokens
    sampling  16 rows over a vocabulary of 152k, each with its own top-p
    overhead  what a step of a model of almost nothing takes, by rows
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
from mlx_mcp.mlx_backend.cpu.openblas import prefer_openblas

BLAS = prefer_openblas()  # before anything imports MLX

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_sampler

from mlx_mcp.core.ports import LoadedModel, PreparedModel
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.messages import Cancel, Event, Load, Loaded, Submit, Token
from mlx_mcp.mlx_backend.runner import Runner

ENDLESS = 1 << 20
BLOCK = 5  # steps timed together
MODEL_25M = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2048,
}
MODEL_VOCABULARY = MODEL_25M | {"hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 152_064}
MODEL_NOTHING = MODEL_25M | {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 16}


def make_model(config: dict[str, Any]) -> Any:
    """A llama with random weights."""
    mx.random.seed(0)
    rest = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "tie_word_embeddings": False}
    args: Any = llama.ModelArgs
    model = llama.Model(args.from_dict({"model_type": "llama", **config, **rest}))
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 1.5 / a.shape[-1] ** 0.5, model.parameters()))
    mx.eval(model.parameters())
    return model


class Loader:
    """Gives the engine a model that is there already."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model, self.vocab_size = model, vocab_size

    def materialise(self, prepared: PreparedModel) -> Generator[float, None, LoadedModel]:
        """See ModelLoader.materialise."""
        yield 1.0
        runner = Runner(self.model)
        return LoadedModel("m", runner, prepared.tokenizer, frozenset(), self.vocab_size, ENDLESS, 0, b"")

    def close(self) -> None:
        """See ModelLoader.close."""


@dataclass
class Ours:
    """Rows on the engine."""

    model: Any
    vocab_size: int
    limits: Limits = field(default_factory=Limits)
    emitted: dict[int, list[float]] = field(default_factory=dict)  # row → when its tokens came

    def __post_init__(self) -> None:
        loader: Any = Loader(self.model, self.vocab_size)
        self.engine = Engine(loader, self.limits, 1, 1 << 40)
        nothing: Any = None
        events: list[Event] = []

        def sink(event: Event) -> bool:
            events.append(event)
            return True

        self.engine.handle(Load(PreparedModel("m", Path(), {}, nothing, 0), sink))
        while self.engine.loads:
            self.engine.step()
        assert isinstance(events[-1], Loaded), f"the model was not loaded: {events[-1]}"

    def add(self, prompt: list[int], **params: Any) -> int:
        """Submit a row that never ends; returns its id."""
        row = len(self.emitted)
        self.emitted[row] = times = []

        def sink(event: object) -> bool:
            if isinstance(event, Token):
                times.append(time.perf_counter())
            return True

        self.engine.handle(Submit(row, "m", tuple(prompt), SamplingParams(ENDLESS - len(prompt), **params), sink))
        return row

    def step(self) -> None:
        """One step of the engine."""
        self.engine.step()

    def decoding(self, rows: list[int]) -> bool:
        """Whether every row has given a token."""
        return all(self.emitted[row] for row in rows)

    @property
    def kv_bytes(self) -> int:
        """What keys and values take."""
        return self.engine.stats.kv_bytes

    def close(self) -> None:
        """Drop the rows."""
        for row in self.emitted:
            self.engine.handle(Cancel(row))


@dataclass
class Theirs:
    """The same rows on mlx_lm's BatchGenerator."""

    model: Any
    emitted: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator: Any = BatchGenerator(self.model, max_tokens=ENDLESS)

    def add(self, prompt: list[int], **sampling: float) -> int:
        """Insert a row that never ends; returns its id."""
        sampler = [make_sampler(sampling["temperature"], top_p=sampling["top_p"])] if sampling else None
        row: int
        (row,) = self.generator.insert([prompt], samplers=sampler)
        self.emitted[row] = []
        return row

    def step(self) -> None:
        """One step of the generator."""
        for response in self.generator.next()[1]:
            self.emitted[response.uid].append(time.perf_counter())

    def decoding(self, rows: list[int]) -> bool:
        """Whether every row has given a token."""
        return all(self.emitted[row] for row in rows)

    @property
    def kv_bytes(self) -> int:
        """What keys and values take."""
        return int(self.generator.prompt_cache_nbytes)

    def close(self) -> None:
        """Drop the rows."""
        self.generator.remove(list(self.emitted))
        self.generator.close()


def prompt(num_tokens: int) -> list[int]:
    """Random token ids."""
    return [random.randrange(2048) for _ in range(num_tokens)]


def fill(side: Ours | Theirs, prompts: list[list[int]], params: list[dict[str, Any]] | None = None) -> None:
    """Add rows and step until all of them decode."""
    rows = [side.add(p, **(params[i] if params else {})) for i, p in enumerate(prompts)]
    while not side.decoding(rows):
        side.step()


def paired(ours: Ours, theirs: Theirs, rounds: int) -> tuple[float, float]:
    """Median seconds of a step on each side: blocks of steps taken in turn, each to its very end.

    Both sides run a step ahead, so a step by itself would be charged with the other side's last one.
    """
    sides: tuple[Ours | Theirs, ...] = (ours, theirs)
    taken: dict[int, list[float]] = {0: [], 1: []}
    for i in range(rounds + 1):
        for at, side in enumerate(sides):
            mx.synchronize()
            mx.synchronize(theirs.generator.stream)
            start = time.perf_counter()
            for _ in range(BLOCK):
                side.step()
            mx.synchronize()
            mx.synchronize(theirs.generator.stream)
            if i:  # the first ones grow buffers
                taken[at].append((time.perf_counter() - start) / BLOCK)
    return median(taken[0]), median(taken[1])


def decode(model: Any, vocab_size: int, lengths: list[int], rounds: int, label: str) -> None:
    """One line: both sides decode rows of these prompt lengths."""
    prompts = [prompt(n) for n in lengths]
    ours, theirs = Ours(model, vocab_size), Theirs(model)
    fill(ours, prompts)
    fill(theirs, prompts)
    a, b = paired(ours, theirs, rounds)
    print(
        f"{label:22} ours {a * 1e3:7.1f} ms {ours.kv_bytes / 1e6:6.0f} MB   theirs {b * 1e3:7.1f} ms "
        f"{theirs.kv_bytes / 1e6:6.0f} MB   {b / a:5.2f}x as fast, {ours.kv_bytes / theirs.kv_bytes:4.2f} of the bytes",
        flush=True,
    )
    ours.close()
    theirs.close()


def equal(rounds: int) -> None:
    """Rows of one length."""
    model = make_model(MODEL_25M)
    for rows, length in ((1, 128), (4, 128), (8, 128), (16, 128), (1, 512), (4, 512), (8, 512), (16, 512), (8, 2048)):
        decode(model, 2048, [length] * rows, rounds, f"equal {rows} x {length}")


def mixed(rounds: int) -> None:
    """Short rows beside a long one."""
    model = make_model(MODEL_25M)
    lines = ([128] * 7 + [2048], [512] * 7 + [8192], [128, 256, 512, 1024, 2048, 4096])
    for lengths in lines:
        decode(
            model, 2048, lengths, rounds, "mixed " + "+".join(f"{lengths.count(n)}x{n}" for n in sorted(set(lengths)))
        )


def gap(rounds: int) -> None:
    """The worst gap between tokens of four decoding rows while a long prompt is read."""
    model = make_model(MODEL_25M)
    worst: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(max(1, rounds // 10)):
        for name, make in (("ours", lambda: Ours(model, 2048)), ("theirs", lambda: Theirs(model))):
            side: Ours | Theirs = make()
            fill(side, [prompt(64) for _ in range(4)])
            for _ in range(3):
                side.step()
            watched = {row: len(times) for row, times in side.emitted.items()}
            late = side.add(prompt(2048))
            while not side.decoding([late]):
                side.step()
            side.step()
            gaps = [
                later - earlier
                for row, first in watched.items()
                for earlier, later in zip(side.emitted[row][first - 1 :], side.emitted[row][first:], strict=False)
            ]
            worst[name].append(max(gaps))
            side.close()
    a, b = median(worst["ours"]), median(worst["theirs"])
    print(
        f"gap                    ours {a * 1e3:7.1f} ms   theirs {b * 1e3:7.1f} ms   {a / b:5.3f} of theirs", flush=True
    )


def sampling(rounds: int) -> None:
    """Sixteen rows, each with its own top-p, over a large vocabulary; the greedy step is taken off both."""
    size = MODEL_VOCABULARY["vocab_size"]
    model = make_model(MODEL_VOCABULARY)
    prompts = [prompt(16) for _ in range(16)]
    greedy: list[dict[str, float]] = [{} for _ in prompts]
    top_p = [{"temperature": 0.7 + 0.02 * i, "top_p": 0.8 + 0.01 * i} for i in range(16)]
    figures = {}
    for label, params in (("greedy", greedy), ("top-p", top_p)):
        ours, theirs = Ours(model, size), Theirs(model)
        fill(ours, prompts, params)
        fill(theirs, prompts, params)
        figures[label] = paired(ours, theirs, rounds)
        ours.close()
        theirs.close()
    (a, b), (c, d) = figures["greedy"], figures["top-p"]
    for label, ours_s, theirs_s in (("greedy step", a, b), ("top-p step", c, d), ("top-p itself", c - a, d - b)):
        print(
            f"sampling {label:13} ours {ours_s * 1e3:7.1f} ms   theirs {theirs_s * 1e3:7.1f} ms   "
            f"{theirs_s / ours_s:5.2f}x as fast",
            flush=True,
        )


def overhead(rounds: int) -> None:
    """A model of almost nothing: what is left is the step itself."""
    model = make_model(MODEL_NOTHING)
    for rows in (1, 2, 4, 8, 16):
        decode(model, 2048, [32] * rows, rounds, f"overhead {rows}")


SECTIONS: dict[str, Callable[[int], None]] = {
    "equal": equal,
    "mixed": mixed,
    "gap": gap,
    "sampling": sampling,
    "overhead": overhead,
}


def main() -> None:
    """Run the sections named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])  # [] is what none reads as
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    random.seed(0)
    print(
        f"{mx.default_device()}, {BLAS or 'the BLAS of the wheel'}, medians of {args.rounds} blocks of {BLOCK} steps",
        flush=True,
    )
    for name in args.sections or SECTIONS:
        SECTIONS[name](args.rounds)


if __name__ == "__main__":
    main()
