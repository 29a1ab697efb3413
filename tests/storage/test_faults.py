"""Fault points: nothing outside of a test, and each is where its name says."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mcp.storage import faults

ROOT = Path(__file__).parents[2]
PASS_BY = "from mlx_mcp.storage.faults import point; point('write.renamed'); point('write.renamed'); print('alive')"


def run(environ):
    command = [sys.executable, "-c", PASS_BY]
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_fault_outside_of_test_mode_does_nothing():
    assert run({"MLX_MCP_FAULT": "write.renamed:kill"}).stdout == "alive\n"
    assert run({"MLX_MCP_FAULT": "write.renamed:kill", "MLX_MCP_TEST_MODE": "0"}).stdout == "alive\n"


@pytest.mark.parametrize(("action", "status"), [("kill", -signal.SIGKILL), ("segv", -signal.SIGSEGV), ("raise", 1)])
def test_in_test_mode_the_nth_time_it_breaks_the_process(action, status):
    for nth, expected in [(2, status), (3, 0)]:
        environ = {"MLX_MCP_TEST_MODE": "1", "MLX_MCP_FAULT": f"write.renamed:{action}@{nth}"}
        assert run(environ).returncode == expected


def test_a_fault_that_names_no_point_is_a_mistake():
    environ = {"MLX_MCP_TEST_MODE": "1", "MLX_MCP_FAULT": "write.renmed:kill"}
    assert "no such point" in run(environ).stderr


def test_every_point_is_registered_and_every_registered_point_is_in_the_code():
    storage = ROOT / "mlx_mcp" / "storage"
    passed = {name for file in storage.glob("*.py") for name in re.findall(r'\bpoint\("(.+?)"\)', file.read_text())}
    assert passed == set(faults.POINTS)
    assert len(set(faults.POINTS)) == len(faults.POINTS)
