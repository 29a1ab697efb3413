"""The engine's side of its socket, in this process, on an engine that can be held between its steps."""

import asyncio
import contextlib
import json
import shutil
import tempfile
import threading

import pytest

from mlx_mcp.config import Config
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.process.daemon import window
from mlx_mcp.process.place import Place
from mlx_mcp.server.connections import Connections, client_name
from tests.engine.test_client import until
from tests.fakes import fake_client
from tests.server.test_stdio import BAD_LINES, INITIALIZE, INITIALIZED


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
        self.place, self.engine, self.connections, self.peers = place, engine, connections, []

    async def greet(self, **changes):
        """A connection that has said hello, and what it was told."""
        peer = Peer(*await asyncio.open_unix_connection(self.place.socket))
        self.peers.append(peer)
        await peer.send(window("stdio", None) | {"again": False} | changes)
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
    task = asyncio.create_task(connections.serve(lambda: None))
    served = Served(place, engine, connections)
    try:
        yield served
        connections.stop()
        engine.loader.runner.gate.set()
        async with asyncio.timeout(10):
            await task
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
        assert len(runner.steps[1].sequences) == 4
        goes.writer.transport.abort()  # as the system closes it for a process that was killed
        await until(lambda: len(served.engine.thread._inbox) == 3)
        runner.gate.allow(1)
        await until(lambda: len(runner.steps) == 3)
        assert len(runner.steps[2].sequences) == 1
        runner.gate.set()
        assert (await stays.answer(2))["result"]["structuredContent"]["completion_tokens"] == 20


async def test_one_call_is_in_the_next_step_while_another_connection_has_thirty():
    async with serving(Limits(max_running=4)) as served:
        many, one = await served.join(), await served.join()
        runner = await held(many, served.engine, max_tokens=90)
        await many.send(*(call(i, max_tokens=90) for i in range(3, 32)))
        await until(lambda: len(served.engine.thread._inbox) == 29)
        runner.gate.allow(1)
        await until(lambda: len(runner.steps) == 2)
        assert [s.group for s in runner.steps[1].sequences] == ["1"] * 4
        await one.send(call(1, max_tokens=5))
        await until(lambda: served.engine.thread._inbox)
        runner.gate.allow(1)
        await until(lambda: len(runner.steps) == 3)
        assert sorted(s.group for s in runner.steps[2].sequences) == ["1", "1", "1", "2"]


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


@pytest.mark.parametrize(("line", "id_", "words"), BAD_LINES, ids=[str(line[:30]) for line, _, _ in BAD_LINES])
async def test_a_bad_line_is_answered_and_the_connection_goes_on(line, id_, words):
    async with serving(max_request_bytes=100_000) as served:
        peer = await served.join()
        await peer.send(line)
        assert words in (await peer.answer(id_))["error"]["message"]
        await peer.send(b"\n", call(11))
        assert (await peer.answer(11))["result"]["structuredContent"]["text"] == "hello"


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
            assert await peer.reader.read() == b""
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
