"""Nothing that a caller writes is in a log line, a metric, a span or the page, in whatever field of whatever call.

A canary is put into every field of every tool, and of every endpoint of the APIs over HTTP, one after the other: in its
right form where that is text, and in a wrong one. Logs are at the level debug, of all packages.
"""

import contextlib
import json
import logging
import threading
from functools import partial

import pytest
from mcp import Client, MCPError
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.hosting import faces
from mlx_mcp.hosting.logs import configure_logs, log_generations
from mlx_mcp.service import tracing
from mlx_mcp.workflows.sandbox.opening import open_runtime
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, closing
from tests.api.http.small_api import SMALL
from tests.api.http.watched import served
from tests.effort import THOROUGH
from tests.fakes import FakeLoader, fake_client

CANARY = "canary7f3a"
NUMBER = 73217321
WRONG = [{CANARY: [CANARY]}, f"s_{CANARY}", NUMBER]
PROGRAM = f"""
print(llm_query("{CANARY}", text=context), remember("{CANARY}", "{CANARY}"))
raise ValueError(context)
"""
# What a tool's call is like that does something.
USUAL = {
    "generate": {"prompt": CANARY, "system": CANARY, "model": "tiny", "max_tokens": 5},
    "generate_batch": {"prompts": [CANARY, CANARY], "model": "tiny", "max_tokens": 5},
    "create_session": {"system": CANARY, "model": "tiny", "ephemeral": True},
    "count_tokens": {"prompt": CANARY, "model": "tiny"},
    "sandbox_run": {"code": PROGRAM, "context": CANARY, "model": "tiny"},
    "list_models": {},
    "list_sessions": {},
}


@pytest.fixture
def log(tmp_path):
    """The log, at debug and of all packages; what else is printed to stderr is looked at by capfd."""
    root, hook, own = logging.getLogger(), threading.excepthook, logging.getLogger("mlx_mcp")
    handlers, level, own_level = root.handlers[:], root.level, own.level
    root.handlers[:] = []
    configure_logs(Config.load(log_file=tmp_path / "log", log_level="debug"))
    root.setLevel(logging.DEBUG)
    yield tmp_path / "log"
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    own.setLevel(own_level)
    threading.excepthook = hook


@pytest.fixture
def spans(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(tracing, "tracer", provider.get_tracer("test"))
    monkeypatch.setattr("mcp.shared._otel._tracer", provider.get_tracer("sdk"))
    yield lambda: "\n".join(span.to_json() for span in exporter.get_finished_spans())
    provider.shutdown()


def wrongly(usual, names):
    """The usual arguments, with each of the names in turn given what may be wrong, all of it if thorough."""
    yield usual
    for i, name in enumerate([*names, CANARY]):
        for value in WRONG if THOROUGH else [WRONG[i % len(WRONG)]]:
            yield usual | {name: value}


def filled(schema, defs, depth=0):
    """Something of a JSON schema's shape, with canaries for all texts."""
    if "$ref" in schema:
        return filled(defs[schema["$ref"].rpartition("/")[2]], defs, depth)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    for kind in ("anyOf", "oneOf", "allOf"):
        if kind in schema:
            return filled(schema[kind][0], defs, depth)
    kind = schema.get("type")
    if kind == "object":
        named = schema.get("properties", {}) if depth < 4 else {}
        required = schema.get("required", named)
        return {name: filled(each, defs, depth + 1) for name, each in named.items() if name in required}
    if kind == "array":
        return [filled(schema.get("items", {"type": "string"}), defs, depth + 1)] if depth < 5 else []
    return {"integer": 1, "number": 1.0, "boolean": False, "null": None}.get(kind, CANARY)


async def through_tools(service, folder):
    count = 0
    sandboxes = Sandboxes(partial(open_runtime, folder))
    async with closing(sandboxes), Client(build_server(service, sandboxes=sandboxes)) as client:
        for tool in (await client.list_tools()).tools:
            names = tool.input_schema["properties"]
            usual = USUAL.get(tool.name, dict.fromkeys(tool.input_schema.get("required", []), CANARY))
            for arguments in wrongly(usual, names):
                if isinstance(arguments.get("name"), str):
                    continue  # the name of a session that is made is shown to its own
                count += 1
                with contextlib.suppress(MCPError):
                    await client.call_tool(tool.name, arguments, meta={"traceparent": CANARY, CANARY: CANARY})
        with pytest.raises(MCPError):
            await client.read_resource(f"mlx://sessions/{CANARY}")
        with pytest.raises(MCPError):
            await client.get_prompt(CANARY, {CANARY: CANARY})
        result = await client.call_tool(CANARY, {})
        assert result.is_error
    return count


async def through_apis(http, apis):
    count = 0
    headers = {"x-canary": CANARY, "traceparent": CANARY, "user-agent": CANARY, "tracestate": CANARY}
    for api in apis:
        for endpoint in api.endpoints:
            path = "/".join(CANARY if part.startswith("{") else part for part in endpoint.path.split("/"))
            schema = {} if endpoint.takes is None else endpoint.takes.model_json_schema()
            usual = filled(schema, schema.get("$defs", {})) if schema else {}
            models = [{"model": "tiny"}, {}] if "model" in schema.get("properties", {}) else [{}]
            for body in (body | model for model in models for body in wrongly(usual, schema.get("properties", {}))):
                count += 1
                if isinstance(body.get("name"), str):
                    continue
                sent = json.dumps(body) if endpoint.takes is not None else ""
                response = await http.request(
                    endpoint.method, path, content=sent, params={"q": CANARY}, headers=headers
                )
                assert response.status_code != 500, f"{endpoint.path} {body}"
            broken = await http.request(endpoint.method, path, content=f'{{"{CANARY}', headers=headers)
            assert api is not SMALL or "Send one JSON object" in broken.text
    for path in ("/mcp", f"/{CANARY}", "/", "/health", "/metrics"):
        for method in ("GET", "POST", "DELETE", CANARY.upper()):
            if (path, method) != ("/mcp", "GET"):
                await http.request(method, path, content=CANARY, params={CANARY: CANARY}, headers=headers)
    return count


async def test_nothing_that_a_caller_writes_is_seen_by_those_who_watch(log, spans, capfd, tmp_path):
    engine = fake_client(FakeLoader(context_tokens=2000))
    apis = (*faces.APIS, SMALL)
    async with served(engine, apis) as (http, service):
        log_generations(service.observer)
        calls = await through_tools(service, tmp_path / "runtime") + await through_apis(http, apis)
        engine.loader.runner.explode = ValueError(CANARY)  # a step fails with a text that quotes a prompt
        await http.post("/small/generate", json={"prompt": CANARY})
        seen = {
            "metrics": (await http.get("/metrics")).text,
            "page": (await http.get("/")).text,
            "state": (await http.get("/page/state")).text,
            "health": (await http.get("/health")).text + (await http.get("/health/ready")).text,
        }
    engine.close()
    printed = capfd.readouterr()
    seen |= {"spans": spans(), "log": log.read_text(), "stdout": printed.out, "stderr": printed.err}
    assert calls > 100
    assert seen["log"].count("event=generation") > 20
    assert "a step failed" in seen["log"]
    assert "chat tiny" in seen["spans"]
    leaks = [
        f"{name}: {line[:300]}"
        for name, text in seen.items()
        for line in text.splitlines()
        if CANARY in line.lower() or str(NUMBER) in line
    ]
    assert leaks == []
