"""Programs in the real interpreter that ask the embedded model of texts: exact sums, and each text computed once."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

from mlx_mcp.core.scheduler import Limits as EngineLimits
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.mlx_backend.loader import MlxLoader
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.counting import Counts
from mlx_mcp.workflows.sandbox.opening import open_runtime
from mlx_mcp.workflows.sandbox.runtime import Limits
from mlx_mcp.workflows.sandbox.sandbox import Program
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, closing
from tests.service.house import CALLER, unheard
from training.grammar import NAMES, a_filler

QUESTION_TOKENS = 16  # the most that a question takes, with what the template puts around it
NUM_NAMES, TIMES, LAST = (
    8,
    6,
    3,
)  # each fact is told so often, and so often at the end: then a small model is sure of it
SUM = """
badges = []
for name, text in files.items():
    who = asked[name][turn]
    [answer] = llm_ask(text, [f"What is {who}'s badge?"], max_tokens=8)
    badges.append(int(answer))
submit({"sum": sum(badges), "most": max(badges), "num": len(badges)})
"""


def a_text(rng: random.Random, num_chars: int) -> tuple[str, dict[str, int]]:
    """A text of that length which tells the badges of some people among other things, and at its end; and these."""
    badges = {name: rng.randrange(100, 1000) for name in rng.sample(NAMES, NUM_NAMES)}
    facts = [f"{name}'s badge is {badge}." for name, badge in badges.items()]
    told = facts * (TIMES - LAST)
    while len(" ".join([*told, *facts * LAST])) < num_chars:
        told.append(a_filler(rng))
    rng.shuffle(told)
    return " ".join([*told, *facts * LAST]), badges


@pytest.mark.parametrize(
    ("num_texts", "num_chars"),
    [pytest.param(3, 1_500, id="short"), pytest.param(200, 5_000, id="a megabyte", marks=pytest.mark.slow)],
)
async def test_every_text_is_asked_twice_and_computed_once(tmp_path: Path, num_texts: int, num_chars: int) -> None:
    rng = random.Random(1)
    texts = {f"{index:03}.txt": a_text(rng, num_chars) for index in range(num_texts)}
    files = {name: text for name, (text, _) in texts.items()}
    asked = {name: list(badges)[-2:] for name, (_, badges) in texts.items()}
    loader = MlxLoader()
    limits = EngineLimits(max_running=8)
    thread = EngineThread(lambda: Engine(loader, limits, 1 << 30, 4 << 30, EngineOptions()))
    client = EngineClient(thread, Registry(None), loader)
    service, sandboxes = Service(client, Registry(None)), Sandboxes(partial(open_runtime, tmp_path))
    counts: list[Counts] = []
    try:
        async with closing(sandboxes):
            sandbox = await sandboxes.create(service, CALLER)
            for turn in (0, 1):
                program = Program(SUM, {"turn": turn} | ({} if turn else {"files": files, "asked": asked}))
                ran = await sandboxes.run(service, CALLER, sandbox, program, Limits(), Budget(), unheard)
                gold = [badges[asked[name][turn]] for name, (_, badges) in texts.items()]
                assert ran.ended.error is None
                assert ran.ended.value == {"sum": sum(gold), "most": max(gold), "num": num_texts}
                counts.append(ran.counts)
    finally:
        assert client.close()
    first, second = counts
    assert first.computed_tokens > 0.95 * first.prompt_tokens
    assert second.prompt_tokens > 0.95 * first.prompt_tokens
    assert 0 < second.computed_tokens <= QUESTION_TOKENS * num_texts  # the questions alone
    assert second.calls == num_texts  # and what they are asked of
