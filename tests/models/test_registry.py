import json

import pytest

from mlx_mcp.core.ports import ModelOptions, ModelSpec
from mlx_mcp.errors import ConfigError, UnknownModel
from mlx_mcp.models.registry import EMBEDDED_FOLDER, Registry
from mlx_mcp.models.settings import ModelSettings, Settings


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


# What the settings say of models


def set_for(**by_name):
    return Settings({name.replace("__", "/"): own for name, own in by_name.items()})


def test_a_model_of_the_settings_has_its_options_and_may_be_asked_for_by_its_alias(hub):
    own = ModelSettings(ModelOptions(context_tokens=50, pinned=True, sampling={"temperature": 0.7}), ("fast", "f"))
    registry = Registry(None, hub, settings=set_for(org__llm=own))
    spec = registry.resolve("fast")
    assert spec == registry.at_hand("f") == registry.resolve("org/llm")
    assert (spec.name, spec.options) == ("org/llm", own.options)
    (entry,) = [entry for entry in registry.entries() if entry.spec.name == "org/llm"]
    assert (entry.aliases, entry.context_tokens, entry.sampling) == (("fast", "f"), 50, {"temperature": 0.7})
    assert registry.resolve("org/two-text").options == ModelOptions()


def test_an_alias_may_be_the_default_model(hub):
    registry = Registry("fast", hub, settings=set_for(org__llm=ModelSettings(ModelOptions(ttl_s=5), ("fast",))))
    assert registry.resolve(None).name == "org/llm"
    assert registry.resolve(None).options.ttl_s == 5


def test_what_is_set_for_all_holds_where_a_model_has_nothing_of_its_own(hub):
    general = ModelOptions(context_tokens=60, ttl_s=9.0, pinned=True, sampling={"top_p": 0.9, "temperature": 1.0})
    own = ModelSettings(ModelOptions(context_tokens=50, pinned=False, sampling={"temperature": 0.5}))
    registry = Registry(None, hub, settings=Settings({"org/llm": own}, general))
    assert registry.resolve("org/two-text").options == general
    assert registry.resolve("embedded").options == general
    llm = registry.resolve("org/llm").options
    assert (llm.context_tokens, llm.ttl_s, llm.pinned) == (50, 9.0, False)
    assert llm.sampling == {"top_p": 0.9, "temperature": 0.5}


def test_a_model_that_only_the_settings_name_may_be_downloaded(tmp_path):
    registry = Registry(None, tmp_path, settings=set_for(org__later=ModelSettings()))
    assert registry.resolve("org/later").may_fetch
    assert names(registry) == ["embedded", "org/later"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"org__llm": ModelSettings(aliases=("embedded",))}, "is a name already"),
        ({"org__llm": ModelSettings(aliases=("default",))}, "is a name already"),
        ({"org__llm": ModelSettings(aliases=("a/b",))}, "take 1 to 64 letters"),
        ({"org__a": ModelSettings(aliases=("x",)), "org__b": ModelSettings(aliases=("x",))}, "Take another one"),
        ({"nonsense": ModelSettings()}, "hub id"),
    ],
)
def test_aliases_and_names_that_cannot_be_are_refused_with_the_next_step(settings, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        Registry(None, tmp_path, settings=set_for(**settings))


def adapter(folder):
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes(b"x")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_a_model_with_an_adapter_is_a_model_of_its_own(hub, tmp_path):
    sql, base = adapter(tmp_path / "sql"), tmp_path / "base"
    base.mkdir()
    for name, served in ((f"org/llm+{sql}", "org/llm+sql"), (f"{base}+{sql}", "base+sql"), (f"embedded+{sql}", None)):
        spec = Registry(name, hub).resolve(None)
        assert (spec.name, spec.options.adapter) == (served or "embedded+sql", str(sql))
    both = Registry(
        None, hub, settings=Settings({f"org/llm+{sql}": ModelSettings(aliases=("s",)), "org/llm": ModelSettings()})
    )
    assert both.resolve("s").options.adapter == str(sql)
    assert both.resolve("org/llm").options.adapter == ""
    with pytest.raises(ConfigError, match=r"no adapters\.safetensors and no adapter_config\.json"):
        Registry(f"org/llm+{base}", hub)


def test_two_folders_of_one_name_cannot_both_be_models(tmp_path):
    for folder in ("a/x", "b/x"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"Two models are named 'x': .*Rename one of the folders"):
        Registry(str(tmp_path / "a/x"), tmp_path, settings=Settings({str(tmp_path / "b/x"): ModelSettings()}))


def test_what_a_model_can_is_known_from_its_template(hub):
    folder = next((hub / "models--org--llm").glob("snapshots/*"))
    (folder / "chat_template.jinja").write_text("{% if tools %}{{ tools }}{% endif %}<think></think>")
    by_name = {entry.spec.name: entry for entry in Registry(None, hub).entries()}
    assert (by_name["org/llm"].tools, by_name["org/llm"].thinks) == (True, True)
    assert (by_name["org/two-text"].tools, by_name["org/two-text"].thinks) == (None, None)
