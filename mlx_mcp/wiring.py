"""Puts the layers together: Config → registry, loader, engine thread, client."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from mlx_mcp.config import Config, ModelDefaults, config_path
from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.memory import Budget, MemorySettings, budget_for
from mlx_mcp.core.ports import LoadedModel, LoadProgress, ModelLoader, ModelOptions, ModelSpec, PreparedModel, Report
from mlx_mcp.core.prefill import PrefillOptions
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.io_thread import IoThread
from mlx_mcp.engine.persistence import PersistenceOptions, Persisting
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import StorageError
from mlx_mcp.mlx_backend.cpu.openblas import prefer_openblas
from mlx_mcp.mlx_backend.streams import clear_streams
from mlx_mcp.models.registry import Registry
from mlx_mcp.models.settings import ModelSettings, Settings, sampling_of
from mlx_mcp.stats import EngineStats
from mlx_mcp.storage.sandbox_log import SandboxLog
from mlx_mcp.storage.store import Store


class LateLoader:
    """The MLX loader, imported at its first use: importing mlx_lm takes seconds that a handshake does not have."""

    def __init__(self, config: Config, budget: Budget | None = None, say: Callable[[str], None] | None = None) -> None:
        self._config, self._budget, self._say = config, budget, say

    def prepare(self, spec: ModelSpec, report: Report) -> PreparedModel:
        """See ModelLoader.prepare; what has to be fetched is fetched before anything of MLX is imported."""
        try:
            if spec.source == "hub":
                from mlx_mcp.models.hub import fetch  # a second of imports

                folder = fetch(spec.location, report, spec.may_fetch, self._config.fetch_stall_s)
                spec = replace(spec, source="folder", location=str(folder))
            report(LoadProgress("starting MLX"))
            if self._config.openblas:
                prefer_openblas()
            prepared = self._loader().prepare(spec, report)
            say, self._say = self._say, None
            if say is not None and self._budget is not None:  # once
                say(self._budget.words)
            return prepared
        finally:
            self.close()

    def materialise(self, prepared: PreparedModel) -> Generator[LoadProgress, None, LoadedModel]:
        """See ModelLoader.materialise."""
        return self._loader().materialise(prepared)

    def close(self) -> None:
        """See ModelLoader.close."""
        clear_streams()

    def _loader(self) -> ModelLoader:
        first = "mlx_mcp.mlx_backend.loader" not in sys.modules
        from mlx_mcp.mlx_backend.loader import MlxLoader

        if first:
            # Imported modules are for good: to look through them for garbage would now and then stop every stream for
            # a tenth of a second. Nothing of a model is there yet, which may go again.
            gc.freeze()
        its = self._config
        return MlxLoader(its.kv_bits, prefill_options(its), its.sampling_defaults, self._budget, its.wired_bytes)


def registry_of(config: Config, named: dict[str, ModelSpec] | None = None) -> Registry:
    """The models that can be asked for by these settings; `named` are those of other windows.

    Raises:
        ConfigError: the configured model, or one that the settings name, cannot be one.
    """
    by_name = {
        name: ModelSettings(options_of(own, f'[models."{name}"]'), own.alias) for name, own in config.models.items()
    }
    settings = Settings(by_name, options_of(config.model_defaults, "[model_defaults]"))
    return Registry(config.model, named=named, sampling_defaults=config.sampling_defaults, settings=settings)


def memory_budget(config: Config, share: float = 1.0) -> Budget:
    """What may take how much of the memory of the device in force. Imports MLX, which takes 15 ms.

    `share` is how much of the ceiling is taken; see core.memory.
    """
    if config.openblas:
        prefer_openblas()  # before MLX is there
    from mlx_mcp.mlx_backend.device_memory import device_memory

    return budget_for(memory_settings(config, share), device_memory())


def memory_settings(config: Config, share: float = 1.0) -> MemorySettings:
    """What the settings say of memory; `share` is how much of the ceiling is taken."""
    limits = (config.max_memory_bytes, config.max_weights_bytes, config.max_kv_bytes)
    return MemorySettings(*limits, share, config.wired_bytes)


def prefill_options(config: Config) -> PrefillOptions:
    """What the settings say of reading prompts; the rest is as the device likes it."""
    return PrefillOptions(
        config.chunk_tokens, config.prefill_tokens_idle, config.prefill_tokens_busy, config.prefill_wait_ms / 1000
    )


def options_of(own: ModelDefaults, where: str) -> ModelOptions:
    """What the settings say of a model, as the layers below know it.

    Raises:
        ConfigError: there is no such default for sampling.
    """
    sampling = sampling_of(own.sampling, f"{config_path()}: {where}.sampling")
    return ModelOptions(own.context_tokens, own.kv_bits, sampling, own.ttl_s, own.pinned)


def wire(
    config: Config, memory_share: float = 1.0, say: Callable[[str], None] | None = None
) -> tuple[EngineClient, Registry]:
    """The engine client and the registry of a process; nothing heavy happens before the first generation.

    `memory_share` is how much of the memory's ceiling is taken; see core.memory. `say` is told once, with the first
    model, what may take how much.

    Raises:
        ConfigError: the configured model cannot be one.
    """
    registry = registry_of(config)
    # Asked once: what is free of a GPU's memory is less when a model is there.
    budget = memory_budget(config, memory_share)
    loader = LateLoader(config, budget, say)
    limits = Limits(config.max_running, config.max_waiting)  # how prompts are read is said with each model
    engine_options = EngineOptions(
        config.block_tokens,
        Sharing(config.shared_prefix_rows, config.shared_prefix_tokens),
        config.max_sessions,
        config.session_ttl_s,
        config.max_wait_s,
        config.model_turn_s,
        config.model_ttl_s,
        config.share_prefixes,
    )
    weights_bytes, max_kv_bytes = budget.max_weights_bytes, budget.kv_bytes(0)
    options = PersistenceOptions(bool(config.max_offload_bytes), config.autosave_s, config.persisted_ttl_s)

    def make_engine() -> Engine:
        persisting = None
        if config.max_ssd_bytes:
            persisting = Persisting(partial(open_store, config), IoThread(thread.send, loader.close), options)
        return Engine(loader, limits, weights_bytes, max_kv_bytes, engine_options, persisting=persisting)

    thread = EngineThread(make_engine, config.step_timeout_s, EngineStats(max_weights_bytes=weights_bytes))
    return EngineClient(thread, registry, loader), registry


def open_sandbox_log(config: Config) -> SandboxLog:
    """The sandboxes in the configured folder on disk.

    Raises:
        StorageError: it cannot be used, or another process uses it.
    """
    return SandboxLog.open(config.sandbox_dir, quota_bytes=config.max_sandbox_disk_bytes)


def open_store(config: Config) -> Store:
    """The configured folder on disk, less what has expired.

    Raises:
        StorageError: it cannot be used, or another process uses it.
    """
    store = Store.open(config.store_dir, quota_bytes=config.max_ssd_bytes, daily_bytes=config.max_offload_bytes)
    with suppress(StorageError):  # the next start tries again
        store.expire(time.time())
    return store
