"""Durable sandboxes: what is kept of one, for how long, what damage does, and what a kill or a power cut leaves."""

import contextlib
import errno
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_mcp.core.durable_sandbox import find_sandbox
from mlx_mcp.errors import FolderInUse, InvalidRequest, NotOnDisk, StorageError
from mlx_mcp.storage import sandbox_log
from mlx_mcp.storage.folder import Calls
from mlx_mcp.storage.sandbox_log import SandboxLog
from tests.effort import THOROUGH
from tests.storage.sandboxes import open_log, records_in, sandbox
from tests.storage.test_failing_calls import Failing
from tests.storage.test_power_cuts import Killed, Recorder
from tests.storage.world import T0, scratch

STEP = 1 if THOROUGH else 31  # bytes from one place of damage to the next; coprime to 8


def only_file(path: Path) -> Path:
    [file] = path.glob("*.sandbox.safetensors")
    return file


def test_a_sandbox_comes_back_as_it_was_saved_in_the_next_process(tmp_path: Path) -> None:
    saved = [
        sandbox("x-1"),
        sandbox("x-1", 1, version="friday"),
        sandbox("x-2", dump=b"", journal=b"", variables={}, remembered={}, can_replay=False, persisted=False),
        sandbox("x-3", tenant="", name="\ud800 \N{SNOWMAN}", variables={"\n": "\x00"}, ttl_s=1e9),
    ]
    log = open_log(tmp_path / "kept")
    for record in saved:
        log.save(record)
    log.close()
    log = open_log(tmp_path / "kept")
    assert records_in(log) == {(record.sandbox_id, record.version): record for record in saved}
    assert log.load("x-1", "monday") is log.load("x-9") is None
    assert all(head.stored_bytes == os.path.getsize(tmp_path / "kept" / log._file_name(head)) for head in log.heads())
    log.close()


