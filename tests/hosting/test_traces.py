"""Where traces go."""

import logging
from types import SimpleNamespace

import pytest
from opentelemetry import trace

from mlx_mcp.config import Config
from mlx_mcp.hosting import traces
from mlx_mcp.process.environment import engine_environment
from mlx_mcp.process.place import Place


@pytest.fixture
def provider(monkeypatch):
    """What becomes the provider of traces."""
    became = []
    monkeypatch.setattr(trace, "set_tracer_provider", became.append)
    yield became
    for each in became:
        each.shutdown()


def test_no_exporter_is_looked_for_unless_the_settings_say_so(provider, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    traces.export_traces(Config.load())
    assert provider == []


def test_the_exporter_is_the_one_that_the_operator_names(provider, monkeypatch):
    exported = []
    memory = SimpleNamespace(export=exported.extend, shutdown=lambda: None)
    found = {"console": SimpleNamespace(load=lambda: lambda: memory)}
    monkeypatch.setattr(traces, "entry_points", lambda group, name: [found[name]])
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console, none")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "the studio")
    traces.export_traces(Config.load(traces=True))
    [own] = provider
    own.get_tracer("test").start_span("told").end()
    own.force_flush()
    assert [span.name for span in exported] == ["told"]
    assert exported[0].resource.attributes["service.name"] == "the studio"


@pytest.mark.parametrize(
    ("set_to", "name"),
    [
        ({}, "otlp_proto_http"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "otlp_proto_grpc"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
    ],
)
def test_otlp_over_http_is_taken_where_nothing_else_is_asked_for(set_to, name, monkeypatch):
    for key, value in set_to.items():
        monkeypatch.setenv(key, value)
    assert traces.names() == [name]


def test_an_exporter_that_is_not_installed_is_named_in_the_log(provider, monkeypatch, caplog):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "no_such_exporter")
    with caplog.at_level(logging.WARNING):
        traces.export_traces(Config.load(traces=True))
    assert "install mlx-mcp[otel]" in caplog.text


@pytest.mark.parametrize("asked", [True, False])
def test_an_engine_gets_a_host_s_variables_for_traces_only_where_traces_are_asked_for(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "key=secret")
    if asked:
        monkeypatch.setenv("MLX_MCP_TRACES", "true")
    assert ("OTEL_EXPORTER_OTLP_HEADERS" in engine_environment(Place(str(tmp_path)))) == asked
