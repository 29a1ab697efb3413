"""The faults that `run.py` plants: where, what, and which tests must notice, which are the same layer's.

`file` is relative to mlx_mcp, tests are relative to the folder of the file's layer. A snippet must be in its file
once: choose it as short as that allows, so that changes around it leave it alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault: `new` in place of `old`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def layer(self) -> str:
        """The package that it is planted in."""
        return self.file.partition("/")[0]

    @property
    def table(self) -> str:
        """The file that it is described in."""
        return f"tests/mutants/{self.layer}.py"

    @property
    def path(self) -> str:
        """Its file, from the root of the tree."""
        return f"mlx_mcp/{self.file}"

    @property
    def test_ids(self) -> list[str]:
        """The tests as pytest knows them."""
        return [f"tests/{self.layer}/{test}" for test in self.tests]


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A mutant."""
    return Mutant(name, file, old, new, tests)
