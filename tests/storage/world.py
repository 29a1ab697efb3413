"""Sessions and blocks whose every byte follows from their names, so that an oracle needs to remember names only.

Storage alone is imported here, no MLX: the kill loop forks.
"""

import hashlib
import random
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_mcp.core.durable import SessionRecord
from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Tensor
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.storage.store import Store

BLOCK_TOKENS = 4
QUOTA_BYTES = 11_400  # durable sessions fit, as a rule, and offloads have to go
T0 = 1_700_000_000.0


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def block(name: str, nbytes: int = 300, parent: str = "root", start: int = 0, **changes: Any) -> StoredBlock:
    """The block of that name: its tokens and bytes follow from it."""
    key = key_of(name)
    data = hashlib.shake_128(key).digest(nbytes)
    cut = nbytes // 3
    tokens = tuple(array("I", key[: 4 * BLOCK_TOKENS]))
    made = StoredBlock(
        key, key_of(parent), start, tokens, 0, True, raw(0), (memoryview(data)[:cut], memoryview(data)[cut:])
    )
    made = replace(made, **changes)
    return replace(made, form=raw(made.nbytes))


def raw(nbytes: int) -> Form:
    """Bytes of no meaning."""
    return Form((LayerCache(CacheKind.FULL),), (Tensor("layers.0.keys", "U8", (nbytes,)),))


def content(stored: StoredBlock) -> tuple[Any, ...]:
    """What of a block must come back."""
    data = b"".join(stored.data)
    return stored.key, stored.parent, stored.start, stored.tokens, stored.form, data


def record(session_id: str, blocks: list[StoredBlock], **changes: Any) -> SessionRecord:
    return replace(
        SessionRecord(
            session_id=session_id,
            tenant="ann",
            model="tiny",
            name="",
            version="",
            fingerprint=b"\x01\x02",
            tokenizer=b"\x03",
            text=f"I am {session_id}, \N{SNOWMAN}",
            tokens=tuple(token for one in blocks for token in one.tokens),
            num_kept=sum(len(one.tokens) for one in blocks),
            after="assistant",
            tools=({"name": "look", "arguments": {"n": 1}},),
            parent_id="",
            ttl_s=None,
            pinned=False,
            ephemeral=False,
            saved_at=T0,
            used_at=T0,
            blocks=tuple(one.key for one in blocks),
        ),
        **changes,
    )


def open_store(path: Path, **changes: Any) -> Store:
    return Store.open(path, **{"quota_bytes": QUOTA_BYTES, "daily_bytes": 10**9, "wall": lambda: T0, **changes})


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: what is tested there does not depend on a disk's speed."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path)


# -- what a process does to a store, and what must be true after any end of it


@dataclass(frozen=True)
class Op:
    """One call. A session's turn n has n + 1 blocks and a tail; its first block is its family's."""

    kind: str  # persist, remove, offload or load
    session: str
    turn: int = 0
    version: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.session} {self.turn} {self.version or '-'}"

    @classmethod
    def parse(cls, line: str) -> "Op":
        kind, session, turn, version = line.split()
        return cls(kind, session, int(turn), version.replace("-", ""))


def blocks_of(session: str, turn: int) -> list[StoredBlock]:
    names = [f"family {session[0]}", *(f"{session} {at}" for at in range(turn)), f"{session} tail {turn}"]
    parents = ["root", *names]
    return [block(name, 200 + 40 * at, parents[at], at * BLOCK_TOKENS) for at, name in enumerate(names)]


def record_of(session: str, turn: int, version: str) -> SessionRecord:
    return record(session, blocks_of(session, turn), version=version, name=f"turn-{turn}")


def perform(store: Store, op: Op) -> None:
    """Do it; what is loaded must be as it was persisted."""
    match op.kind:
        case "persist":
            store.persist(blocks_of(op.session, op.turn), record_of(op.session, op.turn, op.version))
        case "remove":
            store.remove(op.session)
        case "offload":
            store.tier.put(blocks_of(op.session, op.turn), offload=True)
        case "load":
            assert check_session(store, op.session, op.version) in (None, op.turn)


