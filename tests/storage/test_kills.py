"""No end of the process loses what was acknowledged, and the loop that says so is able to see it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.effort import THOROUGH, drawn, seconds
from tests.storage.kill_loop import MOMENTS

ROOT = Path(__file__).parents[2]


def run_loop(*options):
    """Its report."""
    command = [sys.executable, "-m", "tests.storage.kill_loop", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds(600), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_point_of_the_code_is_a_bad_one_to_be_killed_at():
    report = run_loop("--each-point")
    assert report["violations"] == []
    assert report["points"] == sorted(MOMENTS), "a point that no child came by"


@pytest.mark.timeout(seconds(600))
def test_no_kill_loses_an_acknowledged_session_or_leaves_anything_behind():
    kills = drawn(2000)
    report = run_loop("--kills", str(kills))
    assert report["violations"] == []
    assert sum(report["killed"].values()) >= kills
    assert min(report["killed"].values()) > kills / 4
    if THOROUGH:
        assert report["points"] == sorted(MOMENTS), "a point that no child came by"


@pytest.mark.parametrize("plant", ["no-rename", "no-rename-no-checksum", "session-first"])
def test_the_loop_catches_a_bad_writer(plant):
    assert run_loop("--kills", "100", "--plant", plant)["violations"] != []
