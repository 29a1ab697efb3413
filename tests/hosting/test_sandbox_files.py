"""What the engine does for `mlx-mcp sandbox`: the sandboxes of all owners, in memory and on disk."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError, InvalidRequest, NotOnDisk, StorageError
from mlx_mcp.hosting.sandbox_files import answer_sandbox, done
from mlx_mcp.hosting.sandboxes import sandboxes_of
from mlx_mcp.service.caller import Caller
from mlx_mcp.workflows.sandbox.runtime import HostCall
from tests.fakes import FakeStore
from tests.service.house import CALLER
from tests.workflows.fakes import FakeRuntime
from tests.workflows.sandbox.processes import Process, process

Run = Generator[HostCall, Any, Any]


def fills(v: dict[str, Any], say: Any) -> Run:
    v["n"] = v.get("n", 0) + 1
    yield HostCall("remember", ("text",))


def reads(v: dict[str, Any], say: Any) -> Run:
    return v["n"]
    yield


def breaks(v: dict[str, Any], say: Any) -> Run:
    raise ValueError("a loop in the value")
    yield


PROGRAMS = {"fills": fills, "n": reads, "big": breaks}


async def ask(server: Process, **hello: Any) -> Any:
    return await done(hello, server.service, server.sandboxes)


async def test_the_user_sees_every_owners_sandboxes_and_their_variables(tmp_path: Path) -> None:
    async with process(FakeRuntime(PROGRAMS), tmp_path / "kept", FakeStore()) as server:
        mine = await server.sandboxes.create(server.service, CALLER, "mine")
        await server.run(mine, "fills", big=1)
        await server.sandboxes.keeping.persist(server.service, CALLER, mine, "v1")
        await server.run(mine, "fills")
        empty = await server.sandboxes.create(server.service, Caller("them"), "theirs")
        listed = await ask(server, do="list")
        found = [(each["name"], each["version"], each["persisted"], bool(each["saved_at"])) for each in listed]
        assert found == [("mine", "", True, True), ("mine", "v1", True, True), ("theirs", "", False, False)]
        assert await ask(server, do="get", sandbox="mine", variable="n") == {"value": 2}
        assert await ask(server, do="get", sandbox=mine.sandbox_id, variable="n", at="v1") == {"value": 1}
        with pytest.raises(InvalidRequest, match="Have a program in the sandbox put"):
            await ask(server, do="get", sandbox="mine", variable="big")
        with pytest.raises(InvalidRequest, match="This sandbox has no variables yet"):
            await ask(server, do="get", sandbox="theirs", variable="n")
        for question in ({"do": "get", "sandbox": "none", "variable": "n"}, {"do": "rm", "sandbox": "none"}):
            with pytest.raises(NotOnDisk, match="`mlx-mcp sandbox list`"):
                await ask(server, **question)
        for strange in ({"do": "sing"}, {"do": "get", "sandbox": "mine"}, {"do": "rm", "sandbox": 1}):
            with pytest.raises(ConfigError, match="sandboxes so; `mlx-mcp engine stop`"):
                await ask(server, **strange)
        assert await ask(server, do="rm", sandbox="mine", at="v1") == 1
        with pytest.raises(NotOnDisk, match="has no version 'v1' on disk"):
            await ask(server, do="rm", sandbox="mine", at="v1")
        assert await ask(server, do="rm", sandbox="mine") == 1
        assert [each["sandbox"] for each in await ask(server, do="list")] == [empty.sandbox_id]
        assert await ask(server, do="purge") is None
        assert await ask(server, do="list") == []


async def test_a_name_that_several_owners_have_has_to_be_a_handle(tmp_path: Path) -> None:
    async with process(FakeRuntime(PROGRAMS), tmp_path / "kept") as server:
        made = [await server.sandboxes.create(server.service, each, "both") for each in (CALLER, Caller("them"))]
        with pytest.raises(InvalidRequest, match="2 sandboxes are named 'both': give one of") as told:
            await ask(server, do="rm", sandbox="both")
        assert all(each.sandbox_id in str(told.value) for each in made)


@pytest.mark.parametrize(
    ("folder", "hello", "expected"),
    [
        ("store", {"do": "list"}, {"result": []}),
        ("store", {"do": "rm", "sandbox": "none"}, {"error": "Sandbox not found"}),
        ("other", {"do": "list"}, {"elsewhere": True}),
    ],
)
async def test_the_answer_comes_over_the_socket(
    tmp_path: Path, folder: str, hello: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = Config.load(store_dir=tmp_path / "store")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for each in (ours, theirs):
            each.setblocking(False)
        async with process(FakeRuntime(PROGRAMS), None) as server:
            said = hello | {"kind": "sandbox", "folder": str(tmp_path / folder)}
            async with asyncio.timeout(30):
                await answer_sandbox(ours, said, server.service, server.sandboxes, config)
            lines = (await asyncio.get_running_loop().sock_recv(theirs, 1 << 16)).splitlines()
    told = [json.loads(line) for line in lines]
    assert told[-1].keys() == expected.keys()
    [(key, value)] = expected.items()
    assert told[-1][key] == value or value in told[-1][key]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"max_ssd_bytes": 1 << 30}, True),
        ({"max_ssd_bytes": 0}, False),
        ({"max_ssd_bytes": 1 << 30, "max_sandbox_disk_bytes": 0}, False),
    ],
)
async def test_the_settings_say_whether_and_where_sandboxes_are_kept(
    tmp_path: Path, settings: dict[str, int], kept: bool
) -> None:
    sandboxes = sandboxes_of(Config.load(store_dir=tmp_path / "store", sandbox_autosave_s=7.0, **settings))
    assert sandboxes.keeping.options.autosave_s == 7
    async with process(FakeRuntime(PROGRAMS), None) as server:
        sandbox = await sandboxes.create(server.service, CALLER)
        if kept:
            await sandboxes.keeping.persist(server.service, CALLER, sandbox)
        else:
            with pytest.raises(StorageError, match="max_ssd_bytes above 0"):
                await sandboxes.keeping.persist(server.service, CALLER, sandbox)
    await sandboxes.end()
    assert len(list((tmp_path / "store").glob("sandboxes/*.sandbox.safetensors"))) == kept
