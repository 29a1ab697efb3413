"""What the engine keeps outside of memory, over the real store and a runner that knows its tokens; stepped by hand.

A runner of letters fails if a row is restored from anything but its own tokens, so every answer here is a proof.
"""

import json
import shutil

import pytest

from mlx_mcp.core.cache.misses import MissReason
from mlx_mcp.core.layout import Layout
from mlx_mcp.core.origin import Origin
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.core.slots import KvCost
from mlx_mcp.engine import session_commands
from mlx_mcp.engine.messages import Cancel, Close, Failed, Fork, ListSessions, Persist, Persisted, Prefilled
from mlx_mcp.engine.persistence import PersistenceOptions, Persisting
from mlx_mcp.errors import EngineDead, InvalidRequest, OtherTokenizer, StorageError, UnknownSession, UnknownVersion
from mlx_mcp.storage.store import Store
from tests.engine.hand_io import HandIo
from tests.engine.hearing import hear
from tests.engine.house import House, words

GIGABYTE = 1 << 30


class KeptHouse(House):
    """A house with a store in a folder; `end` and a new one are a restart."""

    def __init__(self, folder, options=None, opened=True, quota_bytes=GIGABYTE, wrap=lambda store: store, **house):
        self.io = HandIo()

        def open_store():
            self.store = Store.open(folder, quota_bytes=quota_bytes, daily_bytes=GIGABYTE)
            return wrap(self.store)

        super().__init__(persisting=Persisting(open_store, self.io, options or PersistenceOptions()), **house)
        self.io.engine = self.engine
        if opened:
            self.settle()

    def settle(self):
        """Let everything come to its end, on both threads."""
        while self.io.work or self.engine.has_work:
            while self.io.work:
                self.io.run()()
                self.engine.check_integrity()
            self.run_steps()

    def run_steps(self):
        for _ in range(2000):
            if not self.engine.has_work or not self.engine.step():
                return
            self.engine.check_integrity()

    def run(self, steps=2000):
        self.settle()

    def ask(self, command, *arguments):
        heard = []
        self.engine.handle(command(hear(self.engine, lambda event: heard.append(event) or True), *arguments))
        self.settle()
        if isinstance(heard[0], Failed):
            raise heard[0].error
        return heard[0] if isinstance(heard[0], Persisted) else heard[0].infos

    def persist(self, session, version="", tenant="ann"):
        return self.ask(Persist, tenant, session, version)

    def fork_version(self, session, version):
        (fork,) = self.ask(lambda *arguments: Fork(*arguments, version=version), "ann", session, 1, ())
        return fork.session_id

    def sessions(self, tenant="ann"):
        return {info.session_id: info for info in self.ask(ListSessions, tenant)}

    def evict(self):
        """Have everything leave memory that can."""
        assert self.pool.reclaim(self.pool.used_bytes - self.pool.protected_bytes)
        self.engine.persistence.offload.flush()
        self.settle()

    def die(self):
        """As a kill ends it: nothing is flushed, and the lock is gone with the process."""
        self.store._folder.close()

    def restored(self, events):
        return next(e.num_restored for e in events if isinstance(e, Prefilled))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def come_back(folder, text):
    """A house after a restart, and the session that it had persisted before."""
    house = KeptHouse(folder)
    session = house.prime(text)
    house.persist(session)
    house.die()
    return KeptHouse(folder), session


def test_a_persisted_session_goes_on_after_a_kill_and_computes_only_what_is_new(folder):
    house = KeptHouse(folder)
    session = house.prime(words(50), name="base")
    assert house.persist("base").num_kept == 50
    house.die()
    house = KeptHouse(folder)
    assert house.sessions()[session].num_tokens == 50
    events = house.say("tail", session, after="user")
    house.run()
    assert (house.restored(events), house.runner.num_computed) == (50, 4 + len(events.text))
    assert house.log(session) == words(50) + "tail" + events.text


def test_whoever_persists_hears_of_it_once_the_store_has_all_of_it(folder):
    house = KeptHouse(folder)
    session, heard = house.prime(words(100)), []

    def told(event):
        record = house.store.sessions.load(session)
        heard.append((type(event), record and all(house.store.tier.find(key) for key in record.blocks)))
        return True

    house.engine.handle(Persist(hear(house.engine, told), "ann", session, ""))
    assert heard == []
    assert house.store.sessions.load(session) is None  # nothing is written before the thread for that has its turn
    house.settle()
    assert heard == [(Persisted, True)]


