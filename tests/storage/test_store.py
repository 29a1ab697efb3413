"""One folder as a whole: persisting writes what is new, removing leaves nothing, a file carries a session elsewhere."""

import os

import pytest

from mlx_mcp.core.origin import Origin
from mlx_mcp.errors import FolderInUse, StorageError
from mlx_mcp.storage import session_log
from mlx_mcp.storage.transfer import from_file, to_file
from tests.storage.world import T0, Op, block, check_session, content, key_of, open_store, perform, record

ROOMY = {"quota_bytes": 10**9}


def everything(path):
    return b"".join(file.read_bytes() for file in path.iterdir())


def there(store, names):
    return "".join(name for name in names if store.tier.find(key_of(name)))


def test_a_persisted_session_is_there_after_a_restart(tmp_path):
    store = open_store(tmp_path / "cache")
    perform(store, Op("persist", "a0", 3))
    store.close()
    store = open_store(tmp_path / "cache")
    assert check_session(store, "a0", "") == 3
    store.close()


def test_persisting_again_writes_only_what_is_new(tmp_path):
    store = open_store(tmp_path / "cache", **ROOMY)
    first = [block(f"{n}", 100_000) for n in range(10)]
    assert store.persist([*first, block("tail")], record("s", [*first, block("tail")])) > 1_000_000
    assert store.persist([*first, block("tail")], record("s", [*first, block("tail")])) == 0
    second = [*first, block("10", 100_000), block("new tail")]
    assert 100_000 < store.persist(second, record("s", second)) < 110_000
    assert not store.tier.find(key_of("tail")), "the tail that was replaced is gone"
    store.close()


def test_a_fork_shares_its_parents_blocks_and_each_can_go_alone(tmp_path):
    store = open_store(tmp_path / "cache")
    parent, fork = [block("a"), block("p")], [block("a"), block("f")]
    store.persist(parent, record("parent", parent))
    store.persist(fork, record("fork", fork, parent_id="parent"))
    store.remove("parent")
    assert there(store, "apf") == "af"
    store.remove("fork")
    assert there(store, "apf") == ""
    store.close()


def test_a_session_that_needs_blocks_which_are_nowhere_is_refused(tmp_path):
    store = open_store(tmp_path / "cache")
    with pytest.raises(StorageError, match=r"1 of the session's 2 blocks are not on disk\. Persist it again"):
        store.persist([block("a")], record("s", [block("a"), block("tail")]))
    assert store.sessions.heads() == []
    store.close()


def test_blocks_offloaded_before_are_not_written_again_and_stay_while_the_session_does(tmp_path):
    store = open_store(tmp_path / "cache", quota_bytes=35_000)
    blocks = [block("a", 10_000), block("tail", 10_000)]
    store.tier.put(blocks, offload=True)
    assert store.persist(blocks, record("s", blocks)) == 0
    for name in "bcd":
        store.tier.put([block(name, 10_000)], offload=True)
    assert len(store.tier.get([one.key for one in blocks])) == 2
    store.close()


def test_blocks_that_a_session_on_its_way_needs_are_not_evicted_for_its_others(tmp_path):
    store = open_store(tmp_path / "cache", quota_bytes=45_000)
    for name in ("a", "x", "y", "z"):
        store.tier.put([block(name, 10_000)], offload=True)
    blocks = [block(name, 10_000) for name in ("a", "b", "c", "tail")]
    store.persist(blocks[1:], record("s", blocks))
    assert len(store.tier.get([one.key for one in blocks])) == 4
    store.close()


def test_removing_leaves_no_byte_of_the_session(tmp_path):
    canary = b"canary-in-the-keys-and-values"
    blocks = [block("shared"), block("mine", data=(memoryview(canary),)), block("tail", data=(memoryview(canary),))]
    store = open_store(tmp_path / "cache")
    store.tier.put([block("other"), *blocks], offload=True)
    store.persist(blocks, record("s", blocks, text="canary in the text", name="canary-name"))
    store.persist(blocks, record("s", blocks, text="canary in the text", version="v1"))
    store.persist([], record("t", [block("shared")]))
    assert canary in everything(tmp_path / "cache")
    assert store.remove("s") == 2
    assert b"canary" not in everything(tmp_path / "cache")
    assert [content(one) for one in store.tier.get([key_of("shared")])] == [content(block("shared"))]
    store.close()


def test_purging_leaves_nothing_at_all(tmp_path):
    store = open_store(tmp_path / "cache")
    perform(store, Op("persist", "a0", 2))
    perform(store, Op("offload", "b0", 2))
    (tmp_path / "cache" / "x.session.safetensors.bad").write_bytes(b"damaged")
    (tmp_path / "cache" / "x.blocks.safetensors").write_bytes(b"damaged")
    store.purge()
    assert sorted(os.listdir(tmp_path / "cache")) == ["key", "key.copy", "lock"]
    assert store.sessions.heads() == []
    assert store.tier.stats.blocks == store.tier.stats.bytes == 0
    perform(store, Op("persist", "a0", 2))
    store.close()


def test_expired_sessions_go_with_their_blocks(tmp_path):
    store = open_store(tmp_path / "cache")
    store.persist([block("a")], record("short", [block("a")], ttl_s=60.0))
    store.persist([block("b")], record("long", [block("b")], ttl_s=600.0))
    assert [head.session_id for head in store.expire(T0 + 61)] == ["short"]
    assert there(store, "ab") == "b"
    store.close()


def test_a_folder_in_use_is_refused_and_free_again_after_close(tmp_path):
    store = open_store(tmp_path / "cache")
    with pytest.raises(FolderInUse):
        open_store(tmp_path / "cache")
    store.close()
    open_store(tmp_path / "cache").close()


