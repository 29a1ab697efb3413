"""Downloading from a hub: the real client code against a hub of this test's own on loopback."""

import os
import subprocess
import sys

import pytest

from tests.models.fake_hub import serving
from tests.models_made import make_model


@pytest.fixture
def hub(tmp_path):
    folder = make_model(tmp_path / "origin")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with serving(folder) as server:
        yield server


def run(hub, home, *arguments, offline="0"):
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": offline,
    }
    command = [sys.executable, "-m", "mlx_mcp", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=90)


@pytest.mark.long
def test_a_hub_model_is_downloaded_once_and_then_serves_offline(hub, tmp_path):
    asked = ("run", "hi", "--max-tokens", "4", "--model", "someone/tiny")
    first = run(hub, tmp_path / "home", *asked)
    assert first.returncode == 0, first.stderr
    assert "4 generated" in first.stderr
    fetched = " ".join(hub.asked)
    assert "model.safetensors" in fetched
    assert "evil.py" not in fetched.replace("/tree/", "")
    assert "pytorch_model.bin" not in fetched
    hub.asked.clear()
    again = run(hub, tmp_path / "home", *asked, offline="1")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert hub.asked == []
    assert "someone/tiny" in run(hub, tmp_path / "home", "models").stdout


@pytest.mark.long
def test_a_repository_that_the_hub_does_not_have_is_named(hub, tmp_path):
    done = run(hub, tmp_path / "home", "run", "hi", "--model", "someone/else")
    assert done.returncode == 2
    assert "someone/else" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_listing_and_serving_the_embedded_model_ask_the_hub_nothing(hub, tmp_path):
    assert run(hub, tmp_path / "home", "models").returncode == 0
    assert run(hub, tmp_path / "home", "run", "Hello.", "--max-tokens", "4").returncode == 0
    assert hub.asked == []
