"""Sessions under everything that can befall them, over real models: what is kept is bit by bit what a cold run gives.

The wheel's BLAS computes a row alike however it is cut. Two architectures do not: gemma3's ring lies otherwise in
memory once it has turned, and mamba2 scans a chunk in another order than single tokens. For these there is a bound.
"""

from collections import Counter
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_mcp.core.cache.prefixes import usable
from mlx_mcp.core.layout import Part
from mlx_mcp.core.ports import LoadedModel, PreparedModel
from mlx_mcp.mlx_backend.cache_tree import leaves
from mlx_mcp.mlx_backend.layers import read
from mlx_mcp.mlx_backend.runner import Runner
from tests.comparing import assert_same, within
from tests.effort import THOROUGH, drawn
from tests.engine.machine import LIMITS, SessionMachine
from tests.fakes import FakeStore
from tests.models_made import make_model

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
# architecture → what is smaller than usual, bound on what differs from a cold run
KINDS = {
    "llama": (SMALL, 0.0),
    "gemma3": (SMALL | {"sliding_window": 12, "sliding_window_pattern": 2}, 1e-4),
    "qwen3_next": (
        {k: v for k, v in SMALL.items() if k != "head_dim"}
        | {"full_attention_interval": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        0.0,
    ),
    "mamba2": ({"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16, "state_size": 8}, 1e-4),
}
RUNS = 126  # of 50 steps, for each architecture, in a thorough run


class TwoModels:
    """A loader of two models of one architecture, each of which it has read once."""

    def __init__(self, folder, architecture, changes):
        self.models = {}
        for name, bias in (("tiny", {}), ("other", {"rms_norm_eps": 1e-4, "layer_norm_epsilon": 1e-4})):
            known = {k: v for k, v in bias.items() if k == "layer_norm_epsilon" or architecture != "mamba2"}
            self.models[name] = load_model(make_model(folder / name, architecture, **changes, **known))[0]
        self.cold = {}

    def prepare(self, spec, report):
        return PreparedModel(spec.name, spec.location, {}, None, 100)

    def materialise(self, prepared):
        yield 0.0
        model = self.models[prepared.name]
        runner, stop_ids = Runner(model, None, LIMITS.chunk_tokens), frozenset({1})
        name, num_ids = prepared.name, model.args.vocab_size
        return LoadedModel(name, runner, None, stop_ids, num_ids, 1000, 100, name.encode())

    def close(self):
        pass

    def cold_run(self, name, tokens):
        """Logits of every token, and the caches, of a model that computes these tokens from nothing."""
        if (name, tokens) not in self.cold:
            caches, logits = make_prompt_cache(self.models[name]), []
            for start in range(0, len(tokens), LIMITS.chunk_tokens):
                chunk = mx.array([tokens[start : start + LIMITS.chunk_tokens]])
                logits.append(self.models[name](chunk, cache=caches)[0])
            flat = leaves(caches)
            mx.eval(logits, [cache.state for cache in flat])
            self.cold[name, tokens] = np.concatenate([np.array(x) for x in logits]), flat
        return self.cold[name, tokens]


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """Two models of an architecture, and the bound on what differs from a cold run."""
    changes, bound = KINDS[request.param]
    return TwoModels(tmp_path_factory.mktemp("models"), request.param, changes), bound


def make_machine(models, bound, tight):
    """A kind of machine over these models, and the events that it must have seen to prove anything."""
    cost = Runner(models.models["tiny"], None, LIMITS.chunk_tokens).cost
    checked = set()

    class Machine(SessionMachine):
        seen: ClassVar = Counter()
        max_kv_bytes = int(2.2 * cost.row_bytes(cost.slabs.capacity_for(256))) if tight else 1 << 30

        def __init__(self):
            store = FakeStore()
            self.open_store = (lambda: store) if tight else None  # where memory is tight, blocks come and go
            super().__init__()

        def make_loader(self):
            checked.clear()
            return models

        def expected(self, model, prompt, output, params, finished):
            if not output:
                return
            logits, _ = models.cold_run(model, prompt + output[:-1])
            for i, token in enumerate(output):
                row = logits[len(prompt) - 1 + i]
                assert row[token] >= row.max() - within(bound), (
                    f"token {i} is {token}, where {row.argmax()} is likelier"
                )

        def check_kept(self, session):
            leaf = session.leaf
            if leaf in checked or session.model not in self.engine.models.by_name:
                return
            checked.add(leaf)
            self.seen["checked"] += 1
            blocks = list(leaf.chain())[::-1]
            parts, end = [Part(b.payload, len(b.tokens)) for b in blocks], leaf.end
            codec = self.engine.models.by_name[session.model].model.runner.rows.codec
            _, caches = models.cold_run(session.model, session.log[:end])
            kept = codec.tokens(parts, 0, end)
            if usable([blocks[0].parent, *blocks], end, codec.layout):
                kept |= codec.latest(parts, end)
            for i, planes in kept.items():
                for one, other in zip(planes, read(caches[i], 0, end), strict=True):
                    assert_same(one, other, bound, f"layer {i} of {end} tokens")

    events = ["Finished", "cached", "checked", "evictions"]
    events += ["repeats"] if cost.token_bytes or not tight else []  # states leave logits no room
    if tight:
        events += ["persisted", "restarts", "restored"]
        events += ["preemptions"] if cost.token_bytes else []  # rows that do not grow never give way
    return Machine, events


@pytest.mark.usefixtures("cpu_ways")  # what happens in the story follows from the sizes of slots
@pytest.mark.parametrize("tight", [pytest.param(False, marks=pytest.mark.long), True], ids=["roomy", "tight"])
def test_what_is_kept_after_each_event_is_what_a_cold_run_computes(kind, tight):
    machine, events = make_machine(*kind, tight)
    machine().story()
    assert [event for event in events if not machine.seen[event]] == []


@pytest.mark.timeout(900)  # a time-out inside Hypothesis would be taken for a failure, and shrunk
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
def test_what_is_kept_of_a_session_is_what_a_cold_run_computes(kind, tight):
    machine, events = make_machine(*kind, tight)
    runs = drawn(RUNS / 2) if THOROUGH else 1  # what must befall a session is in the story
    run_state_machine_as_test(
        machine, settings=settings(max_examples=runs, stateful_step_count=50, deadline=None, print_blob=True)
    )
    if THOROUGH:
        assert [event for event in events if not machine.seen[event]] == []
