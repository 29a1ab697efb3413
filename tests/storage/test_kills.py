"""No end of the process loses what was acknowledged, and the loop that says so is able to see it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mcp.storage import faults
from tests.effort import EFFORT

ROOT = Path(__file__).parents[2]


def run_loop(kills, plant=""):
    """Its report."""
    command = [sys.executable, "-m", "tests.storage.kill_loop", "--kills", str(kills), "--plant", plant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600 * EFFORT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(600 * EFFORT)
def test_no_kill_loses_an_acknowledged_session_or_leaves_anything_behind():
    report = run_loop(2000 * EFFORT)
    assert report["violations"] == []
    assert sum(report["killed"].values()) >= 2000 * EFFORT
    assert min(report["killed"].values()) > 500 * EFFORT
    assert report["points"] == sorted(faults.POINTS), "a point that no child came by"


@pytest.mark.parametrize("plant", ["no-rename", "no-rename-no-checksum", "session-first"])
def test_the_loop_catches_a_bad_writer(plant):
    assert run_loop(100, plant)["violations"] != []
