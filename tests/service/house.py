"""A service over fakes, one token per character, and callers of it."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from mlx_mcp.chat.message import Message
from mlx_mcp.engine.requests import GenerateRequest, Update
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.activity import Meter
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.service import Service
from tests.fakes import FakeLoader, fake_client

CALLER = Caller("us")


def make_service(model: str | None = None, **keeping: Any) -> Service:
    return Service(fake_client(FakeLoader(context_tokens=2000), block_tokens=16, **keeping), Registry(model))


def asked(prompt: str, system: str = "", files: Sequence[str] = ()) -> Context:
    return Context(system, tuple(files), (Message("user", prompt),))


async def unheard(meters: Sequence[Meter]) -> None:
    """Take a report."""


def requests_of(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[GenerateRequest]:
    """The requests that the engine gets from now on."""
    got: list[GenerateRequest] = []
    for_real = service.engine.generate

    def generate(request: GenerateRequest) -> AsyncGenerator[Update, None]:
        got.append(request)
        return for_real(request)

    monkeypatch.setattr(service.engine, "generate", generate)
    return got
