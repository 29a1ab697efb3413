"""Every test runs on the wheel's own BLAS, whose rows are bitwise independent; offline; with no settings of a user.

Nor does any join a user's engine: those that want one share one of this test run, which ends with it.
"""

import os
import shutil
import tempfile

from mlx_mcp.process.daemon import stop
from mlx_mcp.process.place import user_place

_HOME = tempfile.mkdtemp(prefix="mlx-mcp-tests-")
os.environ.update(
    MLX_MCP_OPENBLAS="0",
    MLX_MCP_CONFIG=os.path.join(_HOME, "config.toml"),
    MLX_MCP_STATE_DIR=os.path.join(_HOME, "state"),
    HF_HOME=os.path.join(_HOME, "hub"),
    HF_HUB_OFFLINE="1",
    MLX_MCP_STORE_DIR=os.path.join(_HOME, "store"),
    MLX_MCP_MAX_SSD_BYTES="0",  # what one test leaves there, another would find
    PYTHONUNBUFFERED="1",
)


def pytest_sessionfinish() -> None:
    stop(user_place(), 30)
    shutil.rmtree(_HOME, ignore_errors=True)
