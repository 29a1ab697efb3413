"""/metrics: what the process has counted, in the text format of Prometheus.

Nothing is counted here. When somebody asks, the counts of the engine and of the service's observer are put into the
families below. Every label has few values: routes, tools, kinds of errors and models in use, never a caller's words.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_mcp.service.health import readiness
from mlx_mcp.service.observing import Distribution, Histogram, Tally
from mlx_mcp.service.service import Service

PREFIX = "mlx_mcp_"
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def metrics_route(service: Service) -> Route:
    """The route of a service's metrics."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(service))

    async def show(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type, "cache-control": "no-store"})

    return Route("/metrics", show, methods=["GET"])


class ServiceCollector(Collector):
    """The metrics of a service, read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterable[Family]:
        """The families, without which the registry would collect them once to learn their names."""
        return self.collect()

    def collect(self) -> Iterator[Family]:
        """All families with their values now."""
        yield from self._process()
        yield from self._asked()
        yield from self._generations()
        yield from self._engine()
        yield from self._memory()
        yield from self._models()
        yield from self._disk()

    def _process(self) -> Iterator[Family]:
        service, observer = self._service, self._service.observer
        yield gauge("up_seconds", "How long the process has served.", time.monotonic() - observer.began_at)
        yield gauge("ready", "1 if calls should be sent here, as /health/ready says.", float(readiness(service).ready))
        yield gauge("engine_step_seconds", "How long the engine has been at its current step.", engine_step_s(service))

    def _asked(self) -> Iterator[Family]:
        observer = self._service.observer
        yield from tally("http_request", "HTTP requests", observer.requests, ("route", "method", "status"))
        yield from tally("tool_call", "calls of MCP tools", observer.tools, ("tool", "outcome"))
        errors = counter("errors", "Errors that callers got, by kind.", "kind")
        for kind, count in sorted(observer.errors.items()):
            errors.add_metric([kind], count)
        yield errors
        ignored = counter("ignored", "Requests with a part that no API looks at, by that part.", "part")
        for part, count in sorted(observer.ignored.items()):
            ignored.add_metric([part], count)
        yield ignored

    def _generations(self) -> Iterator[Family]:
        observer = self._service.observer
        ended = counter("generations", "Generations that ended, by model and why.", "model", "outcome")
        for labels, count in sorted(observer.generations.items()):
            ended.add_metric(labels, count)
        yield ended
        used = counter("model_tokens", "Tokens of answered calls, by model and kind.", "model", "kind")
        for model, counts in sorted(observer.tokens.items()):
            for kind, count in zip(("prompt", "cached", "restored", "output"), counts, strict=True):
                used.add_metric([model, kind], count)
        yield used
        yield gauge("generations_active", "Generations that go on or wait.", len(observer.active))
        yield histogram("generation_seconds", "Duration of generations.", observer.generation_s)
        yield histogram("time_to_first_token_seconds", "From a call to its first token.", observer.first_token_s)
        yield histogram("time_between_tokens_seconds", "From one token to the next.", observer.between_tokens_s)

    def _engine(self) -> Iterator[Family]:
        stats = self._service.engine.stats
        yield gauge("running", "Generations in the batch.", stats.running)
        yield gauge("waiting", "Calls that wait for a place, for memory or for a model.", stats.waiting)
        yield histogram("queue_wait_seconds", "From a call's arrival at the engine to its row.", stats.queue_s)
        yield histogram("batch_rows", "Rows that a step computes.", stats.batch_rows)
        yield one_counter("steps", "Steps of the engine.", stats.steps)
        yield one_counter("preemptions", "Sequences that gave up their places.", stats.preemptions)
        tokens = counter("tokens", "Tokens of the engine, by kind; cached ones include restored ones.", "kind")
        for kind in ("prompt", "cached", "restored", "computed", "output"):
            tokens.add_metric([kind], getattr(stats, f"{kind}_tokens"))
        yield tokens
        yield gauge("sessions", "Open sessions.", stats.sessions)

    def _memory(self) -> Iterator[Family]:
        stats = self._service.engine.stats
        memory = gauge_of("memory_bytes", "Memory by kind; pinned blocks are among the cached ones.", "kind")
        for kind, num_bytes in (
            ("weights", stats.weights_bytes),
            ("rows", stats.kv_reserved_bytes),
            ("cached", stats.cache_bytes),
            ("pinned", stats.cache_pinned_bytes),
            ("pending", stats.pending_bytes),
        ):
            memory.add_metric([kind], num_bytes)
        yield memory
        limits = gauge_of("memory_limit_bytes", "What weights, and rows and cached blocks together, may take.", "kind")
        limits.add_metric(["weights"], stats.max_weights_bytes)
        limits.add_metric(["kv"], stats.max_kv_bytes)
        yield limits
        used = (stats.kv_reserved_bytes + stats.cache_bytes) / stats.max_kv_bytes if stats.max_kv_bytes else 0.0
        yield gauge("kv_used_ratio", "Part of the memory for keys and values that is in use.", used)
        yield gauge("cached_blocks", "Blocks in memory.", stats.cache_blocks)
        evictions = counter("evictions", "Blocks that a tier forgot, by tier.", "tier")
        evictions.add_metric(["memory"], stats.evictions)
        evictions.add_metric(["disk"], stats.disk_evictions)
        yield evictions

    def _models(self) -> Iterator[Family]:
        stats = self._service.engine.stats
        yield gauge("models", "Models in memory.", len(stats.models))
        yield gauge("models_loading", "Models whose weights are being read.", len(stats.loading))
        yield gauge("models_waiting", "Models that wait for room.", len(stats.awaited))
        yield one_counter("model_loads", "Models whose weights were read.", stats.loads)
        yield one_counter("model_unloads", "Models whose weights went.", stats.unloads)
        yield one_counter("model_swaps", "Models that went to make room for another.", stats.swaps)
        yield histogram("model_load_seconds", "Duration of reading a model's weights.", stats.load_s)

    def _disk(self) -> Iterator[Family]:
        stats = self._service.engine.stats
        yield gauge("disk_ok", "1 if blocks and sessions can be kept on disk, or need not.", storage_ok(stats.storage))
        yield gauge("disk_bytes", "What blocks take on disk.", stats.disk_bytes)
        blocks = counter("blocks", "Blocks that went to disk, came back, or were dropped before.", "event")
        blocks.add_metric(["offloaded"], stats.offloaded)
        blocks.add_metric(["restored"], stats.restored)
        blocks.add_metric(["dropped"], stats.dropped)
        yield blocks
        persists = counter("persists", "Sessions that were written to disk, by outcome.", "outcome")
        persists.add_metric(["ok"], stats.persists)
        persists.add_metric(["failed"], stats.persist_failures)
        yield persists
        yield histogram("persist_seconds", "Duration of writing a session to disk.", stats.persist_s)


def engine_step_s(service: Service) -> float:
    """For how many seconds the engine has been at its current step."""
    return service.engine.thread.step_s


def storage_ok(storage: str) -> float:
    """1 if what should be kept on disk can be."""
    return float(storage in ("ok", "off"))


def gauge(name: str, words: str, value: float) -> GaugeMetricFamily:
    """A value that goes up and down."""
    return GaugeMetricFamily(PREFIX + name, words, value=value)


def gauge_of(name: str, words: str, *labels: str) -> GaugeMetricFamily:
    """The same for several things."""
    return GaugeMetricFamily(PREFIX + name, words, labels=labels)


def counter(name: str, words: str, *labels: str) -> CounterMetricFamily:
    """What only goes up; its samples have _total at the end of their names."""
    return CounterMetricFamily(PREFIX + name, words, labels=labels)


def one_counter(name: str, words: str, value: float) -> CounterMetricFamily:
    """The same for one thing."""
    return CounterMetricFamily(PREFIX + name, words, value=value)


def histogram(name: str, words: str, values: Histogram | Distribution) -> HistogramMetricFamily:
    """The distribution of a value."""
    family = HistogramMetricFamily(PREFIX + name, words)
    family.add_metric([], *buckets(values))
    return family


def buckets(values: Histogram | Distribution) -> tuple[list[tuple[str, float]], float]:
    """The cumulated counts by upper bound, as Prometheus has them, and the sum of all values."""
    its = values.snapshot if isinstance(values, Histogram) else values
    counted, cumulated = 0, []
    for bound, count in zip((*its.bounds, float("inf")), its.counts, strict=True):
        counted += count
        cumulated.append(("+Inf" if bound == float("inf") else f"{bound:g}", float(counted)))
    return cumulated, its.total


def tally(
    name: str, words: str, counted: Tally, labels: tuple[str, ...]
) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
    """How often something was asked for, and how long it took."""
    counts = counter(f"{name}s", f"Number of {words}, by {' and '.join(labels)}.", *labels)
    for values, count in sorted(counted.counts.items()):
        counts.add_metric(values, count)
    yield counts
    seconds = HistogramMetricFamily(f"{PREFIX}{name}_seconds", f"Duration of {words}.", labels=labels[:1])
    for value, times in sorted(counted.seconds.items()):
        seconds.add_metric([value], *buckets(times))
    yield seconds
