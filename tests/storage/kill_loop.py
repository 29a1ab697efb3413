"""Kills a process that persists, offloads, loads and removes, again and again, and looks at what it leaves.

A program of its own, which imports storage and nothing else, for it forks: `python -m tests.storage.kill_loop`. The
parent hears through a pipe what each child begins and what it was told is done. Whatever the moment of the kill, what
was done is there, and what was under way is there as a whole or not at all.

A moment is just before or just after a system call that some functions of storage make: between two of them nothing
changes on the disk.
"""

import argparse
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path
from types import FrameType

from mlx_mcp.core.durable import SessionRecord
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.errors import StorageError
from mlx_mcp.storage import export, folder, sealed, session_log, ssd_tier, store
from tests.storage.world import Op, State, check_folder, next_op, open_store, perform, scratch

MAX_OPS = 12
KILLS_PER_FOLDER = 50
MAX_OCCURRENCE = 8
LONGEST_S = 0.012  # until a kill at random
STORAGE = os.path.dirname(folder.__file__)


def child(path: Path, state: State, seed: int, spec: str | None, pipe: int) -> None:
    """Do things until killed, or until there is nothing left to do."""
    calls = Halves(spec)
    opened = open_store(path, calls=calls)
    calls.pass_by("after", "start", "")
    rng = random.Random(seed)
    for _ in range(MAX_OPS):
        op = next_op(rng, state)
        os.write(pipe, f"{op}\n".encode())
        try:
            perform(opened, op)
        except StorageError:  # the quota: what was there still is
            os.write(pipe, b"refused\n")
            continue
        os.write(pipe, b"done\n")
        state = state.after(op)


MOMENTS = {  # before or after which call, made by which functions, outermost first; others may come between
    "write.opened": ("after", "open", "write_durably"),
    "write.half_written": ("after", "pwrite", "_write_all"),
    "write.written": ("before", "fsync", "write_durably", "file"),
    "write.synced": ("before", "rename", "write_durably"),
    "write.renamed": ("after", "rename", "write_durably"),
    "write.durable": ("after", "fsync", "write_durably", "folder"),
    "write.indexed": ("after", "fsync", "_write_one", "write_durably", "folder"),
    "unlink.some": ("after", "unlink", "unlink"),
    "unlink.all": ("after", "fsync", "unlink"),
    "rename.done": ("after", "rename", "Folder.rename"),
    "delete.rewritten": ("before", "unlink", "_remove_from", "_unlink"),
    "evict.some": ("after", "fsync", "_make_room", "_remove_from", "_unlink"),
    "persist.blocks_durable": ("before", "open", "persist", "save", "write_durably"),
    "persist.manifest_durable": ("after", "fsync", "persist", "save", "write_durably", "folder"),
    "remove.marked": ("after", "fsync", "Store.remove", "Folder.rename"),
    "remove.blocks_deleted": ("after", "fsync", "_finish_removals", "delete", "_unlink"),
    "open.locked": ("before", "fsync", "_recover", "unlink"),
    "open.scanned": ("after", "close", "Store.open", "_scan"),
    "open.collected": ("after", "start"),
}


def is_subsequence(some: Iterable[str], whole: Iterable[str]) -> bool:
    """Whether these come in the whole in this order."""
    rest = iter(whole)
    return all(each in rest for each in some)


