"""The engine's side of its socket, in this process, on an engine that can be held between its steps."""

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import threading

import pytest

from mlx_mcp.config import Config
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.engine.messages import Submit
from mlx_mcp.hosting import connection, connections
from mlx_mcp.hosting.connection import client_name
from mlx_mcp.hosting.connections import CHECK_S, Connections
from mlx_mcp.process.environment import window_hello
from mlx_mcp.process.place import Place
from mlx_mcp.service.health import readiness
from tests.effort import drawn
from tests.engine.test_client import until
from tests.fakes import fake_client
from tests.hosting.test_stdio import BAD_LINES, INITIALIZE, INITIALIZED, PING
from tests.process.windows import META


class Peer:
    """One connection to the engine, as a relay has it."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def send(self, *messages):
        for message in messages:
            self.writer.write(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")
        await self.writer.drain()

    async def line(self):
        async with asyncio.timeout(10):
            return json.loads(await self.reader.readline())

    async def answer(self, *ids):
        while (message := await self.line()).get("id") not in ids or "method" in message:
            pass
        return message

    async def handshake(self):
        await self.send(INITIALIZE)
        assert "result" in await self.answer(0)
        await self.send(INITIALIZED)
        return self


def call(id_, **arguments):
    params = {"name": "generate", "arguments": {"prompt": "hello"} | arguments}
    return {"jsonrpc": "2.0", "id": id_, "method": "tools/call", "params": params}


class Served:
    """A socket that is served, and the engine behind it."""

    def __init__(self, place, engine, connections):
        self.place, self.engine, self.connections = place, engine, connections
        self.peers = []
        self.ending = asyncio.Event()
        self.task = asyncio.create_task(connections.serve(self.ending.set))

    async def greet(self, **changes):
        """A connection that has said hello, and what it was told."""
        peer = Peer(*await asyncio.open_unix_connection(self.place.socket))
        self.peers.append(peer)
        await peer.send(window_hello("stdio", None) | {"again": False, "notices": True} | changes)
        return peer, await peer.line()

    async def join(self, **changes):
        peer, told = await self.greet(**changes)
        assert "pid" in told, told
        return await peer.handshake()

    async def status(self):
        return (await self.greet(kind="status"))[1]


@contextlib.asynccontextmanager
async def serving(limits=None, **settings):
    folder = tempfile.mkdtemp(prefix="mlx-")
    place, engine = Place(folder), fake_client(limits=limits)
    connections = Connections(engine, Config.load(**settings), place.listen())
    served = Served(place, engine, connections)
    try:
        yield served
        connections.stop()
        engine.loader.runner.gate.set()
        async with asyncio.timeout(10):
            await served.task
    finally:
        for peer in served.peers:
            peer.writer.close()
        engine.close()
        shutil.rmtree(folder)


class Gate:
    """Lets the engine make so many steps and no more."""

    def __init__(self):
        self._steps, self._open = threading.Semaphore(0), False

    def wait(self, timeout_s):
        return self._open or self._steps.acquire(timeout=timeout_s)

    def allow(self, count):
        self._steps.release(count)

    def set(self):
        self._open = True
        self.allow(1)


async def held(peer, engine, **arguments):
    """The runner, which is held in the first step of a call of the peer's."""
    runner = engine.loader.runner
    await peer.send(call(1))  # loads the model
    await peer.answer(1)
    runner.endless, runner.gate, runner.steps = True, Gate(), []
    await peer.send(call(2, **arguments))
    await until(lambda: len(runner.steps) == 1)
    return runner