def test_a_session_on_its_way_to_the_disk_keeps_its_blocks_until_it_is_there(folder):
    house = KeptHouse(folder)
    session = house.prime(words(100))
    house.engine.handle(Persist(99, "ann", session, ""))
    assert house.pool.protected_bytes == house.pool.used_bytes == 100
    assert not house.pool.reclaim(1)
    house.engine.check_integrity()
    house.settle()
    assert house.pool.protected_bytes == 0


def test_what_was_not_persisted_since_is_as_it_was_then(folder):
    house = KeptHouse(folder)
    session = house.open(words(20))
    house.persist(session)
    before = house.log(session)
    house.say("more", session)
    house.run()
    house.die()
    house = KeptHouse(folder)
    house.say("other", session)
    house.run()
    assert house.log(session).startswith(before + "other")


def test_persisting_again_writes_only_what_is_new(folder):
    house = KeptHouse(folder)
    session = house.prime(words(400))
    first = house.persist(session)
    house.say("x", session, after="user", max_tokens=4)
    house.run()
    second = house.persist(session)
    assert first.num_bytes > 400
    assert second.num_bytes < first.num_bytes
    assert house.persist(session).num_bytes == 0


def test_a_version_stays_as_it_was_while_its_session_goes_on(folder):
    house = KeptHouse(folder)
    session = house.prime(words(30), name="base")
    house.persist("base", "v1")
    house.say("on", session, after="user", max_tokens=4)
    house.run()
    house.persist("base")
    fork = house.fork_version("base", "v1")
    assert house.log(fork) == words(30)
    house.die()
    house = KeptHouse(folder)
    fork = house.fork_version("base", "v1")
    events = house.say("apart", fork, after="user")
    house.run()
    assert house.restored(events) == 30
    assert house.log(fork) == words(30) + "apart" + events.text
    with pytest.raises(UnknownVersion, match=r"on disk; it has: v1\. persist_session makes one"):
        house.fork_version("base", "v2")


def test_who_asked_for_the_turns_of_a_session_and_its_versions_survives_a_kill(folder):
    house = KeptHouse(folder)
    session = house.prime(words(30), name="base")
    house.say("one", session, after="user", origin=Origin("ann", 10.0))
    house.run()
    house.persist("base", "v1")
    ends = [len(house.log(session))]
    house.say("|two", session, origin=Origin("bob", 11.0))
    house.run()
    house.persist("base")
    ends.append(len(house.log(session)))
    before = house.engine.sessions.sessions[session].origins
    assert before[1:] == (Origin("ann", 10.0, 30), Origin("bob", 11.0, ends[0]))
    house.die()
    house = KeptHouse(folder)
    fork = house.fork_version("base", "v1")
    house.say("|three", session, origin=Origin("eve", 12.0))
    house.run()
    sessions = house.engine.sessions.sessions
    assert sessions[session].origins == (*before, Origin("eve", 12.0, ends[1]))
    assert sessions[fork].origins == before[:2]
    house.persist(session)  # its text was written by the tokenizer now, and that of the fork is the one from disk
    house.persist(fork)
    for each in (session, fork):
        marks = [part[1] for part in json.loads(house.store.sessions.load(each).text) if isinstance(part, list)]
        assert marks == [origin.begin for origin in sessions[each].origins]


def test_closing_a_persisted_session_removes_its_bytes(folder):
    house = KeptHouse(folder)
    session = house.prime("CANARY" + words(60))
    house.persist(session)
    house.persist(session, "v1")
    assert any(b"CANARY" in path.read_bytes() for path in folder.iterdir())
    house.ask(Close, "ann", (session,))
    assert not any(b"CANARY" in path.read_bytes() for path in folder.iterdir())
    house.die()
    assert KeptHouse(folder).sessions() == {}


def test_a_session_that_was_only_imported_as_a_version_can_be_gone_on_with(folder):
    house = KeptHouse(folder)
    session = house.prime(words(30))
    house.persist(session, "v1")
    house.store.remove(session, "")
    house.die()
    house = KeptHouse(folder)
    events = house.say("on", session, after="user")
    house.run()
    assert house.restored(events) == 30


