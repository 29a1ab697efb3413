"""What a relay answers by itself is what the server answers, and is answered at once."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time

import pytest
from mcp import Client, StdioServerParameters

from mlx_mcp.process import relay as relay_module
from mlx_mcp.process.front import CAPABILITIES, CLIENT_INFO, FOLDER, OPENING_ID, VERSION, Front
from mlx_mcp.process.lines import envelope
from tests.api.mcp.surface import CLIENT, LISTS, conversation, made, request
from tests.effort import drawn, rare_ones_slow
from tests.process.test_relay import end_during_a_call, hang_up, message, relaying
from tests.process.windows import ERAS, INITIALIZE, META, Window, command, ended, state_folder, wait_until

VERSIONS = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"]
SHAKE = request(0, "initialize", protocolVersion="2025-11-25", capabilities={}, clientInfo=CLIENT)
ENVELOPE = {VERSION: "2026-07-28", CLIENT_INFO: CLIENT, CAPABILITIES: {}}


def initialize(id_=0, **changed):
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": CLIENT} | changed
    return request(id_, "initialize", **params)


def discover(id_=0, method="server/discover", **changed):
    return request(id_, method, _meta=ENVELOPE | changed)


def answers(front, *lines):
    return [front.answer(line, envelope(line)) for line in lines]


def test_the_files_say_what_the_server_says():
    for era, surface in made().items():
        with open(os.path.join(FOLDER, f"{era}.json"), encoding="utf-8") as file:
            assert json.load(file) == surface, "make surface"


USUAL = {
    **{f"initialize {version}": [initialize(protocolVersion=version)] for version in [*VERSIONS, "1999-01-01", ""]},
    "a new version in the old way": [initialize(protocolVersion="2026-07-28")],
    "capabilities": [
        initialize(
            capabilities={
                "roots": {"listChanged": True},
                "sampling": {},
                "elicitation": {"form": {}, "url": {}},
                "experimental": {"x": {"y": 1}},
                "tasks": {"requests": {"elicitation": {"create": {}}}},
                "unheard-of": 7,
            },
            clientInfo=CLIENT | {"title": "T", "icons": [{"src": "data:,", "sizes": ["any"]}]},
            _meta={"progressToken": 3, "theirs/x": None},
        )
    ],
    "extensions": [initialize(capabilities={"extensions": {"io.modelcontextprotocol/tasks": {}, "a/b": {"c": [1]}}})],
    "extensions in the new era": [
        discover(
            id_, method, **{CAPABILITIES: {"elicitation": {}, "extensions": {"io.modelcontextprotocol/tasks": {}}}}
        )
        for id_, method in enumerate(["server/discover", "tools/list"])
    ],
    "lists after a handshake": [SHAKE, *(request(id_, method) for id_, method in enumerate([*LISTS, "ping"], 1))],
    "a cursor": [SHAKE, request("a", "tools/list", cursor="x"), request("b", "resources/list", cursor="")],
    "no parameters": [
        SHAKE,
        b'{"jsonrpc":"2.0","id":5,"method":"tools/list"}',
        b'{"id":6,"method":"ping","params":null,"jsonrpc":"2.0"}',
    ],
    "server/discover": [discover()],
    "lists in the new era": [discover(id_, method) for id_, method in enumerate(["server/discover", *LISTS])],
    "nobody's": [request(0, "tools/list", _meta={VERSION: "2026-07-28", CAPABILITIES: {}, "progressToken": "t"})],
}
UNUSUAL = {
    "another version of the new era": [discover(**{VERSION: "2027-01-01"}), discover(1)],
    "no capabilities": [request(0, "server/discover", _meta={VERSION: "2026-07-28"})],
    "discover in the old way": [request(0, "server/discover"), initialize(1)],
    "before the handshake": [request(0, "tools/list"), request(1, "ping"), initialize(2)],
    "ping in the new era": [discover(0), discover(1, "ping")],
    "a handshake in the new era": [discover(0), initialize(1), discover(2, "tools/list")],
    "the new era after a handshake": [SHAKE, discover(1), request(2, "tools/list")],
    "a second handshake": [SHAKE, initialize(1, protocolVersion="2024-11-05"), request(2, "tools/list")],
    "no version": [request(0, "initialize", capabilities={}, clientInfo=CLIENT), request(1, "tools/list")],
    "no name": [initialize(clientInfo={"version": "1"}), request(1, "tools/list")],
    "a version that is a number": [initialize(protocolVersion=20251125)],
    "capabilities of another form": [initialize(capabilities={"roots": {"listChanged": "perhaps"}}), initialize(1)],
    "experiments of another form": [initialize(capabilities={"experimental": {"x": 1}})],
    "icons of another form": [initialize(clientInfo=CLIENT | {"icons": [{}]})],
    "a cursor of another form": [SHAKE, request(1, "tools/list", cursor=1)],
    "a token of another form": [SHAKE, request(1, "tools/list", _meta={"progressToken": [1]})],
    "parameters that are none": [SHAKE, request(1, "tools/list", unheard=1), request(2, "ping", cursor="x")],
    "meta of another form": [SHAKE, request(1, "tools/list", _meta=[])],
    "reserved meta": [SHAKE, request(1, "tools/list", _meta={CLIENT_INFO: 1})],
    "a level of logs": [discover(**{"io.modelcontextprotocol/logLevel": "loud"})],
    "not a number": [SHAKE, b'{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{"x":NaN}}}'],
    "half a character": [SHAKE, b'{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{"x":"\\ud800"}}}'],
    "another JSON-RPC": [b'{"jsonrpc":"1.0","id":1,"method":"ping"}', SHAKE],
    "another method": [SHAKE, request(1, "tools/calls"), request(2, "tools/call", name="list_models")],
}


@pytest.mark.parametrize("lines", USUAL.values(), ids=USUAL.keys())
def test_what_hosts_usually_ask_is_answered_as_the_server_does(lines):
    there = {said["id"]: said for said in asyncio.run(conversation(*lines)) if "id" in said}
    for line, here in zip(lines, answers(Front(), *lines), strict=True):
        assert here == there[json.loads(line)["id"]]


@pytest.mark.parametrize("lines", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_whatever_else_is_answered_is_answered_as_the_server_does(lines):
    there = {said["id"]: said for said in asyncio.run(conversation(*lines)) if "id" in said}
    here = [answer for answer in answers(Front(), *lines) if answer is not None]
    assert len(here) < len(lines)
    for answer in here:
        assert answer == there[answer["id"]]


@pytest.mark.parametrize(
    "wanted",
    [
        {"toolsListChanged": True, "promptsListChanged": False, "resourceSubscriptions": ["mlx://stats"]},
        {"resourcesListChanged": True, "resourceSubscriptions": []},
        {},
    ],
)
def test_who_listens_is_told_so_as_the_server_does(wanted):
    front, line = Front(), request("a", "subscriptions/listen", _meta=ENVELOPE, notifications=wanted)
    assert answers(front, line) == [None]
    (there,) = asyncio.run(conversation(line))
    assert front.acknowledge(line, envelope(line)) == there


@pytest.mark.parametrize(
    "params",
    [
        {"_meta": ENVELOPE},
        {"_meta": ENVELOPE, "notifications": {"toolsListChanged": 1}},
        {"_meta": ENVELOPE, "notifications": {"toolsListChanged": True, "unheard": True}},
        {"_meta": ENVELOPE, "notifications": {"resourceSubscriptions": "mlx://stats"}},
        {"_meta": ENVELOPE | {VERSION: "2027-01-01"}, "notifications": {}},
        {"notifications": {}},
    ],
)
def test_who_asks_to_listen_in_another_form_hears_of_it_from_the_engine(params):
    front, line = Front(), request("a", "subscriptions/listen", **params)
    assert answers(front, discover(), line)[1] is None
    assert front.acknowledge(line, envelope(line)) is None


ODD = [None, True, 0, 1.5, "", "x", [], ["x"], [{}], {}, {"x": 1}, {"listChanged": "yes"}, {"form": []}, "\x00é☃"]


def changed(rng, value, depth=0):
    """A value with something else in one place."""
    if not isinstance(value, dict) or not value or (depth > 2 and rng.random() < 0.4):
        return rng.choice(ODD)
    name = rng.choice([*value, rng.choice(["extra", "_meta", "cursor", "roots", "experimental", "icons", CLIENT_INFO])])
    made = {key: item for key, item in value.items() if key != name}
    return made if rng.random() < 0.2 else made | {name: changed(rng, value.get(name, 0), depth + 1)}


def test_whatever_a_client_sends_is_answered_as_the_server_does_or_left_to_it():
    rng, num_answered = random.Random(9), 0
    for _ in range(drawn(300, least=60)):
        lines = []
        for number, line in enumerate(rng.choice(list(USUAL.values()))[:3]):
            said = json.loads(line)
            params = changed(rng, said.get("params") or {}) if rng.random() < 0.5 else said.get("params")
            lines.append(json.dumps(said | {"id": number, "params": params}).encode())
        there = {said["id"]: said for said in asyncio.run(conversation(*lines)) if "id" in said}
        here = [answer for answer in answers(Front(), *lines) if answer is not None]
        for answer in here:
            assert answer == there[answer["id"]], lines
        num_answered += len(here)
    assert num_answered > 30


def test_without_its_files_the_front_leaves_everything_to_the_engine(tmp_path):
    assert answers(Front(str(tmp_path)), SHAKE, request(1, "tools/list")) == [None, None]
    assert answers(Front(str(tmp_path)), discover()) == [None]


def test_the_handshake_and_the_lists_need_no_engine_and_the_engine_hears_of_the_handshake_first():
    initialized = b'{"jsonrpc":"2.0","method":"notifications/initialized"}\n'
    shake = message(0, "initialize", **INITIALIZE)
    with relaying() as (engine, to_relay, lines):  # it connects, and is not greeted before the end
        to_relay.write(shake)
        assert json.loads(lines.next())["result"]["serverInfo"]["name"] == "mlx-mcp"
        calls = [message(1, "tools/call"), message(5, "tools/call")]
        to_relay.write(initialized + b"".join(calls) + message(2, "tools/list") + message(3, "ping"))
        assert [json.loads(lines.next())["id"] for _ in range(2)] == [2, 3]
        connection, wire, hello = engine.accept()
        assert hello["again"] is False
        assert wire.readline() == shake
        wire.write(b'{"jsonrpc":"2.0","id":0,"result":{}}\n')
        assert [wire.readline() for _ in range(3)] == [initialized, *calls]
        wire.write(b'{"jsonrpc":"2.0","id":5,"result":{}}\n{"jsonrpc":"2.0","id":1,"result":{}}\n')
        assert [json.loads(lines.next())["id"] for _ in calls] == [5, 1]
        to_relay.write(message(4, "tools/list"))  # from now on the engine answers
        assert wire.readline() == message(4, "tools/list")
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == 4


def test_a_request_that_is_cancelled_before_there_is_an_engine_reaches_none():
    cancel = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}\n'
    with relaying() as (engine, to_relay, lines):
        to_relay.write(
            message(1, "tools/call") + message(2, "tools/call") + cancel + message(0, "initialize", **INITIALIZE)
        )
        assert json.loads(lines.next())["id"] == 0
        connection, wire, _ = engine.accept()
        assert wire.readline() == message(0, "initialize", **INITIALIZE)
        wire.write(b'{"jsonrpc":"2.0","id":0,"result":{}}\n')
        assert wire.readline() == message(2, "tools/call")
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == 2


def test_more_lines_than_may_wait_are_read_when_there_is_an_engine(monkeypatch):
    monkeypatch.setattr(relay_module, "MAX_WAITING_BYTES", 250)
    with relaying() as (engine, to_relay, lines):
        asked = [message(id_, "tools/call", text="x" * 50) for id_ in range(4)]
        to_relay.write(b"".join(asked) + message(9, "initialize", **INITIALIZE))
        connection, wire, _ = engine.accept()
        assert [wire.readline() for _ in range(4)] == asked
        assert wire.readline() == message(9, "initialize", **INITIALIZE)  # which the relay had not read before
        hang_up(connection, wire)
        assert {json.loads(lines.next())["id"] for _ in range(5)} == {0, 1, 2, 3, 9}


def test_a_host_that_listens_is_told_so_at_once_and_only_once():
    listen = message("l", "subscriptions/listen", _meta=META, notifications={"toolsListChanged": True})
    meta = {"io.modelcontextprotocol/subscriptionId": "l"}
    with relaying() as (engine, to_relay, lines):
        to_relay.write(message(1, "server/discover", _meta=META) + listen + message(2, "tools/list", _meta=META))
        told = [json.loads(lines.next()) for _ in range(3)]
        assert [each.get("id") for each in told] == [1, None, 2]
        assert told[1]["params"] == {"_meta": meta, "notifications": {"toolsListChanged": True}}
        connection, wire, _ = engine.accept()
        assert json.loads(wire.readline())["id"] == OPENING_ID
        assert wire.readline() == listen
        for method in (told[1]["method"], "notifications/tools/list_changed"):
            wire.write(json.dumps({"jsonrpc": "2.0", "method": method, "params": {"_meta": meta}}).encode() + b"\n")
        assert json.loads(lines.next())["method"] == "notifications/tools/list_changed"
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == "l"


def test_an_engine_hears_which_era_the_host_speaks():
    with relaying() as (engine, to_relay, lines):
        to_relay.write(message(1, "server/discover", _meta=META))
        assert json.loads(lines.next())["result"]["supportedVersions"] == ["2026-07-28"]
        connection, wire, _ = engine.accept()
        opening = wire.readline()
        assert (json.loads(opening)["id"], json.loads(opening)["params"]["_meta"]) == (OPENING_ID, META)
        wire.write(json.dumps({"jsonrpc": "2.0", "id": OPENING_ID, "result": {}}).encode() + b"\n")
        end_during_a_call(connection, wire, to_relay, lines)
        to_relay.write(message(2, "tools/call"))
        connection, wire, _ = engine.accept()
        assert [wire.readline(), wire.readline()] == [opening, message(2, "tools/call")]
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == 2


def test_a_client_that_probes_and_then_shakes_hands_is_refused_as_the_server_does():
    async def probe(*lines):
        return [said["error"]["code"] for said in await conversation(*lines) if "error" in said]

    lines = [discover(0), initialize(1)]
    (there,) = asyncio.run(probe(*lines))
    with state_folder() as (_, env), Window(env, handshake=False) as window:
        for line in lines:
            window.send(line)
        assert "result" in window.answer(0)
        assert window.answer(1)["error"]["code"] == there


@pytest.mark.parametrize("era", rare_ones_slow(ERAS, ERAS, ["legacy"]))
def test_an_engine_that_cannot_start_is_told_of_by_the_first_call_and_not_by_the_handshake(era):
    with state_folder() as (place, env):
        place.prepare()
        with open(place.socket, "w"):
            pass  # in the engine's place
        with Window(env, era=era) as window:
            listed = window.answer(window.request("tools/list"))
            assert listed["result"]["tools"][0]["name"] == "generate"
            failed = window.answer(window.call("list_models"))["result"]
            assert failed["isError"]
            assert "MLX_MCP_STATE_DIR" in failed["content"][0]["text"]
            assert b"MLX_MCP_STATE_DIR" in window.process.stderr.readline()
            os.unlink(place.socket)
            assert window.serves()  # each call tries again
            assert window.close() == 0


@pytest.mark.long
@pytest.mark.parametrize("era", rare_ones_slow(ERAS, ERAS, ["legacy"]))
def test_where_no_engine_can_be_shared_the_window_serves_alone_and_the_host_notices_nothing(era):
    with state_folder() as (place, env):
        os.makedirs(place.log)  # it cannot be written
        with Window(env, era=era) as window:
            assert "result" in window.answer(window.request("tools/list"))
            assert window.generate()["text"] == "771"
            assert b"No engine can be shared here, since the log" in window.process.stderr.readline()
            assert window.close() == 0
        os.rmdir(place.log)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_the_sdks_client_gets_everything_it_asks_for(mode):
    with state_folder() as (_, env):
        parameters = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve"], env=env)
        async with Client(parameters, mode=mode) as client:
            tools = await client.list_tools()
            result = await client.call_tool("list_models", {})
        assert (tools.tools[0].name, result.is_error) == ("generate", False)


OTHER = "import mlx_mcp.process.relay as relay; relay.surface_digest = lambda: 'other'; relay.serve()"


@pytest.mark.parametrize("era", ERAS)
def test_a_host_hears_that_lists_have_changed_where_the_engine_says_something_else_than_the_relay(era):
    with state_folder() as (_, env), Window(env, era=era, program=[sys.executable, "-c", OTHER]) as window:
        wanted = {f"notifications/{name}/list_changed" for name in ("tools", "prompts")}
        if era == "modern":
            window.request("subscriptions/listen", notifications={"toolsListChanged": True, "promptsListChanged": True})
        assert window.serves()
        deadline = time.monotonic() + 60
        while not wanted <= {said["method"] for said in window.others}:
            window.others.append(window.lines.get(timeout=deadline - time.monotonic()))


@pytest.mark.long
def test_a_host_hears_that_its_sessions_are_gone_with_their_engine():
    with state_folder() as (place, env), Window(env) as window:
        window.ask("create_session", system="Be short.", name="base")
        wait_until(lambda: ended(place))
        window.others.clear()
        assert window.serves()  # by another engine
        deadline = time.monotonic() + 60
        while "notifications/resources/list_changed" not in {said["method"] for said in window.others}:
            window.others.append(window.lines.get(timeout=deadline - time.monotonic()))


BARE = "from mcp.server.mcpserver import MCPServer; MCPServer('bare').run()"


def answers_s(program, env, *lines):
    """The time from the start of a server to its last answer to these requests."""
    began = time.perf_counter()
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    try:
        process.stdin.write(b"".join(line + b"\n" for line in lines))
        process.stdin.flush()
        assert all(b'"result"' in process.stdout.readline() for _ in lines)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.communicate()


FIRST = {
    "initialize": [SHAKE],
    "discover": [discover()],
    "the tools after initialize": [SHAKE, request(1, "tools/list")],
    "the tools after discover": [discover(), discover(1, "tools/list")],
}


@pytest.mark.figures
@pytest.mark.parametrize("asked", rare_ones_slow(FIRST, FIRST, ["the tools after initialize"]))
def test_with_no_engine_the_first_answer_takes_at_most_half_of_a_bare_servers_start(asked):
    lines = FIRST[asked]
    with state_folder() as (place, env):
        ratios = []
        for _ in range(drawn(10, least=5)):
            bare = answers_s([sys.executable, "-c", BARE], env, lines[0])
            ratios.append(answers_s(command("serve"), env, *lines) / bare)
            wait_until(lambda: ended(place))  # the next one has none either
            if ratios[-1] <= 0.5:
                break
        assert min(ratios) <= 0.5
