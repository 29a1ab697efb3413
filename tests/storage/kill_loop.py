"""Kills a process that persists, offloads, loads and removes, again and again, and looks at what it leaves.

A program of its own, which imports storage and nothing else, for it forks: `python -m tests.storage.kill_loop`. The
parent hears through a pipe what each child begins and what it was told is done. Whatever the moment of the kill, what
was done is there, and what was under way is there as a whole or not at all.
"""

import argparse
import itertools
import json
import os
import random
import select
import signal
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path

from mlx_mcp.core.durable import SessionRecord
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.errors import StorageError
from mlx_mcp.storage import faults, folder, sealed, session_log, ssd_tier, store
from tests.storage.world import Op, State, check_folder, next_op, open_store, perform, scratch

MAX_OPS = 12
KILLS_PER_FOLDER = 50
MAX_OCCURRENCE = 8
LONGEST_S = 0.012  # until a kill at random


def child(path: Path, state: State, seed: int, spec: str | None, pipe: int) -> None:
    """Do things until killed, or until there is nothing left to do."""
    faults.arm({"MLX_MCP_TEST_MODE": "1", "MLX_MCP_FAULT": spec} if spec else {})
    opened = open_store(path, calls=Halves())
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


class Halves(folder.Calls):
    """Writes half of what is asked, as a system may."""

    def pwrite(self, fd: int, buffers: Seq[folder.Buffer], offset: int) -> int:
        whole = b"".join(buffers)
        written = super().pwrite(fd, [whole[: (len(whole) + 1) // 2]], offset)
        faults.point("write.half_written")
        return written


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
        (sealed, "_mac", no_digest),
        (ssd_tier, "digest", no_digest),
        (session_log, "digest", no_digest),
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
    named = itertools.cycle(itertools.product(range(1, MAX_OCCURRENCE + 1), faults.POINTS))
    killed = {"at a point": 0, "at random": 0}
    points: set[str] = set()
    violations: list[str] = []
    seed, began = options.seed, time.process_time()

    def left() -> bool:
        if violations and options.plant:  # one is enough to say that it was caught
            return False
        if options.each_point:  # some points are on few children's way
            return len(points) < len(faults.POINTS) and seed < options.seed + 100 * len(faults.POINTS)
        return sum(killed.values()) < int(options.kills)

    while left():
        with scratch() as parent:
            path, state, here = parent / "cache", State(), 0
            while here < KILLS_PER_FOLDER and left():
                seed += 1
                nth, point = next(named)
                at_random = not options.each_point and rng.random() < 0.5
                if options.each_point:
                    nth, point = 1, next(each for each in faults.POINTS if each not in points)
                spec = None if at_random else f"{point}:kill@{nth}"
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