def test_closing_all_leaves_what_is_persisted(folder):
    house = KeptHouse(folder)
    kept, other = house.open("abc"), house.open("def")
    house.persist(kept)
    assert [info.session_id for info in house.ask(Close, "ann", ())] == [other]
    assert kept in house.sessions()


def test_closing_a_session_that_is_on_its_way_to_the_disk_removes_it_there_too(folder):
    house = KeptHouse(folder)
    session = house.prime(words(60))
    house.engine.handle(Persist(99, "ann", session, ""))
    house.ask(Close, "ann", (session,))
    house.die()
    assert KeptHouse(folder).sessions() == {}


def test_what_can_be_kept_is_said_before_anything_is_written(folder):
    house = KeptHouse(folder)
    with pytest.raises(UnknownSession):
        house.persist("nobody")
    with pytest.raises(InvalidRequest, match=r"is ephemeral, so nothing of it is kept\. Create it without `ephemeral`"):
        house.persist(house.open("abc", ephemeral=True))
    with pytest.raises(InvalidRequest, match="cannot be a version: take 1 to 64 letters"):
        house.persist(house.open("abc"), "../up")
    session = house.open("abc")
    with pytest.raises(UnknownSession):
        house.persist(session, tenant="bob")


def test_a_session_has_so_many_versions_and_no_more(folder, monkeypatch):
    monkeypatch.setattr(session_commands, "MAX_VERSIONS", 1)
    house = KeptHouse(folder)
    session = house.open("abc")
    house.persist(session, "v1")
    with pytest.raises(InvalidRequest, match="has 1 versions, as many as it may; take one of their names"):
        house.persist(session, "v2")
    house.persist(session, "v1")


def test_nothing_on_disk_means_so_and_generations_go_on():
    house = House()
    session = house.open("abc")
    with pytest.raises(StorageError, match="keeps nothing on disk"):
        house.ask(Persist, "ann", session, "")
    assert house.open("abc")


def test_a_second_process_says_who_has_the_folder_and_goes_on_in_memory(folder):
    first = KeptHouse(folder)
    second = KeptHouse(folder)
    session = second.open("abc")
    with pytest.raises(StorageError, match="in use by another process"):
        second.persist(session)
    assert first.persist(first.open("abc")).num_kept


def test_other_weights_are_a_miss_the_tokens_survive_and_the_result_says_so(folder):
    house, session = come_back(folder, words(40))
    model = house.engine.models.by_name["tiny"].model
    object.__setattr__(model, "fingerprint", b"others")
    house.engine.models.by_name["tiny"].scheduler.cache.fingerprint = b"others"
    events = house.say("on", session, after="user")
    house.run()
    assert (house.restored(events), events.cached) == (0, 0)
    assert events.miss.reason is MissReason.OTHER_MODEL
    assert house.log(session) == words(40) + "on" + events.text


def test_a_session_of_another_tokenizer_is_refused_with_the_next_step_and_stays_as_it_was(folder):
    house, session = come_back(folder, "abc")
    model = house.engine.models.by_name["tiny"].model
    object.__setattr__(model, "fingerprint", b"others")
    model.tokenizer.digest = b"capitals"
    for _ in range(2):
        events = house.say("def", session, after="user")
        house.run()
        assert isinstance(events.error, OtherTokenizer)
        assert "so its tokens no longer mean the same. Begin a new session" in str(events.error)
    (fork,) = house.fork(session)
    events = house.say("def", fork, after="user")
    house.run()
    assert isinstance(events.error, OtherTokenizer)
    model.tokenizer.digest = b"letters"
    events = house.say("def", session, after="user")
    house.run()
    assert house.log(session) == "abcdef" + events.text


def test_a_session_from_disk_with_ids_that_the_model_does_not_have_never_reaches_it(folder):
    house, session = come_back(folder, "abc")
    object.__setattr__(house.engine.models.by_name["tiny"].model, "vocab_size", ord("c"))
    events = house.say("aa", session, after="user")
    house.run()
    assert isinstance(events.error, OtherTokenizer)


