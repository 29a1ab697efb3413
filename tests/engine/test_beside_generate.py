"""The whole engine with a GPU's ways beside mlx_lm's own generation: greedy, of the same weights in the same type.

Each model answers a prompt that is new, then three turns at once in forks of that session, then one in the session as
another engine has read it from disk. Tokens are the same; where they part, the two must be as likely as each other but
for rounding: in float32 they differ by less than rounding changes. mlx_lm chooses by log-probabilities in the weights'
own type, of which bf16 has few: of two tokens that are 0.03 apart it takes either.
"""

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model

from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.messages import Failed, Fork, Load, Persist, Persisted, Prefilled, Submit, Token, Turn
from mlx_mcp.engine.persistence import Persisting
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.loader import MlxLoader
from mlx_mcp.storage.store import Store
from tests.effort import rare_ones_slow
from tests.engine.hand_io import HandIo
from tests.engine.hearing import hear
from tests.mlx_backend.test_architectures import CASES, COMMON, module
from tests.models_made import initial, write_tokenizer

pytestmark = pytest.mark.usefixtures("gpu_ways")
NUM_TOKENS = 10  # of each answer

# Sizes that every group of weights divides; experts of half precision cannot be computed on a CPU, so there are none.
SIZES = {
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
}
NO_EXPERTS = {"num_experts": 0, "mlp_only_layers": list(range(4))}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {},
    "gemma4_text": {},
    "phi3": {"rope_scaling": None},
    "ministral3": {},
    "olmo2": {},
    "cohere2": {},
    "glm4": {},
    "granite": {},
    "smollm3": {},
    "qwen3_next": NO_EXPERTS,
    "falcon_h1": {},
    "lfm2": {},
    "mamba2": {},
}
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe")
FOUR_BITS: dict[str, Any] = {"group_size": 64, "bits": 4}


def write_model(folder: Path, name: str, dtype: mx.Dtype, quantization: dict[str, Any] | None, **changes: Any) -> Path:
    """A tiny random model of an architecture in a folder that the real loader takes."""
    folder.mkdir()
    stop_id, vocab_size = write_tokenizer(folder, None)
    sizes = {**SIZES, "vocab_size": vocab_size, "vocab_size_per_layer_input": vocab_size, "eos_token_id": stop_id}
    config: dict[str, Any] = {"model_type": name} | COMMON | CASES[name] | sizes | changes
    mx.random.seed(7)
    model = module(name).Model(module(name).ModelArgs.from_dict(config))
    parameters: Any = tree_flatten(model.parameters())
    model.update(tree_unflatten([(path, initial(path, array).astype(dtype)) for path, array in parameters]))
    if quantization:
        model, config = quantize_model(model, config, **quantization)
    weights: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def gpu_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights keep their type, attention is mlx.fast's, rows lie for few calls, tokens are drawn on the device."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)


class Reference:
    """The folder as mlx_lm loads it."""

    def __init__(self, folder: Path) -> None:
        loaded: Any = load_model(folder)
        self.model, self.folder = loaded[0], folder

    def answer(self, prompt: tuple[int, ...]) -> list[int]:
        """mlx_lm's own tokens."""
        steps: Any = generate_step(mx.array(prompt), self.model, max_tokens=NUM_TOKENS)
        return [int(token) for token, _ in steps]

    def logprobs(self, dtype: mx.Dtype | None, ids: list[int]) -> Any:
        """Those of the next token, computed in this type, or in that of the weights, as mlx_lm chooses by them."""
        loaded: Any = load_model(self.folder)
        if dtype is not None:
            loaded[0].set_dtype(dtype)
        logits = loaded[0](mx.array([ids]), cache=make_prompt_cache(loaded[0]))[0, -1]
        return np.array((logits - mx.logsumexp(logits)).astype(mx.float32))

    def assert_same(self, found: list[int], prompt: tuple[int, ...], what: str) -> int:
        """An answer is mlx_lm's own as far as two tokens are not as likely as each other; returns how far that is."""
        expected = self.answer(prompt)
        assert len(found) == len(expected), what
        at = next((i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other), None)
        if at is None:
            return NUM_TOKENS
        rounded, exact = (self.logprobs(dtype, [*prompt, *expected[:at]]) for dtype in (None, mx.float32))
        gap, rounding = exact[expected[at]] - exact[found[at]], np.abs(rounded - exact).max()
        said = f"{what}: token {at} is {found[at]} in place of {expected[at]}, {gap} less likely, rounding {rounding}"
        assert abs(gap) <= 2 * rounding, said
        return at


class Endless(MlxLoader):
    """Models of which no token ends an answer."""

    def materialise(self, prepared):
        loaded = yield from super().materialise(prepared)
        return replace(loaded, stop_ids=frozenset())

    def close(self):
        """The streams of this thread are the test's too."""


