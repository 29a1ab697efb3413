"""Engines for the tests of OpenAI's API: fakes, and the built-in model."""

from collections.abc import Iterator

import pytest

from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from tests.fakes import fake_client


@pytest.fixture
def engine() -> Iterator[EngineClient]:
    """An engine over fakes, which answers a prompt with its own letters."""
    engine = fake_client()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def embedded() -> Iterator[Service]:
    """A service with the built-in model."""
    engine, registry = wire(Config.load())
    assert isinstance(registry, Registry)
    yield Service(engine, registry)
    engine.close()
