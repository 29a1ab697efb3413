"""Everything that can befall a store, in any order, beside a dictionary."""

import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_mcp.errors import StorageError
from mlx_mcp.storage.transfer import from_file, to_file
from tests.effort import drawn
from tests.storage.world import T0, block, content, open_store, record

QUOTA_BYTES = 17_000
DAILY_BYTES = 85_000
SESSIONS = st.sampled_from(["ann", "ben", "cay"])
VERSIONS = st.sampled_from(["", "v1"])
CHAINS = st.lists(st.sampled_from("xyz"), min_size=1, max_size=5)  # sessions with a common beginning share blocks
TTL_S = 600.0


def chain(letters):
    """Blocks whose names are all that came before."""
    names = ["".join(letters[: end + 1]) for end in range(len(letters))]
    return [block(name, 100 + 50 * len(name), parent, 4 * at) for at, (parent, name) in enumerate(_pairs(names))]


def _pairs(names):
    return zip(["root", *names], names, strict=False)


def check_error(exc, why):
    assert why in str(exc)


class StoreMachine(RuleBasedStateMachine):
    """A store, what should be in it, and what may have been lost to damage."""

    @initialize()
    def begin(self):
        self.parent = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.now = T0
        self.sessions = {}  # (session, version) → record
        self.contents = {}  # key → what was put under it
        self.damaged = set()  # keys whose bytes on disk may have been changed
        self.exported = None
        self.start()

    def start(self):
        self.store = open_store(
            self.parent / "cache", quota_bytes=QUOTA_BYTES, daily_bytes=DAILY_BYTES, wall=lambda: self.now
        )

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.parent)

    def know(self, blocks):
        self.contents |= {one.key: content(one) for one in blocks}

    @rule(session=SESSIONS, version=VERSIONS, letters=CHAINS, ttl_s=st.sampled_from([None, TTL_S]), given=st.booleans())
    def persist(self, session, version, letters, ttl_s, given):
        blocks = chain(letters)
        saved = record(session, blocks, version=version, ttl_s=ttl_s, saved_at=self.now, used_at=self.now)
        missing = [one for one in blocks if not self.store.tier.find(one.key)]
        self.know(blocks)
        try:
            self.store.persist(blocks if given else missing, saved)
        except StorageError as exc:
            check_error(exc, "do not fit")
            return
        self.damaged -= {one.key for one in missing}
        self.sessions[session, version] = saved

    @rule(letters=CHAINS)
    def offload(self, letters):
        blocks = chain(letters)
        missing = {one.key for one in blocks if not self.store.tier.find(one.key)}
        self.know(blocks)
        try:
            if self.store.tier.put(blocks, offload=True):
                self.damaged -= missing
        except StorageError as exc:
            check_error(exc, "do not fit")

    @rule(session=SESSIONS, version=st.none() | VERSIONS)
    def remove(self, session, version):
        gone = {at for at in self.sessions if at[0] == session and version in (None, at[1])}
        keys = {key for at in gone for key in self.sessions.pop(at).blocks}
        assert self.store.remove(session, version) == len(gone)
        for key in keys - self.referenced():
            assert self.store.tier.find(key) is None

    @rule(seconds=st.sampled_from([1.0, 300.0, 700.0, -(10.0**9)]))
    def time_goes_by(self, seconds):
        self.now = max(self.now, T0) + seconds
        for head in self.store.expire(self.now):
            kept = self.sessions.pop((head.session_id, head.version))
            assert kept.ttl_s == TTL_S

    @rule()
    def restart(self):
        self.store.close()
        self.start()

    @precondition(lambda self: self.store.tier._index.segments)
    @rule(data=st.data())
    def a_bit_of_a_payload_flips(self, data):
        segment = data.draw(
            st.sampled_from(sorted(self.store.tier._index.segments.values(), key=lambda one: one.serial))
        )
        hit = data.draw(st.sampled_from(sorted(segment.records.values(), key=lambda one: one.offset)))
        file = self.parent / "cache" / segment.name
        whole = bytearray(file.read_bytes())
        whole[hit.offset] ^= 1
        file.write_bytes(whole)
        self.damaged.add(hit.key)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def export(self, data):
        session, version = data.draw(st.sampled_from(sorted(self.sessions)))
        path = self.parent / "exported"
        try:
            self.store.export(session, version, to_file(path))
        except StorageError as exc:
            check_error(exc, "damaged")
            assert self.damaged
            return
        saved = self.sessions[session, version]
        there = list(takewhile(self.store.tier.find, saved.blocks))
        self.exported = replace(saved, blocks=tuple(there), num_kept=4 * len(there))

    @precondition(lambda self: self.exported)
    @rule()
    def import_(self):
        at = self.exported.session_id, self.exported.version
        missing = {key for key in self.exported.blocks if not self.store.tier.find(key)}
        try:
            self.store.import_(from_file(self.parent / "exported"))
        except StorageError as exc:
            check_error(exc, "do not fit")
            return
        self.sessions[at] = self.exported
        self.damaged -= missing

    @rule()
    def purge(self):
        self.store.purge()
        self.sessions.clear()
        self.damaged.clear()

    def referenced(self):
        return {key for saved in self.sessions.values() for key in saved.blocks}

    @invariant()
    def sessions_are_what_was_persisted(self):
        if not hasattr(self, "store"):
            return
        heads = {(head.session_id, head.version) for head in self.store.sessions.heads()}
        assert heads == set(self.sessions)
        for at, saved in self.sessions.items():
            assert self.store.sessions.load(*at) == saved

    @invariant()
    def blocks_are_right_and_lost_only_to_damage(self):
        if not hasattr(self, "store"):
            return
        for key in self.contents:
            was_there = self.store.tier.find(key) is not None
            got = self.store.tier.get([key])
            assert [content(one) for one in got] in ([], [self.contents[key]])
            if was_there and not got:
                assert key in self.damaged
            if key in self.referenced() - self.damaged:
                assert got, "a durable session's block is gone"

    @invariant()
    def figures_are_true(self):
        if not hasattr(self, "store"):
            return
        tier, log = self.store.tier, self.store.sessions
        files = {file.name: file.stat().st_size for file in (self.parent / "cache").iterdir()}
        sizes = [size for name, size in files.items() if name.endswith(".blocks.safetensors")]
        assert tier.stats.bytes == sum(sizes) <= QUOTA_BYTES
        names = (
            set(tier._index.segments) | {kept.file_name for kept in log._entries.values()} | {"key", "key.copy", "lock"}
        )
        assert set(files) == names
        assert all(segment.name in tier._index.segments for segment, _ in tier._index.live.values())
        assert log._references == Counter(key for kept in log._entries.values() for key in set(kept.blocks))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=drawn(150), stateful_step_count=40, deadline=None)
