"""Every test runs on the wheel's own BLAS, whose rows are bitwise independent; offline; with no settings of a user.

Nor does any join a user's engine: those that want one share one of this test run, which ends with it. `make
test-openblas` has OpenBLAS in front instead, and bounds in place of bits (comparing.py).
"""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from mlx_mcp.mlx_backend.cpu.openblas import HINT, prefer_openblas, uses_openblas
from mlx_mcp.process.daemon import stop
from mlx_mcp.process.place import user_place
from tests.comparing import OPENBLAS
from tests.effort import LONG, THOROUGH

_HOME = tempfile.mkdtemp(prefix="mlx-mcp-tests-")
os.environ.update(
    MLX_MCP_OPENBLAS="1" if OPENBLAS else "0",
    MLX_MCP_CONFIG=os.path.join(_HOME, "config.toml"),
    MLX_MCP_STATE_DIR=os.path.join(_HOME, "state"),
    HF_HOME=os.path.join(_HOME, "hub"),
    HF_HUB_OFFLINE="1",
    MLX_MCP_STORE_DIR=os.path.join(_HOME, "store"),
    MLX_MCP_MAX_SSD_BYTES="0",  # what one test leaves there, another would find
    PYTHONUNBUFFERED="1",
)
# Tests start some hundred processes, which would each compile all that they import.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

if OPENBLAS:  # as many tests run at once as there are cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if OPENBLAS and not (prefer_openblas() and uses_openblas()):
    pytest.exit(f"OpenBLAS cannot be put in front: {HINT}", 2)


if os.environ.get("TEST_DEVICE") == "gpu":  # `make test-gpu-ways`: all that asks for the device takes a GPU's ways
    from mlx_mcp.mlx_backend import device  # only here: it imports mlx, and tests/real puts OpenBLAS in front first

    device.on_cpu = lambda: False
ASKED = os.environ.get("TEST_DEVICE_ASKED")  # `make coverage-device`: a folder for what the device was asked
if ASKED:
    from tests.device_branches import listen

    asked = listen()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out of all but thorough runs, and long ones out of `make test`."""
    marks = () if THOROUGH else ("slow",) if LONG else ("slow", "long")
    left_out = {item for item in items if any(map(item.get_closest_marker, marks))}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Keep modules and tests, which stay to the end, out of every garbage collection: a full one took a second."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    if ASKED:
        asked.write(Path(ASKED))
    stop(user_place(), 30)
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture
def cpu_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a test that is about the ways of a CPU take these, whatever the other tests take."""
    monkeypatch.setattr("mlx_mcp.mlx_backend.device.on_cpu", lambda: True)