class Ours:
    """An engine over the folder and a store, stepped by hand."""

    def __init__(self, folder, store, kv_bits=None):
        self.ids, self.io, loader = itertools.count(1), HandIo(), Endless(kv_bits)
        open_store = partial(Store.open, store, quota_bytes=1 << 30, daily_bytes=0)
        self.engine = Engine(loader, Limits(), 1 << 30, 1 << 30, persisting=Persisting(open_store, self.io))
        self.io.engine = self.engine
        self.io.run_all()
        self.ask(Load, loader.prepare(ModelSpec("m", "folder", str(folder)), lambda progress: None))
        self.run()

    def run(self):
        while self.engine.has_work or self.io.work:
            self.engine.step()
            self.io.run_all()

    def ask(self, command, *arguments, **rest):
        """The events of a command, as they come."""
        events = []
        call_id = next(self.ids)
        hear(self.engine, lambda event: events.append(event) or True, call_id)
        self.engine.handle(command(call_id, *arguments, **rest))
        return events

    def say(self, prompt, session="", **turn):
        """A call, or a turn of a session, which stays as it was."""
        return self.ask(Submit, "m", prompt, SamplingParams(NUM_TOKENS), turn=Turn("ann", session, **turn))

    def fork(self, session, count):
        events = self.ask(Fork, "ann", session, count, ())
        self.run()
        return [info.session_id for info in events[0].infos]

    def log(self, session):
        return self.engine.sessions.sessions[session].log

    def end(self):
        self.engine.close(deadline=0)


def ids(number, count):
    return tuple(3 + (37 * number + 7 * k * k + 13 * k) % 300 for k in range(count))


def tokens(events):
    assert not [event for event in events if isinstance(event, Failed)], events
    return [event.token_id for event in events if isinstance(event, Token)]


def answers(folder, store, kv_bits=None):
    """What the engine makes of the story: (what, whole prompt, answer), and how many tokens were read from disk."""
    one = Ours(folder, store, kv_bits)
    first = ids(0, 150)
    events = one.say(first, opens=SessionOptions())
    one.run()
    told = [("new", first, tokens(events))]
    session = events[-1].session.session_id
    log, turns = one.log(session), [ids(number, 9 + 16 * number) for number in (1, 2, 3)]
    calls = [one.say(turn, fork) for turn, fork in zip(turns, one.fork(session, len(turns)), strict=True)]
    one.run()
    told += [("forked", log + turn, tokens(call)) for turn, call in zip(turns, calls, strict=True)]
    persisted = one.ask(Persist, "ann", session, "")
    one.run()
    assert isinstance(persisted[-1], Persisted), persisted
    one.end()
    other = Ours(folder, store, kv_bits)
    call = other.say(turns[0], session)
    other.run()
    told.append(("restored", log + turns[0], tokens(call)))
    other.end()
    return told, next(event.num_restored for event in call if isinstance(event, Prefilled))


def assert_beside_mlx_lm(folder, store):
    told, num_restored = answers(folder, store)
    reference = Reference(folder)
    num_same = sum(reference.assert_same(answer, prompt, what) for what, prompt, answer in told)
    assert num_same >= len(told) * NUM_TOKENS / 2
    assert_restored_as_forked(told, num_restored)


def assert_restored_as_forked(told, num_restored):
    """What another engine reads from disk answers as what this one had in memory, bit by bit."""
    (_, prompt, forked), (_, again, restored) = told[1], told[-1]
    assert (again, restored) == (prompt, forked)
    assert num_restored >= 128


COMMONEST = ("llama", "gemma3_text")


@pytest.mark.parametrize("name", rare_ones_slow(DENSE, set(DENSE), COMMONEST))
def test_in_bf16_every_answer_is_mlx_lms_own(name, tmp_path):
    assert_beside_mlx_lm(write_model(tmp_path / "model", name, mx.bfloat16, None, **DENSE[name]), tmp_path / "store")


@pytest.mark.parametrize("name", rare_ones_slow([*DENSE, *EXPERTS], {*DENSE, *EXPERTS}, COMMONEST))
def test_in_4_bits_every_answer_is_mlx_lms_own(name, tmp_path):
    changes = DENSE.get(name, {})
    assert_beside_mlx_lm(write_model(tmp_path / "model", name, mx.bfloat16, FOUR_BITS, **changes), tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llama", {"group_size": 32, "bits": 4}),
        pytest.param("llama", {"group_size": 64, "bits": 8}, marks=pytest.mark.long),
        pytest.param("qwen3", {"group_size": 32, "bits": 8}, marks=pytest.mark.long),
        pytest.param("gpt_oss", {"group_size": None, "bits": None, "mode": "mxfp4"}, marks=pytest.mark.long),
        pytest.param("llama", {"group_size": None, "bits": None, "mode": "mxfp4"}, marks=pytest.mark.long),
    ],
)
def test_in_other_forms_of_quantized_weights_every_answer_is_mlx_lms_own(name, quantization, tmp_path):
    folder = write_model(tmp_path / "model", name, mx.bfloat16, quantization)
    assert_beside_mlx_lm(folder, tmp_path / "store")


@pytest.mark.parametrize("dtype", [mx.bfloat16, pytest.param(mx.float16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("kv_bits", [8, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.long)])
def test_quantized_keys_of_half_precision_give_the_same_answers_forked_and_restored(name, kv_bits, dtype, tmp_path):
    folder = write_model(tmp_path / "model", name, dtype, None, hidden_size=128, head_dim=32)
    told, num_restored = answers(folder, tmp_path / "store", kv_bits)
    assert_restored_as_forked(told, num_restored)
    again, _ = answers(folder, tmp_path / "other", kv_bits)
    assert again == told
