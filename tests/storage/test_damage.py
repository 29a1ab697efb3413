"""Damaged files: whatever was done to them, what is read is what was written, or nothing."""

import json
import os
import random
import re

import pytest

from mlx_mcp.storage import sealed
from mlx_mcp.storage.segment import PROPERTIES
from tests.effort import THOROUGH, drawn
from tests.storage.world import block, content, open_store, record, scratch

BLOCKS = [block("a", 60), block("b", 50), block("tail", 40)]  # two in one file, the tail in another
NUM_SURGERIES = drawn(1200)
STEP = 1 if THOROUGH else 3  # bytes from one place of damage to the next; coprime to 8, so that every bit has its turn
SAVED = record("s", BLOCKS, text="short")
OTHER = record("other", [], text="another file, which nobody damages")


class Damaged:
    """A folder with known content, made again and again with one file damaged."""

    def __init__(self, parent):
        self.path = parent / "cache"
        store = open_store(self.path)
        store.persist(BLOCKS, SAVED)
        store.persist([], OTHER)
        self.key = store._folder.key
        self.body, self.tail = (store.tier._index.live[BLOCKS[at].key][0].name for at in (0, 2))
        self.session = store.sessions._entries["s", ""].file_name
        store.close()
        self.whole = {file.name: file.read_bytes() for file in self.path.iterdir()}

    def restore(self):
        """Have the files as they were."""
        for name in set(os.listdir(self.path)) - set(self.whole):
            (self.path / name).unlink()
        for name, data in self.whole.items():
            (self.path / name).write_bytes(data)

    def check(self):
        """Open it; returns the names of what could be read, all of which is right."""
        store = open_store(self.path)
        try:
            found = [name for name, one in zip(("a", "b", "tail"), BLOCKS, strict=True) if self._is_there(store, one)]
            loaded = store.sessions.load("s")
            assert loaded in (None, SAVED)
            assert store.sessions.load("other") == OTHER
            damage = store.tier.stats.corrupt + store.sessions.num_damaged
            return [*found, *(["s"] if loaded else [])], damage
        finally:
            store.close()

    @staticmethod
    def _is_there(store, one):
        got = store.tier.get([one.key])
        assert [content(each) for each in got] in ([], [content(one)])
        return bool(got)

    def with_file(self, name, data):
        """What can be read when that file says something else."""
        self.restore()
        (self.path / name).write_bytes(data)
        return self.check()

    def payload_begins(self, name):
        return 8 + int.from_bytes(self.whole[name][:8], "little")


@pytest.fixture(scope="module")
def damaged():
    with scratch() as parent:
        yield Damaged(parent)


WITHOUT = {"body": ["tail", "s"], "tail": ["a", "b", "s"], "session": ["a", "b", "tail"]}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", ["body", "tail", "session"])
def test_every_bit_that_is_flipped_costs_what_it_belongs_to_and_no_more(damaged, which):
    name = getattr(damaged, which)
    whole, begin = damaged.whole[name], damaged.payload_begins(name)
    for at in range(0, len(whole), STEP):
        for bit in range(8) if THOROUGH else [at % 8]:
            found, damage = damaged.with_file(name, whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            assert damage >= 1
            if which == "body" and at >= begin:
                assert found == (["b", "tail", "s"] if at < begin + 60 else ["a", "tail", "s"])
            else:
                assert found == WITHOUT[which]


@pytest.mark.parametrize("which", ["body", "tail", "session"])
def test_a_file_cut_short_anywhere_keeps_the_blocks_before_the_cut(damaged, which):
    name = getattr(damaged, which)
    whole, begin = damaged.whole[name], damaged.payload_begins(name)
    for end in range(0, len(whole), STEP):
        found, _ = damaged.with_file(name, whole[:end])
        assert found == (["a", "tail", "s"] if which == "body" and end >= begin + 60 else WITHOUT[which])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(3))
def test_random_surgery_is_never_believed(damaged, seed):
    rng = random.Random(seed)
    names = [damaged.body, damaged.tail, damaged.session]
    for _ in range(NUM_SURGERIES):
        name = rng.choice(names)
        data = bytearray(damaged.whole[name])
        for _ in range(rng.randrange(1, 4)):
            first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
            part = rng.choice(
                [
                    b"",
                    bytes(last - first),
                    rng.randbytes(last - first),
                    damaged.whole[rng.choice(names)][first:last],
                    bytes(data[first:last]) * 2,
                ]
            )
            data[first:last] = part
            if not data:
                break
        damaged.with_file(name, bytes(data))


@pytest.mark.slow  # a figure of the thorough run
def test_these_are_more_than_20_000_files(damaged):
    sizes = [len(damaged.whole[name]) for name in (damaged.body, damaged.tail, damaged.session)]
    assert sum(8 * size + size for size in sizes) + 3 * NUM_SURGERIES > 20_000


@pytest.mark.parametrize(
    ("which", "said", "instead"),
    [
        ("body", rb"\"starts\":[0", rb"\"starts\":[4"),
        ("tail", rb"\"offload\":false", rb"\"offload\":true "),
        ("session", b"ann", b"bob"),
    ],
)
def test_a_head_that_says_something_else_under_the_old_mac_is_not_believed(damaged, which, said, instead):
    name = getattr(damaged, which)
    assert said in damaged.whole[name]
    found, damage = damaged.with_file(name, damaged.whole[name].replace(said, instead, 1))
    assert (found, damage) == (WITHOUT[which], 1)


