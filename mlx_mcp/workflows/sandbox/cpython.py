"""Runs a sandbox's programs in CPython, in processes that the system encloses. Where nothing does, none is started.

This finds Python, its packages and what can be put around it. What goes on in one of its processes is in
`cpython_worker.py`, and what runs inside of it in `child/`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

import mlx_mcp
from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.cpython_process import Command
from mlx_mcp.workflows.sandbox.cpython_worker import CPythonWorker
from mlx_mcp.workflows.sandbox.isolation import BUBBLEWRAP, SCRATCH, SCRATCH_BYTES, Enclosed, Interpreter, enclose
from mlx_mcp.workflows.sandbox.runtime import Limits, Worker

DUMP_FORMAT = 1
TIME_ZONES = Path("/usr/share/zoneinfo")
# Hashes of texts are the same in every process, libraries start no threads by the number of cores, and no thread takes
# 64 MiB of the addresses that there are.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "2",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "HOME": SCRATCH,
    "TZ": "UTC",
}
NOT_ENCLOSED = (
    "Programs run in CPython only where the system encloses them: on Linux install bubblewrap 0.8 or later (Debian and "
    "Ubuntu: apt-get install bubblewrap) and allow user namespaces, or take the other interpreter: "
    "MLX_MCP_SANDBOX_PYTHON=monty, or sandbox_python in config.toml."
)
# The child's paths come as arguments: first ours, then those of packages. Nothing else is on them, and no hook is run.
START = (
    "import sys; sys.path[:0] = sys.argv[1:2]; sys.path += sys.argv[2:-1]; del sys.argv[1:-1]; "
    "from mlx_mcp.workflows.sandbox.child.main import main; main()"
)
FLAGS = ("-s", "-S", "-P", "-B")  # no user's packages, no hooks of packages, no working folder, nothing written


async def open_runtime(folder: Path) -> CPythonRuntime:
    """Find what runs programs, and try out what can be put around it.

    A script that starts it is written to `folder`, which must belong to the user alone, and stays there.

    Raises:
        SandboxFailed: nothing encloses it here, or the package cloudpickle is missing; the text says what to do.
    """
    cloudpickle = importlib.util.find_spec("cloudpickle")
    if cloudpickle is None or cloudpickle.origin is None:
        raise SandboxFailed(
            "Programs in CPython need the package cloudpickle. Run: pip install 'mlx-mcp[cpython]', and start the "
            "server again; or set MLX_MCP_SANDBOX_PYTHON=monty."
        )
    packages = packages_beside(Path(cloudpickle.origin).parent.parent)
    enclosed = await asyncio.to_thread(enclose, this_python(packages), folder)
    return CPythonRuntime(enclosed, packages, importlib.metadata.version("cloudpickle"))


def packages_beside(folder: Path) -> list[Path]:
    """The folders with the packages of this Python, and one more."""
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    return list(dict.fromkeys(each.resolve() for each in [*installed, folder] if each.is_dir()))


def this_python(packages: list[Path]) -> Interpreter:
    """This Python, without its virtual environment, and what it reads."""
    path = Path(os.path.realpath(sys.executable))
    own = [Path(sysconfig.get_path("stdlib"))]
    # Where a shared libpython may be, and a framework's parts. `/usr` has more than Python in it.
    own += [Path(sys.base_prefix) / "lib"] if sys.base_prefix != "/usr" else []
    own += [Path(sys.base_prefix)] if ".framework" in sys.base_prefix else []
    reads = [path, *own, Path(mlx_mcp.__file__).parent, *packages, TIME_ZONES]
    found = tuple(dict.fromkeys(each.resolve() for each in reads if each.exists()))
    return Interpreter(path, b"python", NOT_ENCLOSED, found, ENVIRONMENT)


class CPythonRuntime:
    """Starts workers by one script, which encloses the interpreter. `open_runtime` makes it."""

    def __init__(self, enclosed: Enclosed, packages: list[Path], cloudpickle_version: str) -> None:
        """`enclosed` is what `enclose` found to work."""
        self.isolation = f"{enclosed.isolation}, around CPython"
        self.version = f"cpython {platform.python_version()}, cloudpickle {cloudpickle_version}, {DUMP_FORMAT}"
        self._enclosed, self._packages = enclosed, packages
        self._workers: set[CPythonWorker] = set()

    async def start(self, limits: Limits, functions: Collection[str]) -> Worker:
        """See `Runtime.start`."""
        paths = [Path(mlx_mcp.__file__).parents[1].resolve(), *self._packages]
        options = {
            "memory_bytes": limits.memory_bytes,
            "file_bytes": SCRATCH_BYTES,
            "output_chars": limits.output_chars,
            "scratch": SCRATCH if self._enclosed.isolation == BUBBLEWRAP else "",
            "functions": sorted(functions),
        }
        command = Command(self._enclosed, (*FLAGS, "-c", START, *map(str, paths)), options)
        worker = CPythonWorker(command, self.version, limits, functions, self._workers.discard)
        await worker.begin()
        self._workers.add(worker)
        return worker

    async def close(self) -> None:
        """See `Runtime.close`."""
        for worker in list(self._workers):
            await worker.close()
