"""`mlx-mcp token` as a user types it."""

import json
import time

import pytest

from mlx_mcp.storage.token_file import TokenFile
from tests.cli.test_main import invoked


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MCP_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_token_is_made_shown_once_listed_and_revoked(state):
    made = invoked("token", "add", "ann", "--expires", "30d", "--requests-per-minute", "60", "--sessions", "0")
    assert made.exit_code == 0, made.stderr
    token = made.stdout.strip()
    assert "It is shown this once" in made.stderr
    assert TokenFile(state).find(token, time.time()).name == "ann"
    invoked("token", "add", "bob")
    table = invoked("token", "list").stdout
    assert "requests_per_minute 60, sessions unlimited" in table
    assert "never" in table
    listed = invoked("token", "list", "--json").stdout
    [ann, bob] = json.loads(listed)
    assert (ann["name"], ann["limits"], ann["expired"]) == ("ann", {"requests_per_minute": 60, "sessions": 0}, False)
    assert bob["expires_at"] is None
    assert abs(ann["expires_at"] - ann["created_at"] - 30 * 86400) < 60
    assert token not in table + listed
    assert "not valid any more" in invoked("token", "revoke", "ann").stdout
    assert TokenFile(state).find(token, time.time()) is None


def test_without_tokens_a_list_says_whether_callers_need_one(state):
    none = invoked("token", "list")
    assert (none.exit_code, none.stderr) == (1, "")
    assert "`mlx-mcp token add NAME` makes one" in none.stdout
    invoked("token", "add", "ann")
    invoked("token", "revoke", "ann")
    none = invoked("token", "list")
    assert none.exit_code == 1
    assert "Callers need one all the same" in none.stderr
    assert json.loads(invoked("token", "list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "ann", "--expires", "soon"), "'soon' is no time. Give a length, as 12h"),
        (("add", "ann", "--expires", "2001-01-01"), "is over already. Give a moment that is to come"),
        (("add", "ann", "--expires", "0d"), "is over already"),
        (("add", "a b"), "cannot be a token's name"),
        (("revoke", "ann"), "There is no token named 'ann'"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_makes_no_token(state, arguments, words):
    done = invoked("token", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not TokenFile(state).exists


def test_a_day_is_a_moment_too():
    assert invoked("token", "add", "ann", "--expires", "2999-01-31").exit_code == 0
