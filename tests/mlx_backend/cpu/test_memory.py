"""Freed memory."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is glibc that keeps memory")
def test_memory_that_a_row_gave_back_is_there_for_the_next_without_the_system():
    program = """
import resource
import mlx.core as mx
from mlx_mcp.mlx_backend.cpu.memory import keep_freed_memory
mx.set_default_device(mx.cpu)
keep_freed_memory(256 << 20)
faults = []
for _ in range(6):
    mx.eval([mx.zeros((3 << 20,), mx.uint8) for _ in range(16)])
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[-2]) * resource.getpagesize())
"""
    options = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    mapped_bytes = int(subprocess.run([sys.executable, "-c", program], **options).stdout)
    assert mapped_bytes < 16 * (3 << 20) / 10
