"""What /metrics has after some calls, and that its labels are few."""

import asyncio

import pytest
from mcp import Client
from prometheus_client.parser import text_string_to_metric_families

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.errors import UnknownModel
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.service import Service
from tests.api.http.watched import watched
from tests.fakes import FakeLoader, fake_client
from tests.service.house import CALLER, asked, unheard


@pytest.fixture
def engine():
    engine = fake_client(FakeLoader(context_tokens=2000), Limits(max_running=2))
    yield engine
    engine.close()


async def scraped(http):
    """Samples by name and the values of their labels, in alphabetical order."""
    response = await http.get("/metrics")
    assert response.status_code == 200
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith("mlx_mcp_") and family.documentation for family in families)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


async def test_what_callers_get_is_counted_by_kind(engine):
    async with watched(engine) as (http, service):
        ask = [generate(service, CALLER, asked("hello"), Options(model="tiny"), unheard) for _ in range(3)]
        await asyncio.gather(*ask)
        with pytest.raises(UnknownModel):
            await generate(service, CALLER, asked("hello"), Options(model="nowhere"), unheard)
        await http.get("/health")
        found = await scraped(http)
    assert found["mlx_mcp_generations_total", "stop", "tiny"] == 3
    assert found["mlx_mcp_generations_total", "", "UnknownModel"] == 1
    assert found["mlx_mcp_errors_total", "UnknownModel"] == 1
    assert found["mlx_mcp_model_tokens_total", "output", "tiny"] == 15 == found["mlx_mcp_tokens_total", "output"] - 3
    assert found["mlx_mcp_tokens_total", "prompt"] == found["mlx_mcp_model_tokens_total", "prompt", "tiny"]
    assert found["mlx_mcp_time_to_first_token_seconds_count",] == 3
    assert found["mlx_mcp_time_between_tokens_seconds_count",] == 12
    assert found["mlx_mcp_queue_wait_seconds_count",] == 3
    assert found["mlx_mcp_batch_rows_count",] > 0
    assert found["mlx_mcp_model_load_seconds_count",] == found["mlx_mcp_model_loads_total",] == 1
    assert found["mlx_mcp_memory_bytes", "weights"] == 100
    assert 0 < found["mlx_mcp_kv_used_ratio",] < 1
    assert found["mlx_mcp_http_requests_total", "/health", "200", "GET"] == 1
    assert found["mlx_mcp_ready",] == 1


async def test_a_bucket_counts_all_that_is_below_its_bound(engine):
    async with watched(engine) as (http, service):
        for seconds in (0.004, 0.02, 400):
            service.observer.first_token_s.observe(seconds)
        found = await scraped(http)
    name = "mlx_mcp_time_to_first_token_seconds"
    assert [found[f"{name}_bucket", bound] for bound in ("0.005", "0.01", "0.025", "300", "+Inf")] == [1, 1, 2, 2, 3]
    assert found[f"{name}_count",] == 3
    assert found[f"{name}_sum",] == pytest.approx(400.024)


async def test_no_path_method_or_name_of_a_caller_becomes_a_label(engine):
    async with watched(engine) as (http, service):
        for i in range(20):
            await http.request(f"METHOD{i}", f"/canary{i}")
            await http.get("/canary", headers={"host": f"canary{i}.example"})
        async with Client(build_server(service)) as client:
            for i in range(3):
                await client.call_tool(f"canary{i}", {})
            await client.call_tool("generate", {"prompt": "hello", "model": "canary"})
        text = (await http.get("/metrics")).text
        found = await scraped(http)
    assert "canary" not in text.lower()
    assert "METHOD" not in text
    assert found["mlx_mcp_http_requests_total", "421", "GET", "other"] == 20
    assert found["mlx_mcp_tool_calls_total", "UnknownModel", "generate"] == 1


async def test_a_call_of_a_tool_is_counted_once_with_its_error(engine):
    service = Service(engine, Registry(None))
    async with Client(build_server(service)) as client:
        await client.call_tool("generate", {"prompt": "hello", "model": "tiny"})
        await client.call_tool("generate", {"prompt": "hello", "model": "tiny", "session": "s_none"})
        await client.call_tool("generate_batch", {"prompts": ["a", "b"], "model": "none"})
        await client.call_tool("generate", {"promt": "hello"})
        await client.call_tool("generated", {"prompt": "hello"})
    assert service.observer.tools.counts == {
        ("generate", "ok"): 1,
        ("generate", "UnknownSession"): 1,  # a call with wrong arguments is none of the tool
        ("generate_batch", "UnknownModel"): 1,
    }
    assert service.observer.errors == {"UnknownSession": 1, "UnknownModel": 2}  # each branch's own


async def test_openmetrics_is_given_to_those_who_ask_for_it(engine):
    async with watched(engine) as (http, _):
        response = await http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
