"""What a user does to sessions on disk while the engine has the folder open; stepped by hand, over the real store."""

import threading

import pytest

from mlx_mcp.core.durable import find_heads
from mlx_mcp.engine.io_thread import IoThread
from mlx_mcp.engine.messages import Export, Failed, Heads, Import, OnDisk, Persist, Purge, Read, Remove, Told
from mlx_mcp.errors import InvalidRequest, NotKeptHere, NotOnDisk, StorageError, UnknownSession
from mlx_mcp.storage import export as export_module
from mlx_mcp.storage.transfer import from_file, to_file
from tests.engine.hearing import hear
from tests.engine.house import House, words
from tests.engine.test_persistence import KeptHouse

TURN = {"after": "user", "max_tokens": 4}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def begin(house, what):
    """Have something done on disk; what is heard of it comes in the list that is returned."""
    heard = []
    house.engine.handle(OnDisk(hear(house.engine, lambda event: heard.append(event) or True), what))
    return heard


def outcome(heard):
    (event,) = heard
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Told)
    return event.value


def do(house, what):
    heard = begin(house, what)
    house.settle()
    return outcome(heard)


def export(house, session, path, version=""):
    return do(house, Export(session, version, to_file(path)))


def exported(tmp_path, text, name="base"):
    """What another machine exported: the file, and the session's handle."""
    house = KeptHouse(tmp_path / "elsewhere")
    session = house.prime(text, name=name)
    house.persist(session)
    export(house, session, tmp_path / "file")
    house.die()
    return tmp_path / "file", session


def bytes_in(folder):
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_a_session_that_is_removed_ends_in_memory_too_and_leaves_no_bytes(folder):
    house = KeptHouse(folder)
    session = house.prime("CANARY" + words(60), name="base")
    house.persist(session)
    house.persist(session, "v1")
    assert do(house, Remove("base")) == 2
    assert b"CANARY" not in bytes_in(folder)
    assert house.sessions() == {}
    assert house.say("x", session).error.args == UnknownSession(session).args
    house.die()
    assert KeptHouse(folder).sessions() == {}


def test_removing_a_session_ends_the_turn_that_goes_on_with_it(folder):
    house = KeptHouse(folder)
    session = house.prime(words(20))
    house.persist(session)
    house.runner.endless = True
    events = house.say("on and on", session, **TURN | {"max_tokens": 1000})
    house.engine.step()
    house.engine.step()
    heard = begin(house, Remove(session))
    house.io.run_all()
    assert outcome(heard) == 1
    assert isinstance(events.error, UnknownSession)
    assert not house.engine.has_work
    house.engine.check_integrity()


def test_removing_a_session_that_wakes_leaves_it_neither_here_nor_there(folder):
    house = KeptHouse(folder)
    session = house.prime(words(20))
    house.persist(session)
    house.die()
    house = KeptHouse(folder)
    heard = begin(house, Remove(session))
    events = house.say("tail", session, **TURN)  # reads it, before it is removed
    house.settle()
    assert outcome(heard) == 1
    assert isinstance(events.error, UnknownSession)
    assert house.sessions() == {}


def test_removing_comes_after_the_persisting_that_was_under_way(folder):
    house = KeptHouse(folder)
    session = house.prime("CANARY" + words(20))
    persisted = []
    house.engine.handle(Persist(hear(house.engine, lambda event: persisted.append(event) or True), "ann", session, ""))
    assert do(house, Remove(session)) == 1
    assert not isinstance(persisted[0], Failed)
    assert b"CANARY" not in bytes_in(folder)
    assert house.sessions() == {}


def test_a_session_loses_a_version_and_nothing_else(folder):
    house = KeptHouse(folder)
    session = house.prime(words(30), name="base")
    house.persist("base", "v1")
    house.persist("base", "v2")
    assert do(house, Remove("base", "v1")) == 1
    info = house.sessions()[session]
    assert (info.versions, info.persisted) == (("v2",), True)
    assert do(house, Remove("base", "")) == 1
    info = house.sessions()[session]
    assert (info.versions, info.persisted) == (("v2",), False)
    house.persist("base")
    assert house.sessions()[session].persisted
    house.say("tail", session, **TURN)
    house.run()


def test_a_session_that_rests_on_a_removed_state_rests_on_another_one_or_ends(folder):
    house = KeptHouse(folder)
    session = house.prime(words(30), name="base")
    house.persist("base", "v1")
    house.die()
    house = KeptHouse(folder)
    assert do(house, Remove("base", "")) == 1
    events = house.say("tail", session, **TURN)
    house.run()
    assert house.log(session) == words(30) + "tail" + events.text
    house.die()
    house = KeptHouse(folder)
    assert do(house, Remove("base", "v1")) == 1
    assert house.sessions() == {}