async def test_a_connection_that_ends_frees_its_rows_within_a_step_and_no_others():
    async with serving() as served:
        goes, stays = await served.join(), await served.join()
        runner = await held(stays, served.engine, max_tokens=20)
        await goes.send(*(call(i, max_tokens=90) for i in range(3)))
        await until(lambda: len(served.engine.thread._inbox) == 3)
        runner.gate.allow(1)
        await until(lambda: len(runner.steps) == 2)
        assert len(runner.steps[1].rows) == 4
        goes.writer.transport.abort()  # as the system closes it for a process that was killed
        await until(lambda: len(served.engine.thread._inbox) == 3)
        runner.gate.allow(1)
        await until(lambda: len(runner.steps) == 3)
        assert len(runner.steps[2].rows) == 1
        runner.gate.set()
        assert (await stays.answer(2))["result"]["structuredContent"]["completion_tokens"] == 20


async def test_one_call_is_in_the_next_step_while_another_connection_has_thirty(monkeypatch):
    async with serving(Limits(max_running=4)) as served:
        groups, send = {}, served.engine.thread.send

        def note(command):
            if isinstance(command, Submit):
                groups[command.call_id] = command.group
            send(command)

        monkeypatch.setattr(served.engine.thread, "send", note)
        many, one = await served.join(), await served.join()
        runner = await held(many, served.engine, max_tokens=90)
        await many.send(*(call(i, max_tokens=90) for i in range(3, 32)))
        await until(lambda: len(served.engine.thread._inbox) == 29)
        runner.gate.allow(1)
        await until(lambda: len(runner.steps) == 2)
        assert [groups[i] for i in runner.steps[1].rows] == ["1"] * 4
        await one.send(call(1, max_tokens=5))
        await until(lambda: served.engine.thread._inbox)
        runner.gate.allow(1)
        await until(lambda: len(runner.steps) == 3)
        assert sorted(groups[i] for i in runner.steps[2].rows) == ["1", "1", "1", "2"]


async def test_status_says_what_each_connection_waits_for():
    async with serving(Limits(max_running=1)) as served:
        first, second = await served.join(folder="/first"), await served.join(folder="/second")
        runner = await held(first, served.engine, max_tokens=90)
        await second.send(call(1, max_tokens=90), call(2, max_tokens=90))
        await until(lambda: len(served.engine.thread._inbox) == 2)
        runner.gate.allow(1)
        async with asyncio.timeout(10):
            while True:
                a, b = (await served.status())["connections"]
                if (a["running"], b["waiting"], b["waits_for"][:12]) == (1, 2, "queued behin"):
                    break
        assert (a["folder"], b["folder"], a["host"]) == ("/first", "/second", "test 1")


async def test_whoever_looks_sees_calls_of_all_connections_and_that_the_process_is_about_to_end():
    async with serving(shutdown_timeout_s=0) as served:
        one, other = await served.join(), await served.join()
        await held(one, served.engine, session="", max_tokens=90)
        await other.send(call(2, prompt="canary", max_tokens=90))
        await until(lambda: len(served.connections._observer.active) == 2)
        _, state = await served.greet(kind="top")
        assert sorted(each["connection"] for each in state["calls"]) == ["1", "2"]
        assert state["ready"]
        assert state["pid"] == os.getpid()
        assert "canary" not in json.dumps(state)
        view = served.connections._service(served.engine, served.engine.registry)
        served.connections.stop()
        assert readiness(view).status == "draining"


async def test_a_call_whose_place_another_window_got_is_shown_as_waiting():
    async with serving(Limits(max_running=4)) as served:
        many, one = await served.join(), await served.join()
        runner = await held(many, served.engine, max_tokens=90)
        await many.send(*(call(i, max_tokens=90) for i in range(3, 6)))
        await until(lambda: len(served.engine.thread._inbox) == 3)
        runner.gate.allow(2)
        await until(lambda: len(runner.steps) == 3)
        await one.send(call(1, max_tokens=90))
        await until(lambda: served.engine.thread._inbox)
        runner.gate.allow(2)
        await until(lambda: len(runner.steps) == 5)
        async with asyncio.timeout(10):
            while True:
                state = await served.status()
                a, b = state["connections"]
                if (a["waiting"], b["running"], a["waits_for"][:12]) == (1, 1, "queued behin"):
                    break
        assert (a["running"], b["waiting"], b["waits_for"], state["rows"]) == (3, 0, "", 4)


