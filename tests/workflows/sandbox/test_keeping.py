"""Sandboxes that outlive their process: found again, forked, in versions, with what they remember."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_mcp.errors import (
    FolderInUse,
    OtherInterpreter,
    RateLimited,
    SandboxFailed,
    StorageError,
    UnknownSandbox,
    UnknownVersion,
)
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.limits import Limiter, Limits
from mlx_mcp.service.service import known_sessions
from mlx_mcp.storage.sandbox_log import SandboxLog
from mlx_mcp.workflows.reason_over.input import Input, filled
from mlx_mcp.workflows.sandbox import keeping as keepings
from mlx_mcp.workflows.sandbox.keeping import Keeping, KeepingOptions
from mlx_mcp.workflows.sandbox.reading import value_of
from mlx_mcp.workflows.sandbox.runtime import HostCall
from tests.fakes import FakeStore
from tests.service.house import CALLER
from tests.workflows.fakes import FakeRuntime, FakeWorker
from tests.workflows.sandbox.processes import process

Run = Generator[HostCall, Any, Any]


def count(v: dict[str, Any], say: Any) -> Run:
    v["n"] = v.get("n", 0) + 1
    v["answer"] = yield HostCall("llm_query", (f"{v['n']}?",))
    say(v["answer"])


def remembers(v: dict[str, Any], say: Any) -> Run:
    v["key"] = yield HostCall("remember", (v["text"],), {"name": "it"})


def asks_over(v: dict[str, Any], say: Any) -> Run:
    v["answer"] = yield HostCall("llm_query", ("and?",), {"over": "it"})


def fails(v: dict[str, Any], say: Any) -> Run:
    v["n"] = -1
    yield HostCall("llm_query", ("?",))
    raise ValueError("as it should")


def submits(v: dict[str, Any], say: Any) -> Run:
    v["n"] = v.get("n", 0) + 10
    yield HostCall("submit", (v["n"],))


def reads(name: str) -> Any:
    """The program that consists of a variable's name."""

    def read(v: dict[str, Any], say: Any) -> Run:
        return v[name]
        yield

    return read


PROGRAMS = {each.__name__: each for each in (count, remembers, asks_over, fails, submits)}
PROGRAMS |= {name: reads(name) for name in ("n", "m", "answer")}


def runtime(**changes: Any) -> FakeRuntime:
    return FakeRuntime(PROGRAMS, **changes)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.sandbox.safetensors"))


