"""Loads an installed OpenBLAS, so that MLX uses it instead of the reference BLAS of its wheel for Linux CPUs.

The wheel's BLAS reaches about 5 GFLOP/s, OpenBLAS 100 and more. But the wheel's is row-invariant: with it a row of a
batch is bitwise what it is alone. The tests rely on that, so they do not load OpenBLAS. This module does not import
mlx, since the library must be in the process before `mlx.core` is.
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
    """The path or name of an installed OpenBLAS; None where none is installed, and on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return None
    found = (path for pattern in _PATTERNS for path in sorted(glob.glob(pattern)))
    return next(found, None) or ctypes.util.find_library("openblas")


def prefer_openblas() -> str | None:
    """Load OpenBLAS, so that MLX multiplies with it once it is imported; returns what was loaded, or None.

    It must be called before mlx is imported: afterwards its symbols are bound, and nothing is done.
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
def uses_openblas() -> bool:
    """Whether MLX multiplies with OpenBLAS, loaded as above or by LD_PRELOAD; the process is examined once.

    To be called after mlx is imported. NumPy's copy of OpenBLAS has other symbols, and does not count.
    """
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "openblas_get_config")


@cache
def num_threads() -> int:
    """The number of threads of the OpenBLAS that MLX uses; 1 where MLX does not use it.

    NumPy's own copy gets one thread, for the whole process. Otherwise it would have as many threads again, which wait
    busily for work and take the cores from the others: a prompt took two to three times as long. To be called after
    numpy is imported.
    """
    if not uses_openblas():
        return 1
    from threadpoolctl import ThreadpoolController  # imported here, since a server starts before it computes

    for library in ThreadpoolController().select(user_api="blas").lib_controllers:
        if library.prefix != "libopenblas":
            library.set_num_threads(1)
    return int(ctypes.CDLL(None).openblas_get_num_threads())
