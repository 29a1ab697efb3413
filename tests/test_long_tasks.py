"""The tasks of `benchmarks/long_input.py`: a host's program gets them right, with a model that labels right."""

import json
from functools import partial

import pytest

from benchmarks import long_tasks as tasks
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.sandbox.opening import open_runtime
from mlx_mcp.workflows.sandbox.runtime import Limits
from mlx_mcp.workflows.sandbox.sandbox import Program
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, closing
from tests.fakes import FakeLoader, fake_client
from tests.service.house import CALLER, unheard


@pytest.mark.parametrize("name", ["needle", "count", "pairs"])
async def test_a_program_and_a_model_that_reads_get_every_task_right(tmp_path, name):
    task = tasks.TASKS[name](1_000, seed=1)
    loader = FakeLoader(context_tokens=2_000)
    loader.runner.says = lambda text: json.dumps({"about": tasks.about_of(": " + text.splitlines()[-1])})
    service = Service(fake_client(loader), Registry(None))
    sandboxes = Sandboxes(partial(open_runtime, tmp_path))
    async with closing(sandboxes):
        sandbox = await sandboxes.create(service, CALLER)
        program = Program(task.program, {"context": task.text})
        ran = await sandboxes.run(service, CALLER, sandbox, program, Limits(), Budget(), unheard)
    assert service.engine.close()
    assert task.score(ran.ended.value) == 1.0, ran.ended


def test_what_is_wrong_scores_less_and_what_is_no_answer_nothing():
    for name, near in (
        ("needle", {"phrase": "amber"}),
        ("count", {"count": 10**6}),
        ("pairs", {"pairs": [["a", "b"]]}),
    ):
        task = tasks.TASKS[name](1_000, seed=2)
        assert task.score(near) < 0.01
        assert task.score(None) == 0.0


def test_texts_are_as_long_as_they_should_be_and_the_same_for_a_seed():
    for make in tasks.TASKS.values():
        assert 4_000 <= len(make(1_000, seed=3).text) < 4_200
        assert make(1_000, seed=3).text == make(1_000, seed=3).text != make(1_000, seed=4).text
