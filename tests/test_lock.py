"""What CI installs fits what pyproject.toml allows; `make lock` writes it anew."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = re.findall(r"^([\w.-]+)==([\w.+-]+)", (ROOT / "requirements" / "ci.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_every_dependency_is_pinned_to_a_version_that_is_allowed(line):
    allowed = Requirement(line)
    pinned = [version for name, version in PINS if name == allowed.name]
    assert pinned, "run `make lock`"
    assert all(allowed.specifier.contains(version) for version in pinned), "run `make lock`"
