"""How hard the tests that draw their cases look: 1 in `make test-all`, 50 in `make campaign`, little in `make test`.

What must happen at least once is scripted in a test of its own, so that it does not depend on how many cases there are.
"""

import os
from collections.abc import Container, Iterable
from typing import Any

import pytest

EFFORT = float(os.environ.get("EFFORT", "0.1"))
LONG = "LONG" in os.environ  # `make test-long`
THOROUGH = EFFORT >= 1  # enough cases to demand that chance brought about what it should


def drawn(count: float, least: int = 1) -> int:
    """How many cases to draw where a thorough run draws `count`."""
    return max(least, round(count * EFFORT))


def seconds(count: float) -> float:
    """The time that a test may take, where it may take so long in a thorough run."""
    return count * max(1.0, EFFORT)


def rare_ones_slow(names: Iterable[str], usual: Container[str], common: Container[str] | None = None) -> list[Any]:
    """The names as parameters of tests. Those that are not usual are slow, and those that are not common are long."""
    common = usual if common is None else common
    marks = {name: () if name in common else pytest.mark.long if name in usual else pytest.mark.slow for name in names}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]