def test_files_that_change_places_are_not_believed(damaged):
    damaged.restore()
    names = [damaged.body, damaged.tail, damaged.session]
    for one in names:
        for other in names:
            if one != other:
                damaged.with_file(one, damaged.whole[other])


def test_payloads_that_change_places_are_not_believed(damaged):
    whole, begin = damaged.whole[damaged.body], damaged.payload_begins(damaged.body)
    swapped = whole[:begin] + whole[begin + 60 :] + whole[begin : begin + 60]
    assert damaged.with_file(damaged.body, swapped) == (["tail", "s"], 2)


def test_a_copy_of_a_file_is_as_good_as_the_file(damaged):
    damaged.restore()
    (damaged.path / ("0" * 32 + ".blocks.safetensors")).write_bytes(damaged.whole[damaged.body])
    assert damaged.check() == (["a", "b", "tail", "s"], 0)


@pytest.mark.parametrize("plant", ["symlink", "dangling", "loop", "hardlink", "fifo", "folder"])
@pytest.mark.parametrize("which", ["body", "tail", "session"])
def test_what_is_no_plain_file_is_a_miss_and_its_target_unchanged(tmp_path, which, plant):
    damaged = Damaged(tmp_path)
    victim = tmp_path / "victim"
    victim.write_bytes(damaged.whole[getattr(damaged, which)])
    at = damaged.path / getattr(damaged, which)
    at.unlink()
    match plant:
        case "symlink":
            at.symlink_to(victim)
        case "dangling":
            at.symlink_to(tmp_path / "nowhere")
        case "loop":
            at.symlink_to(at)
        case "hardlink":
            os.link(victim, at)
        case "fifo":
            os.mkfifo(at)
        case "folder":
            at.mkdir()
    for _ in range(2):
        found, damage = damaged.check()
        assert found == WITHOUT[which]
        assert damage >= 1
    assert victim.read_bytes() == damaged.whole[getattr(damaged, which)]


# -- heads that say what no writer of ours would, under a MAC that is right


def forged(damaged, name, change):
    """That file with another head, sealed with the folder's own key."""
    whole, begin = damaged.whole[name], damaged.payload_begins(name)
    metadata = json.loads(whole[8:begin])["__metadata__"]
    digests = [bytes.fromhex(found) for found in re.findall("." * 64, metadata["digests"])]
    record, digests = change(json.loads(metadata["record"]), digests)
    said = record.decode("latin-1") if isinstance(record, bytes) else json.dumps(record)
    metadata = json.dumps({"kind": metadata["kind"], "record": said}, separators=(",", ":"))
    tail = metadata.removeprefix('{"kind":').encode() + b"}"
    return sealed.Draft(sealed._KIND + tail, len(digests)).seal(damaged.key, digests) + whole[begin:]


WEIRD = [None, True, -1, 0, 1, 1.5, 2**70, -(2**70), float("nan"), "", "x", "zz", [], [[]], {}, "00" * 32]


def test_heads_that_say_anything_at_all_break_nothing(damaged):
    paths = (
        *((name,) for name in PROPERTIES),
        ("tokens", 0),
        (),
        ("forms", 0),
        ("forms", 0, "tensors", 0),
        ("forms", 0, "layers", 0),
    )
    for name, path in [*((damaged.body, path) for path in paths), (damaged.session, ())]:
        header = json.loads(damaged.whole[name][8 : damaged.payload_begins(name)])
        inner = json.loads(header["__metadata__"]["record"])
        for step in path:
            inner = inner[step]
        for field in inner if isinstance(inner, dict) else range(len(inner)):
            for value in [*WEIRD, "absent"]:

                def change(meta, digests, field=field, value=value, path=path):
                    target = meta
                    for step in path:
                        target = target[step]
                    if value == "absent":
                        del target[field]
                    else:
                        target[field] = value
                    return meta, digests

                damaged.restore()
                (damaged.path / name).write_bytes(forged(damaged, name, change))
                store = open_store(damaged.path)
                for one in BLOCKS:
                    store.tier.get([one.key])
                store.sessions.load("s")
                store.expire(0.0)
                store.close()


@pytest.mark.parametrize(
    "said",
    [b"", b"null", b"[]", b"{}", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50_000],
    ids=lambda said: str(said[:6]),
)
def test_a_sealed_head_that_is_no_object_of_ours_is_a_miss(damaged, said):
    for which in ("body", "session"):
        name = getattr(damaged, which)
        found, damage = damaged.with_file(name, forged(damaged, name, lambda meta, digests: (said, digests)))
        assert found == WITHOUT[which]
        assert damage >= 1


def test_a_head_that_names_a_key_twice_is_a_miss(damaged):
    def twice(meta, digests):
        return {**meta, "keys": [meta["keys"][0]] * 2}, digests

    assert damaged.with_file(damaged.body, forged(damaged, damaged.body, twice))[0] == ["tail", "s"]


def test_a_head_cannot_say_that_payloads_overlap(damaged):
    """Each begins where the one before ends: a longer first one moves the second out of its digest."""

    def longer(meta, digests):
        meta["forms"].append({"layers": [], "tensors": [["longer", "U8", 70]]})
        meta["form"][0] = 2
        return meta, digests

    assert damaged.with_file(damaged.body, forged(damaged, damaged.body, longer))[0] == ["tail", "s"]


def test_a_head_with_more_or_fewer_digests_than_blocks_is_a_miss(damaged):
    for change in (lambda meta, digests: (meta, digests[:1]), lambda meta, digests: (meta, [*digests, bytes(32)])):
        assert damaged.with_file(damaged.body, forged(damaged, damaged.body, change))[0] == ["tail", "s"]
