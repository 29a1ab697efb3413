import contextlib
import json
import struct

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from mlx_mcp.core.ports import ModelOptions, ModelSpec
from mlx_mcp.core.prefill import CPU_PREFILL, GPU_PREFILL
from mlx_mcp.errors import ModelError
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend import loader as loader_module
from mlx_mcp.mlx_backend.loader import MlxLoader, kept_dtype
from tests.models_made import make_model


@pytest.fixture
def folder(tmp_path):
    return make_model(tmp_path / "tiny")


def prepare(folder):
    return MlxLoader().prepare(ModelSpec("tiny", "folder", str(folder)), lambda progress: None)


def materialise(prepared):
    slices, shares = MlxLoader().materialise(prepared), []
    while True:
        try:
            shares.append(next(slices))
        except StopIteration as end:
            return end.value, shares


def test_weights_are_read_in_slices_and_the_share_reaches_one(folder, monkeypatch):
    monkeypatch.setattr(loader_module, "SLICE_BYTES", 50_000)
    model, shares = materialise(prepare(folder))
    assert len(shares) > 4
    done = [share.done_bytes for share in shares]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, model.weights_bytes)
    assert {share.total_bytes for share in shares} == {model.weights_bytes}
    assert (model.context_tokens, model.vocab_size) == (4096, 306)


def test_prompts_are_read_as_the_device_likes_it(folder, monkeypatch):
    for on_cpu, expected in ((True, CPU_PREFILL), (False, GPU_PREFILL)):
        monkeypatch.setattr(device, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        model, _ = materialise(prepare(folder))
        assert model.prefill == expected


def test_the_models_own_end_of_turn_stops(folder):
    model, _ = materialise(prepare(folder))
    assert model.stop_ids == {2}


@pytest.mark.usefixtures("cpu_ways")
def test_half_precision_weights_become_single_on_a_cpu(tmp_path):
    prepared = prepare(make_model(tmp_path, dtype=mx.bfloat16))
    model, _ = materialise(prepared)
    assert {array.dtype for _, array in tree_flatten(model.runner.model.parameters())} == {mx.float32}
    assert model.weights_bytes == prepared.weights_bytes


def test_what_comes_from_elsewhere_is_kept_in_the_type_that_weights_have_here(tmp_path):
    model, _ = materialise(prepare(make_model(tmp_path, dtype=mx.bfloat16)))
    weights = dict(tree_flatten(model.runner.model.parameters())).values()
    assert {array.dtype for array in weights} == {mx.float32 if kept_dtype() == "F32" else mx.bfloat16}


def test_a_folder_that_is_no_model_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"it has no config\.json\. Give one that `mlx_lm.convert` wrote"):
        prepare(tmp_path)


def test_broken_config_names_the_file(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read: .*Correct it, or download the model again"):
        prepare(folder)


def test_a_model_that_wants_to_run_its_own_code_is_refused_before_it_can(folder):
    canary = folder / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text()) | {"model_file": "evil.py"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"wants to run its own Python file .*, which is never done\. Choose another model"
    ):
        prepare(folder)
    assert not canary.exists()


def test_a_tokenizer_that_wants_to_run_its_own_code_never_does(folder):
    canary = folder / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(config | {"tokenizer_class": "Evil"}))
    with contextlib.suppress(ModelError):
        prepare(folder)
    assert not canary.exists()


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"GGUF, pickle\) are not read: convert the model with"):
        prepare(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_cut_weights_are_refused_before_mlx_reads_them(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ModelError, match=r"is damaged: .*\. Download or convert the model again"):
        prepare(folder)


def test_weights_of_another_length_than_their_header_says_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"it should have \d+ bytes and has \d+"):
        prepare(folder)


def test_a_header_longer_than_the_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    with pytest.raises(ModelError, match="the header is longer than the file"):
        prepare(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"is incomplete: model-00002\.safetensors missing\. Download the model again"):
        prepare(folder)


def test_an_architecture_that_mlx_lm_does_not_know_is_named(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "martian"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="martian"):
        materialise(prepare(folder))


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError,
        match=r"(?s)cannot be loaded: .*Choose another model \(list_models shows them\), or convert this one again",
    ):
        materialise(prepare(folder))


# What a user has set for a model


def loaded_with(folder, **options):
    spec = ModelSpec("tiny", "folder", str(folder), options=ModelOptions(**options))
    prepared = MlxLoader().prepare(spec, lambda progress: None)
    return materialise(prepared)[0]


def test_a_models_own_settings_hold_over_what_holds_for_all(folder):
    model = loaded_with(folder, context_tokens=512, sampling={"temperature": 0.5})
    assert (model.context_tokens, model.defaults) == (512, {"temperature": 0.5})
    assert loaded_with(folder, context_tokens=100_000).context_tokens == 4096


def make_adapter(base, folder, seed=0):
    """A LoRA adapter as mlx_lm.lora writes it, with random weights."""
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
    folder.mkdir()
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model, _ = load_model(base)
    linear_to_lora_layers(model, 2, parameters)
    mx.random.seed(seed)
    lora = {k: mx.random.normal(v.shape) for k, v in tree_flatten(model.parameters()) if "lora" in k}
    mx.save_safetensors(str(folder / "adapters.safetensors"), lora)
    return folder


def logits(model):
    network = model.runner.model
    return network(mx.array([[5, 6, 7]]))


def test_an_adapter_changes_what_a_model_computes_and_shares_no_keys_and_values_with_it(folder, tmp_path):
    one, other = (make_adapter(folder, tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    models = [loaded_with(folder), *(loaded_with(folder, adapter=str(path)) for path in (one, other))]
    plain, first, second = map(logits, models)
    assert not mx.allclose(plain, first)
    assert not mx.allclose(first, second)
    assert mx.array_equal(first, logits(loaded_with(folder, adapter=str(one))))
    assert len({model.fingerprint for model in models}) == 3
    assert loaded_with(folder, adapter=str(one)).fingerprint == models[1].fingerprint
    assert models[1].weights_bytes > models[0].weights_bytes


def test_what_is_no_adapter_of_the_model_is_refused_with_the_next_step(folder, tmp_path):
    adapter = make_adapter(folder, tmp_path / "one")
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"model.layers.9.lora_a": mx.zeros((2, 2))})
    with pytest.raises(ModelError, match=r"(?s)cannot be put on the model.*trained on this model"):
        loaded_with(folder, adapter=str(adapter))
    (adapter / "adapters.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="damaged"):
        loaded_with(folder, adapter=str(adapter))
