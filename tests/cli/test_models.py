"""`mlx-mcp models`, `pull`, `rm` and `alias` as a user types them, with a hub on loopback."""

import json
import shutil
import tomllib

import pytest
from huggingface_hub import constants

from mlx_mcp.cli import models as models_module
from mlx_mcp.cli.config_file import set_alias
from mlx_mcp.errors import Abandoned, ConfigError
from mlx_mcp.models import hub as hub_module
from mlx_mcp.models.hub import fetch, plan
from tests.cli.test_main import invoked
from tests.models.fake_hub import serving
from tests.models.test_hub_cache import use
from tests.models_made import make_model

REPO = "someone/tiny"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("origin"))


@pytest.fixture
def hub(origin, tmp_path, monkeypatch):
    """A hub, an empty cache, and settings of this test's own; no engine runs."""
    monkeypatch.setattr(hub_module, "RETRY_S", 0.01)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLX_MCP_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(models_module, "engine_status", lambda: None)
    with serving(origin) as server:
        use(server.url, monkeypatch)
        yield server


def told(done):
    assert done.exit_code == 0, done.stderr
    return done.stdout


def listed():
    return {model["name"]: model for model in json.loads(told(invoked("models", "--json")))}


def test_a_model_is_pulled_listed_and_removed(hub, tmp_path):
    first = told(invoked("pull", REPO, "--yes"))
    assert "of which 0.0 MB are here" in first
    assert "of the disk are free" in first
    assert listed()[REPO]["fits"] == "yes"
    hub.asked.clear()
    assert f"{REPO} is here" in told(invoked("pull", REPO))
    assert hub.asked == []
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("blobs/*"))
    removed = told(invoked("rm", REPO, "--yes"))
    assert f"{size / 1e6:,.1f} MB are free again" in removed
    assert REPO not in listed()
    assert list((tmp_path / "cache").glob("models--*")) == []
    assert invoked("rm", REPO, "--yes").exit_code == 1


def test_a_pull_goes_on_where_an_earlier_one_ended(hub, origin):
    def abandon(progress):
        if progress.done_bytes > 100_000:
            raise Abandoned

    with pytest.raises(Abandoned):
        fetch(REPO, abandon)
    here = plan(REPO).here_bytes
    assert 100_000 < here < plan(REPO).total_bytes
    sent = hub.sent_bytes
    told(invoked("pull", REPO, "--yes"))
    assert hub.sent_bytes - sent <= plan(REPO).total_bytes - here + 10_000
    assert plan(REPO).lacking_bytes == 0


def test_what_comes_damaged_is_refused(hub):
    hub.damage = True
    done = invoked("pull", REPO, "--yes")
    assert done.exit_code == 2
    assert "did not come as the hub has it" in done.stderr
    hub.damage = False
    told(invoked("pull", REPO, "--yes"))


def test_a_download_is_not_begun_without_consent_or_room(hub, monkeypatch):
    done = invoked("pull", REPO)
    assert (done.exit_code, "There is nobody to ask here: say --yes" in done.stderr) == (2, True)
    full = shutil.disk_usage("/")._replace(free=1 << 29)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    done = invoked("pull", REPO, "--yes")
    assert (done.exit_code, "or set HF_HOME to a folder" in done.stderr) == (2, True)
    assert not any("resolve" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pull", "someone/else", "--yes"], "Check the name and the network"),
        (["pull", "tiny"], "Model not found: 'tiny'"),
        (["pull", "embedded"], "is not from the hub but in"),
        (["rm", "embedded", "--yes"], "not from the hub"),
        (["alias", "x"], "is to stand for, or --remove"),
        (["alias", "x", "embedded", "--remove"], "Give --remove, or a model that"),
        (["alias", "embedded", REPO], "is a name already"),
        (["alias", "a b", REPO], "cannot be an alias: take 1 to 64 letters, digits, dots, dashes, underscores, colons"),
        (["alias", "x", "nothing"], "Model not found"),
    ],
)
def test_a_mistake_is_told_with_the_next_step(hub, arguments, words):
    done = invoked(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_model_that_the_engine_has_in_memory_is_not_removed(hub, monkeypatch):
    told(invoked("pull", REPO, "--yes"))
    monkeypatch.setattr(models_module, "engine_status", lambda: {"models": [f"{REPO}+sql"], "loading": []})
    done = invoked("rm", REPO, "--yes")
    assert (done.exit_code, "Unload it (the tool unload_model)" in done.stderr) == (2, True)
    monkeypatch.setattr(models_module, "engine_status", lambda: None)
    assert REPO in listed()


def test_an_alias_is_good_wherever_a_name_is_and_can_be_moved_and_removed(hub):
    told(invoked("alias", "fast", REPO))
    told(invoked("alias", "old", "embedded"))
    assert json.loads(told(invoked("alias", "--json"))) == {"fast": REPO, "old": "embedded"}
    told(invoked("pull", "fast", "--yes"))
    assert listed()[REPO]["aliases"] == ["fast"]
    assert json.loads(told(invoked("models", "--json", "--model", "fast")))[0]["name"] == REPO
    assert told(invoked("run", "hi", "--model", "fast", "--max-tokens", "2"))
    told(invoked("alias", "fast", "embedded"))
    assert json.loads(told(invoked("alias", "--json"))) == {"fast": "embedded", "old": "embedded"}
    told(invoked("alias", "fast", "--remove"))
    assert invoked("alias", "fast", "--remove").exit_code == 1
    assert told(invoked("alias")).split() == ["alias", "model", "old", "embedded"]


def test_an_alias_of_a_folder_holds_whatever_the_default_model_is(hub, origin, tmp_path):
    told(invoked("alias", "mine", str(origin)))
    assert tomllib.loads((tmp_path / "config.toml").read_text())["models"] == {str(origin): {"alias": ["mine"]}}
    assert listed()[origin.name]["aliases"] == ["mine"]


# The file

ODD = b"""# my settings\r
port = 9000   # not 8080\r
\r
[models."org/b"]  # the big one\r
ttl_s = 60\r
alias = "big, large"\r
\r
[models."org/a"]\r
alias = ["small"]\r
"""


def test_comments_order_and_line_ends_of_the_file_stay(tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(ODD)
    path.chmod(0o600)
    assert set_alias(path, "huge", "org/b")
    assert path.read_bytes() == ODD.replace(b'"big, large"', b'["big", "large", "huge"]')
    assert path.stat().st_mode & 0o777 == 0o600
    assert not set_alias(path, "huge", "org/b")
    assert set_alias(path, "small", "org/b")
    text = path.read_text()
    assert "org/a" not in text
    assert tomllib.loads(text)["models"] == {"org/b": {"ttl_s": 60, "alias": ["big", "large", "huge", "small"]}}
    for alias in ("big", "large", "huge", "small"):
        set_alias(path, alias, None)
    assert tomllib.loads(path.read_text()) == {"port": 9000, "models": {"org/b": {"ttl_s": 60}}}
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_a_file_that_is_no_toml_stays_as_it_is_and_a_link_stays_a_link(tmp_path):
    path, target = tmp_path / "config.toml", tmp_path / "elsewhere.toml"
    path.write_text("port = = 1")
    with pytest.raises(ConfigError, match="cannot be changed"):
        set_alias(path, "x", "org/a")
    assert path.read_text() == "port = = 1"
    path.unlink()
    target.write_text("")
    path.symlink_to(target)
    assert set_alias(path, "x", "org/a")
    assert path.is_symlink()
    assert tomllib.loads(target.read_text()) == {"models": {"org/a": {"alias": ["x"]}}}
