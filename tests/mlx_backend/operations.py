"""Counts the operations of a decode step: those that a GPU has to be told of one by one.

The graph is walked before it is evaluated. Views are not counted, since they move no data. What `mx.fast` computes is
one operation on a GPU, and many on a CPU: for the count it is replaced by one.
"""

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.core.slots import Ledger, SlotPool
from mlx_mcp.mlx_backend import runner as runner_module
from mlx_mcp.mlx_backend.runner import Runner

VIEWS = set(
    "AsStrided Broadcast BroadcastAxes Contiguous Copy Depends ExpandDims Flatten Full NumberOfElements Reshape Slice "
    "Split Squeeze StopGradient Transpose Unflatten View".split()
)
STEPS = 6  # that all rows decode together before a step is counted
# mlx_lm has a function of that name too.
batched: Any = importlib.import_module("mlx_lm.generate")


def prompt(index: int, num_tokens: int) -> tuple[int, ...]:
    return tuple((31 * index + 7 * i + i * i) % 300 for i in range(num_tokens))


def of_graph(arrays: Any, path: Path) -> Counter[str]:
    """How many operations of each kind compute these arrays, which are in lists of lists."""
    mx.export_to_dot(str(path), *flat(arrays))
    return Counter(label for label in re.findall(r'label ="(\w+)"', path.read_text()) if label not in VIEWS)


def of_ours(model: Any, lengths: list[int], path: Path, **params: Any) -> Counter[str]:
    """Operations of a step of ours, of rows with prompts of these lengths."""
    runner = Runner(model)
    scheduler = Scheduler(Limits(max_running=len(lengths)), SlotPool(Ledger(1 << 40), runner.cost))
    for index, num_tokens in enumerate(lengths):
        sampling = SamplingParams(200, seed=index, **params)
        scheduler.add(Sequence(index, prompt(index, num_tokens), sampling, frozenset()))
    together = 0
    while together <= STEPS:
        step = scheduler.schedule()
        result = runner.launch(step).collect()
        assert not result.failed, result.failed
        scheduler.commit(step, result.tokens)
        together += len(step.decode) == len(lengths)
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patches:
        count_fast_as_one(patches)
        patches.setattr(runner_module, "async_eval", lambda *arrays: counts.update(of_graph(arrays, path)))
        runner.launch(scheduler.schedule())
    return counts


def of_theirs(model: Any, lengths: list[int], path: Path) -> Counter[str]:
    """Operations of a step of mlx_lm's BatchGenerator."""
    size = len(lengths)
    generator = batched.BatchGenerator(model, max_tokens=200, completion_batch_size=size, prefill_batch_size=size)
    generator.insert([list(prompt(index, num_tokens)) for index, num_tokens in enumerate(lengths)])
    together = 0
    while together <= STEPS:
        together += len(generator.next()[1]) == size
    counts: list[Counter[str]] = []
    with pytest.MonkeyPatch.context() as patches:
        count_fast_as_one(patches)
        patches.setattr(mx, "async_eval", lambda *arrays: counts.append(of_graph(arrays, path)))
        generator.next()
    return counts[0]


def count_fast_as_one(patches: pytest.MonkeyPatch) -> None:
    """Have each function of `mx.fast` be one operation."""

    def one(operation: Any, x: mx.array, needed: list[Any]) -> Any:
        arrays = [each for each in needed if isinstance(each, mx.array)]
        return mx.depends([operation(x)], arrays)[0] if arrays else operation(x)

    def attention(q: mx.array, k: mx.array, v: mx.array, **rest: Any) -> Any:
        return one(mx.tan, q, [k, v, *rest.values()])

    def rope(x: mx.array, dims: int, **rest: Any) -> Any:
        return one(mx.cos, x, list(rest.values()))

    patches.setattr(mx.fast, "rms_norm", lambda x, weight, eps: one(mx.sin, x, [weight]))
    patches.setattr(mx.fast, "rope", rope)
    patches.setattr(mx.fast, "scaled_dot_product_attention", attention)


def flat(arrays: Any) -> Iterator[mx.array]:
    """All arrays in lists of lists."""
    for each in arrays:
        if isinstance(each, mx.array):
            yield each
        elif isinstance(each, list | tuple):
            yield from flat(each)
