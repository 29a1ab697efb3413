"""How hard the tests that draw their cases look: `make campaign` sets EFFORT, CI leaves it at 1."""

import os

EFFORT = int(os.environ.get("EFFORT", "1"))
