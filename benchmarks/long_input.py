"""Questions over 8,000 to 1,000,000 tokens of input: what each way of asking gets right, and what it costs.

Run with `python benchmarks/long_input.py --model MODEL [TASK …] [--tokens 8000 …] [--arm ARM …] [--rounds N]
[--out FOLDER]`, on the machine and with the model that you want to know of; nothing is downloaded unless the model is.

    needle   one line says it                     direct       the whole text in one prompt
    count    every line of a user counts          map_reduce   reason_over: every part is read
    pairs    every two users are compared         free         reason_over: the model writes the programs
                                                  host         sandbox_run, with a program as a host would write it

A line of the table is one task at one size by one arm: how much of it was right (0 to 1, the mean over the rounds),
calls of the model, tokens that were cached and computed, characters that came back to the host, and seconds. Where a
prompt does not fit, the arm has no score. The texts are made here (see long_tasks.py), so no figure of a published
benchmark can be compared with these. `--short` is one task at 300 tokens on the built-in model, which cannot do any of
it: it shows that the benchmark runs. With --out the figures are written as JSON and as a picture too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from long_tasks import TASKS, Task
from mcp import Client

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.bench.picture import safe, text
from mlx_mcp.config import Config
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from mlx_mcp.workflows.sandbox.opening import open_runtime
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, closing

ARMS = ("direct", "map_reduce", "free", "host")
COLORS = dict(zip(ARMS, ("#b6bcc4", "#1f6feb", "#8250df", "#1a7f37"), strict=True))
TOKENS = (8_000, 32_000, 128_000, 1_000_000)
MAX_BYTES = 64 << 20
WIDTH, PANEL, PLOT, MARGIN = 900, 220, 150, 40  # pixels


@dataclass(frozen=True)
class Sample:
    """One task by one arm; a score of None means that it could not be asked so, and `note` says why."""

    task: str
    tokens: int
    arm: str
    score: float | None
    calls: int
    cached_tokens: int
    computed_tokens: int
    host_chars: int
    seconds: float
    note: str = ""


async def ask(client: Client, task: Task, tokens: int, arm: str, path: str) -> Sample:
    """Ask a task by one arm."""
    asked = {"json_schema": task.schema, "wait_s": 86_400}
    if arm == "direct":
        call = "generate", asked | {"prompt": task.question, "files": [path], "max_tokens": 500}
    elif arm == "host":
        call = "sandbox_run", {"code": task.program, "files": [path], "wait_s": 86_400}
    else:
        call = "reason_over", asked | {"question": task.question, "files": [path], "strategy": arm}
    began = time.perf_counter()
    result = await client.call_tool(*call)
    seconds = time.perf_counter() - began
    made: dict[str, Any] = result.structured_content or {}
    host_chars = sum(len(getattr(block, "text", "")) for block in result.content)
    if result.is_error:
        note = str(getattr(result.content[0], "text", ""))[:200]
        return Sample(task.name, tokens, arm, None, 0, 0, 0, host_chars, seconds, note)
    counts = made if arm == "direct" else made["calls"]
    answer, note = answer_of(made, arm), str(made.get("why") or made.get("error") or "")[:200]
    cached, computed = counts["cached_tokens"], counts["computed_tokens"]
    calls = 1 if arm == "direct" else counts["calls"]
    return Sample(task.name, tokens, arm, task.score(answer), calls, cached, computed, host_chars, seconds, note)


def answer_of(made: dict[str, Any], arm: str) -> Any:
    """What a tool's result gives as the answer; None where it gives none."""
    if arm != "direct":
        return made.get("value" if arm == "host" else "answer")
    try:
        return json.loads(made["text"])
    except ValueError:  # it was cut off
        return None


async def measure(
    config: Config, tasks: Iterable[str], sizes: Iterable[int], arms: Iterable[str], rounds: int
) -> list[Sample]:
    """Ask everything, the smallest sizes first."""
    engine, registry = wire(config)
    samples = []
    try:
        with TemporaryDirectory() as folder:
            files = FileReader((Path(folder),), MAX_BYTES, MAX_BYTES)
            sandboxes = Sandboxes(partial(open_runtime, Path(folder)))
            server = build_server(Service(engine, registry), files, sandboxes=sandboxes)
            async with closing(sandboxes), Client(server) as client:
                for tokens, name, seed in product(sorted(sizes), tasks, range(rounds)):
                    task, path = TASKS[name](tokens, seed), Path(folder) / f"{name}-{tokens}-{seed}.log"
                    path.write_text(task.text)
                    for arm in arms:
                        samples.append(await ask(client, task, tokens, arm, path.name))
                        print(line_of(samples[-1:]), flush=True)
    finally:
        engine.close()
    return samples


