"""Puts an installed OpenBLAS in front of the reference BLAS that the mlx wheel carries on Linux CPUs.

The wheel's own reaches about 5 GFLOP/s, OpenBLAS 100 and more. The wheel's is row-invariant, though: with it a batched
row is bitwise what it is alone, which the tests rely on, so they turn this off. Imports no mlx: the library must be in
the process before `mlx.core` is.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import sys
from functools import cache

HINT = "apt-get install libopenblas0"
_PATTERNS = (
    "/usr/lib/*/openblas-pthread/libopenblas.so.0",
    "/usr/lib/*/openblas-openmp/libopenblas.so.0",
    "/usr/lib/*/libopenblas.so.0",
    "/usr/lib64/libopenblas*.so.0",
    "/usr/local/lib/libopenblas.so*",
)


def find_openblas() -> str | None:
    """The path or name of an installed OpenBLAS; None where there is none, or off Linux."""
    if not sys.platform.startswith("linux"):
        return None
    found = (path for pattern in _PATTERNS for path in sorted(glob.glob(pattern)))
    return next(found, None) or ctypes.util.find_library("openblas")


def prefer_openblas() -> str | None:
    """Make every later `import mlx.core` multiply with OpenBLAS; returns what was loaded, None where there is none.

    Does nothing once mlx is imported: its symbols are bound by then.
    """
    path = find_openblas()
    if path is None or "mlx.core" in sys.modules:
        return None
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return path


@cache
def openblas_in_front() -> bool:
    """Whether this process has OpenBLAS among its symbols, loaded as above or by LD_PRELOAD; looked for once.

    Ask after mlx is imported. NumPy's copy, under names of its own, does not count.
    """
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "openblas_get_config")


@cache
def num_threads() -> int:
    """The threads that the OpenBLAS in front has; 1 where there is none.

    NumPy's own copy is left one thread, for the whole process: as many again, waiting busily for work, take the cores
    from the others, and a prompt two to three times as long. Ask after numpy is imported.
    """
    if not openblas_in_front():
        return 1
    from threadpoolctl import ThreadpoolController  # here, since a server starts before it computes

    for library in ThreadpoolController().select(user_api="blas").lib_controllers:
        if library.prefix != "libopenblas":
            library.set_num_threads(1)
    return int(ctypes.CDLL(None).openblas_get_num_threads())