def test_evicted_blocks_come_back_from_disk_if_they_were_used_twice(folder):
    house = KeptHouse(folder, max_kv_bytes=20_000)
    house.prime(words(100))
    once = words(100, "A")
    house.say(once)
    house.run()
    session = house.open(words(100) + "!")  # the second use of these
    house.evict()
    computed = house.runner.num_computed
    events = house.say("?", session)
    house.run()
    assert house.restored(events) >= 100
    assert house.runner.num_computed - computed < 10 + len(events.text)
    events = house.say(once)
    house.run()
    assert house.restored(events) == 0


def test_an_ephemeral_session_never_reaches_the_disk(folder):
    house = KeptHouse(folder)
    session = house.open("SECRET" + words(60), ephemeral=True)
    house.say("SECRET", session)
    house.run()
    house.evict()
    assert not any(b"SECRET" in path.read_bytes() for path in folder.iterdir())


def test_a_full_queue_drops_blocks_and_holds_up_nobody(folder):
    house = KeptHouse(folder, max_kv_bytes=2000)
    pool, room = house.engine.cache.pool, house.engine.persistence.offload.max_queue_bytes
    session = house.open(words(300))
    house.say("x", session, keep=False)
    house.run()
    assert pool.reclaim(pool.used_bytes)
    house.engine.persistence.offload.flush()
    assert house.engine.persistence.offload.queue_bytes <= room < 300
    assert house.engine.persistence.offload.num_dropped
    house.settle()
    assert house.engine.persistence.offload.queue_bytes == 0
    events = house.say("y", session)
    house.run()
    assert events.text


def test_two_calls_over_one_evicted_prefix_have_it_read_once(folder):
    house, session = come_back(folder, words(100))
    house.ask(Fork, "ann", session, 1, ())
    one, two = (house.say(text, session, keep=False, after="user") for text in ("one", "two"))
    assert sum(1 for _ in house.io.work) == 1
    house.run()
    assert house.restored(one) == 100
    assert two.cached == 100
    assert house.runner.num_computed == 6 + 2 * 59