def test_a_sandbox_that_is_saved_again_replaces_what_was_kept_of_it(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.save(sandbox("x-1"))
    log.save(sandbox("x-1", 1))
    assert records_in(log) == {("x-1", ""): sandbox("x-1", 1)}
    assert only_file(tmp_path).exists()
    log.close()


def test_a_folder_has_one_owner_and_can_be_looked_at_meanwhile(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.save(sandbox("x-1"))
    with pytest.raises(FolderInUse):
        open_log(tmp_path)
    seen = SandboxLog.look(tmp_path)
    assert records_in(seen) == {("x-1", ""): sandbox("x-1")}
    seen.close()
    log.close()


def test_a_removed_sandbox_is_gone_with_its_versions_or_one_of_them(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for version in ("", "a", "b"):
        log.save(sandbox("x-1", version=version))
    log.save(sandbox("x-2"))
    assert log.remove("x-1", "a") == 1
    assert {head.version for head in log.heads()} == {"", "b"}
    assert (log.remove("x-1"), log.remove("x-1")) == (2, 0)
    log.close()
    log = open_log(tmp_path)
    assert [head.sandbox_id for head in log.heads()] == ["x-2"]
    log.close()


def test_a_sandbox_ends_when_its_ttl_is_over(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.save(sandbox("x-1", ttl_s=10))
    log.save(sandbox("x-2", ttl_s=1000))
    assert log.expire(T0 + 9) == []
    assert [head.sandbox_id for head in log.expire(T0 + 11)] == ["x-1"]
    log.close()
    log = open_log(tmp_path)
    assert [head.sandbox_id for head in log.heads()] == ["x-2"]
    log.close()


def test_what_nobody_asked_to_keep_makes_room_the_least_recently_used_first(tmp_path: Path) -> None:
    log = open_log(tmp_path, 10**6)
    log.save(sandbox("x-0"))
    [size] = [head.stored_bytes for head in log.heads()]
    log.close()
    log = open_log(tmp_path, 3 * size + 100)
    log.save(sandbox("x-1", persisted=False, used_at=T0 - 5))
    log.save(sandbox("x-2", persisted=False, used_at=T0 - 9))
    log.save(sandbox("x-3", persisted=False))
    assert sorted(head.sandbox_id for head in log.heads()) == ["x-0", "x-1", "x-3"]
    log.save(sandbox("x-3"))
    log.save(sandbox("x-4"))
    assert sorted(head.sandbox_id for head in log.heads()) == ["x-0", "x-3", "x-4"]
    with pytest.raises(StorageError, match="`mlx-mcp sandbox rm`"):
        log.save(sandbox("x-5"))
    log.save(sandbox("x-4"))  # in its own place
    assert records_in(log).keys() == {("x-0", ""), ("x-3", ""), ("x-4", "")}
    log.close()


def test_a_state_that_is_too_long_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_log, "MAX_STATE_BYTES", 10)
    log = open_log(tmp_path)
    with pytest.raises(StorageError, match="Set large variables"):
        log.save(sandbox("x-1"))
    log.close()


def test_any_damaged_byte_is_told_and_never_read(tmp_path: Path) -> None:
    log = open_log(tmp_path / "kept")
    log.save(sandbox("x-1"))
    log.close()
    file, seen_at_start, seen_at_load = only_file(tmp_path / "kept"), 0, 0
    whole = file.read_bytes()
    for at in [*range(0, len(whole), STEP), "cut", "longer"]:
        if isinstance(at, int):
            data = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        else:
            data = whole[:-1] if at == "cut" else whole + b"!"
        file.write_bytes(data)
        log = open_log(tmp_path / "kept")
        if log.heads():
            seen_at_load += 1
            with pytest.raises(StorageError, match="on disk is damaged, so its variables are lost"):
                log.load("x-1")
        else:
            seen_at_start += 1
        assert (log.load("x-1"), log.heads(), log.num_damaged) == (None, [], 1)
        assert log.is_damaged("ann", "x-1")
        assert not log.is_damaged("bob", "x-1")
        log.close()
    assert seen_at_start
    assert seen_at_load


def test_a_file_that_was_swapped_for_another_ones_is_not_read(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.save(sandbox("x-1"))
    file = only_file(tmp_path)
    log.save(sandbox("x-1", tenant="ann", version="v"))
    [other] = [each for each in tmp_path.glob("*.sandbox.safetensors") if each != file]
    log.close()
    other.write_bytes(file.read_bytes())
    log = open_log(tmp_path)
    assert records_in(log) == {("x-1", ""): sandbox("x-1")}
    assert log.num_damaged == 1
    log.close()


def test_a_file_that_cannot_be_read_now_is_no_lost_sandbox(tmp_path: Path) -> None:
    class Unreadable(Calls):
        fails = False

        def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
            if self.fails:
                raise OSError(errno.EIO, "Input/output error")
            return super().pread(fd, nbytes, offset)

    calls = Unreadable()
    log = open_log(tmp_path, calls=calls)
    log.save(sandbox("x-1"))
    calls.fails = True
    with pytest.raises(StorageError, match="Check the disk"):
        log.load("x-1")
    calls.fails = False
    assert log.load("x-1") == sandbox("x-1")
    log.close()


def test_whatever_call_of_a_save_fails_the_old_or_the_new_one_is_kept_whole(tmp_path: Path) -> None:
    calls, failed = Failing(), set()
    for nth in range(1, 20):
        with scratch() as folder:
            log = open_log(folder / "kept", calls=calls)
            log.save(sandbox("x-1"))
            calls.arm(nth, errno.ENOSPC, False)
            with contextlib.suppress(StorageError):
                log.save(sandbox("x-1", 1))
            which = calls.failed
            failed.add(which)
            calls.disarm()
            kept = records_in(log)
            assert kept in ({("x-1", ""): sandbox("x-1")}, {("x-1", ""): sandbox("x-1", 1)})
            log.close()
            log = open_log(folder / "kept")
            assert records_in(log) == kept
            log.close()
        if which is None:
            break
    assert failed == {"open", "pwrite", "fsync", "rename", None}


def life(calls: Recorder, path: Path) -> None:
    """What a process does to its sandboxes; `calls.states` are those that may be found after its end."""

    def change(log: SandboxLog, after: dict[str, int], between: tuple[dict[str, int], ...] = ()) -> None:
        calls.states = [calls.states[-1], *between, after]
        {"a": lambda: log.save(sandbox("a", after.get("a", 0))), "": lambda: log.remove("a")}["a" if after else ""]()
        calls.states = [after]
        calls.look()

    log = open_log(path, calls=calls)
    for after in ({"a": 1}, {"a": 2}, {}, {"a": 3}):
        change(log, after)
    log.close()


def check_states(path: Path, states: list[dict[str, int]]) -> None:
    """A folder after an end of its process has one of these states, whole, and nothing else."""
    log = open_log(path)
    found = records_in(log)
    assert found in [{(name, ""): sandbox(name, turn) for name, turn in state.items()} for state in states]
    assert log.num_damaged == 0
    names = {name for name in log._folder.names() if name not in ("key", "key.copy", "lock")}
    assert names == {log._file_name(head) for head in log.heads()}
    log.close()


def test_after_every_legal_power_cut_all_that_was_acknowledged_is_whole() -> None:
    with scratch() as parent:
        calls = Recorder(parent / "kept")
        calls.states = [{}]
        life(calls, parent / "kept")
        assert len(calls.cuts) > 50
        for nth, ((content, _), states) in enumerate(calls.cuts.items()):
            path = parent / f"after-{nth}"
            if content is not None:
                path.mkdir(mode=0o700)
                for name, data in content:
                    (path / name).write_bytes(data)
            check_states(path, states)


def test_after_a_kill_at_any_call_the_old_or_the_new_one_is_there() -> None:
    num_killed = 0
    for lives in range(1, 200):
        with scratch() as parent:
            calls = Recorder(parent / "kept")
            calls.states, calls.lives = [{}], lives
            with contextlib.suppress(Killed):
                life(calls, parent / "kept")
                calls.lives = math.inf
            for fd in calls.held:
                os.close(fd)
            check_states(parent / "kept", calls.states)
            if calls.lives == math.inf:
                break
            num_killed += 1
    assert num_killed > 20


def test_a_sandbox_is_found_by_handle_or_by_a_name_that_one_has() -> None:
    log = [replace(head, name=name) for head, name in zip(heads("x-1", "x-2", "x-3"), ("n", "m", "m"), strict=True)]
    assert find_sandbox(log, "x-1") == find_sandbox(log, "n") == log[0]
    with pytest.raises(InvalidRequest, match="2 sandboxes are named 'm': give one of x-2, x-3"):
        find_sandbox(log, "m")
    with pytest.raises(NotOnDisk, match="`mlx-mcp sandbox list`"):
        find_sandbox(log, "none")
    with pytest.raises(NotOnDisk, match="has no version 'v' on disk"):
        find_sandbox(log, "n", "v")


def heads(*names: str) -> list[sandbox_log.SandboxHead]:
    with scratch() as folder:
        log = open_log(folder / "kept")
        for name in names:
            log.save(sandbox(name))
        log.close()
        return log.heads()
