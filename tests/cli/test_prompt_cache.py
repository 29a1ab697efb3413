"""Sessions go out to mlx_lm as prompt caches, and its prompt caches come in as sessions, with the same next tokens."""

import asyncio
import json
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.utils import load
from typer.testing import CliRunner

from mlx_mcp.chat.message import Message
from mlx_mcp.cli import prompt_cache
from mlx_mcp.cli.main import app
from mlx_mcp.config import Config
from mlx_mcp.core.cache.prefixes import block_key
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.requests import GenerateRequest, Result
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.folder import Calls, opened
from mlx_mcp.storage.prompt_cache import read_prompt_cache
from mlx_mcp.storage.sealed import nbytes_of
from mlx_mcp.storage.store import Store
from mlx_mcp.storage.transfer import from_file
from mlx_mcp.wiring import wire
from tests.effort import drawn
from tests.models_made import make_model

TEXT = "the agent reads the file and calls the tool for the user " * 6  # more than a block, and than a window
TURN = " and then the system reads"
NUM_TOKENS = 12
KINDS = [
    ("llama", None),
    ("llama", 8),
    pytest.param("llama", 4, marks=pytest.mark.long),
    ("gemma3", None),
    pytest.param("qwen3_next", None, marks=pytest.mark.long),
    pytest.param("mamba2", None, marks=pytest.mark.long),
]


class Here:
    """A machine: a cache folder, the settings, a model."""

    def __init__(self, tmp_path, monkeypatch, architecture="llama", kv_bits=None):
        self.path, self.monkeypatch = tmp_path, monkeypatch
        changes = {"head_dim": 64} if kv_bits else {}
        self.model_folder = make_model(tmp_path / "model", architecture, **changes)
        self.kv_bits = kv_bits
        self.use("store")

    def use(self, store):
        values = {
            "STORE_DIR": self.path / store,
            "MAX_SSD_BYTES": 1 << 30,
            "MODEL": self.model_folder,
            **({"KV_BITS": self.kv_bits} if self.kv_bits else {}),
        }
        for name, value in values.items():
            self.monkeypatch.setenv(f"MLX_MCP_{name}", str(value))

    def ask(self, *requests, persist=""):
        """The results of these, by an engine that ends afterwards."""

        async def run():
            client, _ = wire(Config.load())
            try:
                results = []
                for request in requests:
                    async for update in client.generate(request):
                        if isinstance(update, Result):
                            results.append(update)
                if persist:
                    await client.persist("", persist)
                return results
            finally:
                client.close()

        return asyncio.run(run())

    def prime(self, name="base"):
        request = GenerateRequest(
            (Message("user", TEXT),), opens=SessionOptions(name=name), context=True, sampling=Sampling(1)
        )
        return self.ask(request, persist=name)

    def turn(self, session):
        """A turn of the session: what came of it, and the tokens that it added."""
        before = len(self.record(session).tokens)
        request = GenerateRequest((Message("user", TURN),), session=session, sampling=Sampling(NUM_TOKENS))
        [result] = self.ask(request, persist=session)
        return result, self.record(session).tokens[before:]

    def record(self, session):
        store = Store.open(Config.load().store_dir, quota_bytes=1 << 30, daily_bytes=1 << 30)
        try:
            [found] = [head for head in store.sessions.heads() if session in (head.session_id, head.name)]
            return store.sessions.load(found.session_id)
        finally:
            store.close()

    def sessions(self, *arguments, status=0, stdin=None):
        # In a thread of its own: what reads models lets go of what MLX keeps for its thread.
        with ThreadPoolExecutor(1) as apart:
            command = ["sessions", *map(str, arguments)]
            done = apart.submit(CliRunner().invoke, app, command, input=stdin).result()
        assert done.exit_code == status, done.output
        return done.output

    def mlx_lm(self):
        model, tokenizer = load(str(self.model_folder))
        model.set_dtype(mx.float32)
        return model, tokenizer

    def theirs(self, cache, tokens):
        """What mlx_lm says after these tokens in that cache: it must be what followed them."""
        model, _ = self.mlx_lm()
        prompt = mx.array(tokens)
        steps = generate_step(prompt, model, max_tokens=NUM_TOKENS, prompt_cache=cache)
        return [int(token) for token, _ in steps]


