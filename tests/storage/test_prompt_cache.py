"""Which sessions have no prompt cache, and which prompt caches no session: each is refused with the next step."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Tensor
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.export import reading
from mlx_mcp.storage.folder import Calls, opened
from mlx_mcp.storage.prompt_cache import pieces_of, read_prompt_cache
from mlx_mcp.storage.transfer import from_file, to_file
from tests.storage.world import BLOCK_TOKENS, block, open_store, record

FULL, WINDOW, STATE = LayerCache(CacheKind.FULL), LayerCache(CacheKind.WINDOW, 2), LayerCache(CacheKind.STATE)


def made(*layers, tensors=("layers.0.keys", "layers.0.values"), tokens=BLOCK_TOKENS):
    """A block of such layers, whose tensors have this many tokens."""
    form = Form(layers, tuple(Tensor(name, "U8", (1, tokens, 2)) for name in tensors))
    data = bytes(len(tensors) * tokens * 2)
    return replace(block("a"), form=form, data=(memoryview(data),))


SESSIONS = {
    "no tokens are kept": (made(FULL), {"num_kept": 0}, "take a turn in it, persist it, and export again"),
    "layers have several caches": (made(), {}, "have several caches each, and a prompt cache has one. Export without"),
    "states are of later": (made(STATE), {"num_kept": 2}, "ends within a block. Take another turn in it, persist it"),
    "a layer has nothing": (made(FULL, FULL), {}, "the session's last block has nothing. Persist it again"),
    "tokens are missing": (
        replace(made(WINDOW, tokens=1), window_start=BLOCK_TOKENS - 1),  # of the two that a window has
        {},
        "latest keys and values is not on disk. Persist it again",
    ),
}


@pytest.mark.parametrize("case", SESSIONS)
def test_a_session_that_cannot_be_a_prompt_cache_is_refused_with_the_next_step(tmp_path, case):
    kept, changes, step = SESSIONS[case]
    store = open_store(tmp_path / "cache")
    store.persist([kept], record("s", [kept], **changes))
    store.export("s", "", to_file(tmp_path / "out"))
    with reading(Calls(), from_file(tmp_path / "out")) as exported:
        with pytest.raises(StorageError, match=step):
            list(pieces_of(exported, "tiny"))
    store.close()


def read(path):
    transfer = from_file(path)  # which closes the file at its end
    return read_prompt_cache(opened(Calls(), transfer.fd), "cache")


def keys(tokens):
    return np.zeros((1, 1, tokens, 2), np.float32)


def length(tokens):
    return np.array(tokens, np.int32)


FILES = {
    "a kind of cache that sessions have not": (
        {"1.0": "ChunkedKVCache"},
        {"0.0": keys(4), "0.1": keys(4), "0.2": length(4)},
        "of which sessions have none. Choose another model",
    ),
    "other lengths": (
        {"1.0": "KVCache", "1.1": "KVCache"},
        {"0.0": keys(4), "0.1": keys(4), "0.2": length(4), "1.0": keys(5), "1.1": keys(5), "1.2": length(5)},
        "do not say alike how many tokens there are. Write it again",
    ),
    "fewer tokens than it says": (
        {"1.0": "KVCache"},
        {"0.0": keys(4), "0.1": keys(4), "0.2": length(9)},
        "has another shape than its cache says.* Have mlx_lm.cache_prompt write it again",
    ),
    "no length": (
        {"1.0": "KVCache"},
        {"0.0": keys(4), "0.1": keys(4)},
        r"is no prompt cache that mlx_lm wrote .*\. Have mlx_lm.cache_prompt write it again",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_no_session_can_have_is_refused_with_the_next_step(tmp_path, case):
    metadata, tensors, step = FILES[case]
    save_file(tensors, tmp_path / "cache", {"2.0": ""} | metadata)
    with pytest.raises(StorageError, match=step):
        read(tmp_path / "cache")


@pytest.mark.parametrize("change", [(b'"data_offsets":[0,32]', b'"data_offsets":[0,99]'), (b'"F32"', b'"F16"')])
def test_a_tensor_that_is_not_where_it_should_be_is_told(tmp_path, change):
    save_file({"0.0": keys(4)}, tmp_path / "cache", {"1.0": "KVCache", "2.0": ""})
    data = (tmp_path / "cache").read_bytes()
    assert change[0] in data
    (tmp_path / "cache").write_bytes(data.replace(*change))
    with pytest.raises(StorageError, match=r"0\.0 is not where it should be"):
        read(tmp_path / "cache")
