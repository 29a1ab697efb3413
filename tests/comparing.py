"""When two computations of the same thing are the same.

On the wheel's BLAS they are the same bit by bit, however a prompt was cut and whatever else was in the batch. OpenBLAS
sums in another order for other shapes, so where it is in front there is a bound on their difference.
"""

import os
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

OPENBLAS = os.environ.get("TEST_BLAS") == "openblas"
ROUNDING = 1e-4  # of logits, keys and values of the models that tests make, whose largest are about ten
# Where a value in 8 bits goes to its neighbour. Log-probabilities of mlx_lm differ from its own by 0.065 then.
QUANTIZED_ROUNDING = 0.1


def within(bound: float = 0.0) -> float:
    """The difference that is allowed where the wheel's BLAS allows `bound`."""
    return max(bound, ROUNDING) if OPENBLAS else bound


def quantized(kv_bits: int | None) -> float:
    """The bound on a difference that comes of keys and values being stored in so many bits."""
    return QUANTIZED_ROUNDING if OPENBLAS and kv_bits else 0.0


def num_same(found: Seq[Any], expected: Seq[Any]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(found, expected, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(found), len(expected)))


def assert_same(found: Any, expected: Any, bound: float = 0.0, what: str = "they") -> None:
    """Two arrays differ by no more than is allowed."""
    difference = np.abs(np.array(found) - np.array(expected)).max(initial=0)
    assert difference <= within(bound), f"{what}: {difference} apart"


def assert_same_answer(found: Seq[int], expected: Seq[int], logits: Seq[Any], bound: float = 0.0) -> int:
    """Two answers have the same tokens; where rounding is allowed, until two tokens were as likely but for rounding.

    `logits` are those that the expected tokens were drawn from, greedily where they may differ. Returns for how many
    tokens the logits can be compared, which is all unless the answers part.
    """
    assert len(found) == len(expected)
    at = next((i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other), None)
    if at is None:
        return len(found)
    row = np.array(logits[at])
    gap = float(row[expected[at]] - row[found[at]])
    assert OPENBLAS, f"token {at} is another one"
    assert abs(gap) <= 2 * within(bound), f"token {at} is another one, {gap} less likely"
    return at + 1