def line_of(samples: list[Sample]) -> str:
    """A line of the table: the mean of samples of one task, size and arm."""
    first, scores = samples[0], [sample.score for sample in samples if sample.score is not None]
    score = f"{mean(scores):5.2f}" if scores else "    –"
    counts = [round(mean(getattr(s, name) for s in samples)) for name in COUNTS]
    figures = "".join(f"{count:>12,}" for count in counts)
    seconds = mean(sample.seconds for sample in samples)
    return (
        f"{first.task:8}{first.tokens:>10,}  {first.arm:12}{score}{figures}{seconds:>10.1f}  {first.note[:60]}".rstrip()
    )


COUNTS = ("calls", "cached_tokens", "computed_tokens", "host_chars")
HEAD = f"{'task':8}{'tokens':>10}  {'arm':12}right" + "".join(
    f"{name:>{width}}" for name, width in {"calls": 12, "cached": 12, "computed": 12, "chars": 12, "s": 10}.items()
)


def grouped(samples: list[Sample]) -> list[list[Sample]]:
    """The samples of each task, size and arm."""
    groups: dict[tuple[str, int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.task, sample.tokens, sample.arm), []).append(sample)
    return list(groups.values())


def picture(samples: list[Sample], title: str) -> str:
    """The scores as SVG: a panel for each task, a line for each arm, sizes to the right."""
    tasks, sizes = list(dict.fromkeys(s.task for s in samples)), sorted({s.tokens for s in samples})
    step = (WIDTH - 2 * MARGIN - 120) / max(1, len(sizes) - 1)
    parts = [text(MARGIN, 34, title, size=18, weight="600")]
    for index, arm in enumerate(ARMS):
        parts.append(f'<rect x="{MARGIN + 130 * index}" y="48" width="12" height="12" fill="{COLORS[arm]}"/>')
        parts.append(text(MARGIN + 130 * index + 18, 59, arm))
    for row, task in enumerate(tasks):
        top = 90 + row * PANEL
        parts.append(text(MARGIN, top, task, size=15, weight="600"))
        for share in (0, 0.5, 1):
            y = top + 20 + PLOT * (1 - share)
            parts.append(f'<line x1="{MARGIN + 40}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#d0d7de"/>')
            parts.append(text(MARGIN, y + 4, f"{share:g}"))
        for at, tokens in enumerate(sizes):
            parts.append(text(MARGIN + 60 + at * step, top + PLOT + 38, f"{tokens:,}"))
        for arm in ARMS:
            points = []
            for at, tokens in enumerate(sizes):
                scores = [
                    s.score for s in samples if (s.task, s.tokens, s.arm) == (task, tokens, arm) and s.score is not None
                ]
                if scores:
                    points.append((MARGIN + 60 + at * step, top + 20 + PLOT * (1 - mean(scores))))
            parts.append(
                f'<polyline fill="none" stroke="{COLORS[arm]}" stroke-width="2" points="'
                + " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
                + '"/>'
            )
            parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="{COLORS[arm]}"/>' for x, y in points]
    height, body = 90 + len(tasks) * PANEL, "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif">\n<title>{safe(title)}</title>\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fcfcfb"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    """Run the tasks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=[])  # [] is what none reads as
    parser.add_argument("--model", help="as for `mlx-mcp serve`")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--arm", action="append", choices=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a folder for long_input.json and long_input.svg")
    parser.add_argument("--short", action="store_true", help="the built-in model and 300 tokens of one task")
    args = parser.parse_args()
    config = Config.load(**({"model": args.model} if args.model else {}), max_ssd_bytes=0)
    tasks, sizes, rounds = args.tasks or list(TASKS), args.tokens, args.rounds
    if args.short:
        tasks, sizes, rounds = tasks[:1], [300], 1
    print(HEAD, flush=True)
    samples = asyncio.run(measure(config, tasks, sizes, args.arm or ARMS, rounds))
    print("\n".join(["", HEAD, *map(line_of, grouped(samples))]))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "long_input.json").write_text(json.dumps([asdict(sample) for sample in samples], indent=1))
        (args.out / "long_input.svg").write_text(picture(samples, f"Long input: {args.model or 'the built-in model'}"))


if __name__ == "__main__":
    main()