async def test_the_state_of_the_latest_run_is_there_in_the_next_process(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as first:
        sandbox = await first.sandboxes.create(first.service, CALLER, "repo")
        await first.run(sandbox, "count", m=[1, 2])
        await first.run(sandbox, "count")
        info = first.sandboxes.info(sandbox)
        assert len(files_in(tmp_path / "kept")) == 1, "it is saved before the run is answered"
        log = SandboxLog.look(tmp_path / "kept")
        assert [head.persisted for head in log.heads()] == [False]
        log.close()
    async with process(runtime(), tmp_path / "kept") as second:
        again = await second.found("repo")
        assert again.sandbox_id == sandbox.sandbox_id
        assert replace(second.sandboxes.info(again), idle_s=0, expires_in_s=0, state_bytes=0) == replace(
            info, idle_s=0, expires_in_s=0, state_bytes=0
        )
        await second.run(again, "count")
        assert await value_of(await second.sandboxes.runtime(), again.state, "n") == 3
        assert await value_of(await second.sandboxes.runtime(), again.state, "m") == [1, 2]
        assert second.num_asked == 1


@pytest.mark.parametrize("keep", [False, True])
async def test_the_sandbox_of_a_question_is_on_disk_only_once_it_is_to_stay(tmp_path: Path, keep: bool) -> None:
    folder = tmp_path / "kept"
    async with process(runtime(), folder) as first:
        source = await first.sandboxes.create(first.service, CALLER, "repo")
        await first.run(source, "count")
        [saved] = files_in(folder)
        async with filled(first.service, CALLER, first.sandboxes, Input(sandbox="repo"), "", keep) as there:
            await first.run(there.sandbox, "count")
            assert files_in(folder) == [saved]
        assert len(files_in(folder)) == 1 + keep
        assert first.sandboxes.num == 1 + keep


async def test_a_process_that_made_no_sandbox_leaves_no_folder(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as first:
        await first.sandboxes.ready(first.service)
        await first.sandboxes.create(first.service, CALLER, "empty")
    assert not (tmp_path / "kept").exists()


async def test_another_owner_does_not_find_a_kept_sandbox(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as first:
        sandbox = await first.sandboxes.create(first.service, CALLER, "repo")
        await first.run(sandbox, "count")
    async with process(runtime(), tmp_path / "kept") as second:
        await second.sandboxes.ready(second.service)
        for name in ("repo", sandbox.sandbox_id):
            with pytest.raises(UnknownSandbox) as foreign:
                second.sandboxes.get("them", name)
            assert str(foreign.value) == str(UnknownSandbox(name)), "as of one that was never there"
        assert second.sandboxes.infos("them") == []


async def test_a_persisted_sandbox_is_there_with_what_it_remembers_and_in_its_versions(tmp_path: Path) -> None:
    store = FakeStore()
    async with process(runtime(), tmp_path / "kept", store) as first:
        sandbox = await first.sandboxes.create(first.service, CALLER, "repo")
        await first.run(sandbox, "remembers", text="The badge is 7.")
        made = await first.sandboxes.keeping.persist(first.service, CALLER, sandbox, "friday")
        assert (made.version, made.num_remembered) == ("friday", 1)
        await first.run(sandbox, "remembers", text="Another text.")
        await first.sandboxes.keeping.persist(first.service, CALLER, sandbox)
        assert sandbox.kept.versions == {"friday"}
    assert len(store.records) == 2, "the text as it is now, and the version's own"
    async with process(runtime(), tmp_path / "kept", store) as second:
        again = await second.found("repo")
        assert again.kept.persisted
        await second.run(again, "asks_over")
        assert await value_of(await second.sandboxes.runtime(), again.state, "answer") == "Another text.\n\nand?"
        [fork] = await second.sandboxes.fork(second.service, CALLER, "repo", None, ("old",), "friday")
        await second.run(fork, "asks_over")
        assert await value_of(await second.sandboxes.runtime(), fork.state, "answer") == "The badge is 7.\n\nand?"
        with pytest.raises(UnknownVersion, match="it has: friday"):
            await second.sandboxes.fork(second.service, CALLER, "repo", 1, (), "monday")
        await second.sandboxes.close(second.service, CALLER.tenant, [again, fork])
        assert not known_sessions(second.service)
    assert store.records == {}
    assert files_in(tmp_path / "kept") == []


async def test_a_version_that_is_persisted_again_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    store = FakeStore()
    async with process(runtime(), tmp_path / "kept", store) as only:
        sandbox = await only.sandboxes.create(only.service, CALLER)
        for _ in range(2):
            await only.run(sandbox, "remembers", text="one")
            await only.sandboxes.keeping.persist(only.service, CALLER, sandbox, "v")
        assert len(files_in(tmp_path / "kept")) == 2
        assert len(known_sessions(only.service)) == len(store.records) == 2
        await only.sandboxes.keeping.remove_version(only.service, sandbox, "v")
        assert len(files_in(tmp_path / "kept")) == len(known_sessions(only.service)) == len(store.records) == 1
        assert sandbox.kept.versions == frozenset()


async def test_forks_of_a_sandbox_that_is_only_on_disk_begin_where_it_was(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as first:
        sandbox = await first.sandboxes.create(first.service, CALLER, "repo")
        await first.run(sandbox, "count")
    async with process(runtime(), tmp_path / "kept") as second:
        await second.sandboxes.ready(second.service)
        forks = await second.sandboxes.fork(second.service, CALLER, "repo", 3, ())
        await second.run(forks[0], "count")
        values = [await value_of(await second.sandboxes.runtime(), each.state, "n") for each in forks]
        assert values == [2, 1, 1]
        assert [len(list(each.state.journal.cells())) for each in forks] == [2, 1, 1]


async def test_another_version_of_the_interpreter_rebuilds_the_state_and_asks_nobody(tmp_path: Path) -> None:
    codes = ("count", "fails", "submits", "count", "remembers")
    async with process(runtime(), tmp_path / "kept") as first:
        sandbox = await first.sandboxes.create(first.service, CALLER, "repo")
        for code in codes:
            await first.run(sandbox, code, text="Once")
        dump = sandbox.state.dump
    newer = runtime(version="fake 2")
    async with process(newer, tmp_path / "kept") as second:
        again = await second.found("repo")
        assert await value_of(newer, await second.sandboxes.keeping.state_of(again), "n") == 10
        assert second.num_asked == 0
        await second.run(again, "submits")
        assert second.num_asked == 0
        assert again.state.version == "fake 2"
        assert again.state.variables == sandbox.state.variables
        assert [worker.loaded for worker in newer.workers] == [[], []]
    async with process(newer, tmp_path / "kept") as third:
        again = await third.found("repo")
        assert await value_of(newer, await third.sandboxes.keeping.state_of(again), "n") == 20
        assert newer.workers[-1].loaded == [again.state.dump or (await third.sandboxes.keeping.state_of(again)).dump]
        assert newer.workers[-1].loaded != [dump]


async def test_a_dump_that_is_not_taken_is_rebuilt_from_the_runs_if_these_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(worker: FakeWorker, dump: bytes) -> None:
        raise SandboxFailed("The state of this sandbox is damaged. Begin a new sandbox.")

    fake = runtime()
    async with process(fake, tmp_path / "kept") as only:
        sandbox = await only.sandboxes.create(only.service, CALLER, "repo")
        await only.run(sandbox, "count")
        asked = only.num_asked
        monkeypatch.setattr(FakeWorker, "load", refuse)
        await sandbox.release()
        assert (await only.run(sandbox, "n")).ended.value == 1
        assert only.num_asked == asked
        await sandbox.release()
        sandbox.state = replace(sandbox.state, journal=replace(sandbox.state.journal, is_whole=False))
        with pytest.raises(SandboxFailed, match="is damaged"):
            await only.run(sandbox, "n")
        assert fake.live == []


async def test_a_state_that_cannot_be_rebuilt_says_so_and_stays(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as first:
        sandbox = await first.sandboxes.create(first.service, CALLER, "repo")
        await first.run(sandbox, "count")
    changed = FakeRuntime(PROGRAMS | {"count": fails}, version="fake 2")
    async with process(changed, tmp_path / "kept") as second:
        again = await second.found("repo")
        for _ in range(2):
            with pytest.raises(OtherInterpreter, match="run 1 does not ask what it asked"):
                await second.run(again, "count")
        assert changed.live == []
    async with process(runtime(), tmp_path / "kept") as third:
        again = await third.found("repo")
        await third.run(again, "count")
        assert await value_of(await third.sandboxes.runtime(), again.state, "n") == 2


async def test_a_damaged_sandbox_is_told_of_and_its_versions_can_be_forked(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as first:
        sandbox = await first.sandboxes.create(first.service, CALLER, "repo")
        await first.run(sandbox, "count")
        await first.sandboxes.keeping.persist(first.service, CALLER, sandbox)
        [file] = files_in(tmp_path / "kept")
        await first.sandboxes.keeping.persist(first.service, CALLER, sandbox, "v")
        other = await first.sandboxes.create(first.service, CALLER, "other")
        await first.run(other, "count")
        [lost] = set(files_in(tmp_path / "kept")) - {file, *versions(tmp_path / "kept")}
    for each in (file, lost):
        each.write_bytes(each.read_bytes()[:-1] + b"!")
    data = lost.read_bytes()
    lost.write_bytes(data[:30] + b"!" + data[31:])
    async with process(runtime(), tmp_path / "kept") as second:
        again = await second.found("repo")
        for _ in range(2):
            with pytest.raises(StorageError, match="on disk is damaged"):
                await second.run(again, "count")
        [fork] = await second.sandboxes.fork(second.service, CALLER, "repo", 1, (), "v")
        await second.run(fork, "count")
        assert await value_of(await second.sandboxes.runtime(), fork.state, "n") == 2
        with pytest.raises(UnknownSandbox, match="What was kept of it on disk is damaged"):
            second.sandboxes.get(CALLER.tenant, other.sandbox_id)


def versions(folder: Path) -> list[Path]:
    """The files of versions."""
    log = SandboxLog.look(folder)
    found = [folder / log._file_name(head) for head in log.heads() if head.version]
    log.close()
    return found


async def test_a_sandbox_that_was_closed_is_gone_from_disk_also_while_its_program_runs(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as only:
        sandbox = await only.sandboxes.create(only.service, CALLER)
        await only.run(sandbox, "count")
        assert len(files_in(tmp_path / "kept")) == 1
        only.service.engine.loader.runner.endless = True  # type: ignore[attr-defined]
        running = asyncio.create_task(only.run(sandbox, "count"))
        async with asyncio.timeout(30):
            while not only.service.engine.stats.running:
                await asyncio.sleep(0.001)
            await only.sandboxes.close(only.service, CALLER.tenant, [sandbox])
            with pytest.raises(Exception, match="was closed"):
                await running
        assert files_in(tmp_path / "kept") == []
    assert files_in(tmp_path / "kept") == []


async def test_a_long_state_is_saved_when_its_time_has_come_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepings, "SMALL_BYTES", 10)
    async with process(runtime(), tmp_path / "kept", options=KeepingOptions(autosave_s=3600)) as first:
        sandbox = await first.sandboxes.create(first.service, CALLER, "repo")
        await first.run(sandbox, "count")  # the first is saved as soon as possible
        saving = sandbox.kept.saving
        assert saving is not None
        await saving
        first_state = sandbox.kept.state
        assert first_state is sandbox.state
        await first.run(sandbox, "count")
        await first.run(sandbox, "count")
        assert sandbox.kept.saving is not None
        assert sandbox.kept.state is first_state
    async with process(runtime(), tmp_path / "kept") as second:
        again = await second.found("repo")
        state = await second.sandboxes.keeping.state_of(again)
        assert await value_of(await second.sandboxes.runtime(), state, "n") == 3


async def test_changes_while_a_long_state_is_saved_are_saved_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepings, "SMALL_BYTES", 10)
    async with process(runtime(), tmp_path / "kept", options=KeepingOptions(autosave_s=0)) as only:
        sandbox = await only.sandboxes.create(only.service, CALLER, "repo")
        for _ in range(20):
            await only.run(sandbox, "count")
        async with asyncio.timeout(30):
            while sandbox.kept.state is not sandbox.state:
                assert sandbox.kept.saving is not None
                await asyncio.wait({sandbox.kept.saving})
                await asyncio.sleep(0)


async def test_where_nothing_is_kept_a_sandbox_lives_on_in_memory_and_persisting_says_why() -> None:
    async with process(runtime(), None) as only:
        sandbox = await only.sandboxes.create(only.service, CALLER)
        await only.run(sandbox, "count")
        with pytest.raises(StorageError, match="max_ssd_bytes above 0"):
            await only.sandboxes.keeping.persist(only.service, CALLER, sandbox)
        await only.run(sandbox, "count")
        assert not sandbox.kept.persisted


async def test_a_disk_that_fails_costs_no_run_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with process(runtime(), tmp_path / "kept", quota_bytes=100) as only:
        sandbox = await only.sandboxes.create(only.service, CALLER)
        with caplog.at_level(logging.WARNING):
            await only.run(sandbox, "count", text="CANARY")
        assert "a sandbox could not be saved" in caplog.text
        assert "CANARY" not in caplog.text
        with pytest.raises(StorageError, match="max_sandbox_disk_bytes"):
            await only.sandboxes.keeping.persist(only.service, CALLER, sandbox)
        assert not sandbox.kept.persisted
        await only.run(sandbox, "count")


async def test_a_second_process_on_the_folder_keeps_its_sandboxes_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with process(runtime(), tmp_path / "kept") as first, process(runtime(), tmp_path / "kept") as second:
        await first.run(await first.sandboxes.create(first.service, CALLER, "repo"), "count")
        with caplog.at_level(logging.WARNING):
            await second.sandboxes.ready(second.service)
        assert "no sandbox is kept on disk" in caplog.text
        sandbox = await second.sandboxes.create(second.service, CALLER, "repo")
        await second.run(sandbox, "count")
        with pytest.raises(FolderInUse):
            await second.sandboxes.keeping.persist(second.service, CALLER, sandbox)


async def test_what_a_principal_may_have_on_disk_counts_its_sandboxes(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as only:
        service = replace(only.service, limits=Limiter(lambda tenant: Limits(disk_bytes=100)))
        sandbox = await only.sandboxes.create(service, CALLER)
        await only.run(sandbox, "count")
        with pytest.raises(RateLimited, match="MB more, and you may have"):
            await only.sandboxes.keeping.persist(service, CALLER, sandbox)


async def test_a_run_that_ends_while_its_sandbox_is_persisted_is_on_disk_in_the_end(tmp_path: Path) -> None:
    store = FakeStore()
    async with process(runtime(), tmp_path / "kept", store) as only:
        sandbox = await only.sandboxes.create(only.service, CALLER)
        await only.run(sandbox, "remembers", text="one")
        for_real, runs = only.service.engine.persist, []

        async def persist(*given: Any) -> Any:
            runs.append(await only.run(sandbox, "count"))
            return await for_real(*given)

        only.service.engine.persist = persist  # type: ignore[method-assign]
        await only.sandboxes.keeping.persist(only.service, CALLER, sandbox)
        assert len(runs) == 1
        log = SandboxLog.look(tmp_path / "kept")
        record = log.load(sandbox.sandbox_id)
        log.close()
        assert record is not None
        assert record.persisted
        assert record.dump == sandbox.state.dump


async def test_a_disk_that_fails_is_tried_again_after_the_next_run_and_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keepings, "SMALL_BYTES", 10)
    options = KeepingOptions(autosave_s=0)
    async with process(runtime(), tmp_path / "kept", quota_bytes=100, options=options) as only:
        sandbox = await only.sandboxes.create(only.service, CALLER)
        for number in (1, 2):
            await only.run(sandbox, "count")
            assert sandbox.kept.saving is not None
            await sandbox.kept.saving
            assert sandbox.kept.saving is None
            assert caplog.text.count("could not be saved") == number


async def test_persisting_goes_on_when_its_caller_is_gone(tmp_path: Path) -> None:
    store = FakeStore()
    async with process(runtime(), tmp_path / "kept", store) as only:
        sandbox = await only.sandboxes.create(only.service, CALLER)
        await only.run(sandbox, "remembers", text="one")
        persisting = asyncio.create_task(only.sandboxes.keeping.persist(only.service, CALLER, sandbox, "v"))
        await asyncio.sleep(0)
        persisting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await persisting
        async with asyncio.timeout(30):
            while not sandbox.kept.versions:
                await asyncio.sleep(0.001)
        assert len(files_in(tmp_path / "kept")) == 2


async def test_a_kept_sandbox_ends_when_it_was_not_used_for_its_ttl(tmp_path: Path) -> None:
    now = [0.0]
    async with process(runtime(), tmp_path / "kept", ttl_s=100.0, clock=lambda: now[0]) as only:
        saved = await only.sandboxes.create(only.service, CALLER, "saved")
        persisted = await only.sandboxes.create(only.service, CALLER, "persisted")
        for each in (saved, persisted):
            await only.run(each, "count")
        await only.sandboxes.keeping.persist(only.service, CALLER, persisted)
        now[0] = 101.0
        await only.sandboxes.expire(only.service)
        assert [info.name for info in only.sandboxes.infos(CALLER.tenant)] == ["persisted"]
        assert len(files_in(tmp_path / "kept")) == 1


async def test_what_was_not_used_for_its_ttl_is_gone_at_the_next_start(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as first:
        await first.run(await first.sandboxes.create(first.service, CALLER), "count")
    later = Keeping(
        lambda: SandboxLog.open(tmp_path / "kept", quota_bytes=1 << 20), wall=lambda: 1e5 + keepings.time.time()
    )
    assert await later.heads() == []
    await later.close([])
    assert files_in(tmp_path / "kept") == []


async def test_the_sandboxes_of_an_owner_that_were_kept_count_among_its_sessions(tmp_path: Path) -> None:
    async with process(runtime(), tmp_path / "kept") as first:
        for _ in range(2):
            await first.run(await first.sandboxes.create(first.service, CALLER), "count")
    async with process(runtime(), tmp_path / "kept") as second:
        service = replace(second.service, limits=Limiter(lambda tenant: Limits(sessions=2)))
        await second.sandboxes.ready(service)
        with pytest.raises(RateLimited, match="You have 2"):
            await second.sandboxes.create(service, CALLER)
        assert await second.sandboxes.create(service, Caller("them"))
