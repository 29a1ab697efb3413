"""The threads of two BLAS libraries in one process, and the sums that OpenBLAS gets."""

import json
import os
import subprocess
import sys

import pytest

from mlx_mcp.mlx_backend.cpu.openblas import find_openblas, num_threads

SCRIPT = """
import json
from mlx_mcp.mlx_backend.cpu.openblas import num_threads, prefer_openblas
assert prefer_openblas()
import mlx.core, numpy
from threadpoolctl import threadpool_info
def pools():
    return {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
before = pools()
print(json.dumps([num_threads(), before, pools()]))
"""


@pytest.mark.skipif(find_openblas() is None, reason="no OpenBLAS is installed")
def test_uses_openblas_keeps_its_threads_and_numpys_own_is_left_one():
    env = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True).stdout
    threads, before, after = json.loads(out)
    (numpys,) = (path for path in after if "numpy" in path)
    (front,) = after.keys() - {numpys}
    assert (threads, before[front], after[front], after[numpys]) == (2, 2, 2, 1)
    assert before[numpys] == 2, "else nothing was proved"


def test_without_uses_openblas_one_thread_attends():
    assert num_threads() == 1
