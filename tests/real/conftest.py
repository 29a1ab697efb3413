"""A real model of 538 MB, beside mlx_lm's own generation on it: `make test-real`.

SMOLLM2_FOLDER says where smollm2.py made the model. Nothing here is collected unless this folder is named on pytest's
command line. EFFORT is 0.1, which takes minutes on two cores, or up to 1 for all prompts and seeds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlx_mcp.mlx_backend.cpu.openblas import HINT, prefer_openblas, uses_openblas
from tests.real.product import ANSWER_S, Product, serving

if TYPE_CHECKING:
    from tests.real.beside import Reference

HERE = Path(__file__).parent


def asked_for(config: pytest.Config) -> bool:
    named = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return any(path == HERE or HERE in path.parents for path in named)


def pytest_configure(config: pytest.Config) -> None:
    if asked_for(config):
        prefer_openblas()  # before anything imports MLX


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if asked_for(config) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(ANSWER_S))


@pytest.fixture(scope="session")
def folder() -> Path:
    """The model's folder of float32 weights."""
    made = Path(os.environ.get("SMOLLM2_FOLDER", "build/smollm2")).resolve() / "float32"
    if not made.is_dir():
        pytest.fail(f"{made} is not there: `make test-real` makes it")
    return made


@pytest.fixture(scope="session")
def float32(folder: Path) -> Path:
    """The same, with a BLAS that multiplies them in reasonable time."""
    if sys.platform.startswith("linux") and not uses_openblas():
        pytest.fail(f"The MLX wheel's own BLAS would take an hour. Run these tests alone, with OpenBLAS: {HINT}")
    return folder


@pytest.fixture(scope="session")
def reference(float32: Path) -> Reference:
    from tests.real.beside import Reference  # here: it imports MLX

    return Reference(float32)


@pytest.fixture(scope="session")
def product(float32: Path) -> Iterator[Product]:
    with serving(float32) as product:
        yield product