@dataclass(frozen=True)
class State:
    """What a store should hold."""

    sessions: dict[tuple[str, str], int] = field(default_factory=dict)  # → turn
    cached: frozenset[bytes] = frozenset()  # keys that offloads may have left

    def after(self, op: Op) -> "State":
        match op.kind:
            case "persist":
                new = {**self.sessions, (op.session, op.version): op.turn}
                return self._without_unreferenced(new)
            case "remove":
                new = {at: turn for at, turn in self.sessions.items() if at[0] != op.session}
                return self._without_unreferenced(new)
            case "offload":
                return replace(self, cached=self.cached | {one.key for one in blocks_of(op.session, op.turn)})
        return self

    def after_refusing(self, op: Op) -> "State":
        """Nothing is lost, and some of its blocks may be there."""
        return replace(self, cached=self.cached | _referenced({(op.session, ""): op.turn}))

    def during(self, op: Op) -> list["State"]:
        """All that may be while it is under way. Versions of a session go one by one."""
        states = [self, self.after(op)]
        if op.kind == "remove":
            for at in self.sessions:
                if at[0] == op.session:
                    states.append(self._without_unreferenced({k: v for k, v in self.sessions.items() if k != at}))
        return states

    def _without_unreferenced(self, new: dict[tuple[str, str], int]) -> "State":
        """What a session let go is gone, even if it was offloaded once."""
        return State(new, self.cached - (_referenced(self.sessions) - _referenced(new)))


def _referenced(sessions: dict[tuple[str, str], int]) -> set[bytes]:
    return {one.key for (session, _), turn in sessions.items() for one in blocks_of(session, turn)}


def check_session(store: Store, session: str, version: str) -> int | None:
    """The turn that a session is at, all of which must be sound; None if there is none."""
    found = store.sessions.load(session, version)
    if found is None:
        return None
    turn = int(found.name.removeprefix("turn-"))
    assert found == record_of(session, turn, version), f"{session} is not what it was"
    got = store.tier.get(found.blocks)
    assert [content(one) for one in got] == [content(one) for one in blocks_of(session, turn)], f"{session}: its blocks"
    return turn


def check_folder(path: Path, states: list[State]) -> State:
    """Open what an ended process left, and find one of these states, whole, and nothing else."""
    store = open_store(path)
    try:
        turns = {
            (head.session_id, head.version): check_session(store, head.session_id, head.version)
            for head in store.sessions.heads()
        }
        found = {at: turn for at, turn in turns.items() if turn is not None}
        assert found == turns, "a session that is listed is not there"
        matching = [state for state in states if state.sessions == found]
        assert matching, f"found {found}, and not one of {[state.sessions for state in states]}"
        keys = set(store.tier._index.live)
        cached = frozenset().union(*(state.cached for state in matching))
        left = keys - _referenced(found) - cached
        assert not left, f"{len(left)} blocks are nobody's"
        for key in keys:
            [got] = store.tier.get([key])
            assert b"".join(got.data) == hashlib.shake_128(key).digest(got.nbytes)
        names = {name for name in store._folder.names() if name not in ("key", "key.copy", "lock")}
        known = set(store.tier._index.segments) | {kept.file_name for kept in store.sessions._entries.values()}
        assert names == known, f"leftovers: {sorted(names ^ known)}"
        assert (store.tier.stats.corrupt, store.sessions.num_damaged) == (0, 0), "something is damaged"
        return State(found, cached)
    finally:
        store.close()


def next_op(rng: random.Random, state: State) -> Op:
    """Something that a process in this state would do."""
    session = rng.choice(["a0", "a1", "b0", "b1"])
    turn = state.sessions.get((session, ""))
    roll = rng.random()
    if roll < 0.15:
        return Op("offload", session, rng.randrange(3))
    if turn is None or (roll < 0.6 and turn < 4):
        return Op("persist", session, 0 if turn is None else turn + 1)
    if roll < 0.7:
        return Op("persist", session, turn, "kept")
    if roll < 0.8:
        return Op("load", session, turn)
    return Op("remove", session)
