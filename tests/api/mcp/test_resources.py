"""Resources, subscriptions and completions as an MCP client sees them, in both protocol eras, over fakes."""

import asyncio
import json
import re

import anyio
import pytest
from mcp import Client, MCPError
from mcp_types import (
    Implementation,
    PromptReference,
    ResourceListChangedNotification,
    ResourceTemplateReference,
    ResourceUpdatedNotification,
    ToolListChangedNotification,
)

from mlx_mcp.api.mcp import calls, changes, completions, resources
from mlx_mcp.api.mcp.server import INSTRUCTIONS, build_server
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from tests.fakes import FakeLoader, fake_client

MODES = ["auto", "legacy"]
HOST = Implementation(name="claude-code", version="2.1.332")
LINE = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC, "
pytestmark = pytest.mark.filterwarnings(
    "ignore:resources/.* is removed as of 2026-07-28"
)  # but there in older versions


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def engine():
    engine = fake_client(FakeLoader(context_tokens=2000), block_tokens=16)
    yield engine
    assert engine.close()


def connect(engine, mode="auto", stale=(), **options):
    return Client(build_server(Service(engine, Registry(None)), stale=stale), mode=mode, **options)


async def call(client, tool, **arguments):
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content[0].text
    return result.structured_content


async def content(client, uri):
    (found,) = (await client.read_resource(uri)).contents
    return found.mime_type, found.text


async def test_resources_say_what_the_tools_of_the_same_name_return(engine, mode):
    async with connect(engine, mode) as client:
        made = await call(client, "create_session", system="Be short.", name="base", model="tiny")
        for uri, tool in (("mlx://models", "list_models"), ("mlx://sessions", "list_sessions")):
            mime_type, text = await content(client, uri)
            assert mime_type == "application/json"
            there = await call(client, tool)
            for each in (found := json.loads(text)).get("sessions", []) + there.get("sessions", []):
                each.pop("idle_s"), each.pop("expires_in_s")
            assert found == {key: value for key, value in there.items() if value is not None}
        mime_type, text = await content(client, "mlx://stats")
        assert (mime_type, json.loads(text)["sessions"]) == ("application/json", 1)
        assert made["session"] in [
            str(each.uri).rpartition("/")[2] for each in (await client.list_resources()).resources
        ]


async def test_the_list_has_the_callers_sessions_and_no_others(engine, mode, monkeypatch):
    async with connect(engine, mode) as client:
        await call(client, "create_session", system="Be short.", name="mine", model="tiny")
        listed = {each.name for each in (await client.list_resources()).resources}
        assert listed == {"models", "sessions", "stats", "mine"}
        monkeypatch.setattr(resources, "tenant", lambda: "other")
        assert {each.name for each in (await client.list_resources()).resources} == {"models", "sessions", "stats"}


@pytest.mark.parametrize("session", ["base", None], ids=["by name", "by handle"])
async def test_a_transcript_has_what_was_said(engine, mode, session):
    async with connect(engine, mode) as client:
        made = await call(client, "create_session", system="Be short.", name="base", model="tiny")
        await call(client, "generate", session="base", prompt="Hello", keep=True)
        mime_type, text = await content(client, f"mlx://sessions/{session or made['session']}")
    assert mime_type == "text/markdown"
    assert text.startswith("# Session base\n")
    assert "Be short." in text
    assert text.count("Hello") == 2  # the prompt, and its echo


async def test_a_transcript_is_read_from_disk_without_the_model_and_says_who_spoke(tmp_path):
    settings = {"model": "embedded", "openblas": False, "store_dir": tmp_path, "max_ssd_bytes": 1 << 30}
    said = "## user\n\nBob's badge is 171. What is Bob's badge?\n\n## assistant\n\n171"
    engine, registry = wire(Config.load(**settings))
    async with Client(build_server(Service(engine, registry)), client_info=HOST) as client:
        await call(client, "create_session", system="Be short.", name="badges")
        await call(client, "generate", session="badges", prompt=said.splitlines()[2], keep=True)
        first = await content(client, "mlx://sessions/badges")
        await call(client, "persist_session", session="badges")
    assert engine.close()
    assert "## system\n\nBe short." in first[1]
    assert said in first[1]
    assert len(re.findall(f"`{LINE}claude-code 2.1.332`\n", first[1])) == 2
    engine, registry = wire(Config.load(**settings))
    async with Client(build_server(Service(engine, registry))) as client:
        assert await content(client, "mlx://sessions/badges") == first
        assert engine.stats.models == ()
    assert engine.close()


