"""The engine's side of `mlx-mcp sessions`, in this process, over a real store."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from functools import partial

import pytest

from mlx_mcp import __version__
from mlx_mcp.config import Config
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.io_thread import IoThread
from mlx_mcp.engine.persistence import Persisting
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.hosting.connections import Connections
from mlx_mcp.process.place import Place
from mlx_mcp.storage.store import Store
from tests.cli.test_sessions import keep
from tests.engine.test_client import until
from tests.fakes import FakeLoader, FakeRegistry


@contextlib.asynccontextmanager
async def serving(store_dir):
    """An engine over fakes that has the folder open, and the socket to it."""
    folder, loader = tempfile.mkdtemp(prefix="mlx-"), FakeLoader()
    open_store = partial(Store.open, store_dir, quota_bytes=1 << 30, daily_bytes=1 << 30)

    def make_engine():
        return Engine(loader, Limits(), 1000, 1 << 30, persisting=Persisting(open_store, IoThread(thread.send)))

    thread = EngineThread(make_engine)
    client = EngineClient(thread, FakeRegistry(), loader)
    place = Place(folder)
    connections = Connections(client, Config.load(store_dir=store_dir, max_ssd_bytes=1 << 30), place.listen())
    task = asyncio.create_task(connections.serve(lambda: None))
    try:
        yield connections, partial(ask, place, store_dir)
    finally:
        connections.stop()
        async with asyncio.timeout(20):
            await task
        client.close()
        shutil.rmtree(folder)


class Asked:
    """A question that was asked, and the lines that answer it."""

    def __init__(self, connection, reader, writer):
        self.connection, self.reader, self.writer = connection, reader, writer

    async def line(self):
        async with asyncio.timeout(20):
            return json.loads(await self.reader.readline() or b"null")

    async def answer(self):
        while not (line := await self.line()) or not line.keys() & {"result", "error", "elsewhere"}:
            assert line is not None, "it ended without an answer"
        self.writer.close()
        return line


async def ask(place, store_dir, do, fd=None, **question):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place.socket)
    hello = {"kind": "sessions", "version": __version__, "folder": str(store_dir), "do": do} | question
    line = json.dumps(hello).encode() + b"\n"
    socket.send_fds(connection, [line], [] if fd is None else [fd])
    return Asked(connection, *await asyncio.open_unix_connection(sock=connection))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MCP_MAX_SSD_BYTES", str(1 << 30))
    keep(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def slow_export(monkeypatch):
    """An export that goes on by a byte whenever the event is set."""
    go_on, ended = threading.Event(), threading.Event()

    def export(self, session_id, version, transfer):
        transfer.total_bytes = 1000
        try:
            for _ in range(1000):
                assert go_on.wait(20)
                go_on.clear()
                transfer.advance(1)
        finally:
            ended.set()

    monkeypatch.setattr(Store, "export", export)
    yield go_on, ended
    go_on.set()


async def test_a_question_is_answered_by_whoever_has_the_folder_open(folder, tmp_path):
    async with serving(folder) as (_, ask):
        (head,) = (await (await ask("list")).answer())["result"]
        assert (head["session"], head["name"], head["tokens"]) == ("s_facts", "facts", 3)
        shown = (await (await ask("show", session="facts")).answer())["result"]
        assert shown["text"] == "<|user|>Alice's badge is 771."
        assert await (await ask("list", folder=str(tmp_path))).answer() == {"elsewhere": True}
        assert "not found" in (await (await ask("rm", session="nobody")).answer())["error"]
        assert await (await ask("rm", session="facts")).answer() == {"result": 1}
        assert await (await ask("purge")).answer() == {"result": None}


async def test_a_question_that_is_none_is_refused_with_the_next_step(folder, tmp_path):
    async with serving(folder) as (_, asking):
        told = (await (await asking("sing")).answer())["error"]
    assert told == "The engine cannot 'sing' sessions so; `mlx-mcp engine stop` ends it."


async def test_a_file_is_written_where_the_descriptor_says_and_nowhere_else(folder, tmp_path):
    (tmp_path / "out").mkdir()
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    async with serving(folder) as (_, ask):
        for name in ("../evil", "/evil", "a/b"):
            assert "cannot" in (await (await ask("export", fd, session="facts", file_name=name)).answer())["error"]
        assert list((tmp_path / "out").iterdir()) == []
        size = (await (await ask("export", fd, session="facts", file_name="x")).answer())["result"]
        assert (tmp_path / "out" / "x").stat().st_size == size
        assert "error" in await (await ask("export", session="facts", file_name="y")).answer()
    os.close(fd)


async def test_who_waits_for_an_export_hears_how_far_it_is(folder, tmp_path, slow_export):
    go_on, _ = slow_export
    fd = os.open(tmp_path, os.O_RDONLY)
    async with serving(folder) as (connections, ask):
        asked = await ask("export", fd, session="facts", file_name="x")
        assert "pid" in await asked.line()
        await until(lambda: connections._session_files.busy)
        assert not connections._may_end(), "an engine that exports is not idle"
        assert (await asked.line())["done"] == 0
        go_on.set()
        while (line := await asked.line())["done"] < 1:
            pass
        assert line["total"] == 1000
        asked.writer.close()
        go_on.set()
    os.close(fd)


async def test_an_export_ends_when_whoever_wanted_it_goes_away(folder, tmp_path, slow_export):
    go_on, ended = slow_export
    fd = os.open(tmp_path, os.O_RDONLY)
    async with serving(folder) as (connections, ask):
        asked = await ask("export", fd, session="facts", file_name="x")
        await asked.line()
        await until(lambda: connections._session_files.busy)
        asked.writer.close()
        await until(lambda: not connections._session_files.busy)
        go_on.set()
        assert await asyncio.to_thread(ended.wait, 20)
        assert (await (await ask("list")).answer())["result"]
    os.close(fd)