class Halves(folder.Calls):
    """Writes half of what is asked, as a system may, and kills the process the nth time that it comes by a moment."""

    def __init__(self, spec: str | None) -> None:
        name, _, nth = (spec or "").partition("@")
        self.moment, self.left = MOMENTS.get(name), int(nth or 1)
        self.folders: set[int] = set()

    def pass_by(self, when: str, call: str, what: str) -> None:
        if self.moment is None or self.moment[:2] != (when, call):
            return
        functions = [what]
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(STORAGE):
                functions += [code.co_qualname, code.co_name]
            frame = frame.f_back
        if is_subsequence(self.moment[2:], functions[::-1]):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def open(self, name: str | Path, flags: int, dir_fd: int | None = None) -> int:
        self.pass_by("before", "open", "file")
        fd = super().open(name, flags, dir_fd)
        self.folders |= {fd} if flags & os.O_DIRECTORY else set()
        self.pass_by("after", "open", "file")
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        self.folders.discard(fd)
        self.pass_by("after", "close", "file")

    def pwrite(self, fd: int, buffers: Seq[folder.Buffer], offset: int) -> int:
        whole = b"".join(buffers)
        written = super().pwrite(fd, [whole[: (len(whole) + 1) // 2]], offset)
        self.pass_by("after", "pwrite", "file")
        return written

    def fsync(self, fd: int) -> None:
        what = "folder" if fd in self.folders else "file"
        self.pass_by("before", "fsync", what)
        super().fsync(fd)
        self.pass_by("after", "fsync", what)

    def rename(self, old: str, new: str, dir_fd: int) -> None:
        self.pass_by("before", "rename", "file")
        super().rename(old, new, dir_fd)
        self.pass_by("after", "rename", "file")

    def unlink(self, name: str, dir_fd: int) -> None:
        self.pass_by("before", "unlink", "file")
        super().unlink(name, dir_fd)
        self.pass_by("after", "unlink", "file")


def hear(pipe: int, kill_after_s: float | None, pid: int) -> list[str]:
    """All that a child said before it ended; kill it when its time has come."""
    said = b""
    deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if left is not None and not select.select([pipe], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            deadline = None
            continue
        heard = os.read(pipe, 1 << 16)
        if not heard:
            return said.decode().split("\n")[:-1]
        said += heard


def one_life(
    path: Path, state: State, seed: int, spec: str | None, kill_after_s: float | None
) -> tuple[bool, list[State]]:
    """One child from birth to death; returns whether it was killed, and the states that it may have left."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            child(path, state, seed, spec, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    try:
        lines = hear(reader, kill_after_s, pid)
    finally:
        os.close(reader)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the process broke"
    under_way: Op | None = None
    for line in lines:
        if line not in ("done", "refused"):
            under_way = Op.parse(line)
            continue
        assert under_way is not None, "it ended what it had not begun"
        state = state.after(under_way) if line == "done" else state.after_refusing(under_way)
        under_way = None
    return os.WIFSIGNALED(status), [state] if under_way is None else state.during(under_way)


# -- writers that the loop must catch


def write_in_place(calls: folder.Calls, dir_fd: int, name: str, pieces: Iterable[folder.Piece]) -> int:
    """No temporary file, no renaming."""
    fd = calls.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, dir_fd)
    end = 0
    for offset, buffers in pieces:
        end = max(end, folder._write_all(calls, fd, buffers, offset))
    calls.fsync(fd)
    calls.close(fd)
    calls.fsync(dir_fd)
    return end


def no_mac(*_: object) -> bytes:
    """The same for everything, too."""
    return b"0" * 64


def no_digest(*_: object) -> bytes:
    """The same for everything."""
    return bytes(32)


def persist_session_first(self: store.Store, blocks: Seq[StoredBlock], record: SessionRecord) -> int:
    """The session is there before its blocks are."""
    self.sessions.save(record)
    return self.tier.put(blocks)


NO_RENAME = (folder, "write_durably", write_in_place)
WRITERS: dict[str, list[tuple[object, str, object]]] = {
    "no-rename": [NO_RENAME],
    "no-rename-no-checksum": [
        NO_RENAME,
        (sealed, "_mac", no_mac),
        (ssd_tier, "digest", no_digest),
        (session_log, "digest", no_digest),
        (export, "digest", no_digest),
    ],
    "session-first": [(store.Store, "persist", persist_session_first)],
}


def plant(name: str) -> None:
    """Put one of these writers in place of the package's."""
    for owner, attribute, writer in WRITERS[name]:
        setattr(owner, attribute, writer)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--each-point", action="store_true", help="kill at every point once instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", choices=WRITERS, default="")
    options = parser.parse_args()
    if options.plant:
        plant(options.plant)
    rng = random.Random(options.seed)
    named = itertools.cycle(itertools.product(range(1, MAX_OCCURRENCE + 1), MOMENTS))
    killed = {"at a point": 0, "at random": 0}
    points: set[str] = set()
    violations: list[str] = []
    seed, began = options.seed, time.process_time()

    def left() -> bool:
        if violations and options.plant:  # one is enough to say that it was caught
            return False
        if options.each_point:  # some points are on few children's way
            return len(points) < len(MOMENTS) and seed < options.seed + 100 * len(MOMENTS)
        return sum(killed.values()) < int(options.kills)

    while left():
        with scratch() as parent:
            path, state, here = parent / "cache", State(), 0
            while here < KILLS_PER_FOLDER and left():
                seed += 1
                nth, point = next(named)
                at_random = not options.each_point and rng.random() < 0.5
                if options.each_point:
                    nth, point = 1, next(each for each in MOMENTS if each not in points)
                spec = None if at_random else f"{point}@{nth}"
                try:
                    was_killed, states = one_life(
                        path, state, seed, spec, rng.uniform(0, LONGEST_S) if at_random else None
                    )
                    state = check_folder(path, states)
                except Exception as exc:  # whatever it is, the store did it
                    violations.append(f"{spec or 'at random'}, seed {seed}: {type(exc).__name__}: {exc}")
                    break
                if was_killed:
                    here += 1
                    killed["at random" if at_random else "at a point"] += 1
                    points |= set() if at_random else {point}
    print(
        json.dumps(
            {
                "killed": killed,
                "points": sorted(points),
                "violations": violations,
                "cpu_s": round(time.process_time() - began + sum(os.times()[2:4]), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