def fetched(id_, result_id, **arguments):
    params = {"name": "get_result", "arguments": {"result_id": result_id} | arguments}
    return {"jsonrpc": "2.0", "id": id_, "method": "tools/call", "params": params}


def result(message):
    return message["result"]["structuredContent"]


async def test_a_call_with_a_handle_outlives_its_window_and_no_engine_ends_before_it_was_fetched():
    async with serving() as served:
        goes = await served.join()
        runner = await held(goes, served.engine, max_tokens=3, wait_s=0)
        result_id = result(await goes.answer(2))["result_id"]
        served.connections._config = Config.load(engine_idle_s=0.001)
        goes.writer.close()
        await until(lambda: not served.connections._connections)
        assert (await served.status())["long_calls"] == 1
        runner.gate.set()
        await until(lambda: served.connections._jobs.num_unfetched)
        await asyncio.sleep(3 * CHECK_S)  # it is idle, and looks whether it may end
        assert not served.ending.is_set()
        assert (await served.status())["results"] == 1
        comes = await served.join()
        await comes.send(fetched(1, result_id))
        assert result(await comes.answer(1))["completion_tokens"] == 3
        comes.writer.close()
        await served.ending.wait()


async def test_a_window_waits_as_long_as_it_is_set_to():
    async with serving() as served:
        patient, hasty = await served.join(), await served.join(wait_s="0")
        await held(hasty, served.engine, max_tokens=3, wait_s=60)
        await hasty.send(call(3))
        assert result(await hasty.answer(3))["status"] == "running"
        await patient.send(call(3))
        await until(lambda: served.connections._jobs.busy)
        await patient.send(PING | {"id": 4})
        assert (await patient.answer(3, 4))["id"] == 4


async def test_what_runs_on_is_cut_off_when_the_engine_is_stopped():
    async with serving(shutdown_timeout_s=0.1) as served:
        peer = await served.join()
        await held(peer, served.engine, max_tokens=90, wait_s=0)
        result_id = result(await peer.answer(2))["result_id"]
        await peer.send(fetched(3, result_id, wait_s=60))
        await until(lambda: served.connections._jobs.get("", result_id).reports)  # the call waits
        served.connections.stop()
        answer = await peer.answer(3)
        assert "gives calls no more time" in json.dumps(answer)


@pytest.mark.parametrize(("line", "id_", "words"), BAD_LINES, ids=[str(line[:30]) for line, _, _ in BAD_LINES])
async def test_a_bad_line_is_answered_and_the_connection_goes_on(line, id_, words):
    async with serving(max_request_bytes=100_000) as served:
        peer = await served.join()
        await peer.send(line)
        assert words in (await peer.answer(id_))["error"]["message"]
        await peer.send(b"\n", call(11))
        assert (await peer.answer(11))["result"]["structuredContent"]["text"] == "hello"


async def test_what_cannot_be_served_is_refused_with_the_next_step(tmp_path, monkeypatch):
    for folder in ("a/x", "b/x"):
        (tmp_path / folder).mkdir(parents=True)
    async with serving() as served:
        await served.join(model=str(tmp_path / "a" / "x"))
        _, told = await served.greet(model=str(tmp_path / "b" / "x"))
        assert "The running engine knows another folder as 'x'" in told["error"]
        assert "Rename one of the two, or serve with --standalone" in told["error"]
        peer, _ = await served.greet(kind="http")
        assert "one socket; connect with `mlx-mcp serve --http`" in (await peer.line())["error"]
        monkeypatch.setattr(connections, "peer", lambda connection: (1, os.geteuid() + 1))
        _, told = await served.greet()
        assert told == {"error": "This is another user's engine. Set MLX_MCP_STATE_DIR to a folder of your own."}
        monkeypatch.undo()


