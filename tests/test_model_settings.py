"""What config.toml says of models."""

import pytest

from mlx_mcp.config import Config
from mlx_mcp.core.ports import ModelOptions
from mlx_mcp.errors import ConfigError
from mlx_mcp.wiring import registry_of


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes config.toml, and loads it."""
    path = tmp_path / "config.toml"
    monkeypatch.setenv("MLX_MCP_CONFIG", str(path))

    def load(text):
        path.write_text(text)
        return Config.load()

    return load


def test_a_models_settings_reach_the_model(config):
    registry = registry_of(
        config(
            """
            model = "fast"

            [model_defaults]
            ttl_s = 600
            sampling = { top_p = 0.9, top_k = 20 }

            [models."org/llm"]
            alias = "fast, small"
            context_tokens = 8192
            kv_bits = 8
            pinned = true
            sampling = { temperature = 0.7 }

            [models.embedded]
            alias = ["tiny"]
            kv_bits = 0
            """
        )
    )
    spec = registry.resolve(None)
    assert spec.name == registry.resolve("small").name == "org/llm"
    sampling = {"top_p": 0.9, "top_k": 20, "temperature": 0.7}
    assert spec.options == ModelOptions(8192, 8, sampling, 600.0, True)
    assert registry.resolve("tiny").options.kv_bits == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models.embedded]\nalais = 'x'", r"models\.embedded\.alais is no setting; did you mean alias\?"),
        ("[model_defaults]\npined = true", r"model_defaults\.pined is no setting; did you mean pinned\?"),
        ("[models.embedded]\nkv_bits = 3", "must be 8 or 4, or 0"),
        ("[models.embedded]\ncontext_tokens = 1", r"models\.embedded\.context_tokens"),
        ("[models.embedded]\nttl_s = 0", r"models\.embedded\.ttl_s"),
        ("modle_ttl_s = 5", "did you mean model_ttl_s"),
    ],
)
def test_a_wrong_key_or_value_is_told_with_the_one_that_was_meant(text, words, config):
    with pytest.raises(ConfigError, match=words):
        config(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[models.embedded.sampling]\ntemprature = 1",
            r"is no default for sampling; did you mean temperature\? Correct it",
        ),
        ("[models.embedded.sampling]\nseed = 1", "take one of: temperature, top_p"),
        ("[model_defaults.sampling]\ntop_p = 2", "above 0 and at most 1"),
        ("[models.embedded]\nalias = 'embedded'", "is a name already"),
    ],
)
def test_what_no_model_can_have_is_told_before_anything_is_served(text, words, config):
    with pytest.raises(ConfigError, match=words):
        registry_of(config(text))