def test_what_is_damaged_on_disk_is_computed_again(folder):
    house = KeptHouse(folder)
    session = house.prime(words(100))
    house.persist(session)
    house.die()
    for path in folder.glob("*.blocks.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    house = KeptHouse(folder)
    events = house.say("on", session, after="user")
    house.run()
    assert house.log(session) == words(100) + "on" + events.text


def test_a_damaged_session_is_said_to_be(folder):
    house = KeptHouse(folder)
    session = house.prime(words(100))
    house.persist(session)
    (path,) = folder.glob("*.session.safetensors")
    house.die()
    house = KeptHouse(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    events = house.say("on", session, after="user")
    house.run()
    assert isinstance(events.error, UnknownSession)
    assert "What was kept of it on disk is damaged. list_sessions shows yours" in str(events.error)
    assert house.open("abc")


def test_a_turn_that_is_cancelled_while_its_session_wakes_leaves_it_as_it_was(folder):
    house, session = come_back(folder, words(40))
    events = house.say("on", session, after="user")
    house.engine.handle(Cancel(events.sequence_id))
    house.run()
    assert events == []
    assert house.log(session) == words(40)


def test_a_call_that_is_cancelled_while_its_blocks_come_leaves_them_for_others(folder):
    house, session = come_back(folder, words(40))
    house.ask(Fork, "ann", session, 1, ())
    events = house.say("on", session, after="user")
    assert house.engine.step() is False
    house.engine.handle(Cancel(events.sequence_id))
    house.run()
    again = house.say("on", session, after="user")
    house.run()
    assert again.cached == 40


def test_whatever_is_about_sessions_waits_until_those_on_disk_are_known(folder):
    house = KeptHouse(folder)
    session = house.prime(words(40), name="base")
    house.persist(session)
    house.die()
    house = KeptHouse(folder, opened=False)
    heard = []
    house.engine.handle(ListSessions(hear(house.engine, lambda event: heard.append(event) or True), "ann"))
    events = house.say("on", "base", after="user")
    other = house.say("abc")
    house.run_steps()
    assert other.ended
    assert (heard, events) == ([], [])
    house.settle()
    assert [info.session_id for info in heard[0].infos] == [session]
    assert events.text


def test_autosave_keeps_what_has_changed_and_nothing_ephemeral(folder):
    house = KeptHouse(folder, PersistenceOptions(autosave_s=60))
    kept, secret = house.open(words(30)), house.open(words(30, "A"), ephemeral=True)
    house.now += 61
    house.engine.check_time()
    house.settle()
    house.die()
    house = KeptHouse(folder)
    assert kept in house.sessions()
    assert secret not in house.sessions()


def test_at_the_end_sessions_are_saved_and_whoever_persists_is_answered(folder):
    house = KeptHouse(folder, PersistenceOptions(autosave_s=3600))
    asked, changed = house.open(words(30)), house.open(words(40))
    running, heard = house.say("abc"), []
    house.engine.handle(Persist(hear(house.engine, lambda event: heard.append(event) or True), "ann", asked, ""))
    house.engine.stop()
    assert isinstance(running.error, EngineDead)
    assert not house.engine.all_saved
    while house.io.work:
        house.io.run()()
    assert house.engine.all_saved
    assert isinstance(heard[0], Persisted)
    house.engine.close(0.0)
    house = KeptHouse(folder)
    assert {asked, changed} <= set(house.sessions())


def test_a_persisted_session_ends_on_disk_too_when_its_time_has_come(folder):
    house = KeptHouse(folder, PersistenceOptions(unused_ttl_s=1000), session_ttl_s=10)
    kept, short = house.open(words(30)), house.open(words(30), ttl_s=20)
    house.persist(kept)
    house.persist(short)
    house.now += 500
    house.engine.check_time()
    house.settle()
    assert set(house.sessions()) == {kept}
    house.now += 1001
    house.engine.check_time()
    house.settle()
    house.die()
    assert KeptHouse(folder).sessions() == {}


def test_a_name_that_was_given_away_before_the_disk_was_read_stays_given(folder):
    house = KeptHouse(folder)
    old = house.prime("abc", name="base")
    house.persist(old)
    house.die()
    house = KeptHouse(folder, opened=False)
    new = house.say("abc", opens=SessionOptions("base"), context="user", max_tokens=1)
    house.settle()
    assert {info.name for info in house.sessions().values()} == {"base", ""}
    assert house.sessions()[new.session].name == "base"


@pytest.mark.parametrize("layout", [Layout(states=True), Layout(windows=(6,))], ids=["states", "windows"])
def test_states_and_windows_come_back_where_rows_can_go_on_from_them(folder, layout):
    cost = KvCost(token_bytes=1, snapshot_bytes=10)
    house = KeptHouse(folder, layout=layout, cost=cost)
    session = house.open(words(50))
    before = house.log(session)
    house.persist(session)
    house.die()
    house = KeptHouse(folder, layout=layout, cost=cost)
    events = house.say("on", session)
    house.run()
    assert house.restored(events) == len(before)
    assert house.log(session).startswith(before + "on")


def test_a_disk_that_refuses_is_told_and_the_next_persist_may_succeed(folder):
    class Refusing:
        def __init__(self, store):
            self.store, self.refuse = store, True

        def __getattr__(self, name):
            return getattr(self.store, name)

        def persist(self, blocks, record):
            if self.refuse:
                raise StorageError("The disk is full.")
            return self.store.persist(blocks, record)

    made = []
    house = KeptHouse(folder, wrap=lambda store: made.append(Refusing(store)) or made[0])
    session = house.open(words(30))
    with pytest.raises(StorageError, match="full"):
        house.persist(session)
    assert "full" in house.engine.stats.storage
    assert house.open("abc")
    made[0].refuse = False
    house.persist(session)
    assert house.engine.stats.storage == "ok"


def test_hashes_of_one_byte_mix_up_nothing_on_disk(folder):
    house = KeptHouse(folder, hash_bytes=1)
    sessions = [house.prime(words(60, chr(ord("a") + i))) for i in range(20)]
    for session in sessions:
        house.persist(session)
    house.die()
    house = KeptHouse(folder, hash_bytes=1)
    for i, session in enumerate(sessions):
        events = house.say("on", session, after="user")
        house.run()
        assert house.log(session) == words(60, chr(ord("a") + i)) + "on" + events.text


def test_a_copied_folder_serves_as_well(folder, tmp_path):
    house = KeptHouse(folder)
    session = house.prime(words(40))
    house.persist(session)
    house.die()
    shutil.copytree(folder, tmp_path / "copy")
    house = KeptHouse(tmp_path / "copy")
    events = house.say("on", session, after="user")
    house.run()
    assert house.restored(events) == 40
