"""Traces by OpenTelemetry: a span for each request, and below it what its generations waited for and did.

    POST /v1/chat/completions        the request; its parent is the caller's own span, if it sent a traceparent
      chat NAME                      a generation, with attributes by the conventions for generative AI
        load                         its model was loaded
        queue                        it waited for its turn, for memory, for others
        prefill                      its prompt was read
        decode                       from the first token to the end
      write                          from the last generation's end to the end of the answer

The spans of a generation are made when it has ended, from the moments that the observer has noted: tokens cost nothing.
Where no provider of traces was set, nothing is done at all. No span has anything that a caller wrote.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import ProxyTracerProvider, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mlx_mcp.service.observing import Observer, Watched
from mlx_mcp.service.service import Service

__all__ = ["RequestTrace", "parent_of", "request_span", "trace_generations"]

PROVIDER = "mlx_mcp"
PROPAGATOR = TraceContextTextMapPropagator()
tracer = trace.get_tracer(PROVIDER)


@dataclass(eq=False)
class RequestTrace:
    """The span of a request that goes on, and when the latest of its generations ended."""

    span: Span
    context: Context
    generated_ns: int = 0  # since 1970; 0 until one has ended

    def name(self, name: str, **attributes: str | int) -> None:
        """Give the span its name and attributes, of which the caller wrote nothing."""
        self.span.update_name(name)
        self.span.set_attributes({key.replace("__", "."): value for key, value in attributes.items()})

    def note_error(self, kind: str) -> None:
        """Note that the request came to nothing, by the kind of its error."""
        self.span.set_attribute("error.type", kind)
        self.span.set_status(Status(StatusCode.ERROR))


_current: ContextVar[RequestTrace | None] = ContextVar("mlx_mcp_request_trace", default=None)


def parent_of(carrier: Mapping[str, Any] | None) -> Context | None:
    """The caller's span, if it sent one as `traceparent`; one that is malformed is none."""
    if not carrier or not isinstance(carrier.get("traceparent"), str):
        return None
    told = {key: carrier[key] for key in ("traceparent", "tracestate") if isinstance(carrier.get(key), str)}
    context = PROPAGATOR.extract(told)
    return context if trace.get_current_span(context).get_span_context().is_valid else None


@contextmanager
def request_span(name: str, parent: Context | None) -> Iterator[RequestTrace | None]:
    """A request that goes on until the end of the block; None where nobody wants traces."""
    if isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        yield None
        return
    span = tracer.start_span(name, parent, SpanKind.SERVER)
    context = trace.set_span_in_context(span, parent)
    request = RequestTrace(span, context)
    token, own = attach(context), _current.set(request)
    try:
        yield request
    finally:
        _current.reset(own)
        detach(token)
        now = time.time_ns()
        if request.generated_ns:
            tracer.start_span("write", context, start_time=request.generated_ns).end(now)
        span.end(now)


def trace_generations(service: Service) -> None:
    """Have the spans of each generation of a process made when it ends."""
    add_listeners(service.observer)


def add_listeners(observer: Observer) -> None:
    """Have an observer's generations traced; nothing is done the second time."""
    if begin not in observer.beginning:
        observer.beginning.append(begin)
        observer.ending.append(end)


def begin(watched: Watched) -> None:
    """Note on behalf of which request a generation begins."""
    watched.context = _current.get()


def end(watched: Watched) -> None:
    """Make the spans of a generation that has ended, if its request is traced."""
    request = watched.context
    if not isinstance(request, RequestTrace):
        return

    def at(moment: float) -> int:
        return watched.began_ns + int((moment - watched.began_at) * 1e9)

    request.generated_ns = max(request.generated_ns, at(watched.ended_at))
    if not request.span.get_span_context().trace_flags.sampled:
        return
    model = "" if watched.result is None else watched.result.model
    span = tracer.start_span(
        f"chat {model}".strip(), request.context, SpanKind.INTERNAL, attributes_of(watched), start_time=watched.began_ns
    )
    if watched.error and watched.result is None:
        span.set_attribute("error.type", watched.error)
        span.set_status(Status(StatusCode.ERROR))
    inside = trace.set_span_in_context(span, request.context)
    for name, start, stop in phases(watched):
        tracer.start_span(name, inside, start_time=at(start)).end(at(stop))
    span.end(at(watched.ended_at))


def phases(watched: Watched) -> Iterator[tuple[str, float, float]]:
    """What a generation did one after the other, with the beginning and the end of each."""
    queued, admitted, first = watched.began_at, watched.admitted_at, watched.first_at
    if watched.loaded_at is not None:
        yield "load", queued, watched.loaded_at
        queued = watched.loaded_at
    admitted = first if admitted is None else max(queued, admitted)
    yield "queue", queued, watched.ended_at if admitted is None else admitted
    if admitted is not None:
        yield "prefill", admitted, watched.ended_at if first is None else first
    if first is not None:
        yield "decode", first, watched.ended_at


def attributes_of(watched: Watched) -> dict[str, Any]:
    """The attributes of a generation's span, by OpenTelemetry's conventions for generative AI."""
    sampling, result = watched.request.sampling, watched.result
    told: dict[str, Any] = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": PROVIDER}
    if result is not None:  # else its numbers may be anything that a caller wrote
        told |= {
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.model": result.model,
            "gen_ai.response.model": result.model,
            "gen_ai.response.finish_reasons": [str(result.finish_reason)],
            "gen_ai.usage.input_tokens": result.prompt_tokens,
            "gen_ai.usage.output_tokens": result.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": result.cached_tokens + result.restored_tokens,
            "gen_ai.conversation.id": None if result.session is None else result.session.session_id,
        }
    return {key: value for key, value in told.items() if value is not None}