async def test_a_connection_that_is_not_read_holds_up_no_other():
    async with serving() as served:
        deaf, other = await served.join(), await served.join()
        deaf.writer.transport.set_write_buffer_limits(0)
        deaf.reader._transport.pause_reading()
        for i in range(500):
            deaf.writer.write(json.dumps(call(i, prompt="x" * 90)).encode() + b"\n")
        await other.send(call(1))
        assert (await other.answer(1))["result"]["structuredContent"]["text"] == "hello"
        deaf.writer.transport.abort()


async def test_whoever_connects_and_says_nothing_holds_up_nobody():
    async with serving() as served:
        silent = [await asyncio.open_unix_connection(served.place.socket) for _ in range(50)]
        peer = await served.join()
        await peer.send(call(1))
        await peer.answer(1)
        for _, writer in silent:
            writer.close()


def test_a_clients_name_is_found_in_both_eras():
    class Message:
        def __init__(self, params):
            self.params = params

    name = {"name": "host", "version": "2"}
    assert client_name(Message({"clientInfo": name})) == "host 2"
    assert client_name(Message({"_meta": {"io.modelcontextprotocol/clientInfo": name}})) == "host 2"
    for odd in (None, {}, {"_meta": None}, {"_meta": 5}, {"clientInfo": "x"}):
        assert client_name(Message(odd)) == ""
    assert client_name(object()) == ""


async def test_a_process_whose_engine_thread_has_died_ends_so_that_another_is_started():
    async with serving() as served:
        peer = await served.join()
        served.engine.close()
        async with asyncio.timeout(10):
            rest = await peer.reader.read()
        assert [json.loads(line)["method"] for line in rest.splitlines()] == ["mlx-mcp/ending"]
        assert served.place.connect() is None


async def test_what_was_said_last_reaches_a_peer_that_reads_late():
    async with serving() as served:
        peer = await served.join()
        await peer.send(*({"jsonrpc": "2.0", "id": i, "method": "tools/list"} for i in range(20)))
        answers = [await peer.answer(i) for i in range(10)]
        peer.writer.write_eof()
        async with asyncio.timeout(10):
            rest = await peer.reader.read()
        assert len(answers) == 10
        assert all(json.loads(line) for line in rest.splitlines())
        assert rest.endswith(b"\n") or not rest


async def rest(peer):
    """What is still said to a peer, to the end of the connection: answers by id, and how it ended."""
    async with asyncio.timeout(10):
        lines = [json.loads(line) for line in (await peer.reader.read()).splitlines()]
    ending = [line["params"] for line in lines if line.get("method") == "mlx-mcp/ending"]
    return {line["id"]: line for line in lines if "id" in line}, ending


async def all_held(served, peer, count, **arguments):
    """The runner, which is held while so many calls of the peer's are under way."""
    runner = await held(peer, served.engine, **arguments)
    await peer.send(*(call(i, **arguments) for i in range(3, 2 + count)))
    await until(lambda: len(served.engine.thread._inbox) == count - 1)
    return runner


@pytest.mark.parametrize("repetition", range(drawn(12, least=3)))
async def test_a_process_that_is_stopped_answers_every_call_on_the_wire_before_it_ends(repetition):
    async with serving() as served:
        peer = await served.join()
        runner = await all_held(served, peer, 8, max_tokens=3)
        served.connections.stop()
        runner.gate.set()
        answers, ending = await rest(peer)
        assert {i: answers[i]["result"]["structuredContent"]["completion_tokens"] for i in answers} == dict.fromkeys(
            range(2, 10), 3
        )
        assert ending[0]["returned"] == []


