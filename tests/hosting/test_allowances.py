"""The limits that hold for a token, and how a caller hears of them over HTTP."""

import httpx2
import pytest

from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError
from mlx_mcp.hosting.allowances import limiter_of
from mlx_mcp.service.limits import Limits
from tests.api.http.routes import serving_all
from tests.api.http.test_auth import bearer, client_of, engine, tokens
from tests.api.mcp.test_tools import generate

__all__ = ["engine", "tokens"]


def test_limits_of_a_token_take_the_place_of_those_of_the_settings_at_once(tokens):
    config = Config.load(limits={"requests_per_minute": 5, "sessions": 2}, window_limits={"calls_at_once": 7})
    limits_of = limiter_of(config).limits_of
    assert limits_of("") == Limits(calls_at_once=7)
    assert limits_of("ann") == limits_of("https://issuer someone") == Limits(5, sessions=2)
    tokens.add("ann", limits={"requests_per_minute": 9, "sessions": 0, "of_a_later_version": 1})
    assert limits_of("ann") == Limits(9)
    tokens.path.chmod(0o644)
    assert limits_of("ann") == Limits(5, sessions=2)


def test_unless_they_are_set_there_are_limits_for_tokens_and_none_for_windows():
    limits_of = limiter_of(Config.load()).limits_of
    assert limits_of("") == Limits()
    assert limits_of("ann") == Limits(calls_at_once=256, sessions=1024)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[limits]\nrequests_a_minute = 5", "limits.requests_a_minute is no setting; did you mean requests_per_minute"),
        ("[limits]\nrequests_per_minute = 0", "limits.requests_per_minute: Input should be greater than or equal to 1"),
        ("[limits]\nsessions = true", "limits.sessions"),
        ("share_prefixes = 3", "share_prefixes"),
    ],
)
def test_a_limit_that_is_none_is_refused(tmp_path, monkeypatch, toml, words):
    (tmp_path / "config.toml").write_text(toml)
    monkeypatch.setenv("MLX_MCP_CONFIG", str(tmp_path / "config.toml"))
    with pytest.raises(ConfigError, match=words):
        Config.load()


async def test_whoever_has_used_up_a_limit_hears_when_to_try_again(engine, tokens):
    token = tokens.add("ann", limits={"requests_per_minute": 2})
    limiter = limiter_of(Config.load())
    async with serving_all(engine, limits=limiter) as address, httpx2.AsyncClient(headers=bearer(token)) as http:
        for _ in range(2):
            assert (await http.post(f"{address}/echo/x", json={"text": "a"})).status_code == 200
        refused = await http.post(f"{address}/echo/x", json={"text": "a"})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert "You may make 2 requests a minute" in refused.json()["oops"]
        async with client_of(address, token) as client:
            result = await generate(client)
            assert result.is_error
            assert "You may make 2 requests a minute" in result.content[0].text
            assert "Retry in" in result.content[0].text
