"""Spans of requests and generations, as an exporter in memory sees them."""

from itertools import pairwise

import httpx2
import pytest
from mcp import Client
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.models.registry import Registry
from mlx_mcp.service import tracing
from mlx_mcp.service.service import Service
from tests.api.http.small_api import SMALL
from tests.api.http.test_http import serving
from tests.api.http.watched import watched
from tests.fakes import fake_client

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


@pytest.fixture
def spans(monkeypatch):
    """The spans of a test, by name, once they have ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(tracing, "tracer", provider.get_tracer("test"))
    monkeypatch.setattr("mcp.shared._otel._tracer", provider.get_tracer("sdk"))
    yield lambda: {span.name: span for span in exporter.get_finished_spans()}
    provider.shutdown()


def parents(found):
    """The name of each span's parent; "the caller" for the one that a request named."""
    names = {span.context.span_id: name for name, span in found.items()} | {int(CALLER, 16): "the caller"}
    return {name: span.parent and names[span.parent.span_id] for name, span in found.items()}


def check_order(found, request):
    """Prove that the parts of a generation follow each other, inside of it, and it inside of its request."""
    parts = [found[name] for name in ("load", "queue", "prefill", "decode") if name in found]
    assert all(before.end_time == after.start_time for before, after in pairwise(parts))
    chat = found["chat tiny"]
    assert chat.start_time == parts[0].start_time <= parts[-1].end_time == chat.end_time
    assert found[request].start_time <= chat.start_time
    if "write" in found:
        assert found["write"].start_time == chat.end_time
        assert chat.end_time <= found["write"].end_time == found[request].end_time


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_over_http_has_the_caller_s_span_as_its_parent(engine, spans, streamed):
    async with watched(engine, (SMALL,)) as (http, _):
        body = {"prompt": "hello", "stream": streamed}
        response = await http.post("/small/generate", json=body, headers={"traceparent": TRACEPARENT})
        assert response.status_code == 200
    found = spans()
    request = "POST /small/generate"
    inside = dict.fromkeys(("load", "queue", "prefill", "decode"), "chat tiny")
    assert parents(found) == {request: "the caller", "chat tiny": request, "write": request} | inside
    assert {span.context.trace_id for span in found.values()} == {int(TRACE, 16)}
    check_order(found, request)
    assert found[request].attributes == {
        "http.request.method": "POST",
        "http.route": "/small/generate",
        "http.response.status_code": 200,
    }


async def test_a_generation_says_what_the_conventions_ask_for(engine, spans):
    async with watched(engine, (SMALL,)) as (http, _):
        await http.post("/small/generate", json={"prompt": "hello"})
    said = spans()["chat tiny"].attributes
    assert said == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mlx_mcp",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }


async def test_a_tool_s_traceparent_in_meta_is_its_parent(engine, spans):
    service = Service(engine, Registry(None))
    async with Client(build_server(service)) as client:
        meta = {"traceparent": TRACEPARENT}
        await client.call_tool("generate", {"prompt": "hello", "model": "tiny"}, meta=meta)
    found = spans()
    inside = {name: parent for name, parent in parents_of_trace(found).items() if name != "tools/call generate"}
    assert found["tools/call generate"].parent.span_id == int(CALLER, 16)
    assert inside["chat tiny"] == inside["write"] == "tools/call generate"
    check_order(found, "tools/call generate")


def parents_of_trace(found):
    return parents({name: span for name, span in found.items() if span.context.trace_id == int(TRACE, 16)})


async def test_a_tool_over_http_belongs_to_the_request_that_brought_it(engine, spans):
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        body = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {
                "name": "generate",
                "arguments": {"prompt": "hello", "model": "tiny"},
                "_meta": {
                    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
                    "io.modelcontextprotocol/clientCapabilities": {},
                },
            },
        }
        headers = {
            "accept": "application/json, text/event-stream",
            "mcp-protocol-version": "2026-07-28",
            "mcp-method": "tools/call",
            "mcp-name": "generate",
            "traceparent": TRACEPARENT,
        }
        response = await http.post(f"{address}/mcp", json=body, headers=headers)
        assert response.status_code == 200, response.text
    found = parents(spans())
    assert found["POST /mcp"] == "the caller"
    assert found["tools/call generate"] == "POST /mcp"
    assert found["chat tiny"] == "tools/call generate"


async def test_a_request_that_fails_says_the_kind_of_its_error_and_no_more(engine, spans):
    async with watched(engine, (SMALL,)) as (http, _):
        await http.post("/small/generate", json={"prompt": "canary", "model": "canary"})
    found = spans()
    assert found["chat"].attributes["error.type"] == "UnknownModel"
    assert not found["chat"].status.is_ok
    assert found["chat"].status.description is None
    assert found["POST /small/generate"].attributes["http.response.status_code"] == 404
    assert "canary" not in "".join(span.to_json() for span in found.values())


@pytest.mark.parametrize("traceparent", ["", "00-zz", f"00-{'0' * 32}-{CALLER}-01", "canary"])
async def test_a_malformed_traceparent_is_none(engine, spans, traceparent):
    async with watched(engine, (SMALL,)) as (http, _):
        await http.post("/small/generate", json={"prompt": "hello"}, headers={"traceparent": traceparent})
    assert spans()["POST /small/generate"].parent is None


async def test_a_caller_who_does_not_sample_has_no_spans_made(engine, spans):
    async with watched(engine, (SMALL,)) as (http, _):
        unsampled = f"00-{TRACE}-{CALLER}-00"
        await http.post("/small/generate", json={"prompt": "hello"}, headers={"traceparent": unsampled})
    assert spans() == {}


async def test_without_a_provider_nothing_is_noted(engine):
    async with watched(engine, (SMALL,)) as (http, service):
        contexts = []
        service.observer.ending.append(lambda watched: contexts.append(watched.context))
        await http.post("/small/generate", json={"prompt": "hello"}, headers={"traceparent": TRACEPARENT})
    assert contexts == [None]