@pytest.fixture
def here(tmp_path, monkeypatch):
    return Here(tmp_path, monkeypatch)


def split_turn(here, added, result):
    """The tokens of a turn's prompt, and of its answer."""
    return list(added[: -result.completion_tokens]), list(added[-result.completion_tokens :])


@pytest.mark.parametrize(("architecture", "kv_bits"), KINDS)
def test_a_session_goes_on_in_mlx_lm_with_the_same_tokens_and_comes_back(tmp_path, monkeypatch, architecture, kv_bits):
    here = Here(tmp_path, monkeypatch, architecture, kv_bits)
    here.prime()
    file = tmp_path / "base.safetensors"
    assert here.sessions("export", "base", file, "--as", "prompt-cache").startswith(f"{file}: ")
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert (metadata["model"], metadata["tokenizer_config"]) == (str(here.model_folder), "{}")
    assert [type(one) for one in cache] == [
        QuantizedKVCache if kv_bits and type(made) is KVCache else type(made)
        for made in make_prompt_cache(here.mlx_lm()[0])
    ]
    assert list(here.record("base").tokens) == json.loads(metadata["mlx_mcp"])["tokens"]
    result, added = here.turn("base")
    prompt, answer = split_turn(here, added, result)
    assert here.theirs(cache, prompt)[: len(answer)] == answer

    here.use("elsewhere")
    assert here.sessions("import", file, "--name", "back").endswith(" back\n")
    again, added_again = here.turn("back")
    assert added_again == added
    assert again.restored_tokens > 0


@pytest.mark.parametrize(("architecture", "kv_bits"), KINDS[:-1])
def test_what_mlx_lm_cached_goes_on_here_with_the_same_tokens(tmp_path, monkeypatch, architecture, kv_bits):
    here = Here(tmp_path, monkeypatch, architecture, kv_bits)
    file = cached_by_mlx_lm(here)
    refused = here.sessions("import", file, status=2)
    assert "--prompt" in refused
    assert here.sessions("import", file, "--prompt", "-", "--name", "came", stdin=TEXT).endswith(" came\n")
    result, added = here.turn("came")
    assert result.restored_tokens > 0
    prompt, answer = split_turn(here, added, result)
    assert here.theirs(load_prompt_cache(str(file)), prompt)[: len(answer)] == answer


def cached_by_mlx_lm(here, caches=make_prompt_cache, saved_as=None):
    """A file, as mlx_lm.cache_prompt writes it."""
    model, tokenizer = here.mlx_lm()
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], add_generation_prompt=False, continue_final_message=True
    )
    cache = caches(model)
    options = {"kv_bits": here.kv_bits, "kv_group_size": 64, "quantized_kv_start": 0} if here.kv_bits else {}
    for _ in generate_step(mx.array(tokens), model, max_tokens=0, prompt_cache=cache, **options):
        pass
    file = here.path / "cached.safetensors"
    metadata = {"model": saved_as or str(here.model_folder), "tokenizer_config": "{}"}
    save_prompt_cache(str(file), cache, metadata)
    return file


def test_a_prompt_of_other_tokens_is_refused_with_both_numbers(here):
    refused = here.sessions("import", cached_by_mlx_lm(here), "--prompt", TEXT + "more", status=2)
    assert "exactly the text" in " ".join(refused.split())


def test_keys_and_values_that_would_be_other_here_are_refused_with_the_reason(tmp_path, monkeypatch):
    here = Here(tmp_path, monkeypatch, kv_bits=8)
    file = cached_by_mlx_lm(here)
    monkeypatch.delenv("MLX_MCP_KV_BITS")
    refused = here.sessions("import", file, "--prompt", TEXT, status=2)
    assert "in 8 bits" in refused
    assert "Have mlx_lm.cache_prompt write it the same way" in " ".join(refused.split())


def test_half_precision_is_refused_where_models_compute_in_single(here):
    file = cached_by_mlx_lm(here)
    arrays, metadata = mx.load(str(file), return_metadata=True)
    halves = {name: array.astype(mx.bfloat16) if array.ndim == 4 else array for name, array in arrays.items()}
    mx.save_safetensors(str(file), halves, metadata)
    refused = " ".join(here.sessions("import", file, "--prompt", TEXT, status=2).split())
    assert "BF16, and on this CPU models compute in" in refused
    assert "Convert the model (mlx_lm.convert --dtype float32) and write the file with it" in refused