async def test_a_transcript_and_a_search_say_which_client_asked_and_when(engine, mode, monkeypatch):
    service = Service(engine, Registry(None))
    async with Client(build_server(service), mode=mode, client_info=HOST) as client:
        await call(client, "create_session", system="Be short.", name="base", model="tiny")
        await call(client, "generate", session="base", prompt="Hello", keep=True)
    other = Implementation(name="codex\n# x" + "y" * 99, version="1")
    async with Client(build_server(service), mode=mode, client_info=other) as client:
        await call(client, "generate", session="base", prompt="Bye", keep=True)
        _, text = await content(client, "mlx://sessions/base")
        assert [line for line in text.splitlines() if re.match(f"`{LINE}", line)] == [
            line for line in text.splitlines() if line.startswith("`20")
        ]
        askers = re.findall(f"`{LINE}(.*)`\n\n## text\n\n\\W?(Be short.|Hello|Bye)", text)
        assert askers == [
            ("claude-code 2.1.332", "Be short."),
            ("claude-code 2.1.332", "Hello"),
            ("codex# x" + "y" * 56, "Bye"),
        ]
        for said, who in (("be SHORT", "claude-code 2.1.332"), ("bye", "codex# x" + "y" * 56)):
            (found,) = (await call(client, "list_sessions", text=said))["sessions"]
            assert re.fullmatch(LINE + who, found["asked"])
        assert "asked" not in (await call(client, "list_sessions"))["sessions"][0]
        monkeypatch.setattr(calls, "tenant", lambda: "other")
        assert (await call(client, "list_sessions", text="bye"))["sessions"] == []


async def test_another_callers_session_is_answered_as_one_that_is_not_there(engine, mode, monkeypatch):
    async with connect(engine, mode) as client:
        made = (await call(client, "create_session", system="Be short.", model="tiny"))["session"]
        monkeypatch.setattr(resources, "tenant", lambda: "other")
        refused = []
        for uri in (f"mlx://sessions/{made}", f"mlx://sessions/{'s_' + 32 * '0'}"):
            with pytest.raises(MCPError) as error:
                await client.read_resource(uri)
            refused.append((error.value.error.code, error.value.error.message.replace(uri.rpartition("/")[2], "X")))
    assert refused[0] == refused[1]
    assert refused[0][0] == (-32602 if mode == "auto" else -32002)
    assert "list_sessions" in refused[0][1]


async def test_a_closed_session_is_not_there_any_more(engine, mode):
    async with connect(engine, mode) as client:
        made = (await call(client, "create_session", system="Be short.", model="tiny"))["session"]
        await call(client, "close_session", sessions=[made])
        with pytest.raises(MCPError, match="list_sessions"):
            await client.read_resource(f"mlx://sessions/{made}")


CHANGES = ResourceListChangedNotification | ResourceUpdatedNotification | ToolListChangedNotification


class Heard:
    """What a client of an older era is notified of; each is waited for with a bound."""

    def __init__(self):
        self.queue = asyncio.Queue()

    async def __call__(self, message):
        root = getattr(message, "root", message)
        if isinstance(
            root, ResourceListChangedNotification | ResourceUpdatedNotification | ToolListChangedNotification
        ):
            self.queue.put_nowait(root)

    async def next(self):
        with anyio.fail_after(20):
            return await self.queue.get()


