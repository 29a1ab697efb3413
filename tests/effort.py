"""How hard the tests that draw their cases look: 1 in `make test-all`, 50 in `make campaign`, little in `make test`.

What must happen at least once is scripted in a test of its own, so that it does not depend on how many cases there are.
"""

import os

EFFORT = float(os.environ.get("EFFORT", "0.1"))
THOROUGH = EFFORT >= 1  # enough cases to demand that chance brought about what it should


def drawn(count: float, least: int = 1) -> int:
    """How many cases to draw where a thorough run draws `count`."""
    return max(least, round(count * EFFORT))


def seconds(count: float) -> float:
    """The time that a test may take, where it may take so long in a thorough run."""
    return count * max(1.0, EFFORT)