def test_a_cache_that_drops_tokens_is_refused_with_the_reason(here):
    file = cached_by_mlx_lm(here, lambda model: [RotatingKVCache(64, keep=4) for _ in model.layers])
    assert "--max-kv-size" in here.sessions("import", file, "--prompt", TEXT, status=2)


def test_states_alone_are_refused_for_they_do_not_say_of_how_many_tokens_they_are(tmp_path, monkeypatch):
    here = Here(tmp_path, monkeypatch, "mamba2")
    refused = " ".join(here.sessions("import", cached_by_mlx_lm(here), "--prompt", TEXT, status=2).split())
    assert "has states alone, which do not say of how many tokens they are" in refused
    assert "Of such a model only what `mlx-mcp sessions export` wrote can be taken in" in refused


def test_a_model_that_is_not_here_is_refused_and_can_be_named(here):
    file = cached_by_mlx_lm(here, saved_as="/far/away")
    refused = " ".join(here.sessions("import", file, "--prompt", TEXT, status=2).split())
    assert "The prompt cache is of the model '/far/away', which is not among" in refused
    assert "Set MLX_MCP_MODEL to its folder or hub id" in refused
    here.sessions("import", file, "--prompt", TEXT, "--model", here.model_folder.name)


def test_what_is_no_prompt_cache_is_told_so_in_one_line(here):
    file = here.path / "other.safetensors"
    mx.save_safetensors(str(file), {"x": mx.zeros(3)})
    assert "not a whole export" in here.sessions("import", file, status=2)
    refused = here.sessions("import", file, "--prompt", "x", status=2)
    assert "is no prompt cache of mlx_lm, which --prompt and --model are for: leave these out" in refused


def test_a_disk_that_is_full_while_a_prompt_cache_is_taken_in_is_told(here):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    file = cached_by_mlx_lm(here)
    here.monkeypatch.setattr(prompt_cache, "write_durably", refuse)
    refused = " ".join(here.sessions("import", file, "--prompt", TEXT, status=2).split())
    assert "No space left on device. Make room next to the cache folder" in refused


def test_whatever_a_damaged_prompt_cache_says_it_is_refused_in_one_line_or_read_as_it_is(here):
    file = cached_by_mlx_lm(here)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    rng = random.Random(1)
    for at in [*range(8), *(rng.randrange(8, 8 + length) for _ in range(drawn(400)))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            with opened_file(file) as source:
                cache = read_prompt_cache(source, "file")
                tokens = tuple(range(cache.num_tokens))
                for block in cache.blocks(tokens, 64, b"root", block_key):
                    assert block.nbytes == sum(map(nbytes_of, block.form.tensors))
        except StorageError:
            continue


@contextmanager
def opened_file(path):
    transfer = from_file(path)
    yield opened(Calls(), transfer.fd)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"tokens": [10**6] * 4000}, "does not say which tokens"),
        ({"tokens": [-1] * 4000}, "does not say which tokens"),
        ({"tokens": ["1"] * 4000}, "does not say which tokens"),
        ({"tokens": []}, "does not say which tokens"),
        ({"after": "root"}, "does not say which tokens"),
        ({"fingerprint": "00"}, "computed by another model"),
        (None, "does not say which tokens"),
        ("{", "does not say which tokens"),
    ],
)
def test_what_a_file_says_of_its_session_is_not_believed_where_it_cannot_be(here, said, words):
    here.prime()
    file = here.path / "cache.safetensors"
    here.sessions("export", "base", file, "--as", "prompt-cache")
    arrays, metadata = mx.load(str(file), return_metadata=True)
    own = json.loads(metadata["0.mlx_mcp"])
    metadata["0.mlx_mcp"] = said if isinstance(said, str) else json.dumps(said and own | said)
    mx.save_safetensors(str(file), arrays, metadata)
    model = here.model_folder.name
    assert words in " ".join(here.sessions("import", file, "--model", model, status=2).split())


def test_the_last_token_of_an_answer_is_told_to_be_missing(here):
    here.prime()
    here.turn("base")
    said = here.sessions("export", "base", here.path / "out", "--as", "prompt-cache")
    assert "last 1 tokens" in " ".join(said.split())
