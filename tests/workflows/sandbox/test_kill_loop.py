"""No SIGKILL of a server or a worker, at any suspension, loses a run that was answered, or asks anything again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.effort import drawn, seconds

ROOT = Path(__file__).parents[3]
NUM_KILLS = drawn(10, least=4)  # 500 in `make campaign`


@pytest.mark.long
@pytest.mark.timeout(seconds(600))
def test_no_kill_loses_a_run_that_was_answered_and_a_replay_asks_nobody() -> None:
    command = [sys.executable, "-m", "tests.workflows.sandbox.kill_loop", "--kills", str(NUM_KILLS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds(600), check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["violations"] == []
    assert min(report["killed"].values()) >= max(1, NUM_KILLS // 4)
