"""Where traces go: to the exporter that the operator has chosen by OpenTelemetry's own variables, OTEL_*.

The exporters are packages of OpenTelemetry, which come with mlx-mcp[otel]. Without the setting `traces` none is looked
for: hosts set these variables for themselves, and their collectors must not get what this process does.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import entry_points
from typing import Any

from mlx_mcp import __version__
from mlx_mcp.config import Config

logger = logging.getLogger(__name__)

GROUP = "opentelemetry_traces_exporter"
LACKING = "traces are asked for and cannot be sent: install mlx-mcp[otel], or set traces to false"


def export_traces(config: Config) -> None:
    """Have the spans of this process exported, if the settings say so. What is missing is said in the log."""
    if not config.traces:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning(LACKING)
        return
    exporters = [exporter(name) for name in names()]
    own = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "mlx-mcp", "service.version": __version__}
    provider = TracerProvider(resource=Resource.create(own))
    for each in exporters:
        if each is not None:
            provider.add_span_processor(BatchSpanProcessor(each))
    trace.set_tracer_provider(provider)


def names() -> list[str]:
    """The names of the exporters that the operator wants; OTLP over HTTP if none is named."""
    asked = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    words = [word.strip() for word in asked.split(",")]
    return [otlp if word == "otlp" else word for word in words if word not in ("", "none")]


def exporter(name: str) -> Any:
    """An exporter by its name; None, and a line in the log, if it is not installed."""
    found = next(iter(entry_points(group=GROUP, name=name)), None)
    if found is None:
        logger.warning(LACKING)
        return None
    return found.load()()