def test_a_session_travels_in_one_file(tmp_path):
    blocks = [block(f"{n}", 1000 + n) for n in range(70)]
    saved = record("s", blocks, origins=(Origin("claude-code 2.1.332", T0, 0), Origin("\N{SNOWMAN}", T0, 8)))
    here, there_ = open_store(tmp_path / "here", **ROOMY), open_store(tmp_path / "there", **ROOMY)
    here.persist(blocks, saved)
    nbytes = here.export("s", "", to_file(tmp_path / "s.mlx-session"))
    assert (tmp_path / "s.mlx-session").stat().st_size == nbytes
    assert (tmp_path / "s.mlx-session").stat().st_mode & 0o777 == 0o600
    assert there_.import_(from_file(tmp_path / "s.mlx-session")).session_id == "s"
    here.close()
    there_.close()
    store = open_store(tmp_path / "there", **ROOMY)
    assert store.sessions.load("s") == saved
    assert [content(one) for one in store.tier.get(saved.blocks)] == [content(one) for one in blocks]
    store.close()


def test_a_session_of_a_version_that_knew_no_turns_is_read_and_knows_none(tmp_path, monkeypatch):
    describe = session_log.describe

    def as_before(saved):
        said, payload = describe(saved)
        del said["turns"]
        return said, payload

    store = open_store(tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(session_log, "describe", as_before)
        store.persist([block("a")], record("s", [block("a")], origins=(Origin("ann", T0),)))
        store.export("s", "", to_file(tmp_path / "out"))
    store.close()
    store, other = open_store(tmp_path / "cache"), open_store(tmp_path / "other")
    other.import_(from_file(tmp_path / "out"))
    assert store.sessions.load("s") == other.sessions.load("s") == record("s", [block("a")])
    store.close()
    other.close()


@pytest.mark.parametrize(
    "turns", [7, [7], [["ann", T0]], [["ann", T0, 99]], [["a\nb", T0, 0]], [["ann", "now", 0]], [[None, T0, 0]]]
)
def test_an_import_with_turns_that_no_session_can_have_is_refused(tmp_path, monkeypatch, turns):
    describe = session_log.describe
    store = open_store(tmp_path / "cache")
    store.persist([block("a")], record("s", [block("a")]))
    with monkeypatch.context() as patched:
        patched.setattr(
            session_log, "describe", lambda saved: (describe(saved)[0] | {"turns": turns}, describe(saved)[1])
        )
        store.export("s", "", to_file(tmp_path / "out"))
    with pytest.raises(StorageError, match="out is not a whole export"):
        store.import_(from_file(tmp_path / "out"))
    store.close()


def test_an_export_without_a_session_names_the_next_step(tmp_path):
    store = open_store(tmp_path / "cache")
    with pytest.raises(StorageError, match="Persist it first"):
        store.export("nobody", "", to_file(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    store.close()


def test_a_damaged_export_is_refused_wherever_the_damage_is_and_nothing_of_it_stays(tmp_path):
    blocks = [block("a", 90), block("tail", 50)]
    here, there_ = open_store(tmp_path / "here"), open_store(tmp_path / "there")
    here.persist(blocks, record("s", blocks))
    here.export("s", "", to_file(tmp_path / "out"))
    whole = (tmp_path / "out").read_bytes()
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    damaged += [whole[:end] for end in range(0, len(whole), 11)]
    for data in damaged:
        (tmp_path / "out").write_bytes(data)
        with pytest.raises(StorageError, match="not a whole export"):
            there_.import_(from_file(tmp_path / "out"))
    assert there_.sessions.heads() == []
    assert there_.tier.stats.blocks == 0
    here.close()
    there_.close()


def test_a_session_whose_blocks_were_damaged_meanwhile_is_not_exported(tmp_path):
    store = open_store(tmp_path / "cache")
    blocks = [block("a", 90), block("tail", 50)]
    store.persist(blocks, record("s", blocks))
    for path in (tmp_path / "cache").iterdir():
        data = path.read_bytes()
        at = data.find(bytes(blocks[0].data[0]))
        if at >= 0:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(StorageError, match=r"A block of the session is damaged, or was changed meanwhile\. Export it"):
        store.export("s", "", to_file(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    store.close()


def test_an_import_never_takes_over_another_tenants_session(tmp_path):
    here, there_ = open_store(tmp_path / "here"), open_store(tmp_path / "there")
    here.persist([block("a")], record("s", [block("a")]))
    here.export("s", "", to_file(tmp_path / "out"))
    there_.persist([], record("s", [], tenant="bob"))
    with pytest.raises(StorageError, match=r"Another tenant has a session of that handle\. Remove it first"):
        there_.import_(from_file(tmp_path / "out"))
    assert there_.sessions.load("s").tenant == "bob"
    here.close()
    there_.close()


def test_what_was_persisted_for_no_session_is_cleared_away_at_the_next_start(tmp_path):
    store = open_store(tmp_path / "cache")
    store.tier.put([block("a")])
    store.tier.put([block("b")], offload=True)
    store.close()
    store = open_store(tmp_path / "cache")
    assert there(store, "ab") == "b"
    store.close()


def test_blocks_stay_while_the_file_of_their_session_is_damaged(tmp_path):
    store = open_store(tmp_path / "cache")
    store.persist([block("a")], record("s", [block("a")]))
    store.close()
    [manifest] = (tmp_path / "cache").glob("*.session.safetensors")
    manifest.write_bytes(b"damaged")
    store = open_store(tmp_path / "cache")
    assert there(store, "a") == "a"
    assert store.sessions.num_damaged == 1
    store.close()
