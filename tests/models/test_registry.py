import json

import pytest

from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.errors import ConfigError, UnknownModel
from mlx_mcp.models.registry import EMBEDDED_FOLDER, Registry


def cached(hub, repo, config, weights=b"1234"):
    snapshot = hub / f"models--{repo.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    if weights:
        (snapshot / "model.safetensors").write_bytes(weights)


@pytest.fixture
def hub(tmp_path):
    cached(tmp_path, "org/llm", {"model_type": "llama", "max_position_embeddings": 99})
    cached(tmp_path, "org/two-text", {"model_type": "qwen3", "text_config": {"max_position_embeddings": 7}})
    cached(tmp_path, "org/vision", {"model_type": "unknown_to_mlx_lm"})
    cached(tmp_path, "org/no-weights", {"model_type": "llama"}, weights=None)
    (tmp_path / "models--org--broken" / "snapshots" / "x").mkdir(parents=True)
    (tmp_path / "models--org--broken" / "snapshots" / "x" / "config.json").write_text("{")
    return tmp_path


def names(registry):
    return [entry.spec.name for entry in registry.entries()]


def test_with_nothing_configured_the_embedded_model_serves(tmp_path):
    registry = Registry(None, tmp_path)
    spec = registry.resolve(None)
    assert (spec.name, spec.location) == ("embedded", str(EMBEDDED_FOLDER))
    assert registry.nothing_configured
    assert "--model" in spec.summary
    assert [entry.default for entry in registry.entries()] == [True]


def test_language_models_of_the_hub_cache_can_be_asked_for_and_nothing_else(hub):
    registry = Registry(None, hub)
    assert names(registry) == ["embedded", "org/llm", "org/two-text"]
    assert names(Registry("org/two-text", hub)) == ["org/two-text", "embedded", "org/llm"]
    by_name = {entry.spec.name: entry for entry in registry.entries()}
    assert (by_name["org/llm"].weights_bytes, by_name["org/llm"].context_tokens) == (4, 99)
    assert by_name["org/two-text"].context_tokens == 7
    assert registry.resolve("org/llm").source == "hub"


def test_what_makers_recommend_for_sampling_is_shown_unless_it_does_not_hold(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": [1]}')
    for holds, shown in ((True, {"temperature": 0.6, "top_k": 20}), (False, {})):
        entries = Registry(str(tmp_path), sampling_defaults=holds).entries()
        assert [entry.sampling for entry in entries if entry.default] == [shown]


def test_a_configured_folder_is_the_default_and_comes_by_its_name(tmp_path):
    (tmp_path / "my-model").mkdir()
    registry = Registry(str(tmp_path / "my-model"), tmp_path)
    assert registry.resolve(None) == registry.resolve("my-model") == registry.resolve("default")
    assert registry.resolve("my-model").source == "folder"
    assert not registry.nothing_configured
    assert registry.resolve("embedded").source == "embedded"


def test_only_models_of_the_hub_cache_are_looked_for_on_the_disk(hub):
    elsewhere = ModelSpec("elsewhere", "folder", "/nowhere")
    registry = Registry("org/llm", hub, {"elsewhere": elsewhere})
    for name in (None, "default", "org/llm", "embedded", "elsewhere"):
        assert registry.at_hand(name) == registry.resolve(name)
    assert registry.at_hand("org/two-text") is None
    assert registry.resolve("org/two-text").name == "org/two-text"


def test_a_configured_hub_id_need_not_be_downloaded_yet(tmp_path):
    registry = Registry("org/later", tmp_path)
    (entry,) = [e for e in registry.entries() if e.default]
    assert (entry.spec.name, entry.spec.source, entry.weights_bytes) == ("org/later", "hub", None)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "plain", "a/b/c", ""])
def test_a_configured_name_that_can_be_no_model_is_refused_at_start(name, tmp_path):
    with pytest.raises(ConfigError, match="hub id"):
        Registry(name, tmp_path)


@pytest.mark.parametrize("name", ["/etc", "../../etc", "org/not-cached", "Embedded", "", "x" * 10_000])
def test_a_caller_can_name_no_path_and_start_no_download(name, hub):
    with pytest.raises(UnknownModel, match="Call list_models") as caught:
        Registry(None, hub).resolve(name)
    assert "embedded" in str(caught.value)
    assert len(str(caught.value)) < 500
