"""Which models there are."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from mlx_mcp.models.registry import Entry
from mlx_mcp.service.service import Service

EMBEDDED_NOTE = (
    "No model is configured, so the built-in one of 0.9M parameters serves: it recalls what it is told and no more. "
    "For real work have the server started as `mlx-mcp serve --model FOLDER_OR_HUB_ID`."
)


@dataclass(frozen=True)
class Model:
    """A model that can be asked for."""

    entry: Entry
    loaded: bool


async def list_models(service: Service) -> list[Model]:
    """Every model that can be asked for, the default one first."""
    loaded = service.engine.stats.models
    entries = await asyncio.to_thread(service.registry.entries)
    return [Model(entry, entry.spec.name in loaded) for entry in entries]


def note_of(service: Service, named: str) -> str:
    """What is to be said where the built-in model serves because nothing was configured or `named`; else nothing."""
    return EMBEDDED_NOTE if not named and service.registry.nothing_configured else ""
