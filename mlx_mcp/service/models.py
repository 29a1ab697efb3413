"""Which models there are, what they cost, and which of them are in memory."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum

from mlx_mcp.engine.requests import Progress
from mlx_mcp.errors import ModelError
from mlx_mcp.models.hub import free_bytes, plan
from mlx_mcp.models.registry import Entry
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.service import Service
from mlx_mcp.stats import EngineStats

EMBEDDED_NOTE = (
    "No model is configured, so the built-in one of 0.9M parameters serves: it recalls what it is told and no more. "
    "For real work have the server started as `mlx-mcp serve --model FOLDER_OR_HUB_ID`."
)


class Fits(StrEnum):
    """Whether a model's weights fit the memory that models may use."""

    YES = "yes"
    AFTER_UNLOADING = "after unloading"  # of others, which happens by itself
    NO = "no"
    UNKNOWN = "unknown"  # its size is not known before it is downloaded, or before an engine runs


@dataclass(frozen=True)
class Model:
    """A model that can be asked for."""

    entry: Entry
    loaded: bool
    loading: bool = False  # its weights are being read, or wait for room
    fits: Fits = Fits.UNKNOWN
    weights_bytes: int | None = None  # in memory if it is loaded, else of its files
    kv_bytes_per_1k: int | None = None  # what a thousand tokens of context take; None until it was loaded
    calls: int = 0  # that run on it, or wait to be run on it
    idle_s: float | None = None  # since a call last used it; None if it is not loaded


@dataclass(frozen=True)
class Freed:
    """A model that was unloaded, and the bytes of its weights; 0 if it was not in memory."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Fetch:
    """A download: what is still to come, and what is free on the disk."""

    name: str
    num_bytes: int
    free_bytes: int


async def list_models(service: Service) -> list[Model]:
    """Every model that can be asked for, the default one first."""
    stats = service.engine.stats
    entries = await asyncio.to_thread(service.registry.entries)
    return [model_of(entry, stats) for entry in entries]


async def load_model(service: Service, caller: Caller, name: str, report: Report) -> Model:
    """Have a model in memory, and download it first if its user named it; it waits for its turn for room.

    Raises:
        UnknownModel: there is no such model; with the name that was probably meant.
        CapacityError: other models have had the room for too long.
        ModelError: it cannot be loaded; what had to go for it comes back if a user had that loaded.
        EngineDead: the engine thread has ended.
        RateLimited: the caller's principal has made too many requests.
    """
    service.limits.request(caller.tenant)
    meter, model = Meter(), None
    try:
        with caller.activity.watching(meter):
            async with aclosing(service.engine.load_model(name or None)) as steps:
                async for step in steps:
                    if isinstance(step, Progress):
                        meter.take(step)
                        await report([meter])
                    else:
                        model = step
    finally:
        meter.ended = True
    assert model is not None, "loading ends with a model or an error"
    spec = await asyncio.to_thread(service.registry.resolve, model.name)
    entry = await asyncio.to_thread(service.registry.entry, spec)
    service.warm.begin(service, caller, model.name)
    # Not by the engine's counts, which may be of a moment before.
    kv_bytes = 1000 * model.runner.cost.token_bytes
    return Model(entry, True, False, Fits.YES, model.weights_bytes, kv_bytes, idle_s=0.0)


async def to_be_fetched(service: Service, name: str) -> Fetch | None:
    """What has to be downloaded before a model can be used; None if it is here, or cannot be downloaded.

    Asks the hub where something is missing.

    Raises:
        UnknownModel: there is no such model.
    """
    spec = service.registry.at_hand(name or None)
    if spec is None:
        spec = await asyncio.to_thread(service.registry.resolve, name)
    if not spec.may_fetch or spec.name in service.engine.stats.models:
        return None
    try:
        made = await asyncio.to_thread(plan, spec.location)
    except ModelError:  # the load tells more of it
        return None
    return None if made.whole else Fetch(spec.name, made.lacking_bytes, free_bytes())


async def unload_model(service: Service, name: str) -> Freed:
    """Have a model's weights go from memory; its sessions stay, and go on when it is loaded again.

    Raises:
        UnknownModel: there is no such model; with the name that was probably meant.
        ModelBusy: calls use it, or it is being loaded.
        EngineDead: the engine thread has ended.
    """
    spec = await asyncio.to_thread(service.registry.resolve, name or None)
    return Freed(spec.name, await service.engine.unload_model(spec.name))


def name_of(service: Service, named: str) -> str:
    """The name of the model that answers where this one was asked for, as far as is known without looking at disks."""
    spec = service.registry.at_hand(named or None)
    return named if spec is None else spec.name


def model_of(entry: Entry, stats: EngineStats) -> Model:
    """What is told of a model."""
    name = entry.spec.name
    known = stats.of_models.get(name)
    size = entry.weights_bytes if known is None else known.weights_bytes
    return Model(
        entry,
        loaded=known is not None,
        loading=name in (*stats.loading, *stats.awaited),
        fits=Fits.YES if known is not None else fits(size, stats),
        weights_bytes=size,
        kv_bytes_per_1k=None if known is None else 1000 * known.kv_token_bytes,
        calls=0 if known is None else known.calls,
        idle_s=None if known is None else known.idle_s,
    )


def fits(size: int | None, stats: EngineStats) -> Fits:
    """Whether weights of this size would fit beside what is in memory now, or in place of what may be unloaded."""
    limit = stats.max_weights_bytes
    if size is None or not limit:
        return Fits.UNKNOWN
    pinned = sum(model.weights_bytes for model in stats.of_models.values() if model.pinned)
    if pinned + size > limit:
        return Fits.NO
    return Fits.YES if stats.weights_bytes + size <= limit else Fits.AFTER_UNLOADING


def note_of(service: Service, named: str) -> str:
    """What is to be said where the built-in model serves because nothing was configured or `named`; else nothing."""
    return EMBEDDED_NOTE if not named and service.registry.nothing_configured else ""