def test_a_session_that_wakes_from_a_version_that_is_removed_wakes_from_another(folder):
    house = KeptHouse(folder)
    session = house.prime(words(30), name="base")
    for version in ("v1", "v2"):
        house.persist("base", version)
    do(house, Remove("base", ""))
    house.die()
    house = KeptHouse(folder)  # rests as v1
    heard = begin(house, Remove("base", "v1"))
    house.io.run()()  # it has been found
    remove = house.io.work.pop()
    events = house.say("tail", session, **TURN)
    house.io.work.insert(0, remove)
    house.settle()
    assert outcome(heard) == 1
    assert house.log(session) == words(30) + "tail" + events.text


def test_what_is_not_on_disk_is_told_apart(folder):
    house = KeptHouse(folder)
    house.prime(words(20), name="here")
    for what in (Remove("here"), Read("here"), Export("here", "", to_file(folder.parent / "x"))):
        with pytest.raises(NotOnDisk, match="in memory only"):
            do(house, what)
    with pytest.raises(NotOnDisk, match="mlx-mcp sessions list"):
        do(house, Remove("nobody"))
    house.persist("here", "v1")
    with pytest.raises(NotOnDisk, match=r"no version 'v2' on disk.*'v1'"):
        do(house, Read("here", "v2"))
    assert not (folder.parent / "x").exists()


def test_a_name_that_several_tenants_have_is_not_guessed_about(folder):
    house = KeptHouse(folder)
    house.prime(words(20), name="base")
    house.persist("base")
    house.say(
        words(20),
        tenant="bob",
        session="",
        opens=house.engine.sessions.sessions[find_heads(house.store.sessions.heads(), "base")[0].session_id].options,
        context="user",
        max_tokens=1,
    )
    house.run()
    house.persist("base", tenant="bob")
    with pytest.raises(InvalidRequest, match="2 sessions are named 'base': give one of s_"):
        do(house, Remove("base"))
    assert len(do(house, Heads())) == 2


def test_a_purge_leaves_nothing_on_disk_and_calls_that_run_go_on(folder):
    house = KeptHouse(folder)
    kept, other = house.prime("CANARY" + words(40)), house.prime(words(20, "b"))
    house.persist(kept)
    running = house.say("CANARY" + words(9, "c"), max_tokens=40)
    house.engine.step()
    assert do(house, Purge()) is None
    assert b"CANARY" not in bytes_in(folder)
    assert running.text
    assert list(house.sessions()) == [other]
    assert not house.sessions()[other].persisted
    house.evict()
    assert b"CANARY" not in bytes_in(folder), "what was purged has come back from memory"
    house.persist(other)
    house.die()
    assert list(KeptHouse(folder).sessions()) == [other]


def test_what_is_persisted_while_a_purge_waits_is_not_said_to_be_on_disk(folder):
    house = KeptHouse(folder)
    session = house.prime(words(40))
    heard = begin(house, Purge())
    house.io.run()()  # sessions on disk were looked for
    house.engine.handle(Persist(99, "ann", session, "v1"))
    house.settle()
    assert outcome(heard) is None
    assert do(house, Heads()) == []
    info = house.sessions()[session]
    assert (info.persisted, info.versions) == (False, ())
    house.say("tail", session, **TURN)
    house.run()
    assert house.persist(session).num_kept > 40