async def test_a_client_of_an_older_era_hears_that_sessions_come_and_of_what_it_subscribed_to(engine, monkeypatch):
    monkeypatch.setattr(changes, "CHANGES_S", 0.01)
    heard = Heard()
    async with connect(engine, "legacy", message_handler=heard) as client:
        assert client.server_capabilities.resources.subscribe
        assert client.server_capabilities.resources.list_changed
        made = (await call(client, "create_session", system="Be short.", name="base", model="tiny"))["session"]
        assert isinstance(await heard.next(), ResourceListChangedNotification)
        uri = f"mlx://sessions/{made}"
        await client.subscribe_resource(uri)
        await call(client, "generate", session="base", prompt="Hello", keep=True)
        assert str((await heard.next()).params.uri) == uri
        await client.subscribe_resource("mlx://stats")
        await call(client, "generate", prompt="Hello", model="tiny")
        assert str((await heard.next()).params.uri) == "mlx://stats"
        await client.unsubscribe_resource("mlx://stats")
        await client.unsubscribe_resource(uri)
        await call(client, "close_session", sessions=[made])
        while not isinstance(last := await heard.next(), ResourceListChangedNotification):
            assert str(last.params.uri) == "mlx://stats"  # which was on its way


async def test_however_many_sessions_come_between_two_looks_they_are_one_change(engine):
    service = Service(engine, Registry(None))
    watching = changes.Changes(service)
    async with Client(build_server(service)) as client:
        for _ in range(5):
            await call(client, "create_session", system="Be short.", model="tiny")
        looks = [[type(event).__name__ for event in watching._look()] for _ in range(2)]
    assert [told.count("ResourcesListChanged") for told in looks] == [1, 0]


@pytest.mark.parametrize("uri", ["mlx://sessions/s_nobody", "mlx://nothing"])
async def test_nobody_can_subscribe_to_what_is_not_there_or_anothers(engine, uri, monkeypatch):
    async with connect(engine, "legacy") as client:
        with pytest.raises(MCPError) as error:
            await client.subscribe_resource(uri)
        assert error.value.error.code == -32002
        assert re.search("resources/list has those there are|Session not found", error.value.error.message)
        made = (await call(client, "create_session", system="Be short.", model="tiny"))["session"]
        monkeypatch.setattr(changes, "tenant", lambda: "other")
        with pytest.raises(MCPError, match="list_sessions"):
            await client.subscribe_resource(f"mlx://sessions/{made}")


async def test_a_client_of_the_newer_era_hears_of_changes_while_it_listens(engine, monkeypatch):
    monkeypatch.setattr(changes, "CHANGES_S", 0.01)
    async with connect(engine) as client:
        made = (await call(client, "create_session", system="Be short.", name="base", model="tiny"))["session"]
        uri = f"mlx://sessions/{made}"
        async with client.listen(resources_list_changed=True, resource_subscriptions=[uri]) as events:
            with anyio.fail_after(20):
                assert type(await anext(aiter(events))).__name__ == "ResourcesListChanged"
                await call(client, "generate", session="base", prompt="Hello", keep=True)
                assert (await anext(aiter(events))).uri == uri


async def test_whoever_was_told_other_lists_hears_that_they_have_changed(engine, mode):
    heard = Heard()
    async with connect(engine, mode, stale=("tools", "prompts"), message_handler=heard) as client:
        if mode == "legacy":
            assert isinstance(await heard.next(), ToolListChangedNotification)
        else:
            async with client.listen(tools_list_changed=True, prompts_list_changed=True) as events:
                with anyio.fail_after(20):
                    told = {type(await anext(aiter(events))).__name__ for _ in range(2)}
                    assert told == {"ToolsListChanged", "PromptsListChanged"}


async def test_names_of_models_and_sessions_are_completed(engine, mode):
    async with connect(engine, mode) as client:
        for name in ("report", "a-report", "notes"):
            await call(client, "create_session", system="Be short.", name=name, model="tiny")
        template = ResourceTemplateReference(uri="mlx://sessions/{id}")
        found = await client.complete(template, {"name": "id", "value": "REP"})
        assert found.completion.values == ["report", "a-report"]
        prompt = PromptReference(name="delegate")
        found = await client.complete(prompt, {"name": "model", "value": "emb"})
        assert found.completion.values == ["embedded"]
        found = await client.complete(prompt, {"name": "task", "value": "x"})
        assert found.completion.values == []


def test_of_many_names_as_many_are_completed_as_the_protocol_allows():
    found = completions.matching([f"m{number}" for number in range(250)], "m")
    assert (len(found.values), found.total, found.has_more) == (100, 250, True)


def test_the_instructions_are_short():
    assert len(INSTRUCTIONS) < 1500
