"""Every file is one that others can open: the safetensors library and MLX find the tensors, by layer and part."""

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Tensor
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.storage.sealed import ALIGNMENT
from mlx_mcp.storage.transfer import to_file
from tests.storage.world import block, key_of, open_store, record

ROOMY = {"quota_bytes": 10**9}
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4}


def layered(name, parent, start, dtypes, num_tokens=4):
    """A block of one layer per dtype, with values that tell layers and parts apart."""
    tensors, data = [], []
    for layer, dtype in enumerate(dtypes):
        for part in ("keys", "values"):
            tensors.append(Tensor(f"layers.{layer}.{part}", dtype, (2, num_tokens, 8)))
            data.append(key_of(f"{name} {layer} {part}") * (2 * num_tokens * 8 * WIDTHS[dtype] // 32))
    form = Form(tuple(LayerCache(CacheKind.FULL) for _ in dtypes), tuple(tensors))
    tokens = tuple(range(start, start + num_tokens))
    return StoredBlock(key_of(name), key_of(parent), start, tokens, 0, True, form, tuple(map(memoryview, data)))


def filled(path, dtypes):
    store = open_store(path / "cache", **ROOMY)
    blocks = [layered("a", "root", 0, dtypes), layered("b", "a", 4, dtypes), layered("tail", "b", 8, dtypes, 3)]
    saved = record("s", blocks, text="odd \N{SNOWMAN}")
    store.persist(blocks, saved)
    store.persist([], record("empty", [], text=""))
    store.export("s", "", to_file(path / "export.safetensors"))
    store.close()
    return blocks, saved, [*sorted((path / "cache").glob("*.safetensors")), path / "export.safetensors"]


@pytest.mark.parametrize("dtypes", [["F32", "U32"], ["BF16", "F16", "F32"]], ids="-".join)
def test_the_safetensors_library_and_mlx_read_every_file(tmp_path, dtypes):
    blocks, saved, files = filled(tmp_path, dtypes)
    assert len(files) == 5  # blocks, the tail, two sessions, the export
    found = {}
    for file in files:
        arrays, metadata = mx.load(str(file), return_metadata=True)
        assert json.loads(metadata["record"])
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == metadata
            assert set(opened.keys()) == set(arrays)
            for name in opened.keys():  # noqa: SIM118  (it is no dict)
                if arrays[name].dtype != mx.bfloat16:  # which NumPy does not have
                    assert opened.get_tensor(name).tobytes() == np.array(arrays[name]).tobytes()
        found[file.name] = arrays
    exported = found["export.safetensors"]
    assert exported["session.tokens"].tolist() == list(saved.tokens)
    assert bytes(exported["session.text"].tolist()).decode() == saved.text
    for n, one in enumerate(blocks):
        for tensor, data in zip(one.form.tensors, one.data, strict=True):
            array_ = exported[f"blocks.{n}.{tensor.name}"]
            assert tuple(array_.shape) == tensor.shape
            assert bytes(np.array(array_.view(mx.uint8))) == bytes(data)
    assert any(name.endswith(".blocks.safetensors") and "blocks.1.layers.0.keys" in found[name] for name in found)


def test_payloads_are_aligned(tmp_path):
    *_, files = filled(tmp_path, ["F32"])
    for file in files:
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % ALIGNMENT == 0


def test_a_file_that_was_read_with_mlx_and_written_again_is_no_file_of_ours(tmp_path):
    *_, files = filled(tmp_path, ["F32"])
    segment = next(file for file in files if ".blocks." in file.name)
    arrays, metadata = mx.load(str(segment), return_metadata=True)
    mx.save_safetensors(str(segment), arrays, metadata)
    store = open_store(tmp_path / "cache", **ROOMY)
    assert store.tier.stats.corrupt == 1
    store.close()


# -- files that an earlier version wrote


def test_blocks_in_the_earlier_form_are_a_miss_a_count_and_removed(tmp_path):
    open_store(tmp_path / "cache").close()
    (tmp_path / "cache" / ("0" * 32 + ".blocks")).write_bytes(b"mlxmcpB1" + bytes(1000))
    store = open_store(tmp_path / "cache")
    assert (store.tier.stats.old, store.tier.stats.corrupt, store.tier.stats.blocks) == (1, 0, 0)
    assert not list((tmp_path / "cache").glob("*.blocks"))
    store.close()


def test_sessions_in_the_earlier_form_are_counted_and_left_alone_until_a_purge(tmp_path):
    open_store(tmp_path / "cache").close()
    old = tmp_path / "cache" / ("0" * 40 + ".session")
    old.write_bytes(b"mlxmcpS1" + bytes(1000))
    (tmp_path / "cache" / ("1" * 40 + ".session.gone")).write_bytes(b"mlxmcpS1" + bytes(1000))
    for _ in range(2):
        store = open_store(tmp_path / "cache")
        assert (store.sessions.num_old, store.sessions.num_damaged, store.sessions.heads()) == (1, 0, [])
        store.close()
    assert old.exists()
    assert not list((tmp_path / "cache").glob("*.gone"))
    store = open_store(tmp_path / "cache")
    store.purge()
    assert store.sessions.num_old == 0
    assert not old.exists()
    store.close()


def test_a_file_of_the_earlier_form_under_a_new_name_is_never_believed(tmp_path):
    store = open_store(tmp_path / "cache")
    store.persist([block("a")], record("s", [block("a")]))
    store.close()
    for file in (tmp_path / "cache").glob("*.safetensors"):
        file.write_bytes(b"mlxmcpB1" + file.read_bytes()[8:])
    store = open_store(tmp_path / "cache")
    assert (store.sessions.heads(), store.tier.stats.blocks) == ([], 0)
    assert (store.sessions.num_damaged, store.tier.stats.corrupt) == (1, 1)
    store.close()