def test_a_long_export_lets_others_have_the_disk_and_is_of_one_moment(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SEGMENT_BLOCKS", 2)
    house = KeptHouse(folder)
    session = house.prime(words(90), name="base")
    house.persist("base")
    parts = []

    def meanwhile():
        """A turn, and what replaces the end of the session on disk; then a part of the export."""
        parts.append(1)
        if len(parts) == 1:
            house.say("more", session, **TURN)
            house.run_steps()
            call_id = hear(house.engine, lambda event: parts.append(event) or True)
            house.engine.handle(Persist(call_id, "ann", session, ""))

    heard = begin(house, Export("base", "", transfer := to_file(tmp_path / "file")))
    between = transfer.between
    transfer.between = lambda: (meanwhile(), between())
    house.settle()
    assert outcome(heard) == (tmp_path / "file").stat().st_size
    assert len(parts) > 5
    assert parts[1] != 1, "the session was persisted in the middle of the export"
    assert transfer.done_bytes == transfer.total_bytes > 0
    house.die()
    there = KeptHouse(tmp_path / "there")
    head = do(there, Import(from_file(tmp_path / "file")))
    assert (head.session_id, head.num_tokens) == (session, 90)
    events = there.say("tail", session, **TURN)
    there.run()
    assert there.restored(events) == 90


def test_a_session_that_is_removed_while_it_is_exported_is_exported_whole_and_then_gone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SEGMENT_BLOCKS", 2)
    house = KeptHouse(folder)
    session = house.prime("CANARY" + words(60))
    house.persist(session)
    removing = []
    heard = begin(house, Export(session, "", transfer := to_file(tmp_path / "file")))
    between = transfer.between

    def remove_it():
        if not removing:
            removing.append(begin(house, Remove(session)))
        between()

    transfer.between = remove_it
    house.settle()
    assert outcome(heard) > 60
    assert outcome(removing[0]) == 1
    assert b"CANARY" not in bytes_in(folder)
    there = KeptHouse(tmp_path / "there")
    assert do(there, Import(from_file(tmp_path / "file"))).num_kept == 66


def test_an_export_that_nobody_wants_any_more_leaves_no_file(folder, tmp_path):
    house = KeptHouse(folder)
    session = house.prime(words(60))
    house.persist(session)
    transfer = to_file(tmp_path / "file")
    transfer.stop()
    with pytest.raises(
        StorageError, match=r"The transfer was stopped, and nothing of it was kept\. Run the command again"
    ):
        do(house, Export(session, "", transfer))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_transfers_end_when_the_engine_does(folder, tmp_path, monkeypatch):
    house = KeptHouse(folder)
    session = house.prime(words(60))
    house.persist(session)
    heard = begin(house, Export(session, "", to_file(tmp_path / "file")))
    house.engine.stop()
    house.io.run_all()
    with pytest.raises(
        StorageError, match=r"The transfer was stopped, and nothing of it was kept\. Run the command again"
    ):
        outcome(heard)


def test_an_import_takes_the_place_of_a_session_that_lost_nothing_by_it(folder, tmp_path):
    file, session = exported(tmp_path, words(40))
    house = KeptHouse(folder)
    assert do(house, Import(from_file(file))).name == "base"
    events = house.say("tail", "base", **TURN)
    house.run()
    assert house.restored(events) == 40
    with pytest.raises(InvalidRequest, match="gone on since it was persisted"):
        do(house, Import(from_file(file)))
    assert house.log(session) == words(40) + "tail" + events.text
    house.persist("base")
    do(house, Import(from_file(file)))
    assert house.sessions()[session].num_tokens == 40
    again = house.say("other", "base", **TURN)
    house.run()
    assert house.log(session) == words(40) + "other" + again.text


def test_an_import_waits_for_no_turn_and_ends_none(folder, tmp_path):
    file, session = exported(tmp_path, words(40))
    house = KeptHouse(folder)
    do(house, Import(from_file(file)))
    house.say("tail", session, **TURN)
    while not house.engine.has_work:
        house.io.run()()
    house.engine.step()
    with pytest.raises(InvalidRequest, match="A turn goes on"):
        do(house, Import(from_file(file)))
    assert session in house.sessions()


def test_an_import_leaves_another_sessions_name_alone(folder, tmp_path):
    file, session = exported(tmp_path, words(40))
    house = KeptHouse(folder)
    other = house.prime(words(20, "b"), name="base")
    with pytest.raises(InvalidRequest, match=rf"named 'base' already: {other}.*--name"):
        do(house, Import(from_file(file)))
    house.persist("base")
    with pytest.raises(InvalidRequest, match="Import it under another name"):
        do(house, Import(from_file(file)))
    with pytest.raises(InvalidRequest, match="cannot be a name"):
        do(house, Import(from_file(file), "no name"))
    assert do(house, Import(from_file(file), "copy")).name == "copy"
    assert {info.name for info in house.sessions().values()} == {"base", "copy"}
    house.die()
    assert {info.name: info.session_id for info in KeptHouse(folder).sessions().values()} == {
        "base": other,
        "copy": session,
    }


def test_a_damaged_file_replaces_nothing(folder, tmp_path):
    file, session = exported(tmp_path, words(40))
    house = KeptHouse(folder)
    do(house, Import(from_file(file)))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match="not a whole export"):
        do(house, Import(from_file(file)))
    events = house.say("tail", session, **TURN)
    house.run()
    assert house.restored(events) == 40


def test_an_import_that_was_persisted_over_meanwhile_is_what_counts(folder, tmp_path):
    """A write that was on its way when the import came is done first, and told to nobody who is gone."""
    file, session = exported(tmp_path, words(40))
    house = KeptHouse(folder)
    do(house, Import(from_file(file)))
    house.say("tail", session, **TURN)
    house.run()
    house.persist(session)
    heard = begin(house, Import(from_file(file)))
    house.engine.handle(Persist(99, "ann", session, "v1"))
    house.settle()
    assert outcome(heard).num_tokens == 40
    info = house.sessions()[session]
    assert (info.num_tokens, info.versions) == (40, ("v1",))
    assert do(house, Read(session)).num_kept == 40


def test_an_engine_that_keeps_nothing_says_so():
    house = House()
    heard = begin(house, Heads())
    with pytest.raises(NotKeptHere, match="This engine keeps nothing on disk"):
        outcome(heard)


def test_a_patient_piece_of_work_lets_others_pass_and_no_other_patient_one():
    done, told, ended = [], [], threading.Event()
    io = IoThread(told.append)

    def background():
        io.submit(lambda: done.append("other background"), lambda _: None, background=True)
        io.submit(lambda: done.append("usual"), lambda _: None)
        io.submit(lambda: done.append("urgent"), lambda _: None, urgent=True)
        io.run_others()
        done.append("background")

    io.submit(background, lambda _: None, background=True)
    assert io.close(ended.set, 20)
    assert ended.is_set()
    assert done == ["urgent", "usual", "background", "other background"]
