"""When two computations of the same thing are the same.

On the wheel's BLAS they are the same bit by bit, however a prompt was cut and whatever else was in the batch. OpenBLAS
sums in another order for other shapes, so where it is in front there is a bound on their difference.
"""

import os
from typing import Any

import numpy as np

OPENBLAS = os.environ.get("TEST_BLAS") == "openblas"
ROUNDING = 1e-4  # of logits, keys and values of the models that tests make, whose largest are about ten


def within(bound: float = 0.0) -> float:
    """The difference that is allowed where the wheel's BLAS allows `bound`."""
    return max(bound, ROUNDING) if OPENBLAS else bound


def assert_same(found: Any, expected: Any, bound: float = 0.0) -> None:
    """Two arrays differ by no more than is allowed."""
    difference = np.abs(np.array(found) - np.array(expected)).max(initial=0)
    assert difference <= within(bound), f"they differ by {difference}"