async def test_a_process_that_is_stopped_waits_until_answers_that_are_read_late_are_on_the_wire():
    async with serving() as served:
        peer = await served.join()
        (joined,) = served.connections._connections.values()
        peer.reader._transport.pause_reading()
        ids = range(3, 83)  # their answers are longer than all buffers together
        await peer.send(*({"jsonrpc": "2.0", "id": id_, "method": "tools/list"} for id_ in ids))
        await until(lambda: joined.requests.num_read == 2 + len(ids))
        served.connections.stop()
        await served.ending.wait()
        peer.reader._transport.resume_reading()
        answers, ending = await rest(peer)
        assert sorted(answers) == list(ids)
        assert ending[0]["returned"] == []


async def test_what_is_read_after_the_stop_is_left_to_the_next_engine_but_a_cancel_is_heard():
    async with serving() as served:
        peer = await served.join()
        runner = await held(peer, served.engine, max_tokens=90)
        served.connections.stop()
        await served.ending.wait()
        await peer.send(call(3), {"jsonrpc": "2.0", "id": "four", "method": "tools/list"})
        await peer.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 2}})
        await until(lambda: served.engine.thread._inbox)  # the cancel
        runner.gate.set()
        answers, ending = await rest(peer)
        assert answers == {}
        assert ending == [{"num_read": 7, "returned": [3, "four"]}]


async def test_a_peer_that_knows_no_notices_gets_none_and_is_served_to_the_end():
    async with serving() as served:
        peer = await served.join(notices=False)
        runner = await held(peer, served.engine, max_tokens=3)
        served.connections.stop()
        await served.ending.wait()
        await peer.send({"jsonrpc": "2.0", "id": 3, "method": "tools/list"})
        assert "result" in await peer.answer(3)
        runner.gate.set()
        answers, ending = await rest(peer)
        assert "result" in answers[2]
        assert ending == []


async def test_a_call_that_outlasts_the_shutdown_is_answered_with_an_error_that_says_so():
    async with serving(shutdown_timeout_s=0.2) as served:
        peer = await served.join()
        await held(peer, served.engine, max_tokens=90)
        served.connections.stop()
        answers, _ = await rest(peer)
        assert answers[2]["result"]["isError"]
        assert "shutdown_timeout_s" in answers[2]["result"]["content"][0]["text"]


async def test_a_subscription_keeps_no_process_from_ending():
    async with serving() as served:
        peer, _ = await served.greet()
        listen = {"jsonrpc": "2.0", "id": 1, "method": "subscriptions/listen", "params": {"_meta": META}}
        listen["params"]["notifications"] = {"toolsListChanged": True}
        await peer.send(listen)
        async with asyncio.timeout(10):
            assert "method" in await peer.line()  # it is acknowledged
        assert served.connections._may_end()
        served.connections.stop()
        async with asyncio.timeout(2):
            await served.task


async def test_a_peer_hears_that_the_process_lives_while_a_step_takes_long(monkeypatch):
    monkeypatch.setattr(connection, "ALIVE_S", 0.01)
    async with serving() as served:
        peer = await served.join()
        runner = await held(peer, served.engine)
        for _ in range(3):
            assert (await peer.line())["method"] == "mlx-mcp/alive"
        assert served.engine.thread.step_s > 0
        runner.gate.set()


@pytest.mark.parametrize("bad", ["null", "1.5", "true", "false", "[1]", "{}", "1e3", "2.0"])
async def test_a_request_whose_id_is_no_string_and_no_integer_is_answered_with_an_error(bad):
    async with serving() as served:
        peer = await served.join()
        await peer.send(b'{"jsonrpc":"2.0","id":%s,"method":"tools/list"}\n' % bad.encode(), PING)
        answer = await peer.answer(None, PING["id"])
        assert (answer["id"], answer["error"]["code"]) == (None, -32600)
        assert "This one is neither, so its answer has no id" in answer["error"]["message"]
        assert "result" in await peer.answer(PING["id"])
        await peer.send({"jsonrpc": "2.0", "id": None, "method": "notifications/initialized"}, PING)
        assert "result" in await peer.answer(None, PING["id"])
