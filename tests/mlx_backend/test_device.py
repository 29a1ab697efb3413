"""Which arithmetic a device gets."""

import os
import subprocess
import sys

import pytest

from mlx_mcp.mlx_backend.cpu.openblas import find_openblas


@pytest.mark.parametrize("blas", ["none", "asked for", "preloaded"])
def test_the_arithmetic_for_cpus_is_used_where_mlx_uses_openblas_and_nowhere_else(blas):
    path, environment = find_openblas(), {name: x for name, x in os.environ.items() if name != "LD_PRELOAD"}
    if blas != "none" and path is None:
        pytest.skip("OpenBLAS is not installed")
    if blas == "preloaded":
        environment["LD_PRELOAD"] = path
    program = f"""
from mlx_mcp.mlx_backend.cpu.openblas import uses_openblas, prefer_openblas
assert {blas != "asked for"} or prefer_openblas()
import mlx.core as mx
from mlx_mcp.mlx_backend.device import MIN_SCORES, uses_cpu_attention
mx.set_default_device(mx.cpu)
cases = ((1, mx.float32), (0, mx.float32), (1, mx.bfloat16))
print(uses_openblas(), *(uses_cpu_attention(MIN_SCORES + more, dtype) for more, dtype in cases))
"""
    options = {"capture_output": True, "text": True, "timeout": 60, "check": True, "env": environment}
    found, there = subprocess.run([sys.executable, "-c", program], **options), str(blas != "none")
    assert found.stdout.split() == [there, there, "False", "False"]
