"""The whole of `mlx-mcp bench`, one part after the other, with one copy of the weights in memory at a time."""

from __future__ import annotations

import asyncio
import gc
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mcp import __version__
from mlx_mcp.bench.effort import Effort
from mlx_mcp.bench.report import Figure, Report
from mlx_mcp.config import Config, available_memory_bytes
from mlx_mcp.core.ports import LoadProgress
from mlx_mcp.mlx_backend.cpu.openblas import prefer_openblas
from mlx_mcp.wiring import prefill_options, registry_of, wire

if TYPE_CHECKING:
    from mlx_mcp.bench.rows import Rows

STORE_BYTES = 8 << 30


def new_report() -> Report:
    """A report without figures."""
    return Report(__version__, platform.platform())


def measure(config: Config, effort: Effort, report: Report, say: Callable[[str], None]) -> Iterator[Figure]:
    """Measure everything, and yield each figure once it is in the report; `say` is told what is done now.

    Raises:
        ModelError: the model cannot be loaded, or does not fit.
        MlxMcpError: a call failed.
    """
    for figure in parts(config, effort, report, say):
        report.figures.append(figure)
        yield figure
    report.complete = True


def parts(config: Config, effort: Effort, report: Report, say: Callable[[str], None]) -> Iterator[Figure]:
    """The figures, as they come."""
    say("starting MLX, and reading the model")
    if config.openblas:
        prefer_openblas()  # as the server does, before mlx is imported
    import mlx.core as mx

    from mlx_mcp.bench.calls import calls_after_restart, first_calls

    report.device = device_facts()
    with tempfile.TemporaryDirectory(prefix="mlx-mcp-bench-") as folder:
        settings = {"store_dir": Path(folder), "max_ssd_bytes": STORE_BYTES, "autosave_s": None, "warm": ()}
        kept = config.model_copy(update=settings)
        client, registry = wire(kept)
        try:
            say("calls: cold, cached, and a fan-out")
            report.model = {"name": Path(registry.resolve(None).name).name, "kv_bits": config.kv_bits}
            primed = asyncio.run(first_calls(client, effort))
            stats = client.stats
        finally:
            client.close()
        (of_model,) = stats.of_models.values()
        yield Figure("memory", "weights", float(of_model.weights_bytes), "bytes")
        yield Figure("memory", "a token of context", float(of_model.kv_token_bytes), "bytes")
        yield Figure("memory", "peak of these calls", float(mx.get_peak_memory()), "bytes")
        for name, limit in (("weights", stats.max_weights_bytes), ("keys and values", stats.max_kv_bytes)):
            yield Figure("limits", name, float(limit), "bytes")
        yield from primed.figures
        say("calls from disk, on an engine that has just started")
        client, _ = wire(kept)
        try:
            yield from asyncio.run(calls_after_restart(client, primed.sessions))
        finally:
            client.close()
    del client, registry
    gc.collect()
    mx.clear_cache()
    rows = loaded_rows(config, effort, report, stats.max_kv_bytes)
    say("prefill beside mlx_lm")
    yield from rows.prefill()
    say("decode beside mlx_lm")
    yield from rows.decode()


def loaded_rows(config: Config, effort: Effort, report: Report, max_kv_bytes: int) -> Rows:
    """The model in this thread, for both sides, whose keys and values may take so much."""
    from mlx_mcp.bench.rows import Rows
    from mlx_mcp.bench.sides import Subject
    from mlx_mcp.mlx_backend.loader import MlxLoader
    from mlx_mcp.mlx_backend.runner import Runner
    from mlx_mcp.models.hub import fetch

    spec = registry_of(config).resolve(None)
    if spec.source == "hub":
        from dataclasses import replace

        folder = fetch(spec.location, ignore, spec.may_fetch, config.fetch_stall_s)
        spec = replace(spec, source="folder", location=str(folder))
    loader = MlxLoader(config.kv_bits, prefill_options(config), config.sampling_defaults)
    steps = loader.materialise(loader.prepare(spec, ignore))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            loaded = end.value
            break
    runner = loaded.runner
    assert isinstance(runner, Runner)
    report.model |= {"context_tokens": loaded.context_tokens, "vocab_size": loaded.vocab_size}
    return Rows(Subject(loaded, runner.model, config.kv_bits, max_kv_bytes), effort, loaded.context_tokens)


def ignore(progress: LoadProgress) -> None:
    """Take a report of progress that nobody wants."""


def device_facts() -> dict[str, Any]:
    """The device and the library that computes on it."""
    from importlib.metadata import version

    import mlx.core as mx

    from mlx_mcp.mlx_backend.cpu.openblas import uses_openblas

    info = mx.device_info()
    on_cpu = mx.default_device() == mx.cpu
    backend = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu"
    return {
        "name": str(info.get("device_name", mx.default_device())),
        "backend": "cpu" if on_cpu else backend,
        "openblas": on_cpu and uses_openblas(),
        "memory_bytes": available_memory_bytes(),
        "info": {key: value for key, value in info.items() if isinstance(value, str | int | float)},
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
