"""Sessions as prompt caches of mlx_lm: what the store exported is written as one, and one becomes what it imports.

So it is the same whether the engine has the cache folder open or the command itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlx_mcp.core.durable import SessionRecord, Transfer
from mlx_mcp.errors import InvalidRequest, MlxMcpError, StorageError
from mlx_mcp.storage.export import pieces, reading
from mlx_mcp.storage.folder import Calls, opened, write_durably
from mlx_mcp.storage.prompt_cache import PromptCache, is_prompt_cache, pieces_of, read_prompt_cache
from mlx_mcp.storage.sealed import Unsound, digest
from mlx_mcp.storage.segment import Record, record_of
from mlx_mcp.storage.transfer import from_file, to_file

if TYPE_CHECKING:
    from mlx_mcp.config import Config
    from mlx_mcp.core.ports import PreparedModel

OWN = "mlx_mcp"  # our part of a prompt cache's metadata


def write_prompt_cache(source: Path, file: Path, config: Config) -> tuple[int, int]:
    """Write an exported session as a prompt cache; returns its bytes, and how many of its last tokens are not in it.

    Raises:
        StorageError: of this session there is none, or it cannot be written.
    """
    from mlx_mcp.wiring import registry_of

    target = to_file(file)
    with reading(Calls(), from_file(source)) as exported:
        record = exported.record
        try:
            model = registry_of(config).resolve(record.model).location
        except MlxMcpError:  # it is no longer there; whoever uses the file may know where it is
            model = record.model
        try:
            size = write_durably(Calls(), target.fd, target.file_name, pieces_of(exported, model))
        except OSError as error:
            raise StorageError(
                f"Writing {file} failed: {error.strerror}. Make room, or choose another place."
            ) from error
        return size, len(record.tokens) - record.num_kept


@contextmanager
def as_export(file: Path, prompt: str | None, model: str | None, config: Config) -> Iterator[Transfer]:
    """The file to import: itself, or, while the block lasts, the session that a prompt cache becomes.

    Args:
        file: what `export` wrote, or mlx_lm.
        prompt: what mlx_lm.cache_prompt was given; "-" is read from stdin.
        model: which model it is of.
        config: the settings.

    Raises:
        InvalidRequest: it is not known which tokens a prompt cache is of, or of which model.
        StorageError: it cannot be read, or sessions have no such caches.
    """
    transfer = from_file(file)
    try:
        source = opened(Calls(), transfer.fd)
        found = is_prompt_cache(source)
    except OSError as error:
        raise StorageError(f"Reading {file} failed: {error.strerror}. Give a file that can be read.") from error
    if not found:
        if prompt is not None or model is not None:
            raise InvalidRequest(
                f"{file} is no prompt cache of mlx_lm, which --prompt and --model are for: leave these out."
            )
        yield transfer
        return
    parent = config.store_dir.parent
    with TemporaryDirectory(dir=parent if parent.is_dir() else None, prefix="mlx-mcp-") as folder:
        cache = read_prompt_cache(source, str(file))
        write_export(cache, Path(folder) / "session", file, prompt, model, config)
        transfer = from_file(Path(folder) / "session")
        transfer.file_name = str(file)
        yield transfer


def write_export(
    cache: PromptCache, target: Path, file: Path, prompt: str | None, model: str | None, config: Config
) -> None:
    """Write a prompt cache as an exported session."""
    from mlx_mcp.core.cache.prefixes import block_key, identity_of
    from mlx_mcp.mlx_backend import device
    from mlx_mcp.mlx_backend.loader import fingerprint
    from mlx_mcp.wiring import prefill_options

    own = own_record(cache)
    prepared = prepare(model or str(own.get("model", "")) or cache.metadata.get("model", ""), config)
    print_ = fingerprint(prepared.folder, config.kv_bits)
    if own.get("fingerprint", print_.hex()) != print_.hex():
        raise StorageError(
            f"The keys and values in {file} were computed by another model than {prepared.name!r} is now, or by "
            "another version of MLX. Name the model that they are of with --model, or begin a new session."
        )
    check_precision(cache, file, config)
    tokens, after = tokens_in(cache, own, prepared, file, prompt)
    kept = tokens[: cache.num_tokens]
    chunk_tokens = prefill_options(config).on(device.prefill()).chunk_tokens
    root = block_key(identity_of(print_, config.block_tokens, chunk_tokens, ""), ())
    known: list[Record] = []
    for block in cache.blocks(kept, config.block_tokens, root, block_key):
        known.append(record_of(block, 0, digest(block.data)))
    now = time.time()
    record = SessionRecord(
        session_id="s_" + os.urandom(16).hex(),
        tenant="",
        model=prepared.name,
        name="",
        version="",
        fingerprint=print_,
        tokenizer=prepared.tokenizer.digest,
        num_kept=cache.num_tokens,
        after=after,
        tools=(),
        parent_id="",
        ttl_s=config.persisted_ttl_s,
        pinned=False,
        ephemeral=False,
        saved_at=now,
        used_at=now,
        text=prepared.tokenizer.transcript(tokens),
        tokens=tokens,
        blocks=tuple(block.key for block in known),
    )
    blocks = cache.blocks(kept, config.block_tokens, root, block_key)
    to = to_file(target)
    try:
        digests = [block.digest for block in known]
        write_durably(Calls(), to.fd, to.file_name, pieces(record, known, digests, blocks))
    except (OSError, Unsound) as error:
        raise StorageError(f"Taking in {file} failed: {error}. Make room next to the cache folder.") from error


def own_record(cache: PromptCache) -> dict[str, Any]:
    """What an export of ours says of its session; nothing of a file that says nothing of the kind."""
    try:
        own = json.loads(cache.metadata.get(OWN, "{}"))
    except (ValueError, RecursionError):
        return {}
    return own if isinstance(own, dict) else {}


def prepare(model: str, config: Config) -> PreparedModel:
    """The model, by the name it has here or by where mlx_lm found it; its weights are not read.

    Raises:
        InvalidRequest: there is no such model here.
    """
    from mlx_mcp.wiring import LateLoader, registry_of

    registry = registry_of(config)
    entries = [entry.spec for entry in registry.entries()]
    location = os.path.realpath(model) if os.path.isdir(model) else model
    spec = next((spec for spec in entries if model == spec.name or location == spec.location), None)
    if spec is None:
        raise InvalidRequest(
            f"The prompt cache is of the model {model!r}, which is not among `mlx-mcp models`. Set MLX_MCP_MODEL to "
            "its folder or hub id, or give its name here with --model."
        )
    return LateLoader(config).prepare(spec, lambda progress: None)


def check_precision(cache: PromptCache, file: Path, config: Config) -> None:
    """See that keys and values are stored as they would be here.

    Raises:
        StorageError: they are not.
    """
    from mlx_mcp.mlx_backend.loader import kept_dtype

    for layer, _, source in cache.planes:
        if source.order is None:
            continue
        if not layer.window and layer.bits != (config.kv_bits or 0):
            said = f"in {layer.bits} bits" if layer.bits else "not quantized"
            raise StorageError(
                f"The keys and values in {file} are {said}, and the setting kv_bits is {config.kv_bits or 'unset'}. "
                "Have mlx_lm.cache_prompt write it the same way (--kv-bits, --quantized-kv-start 0), or change kv_bits."
            )
        if not layer.bits and kept_dtype() not in (None, source.tensor.dtype):
            raise StorageError(
                f"The keys and values in {file} are {source.tensor.dtype}, and on this CPU models compute in "
                f"{kept_dtype()}. Convert the model (mlx_lm.convert --dtype float32) and write the file with it."
            )


def tokens_in(
    cache: PromptCache, own: dict[str, Any], prepared: PreparedModel, file: Path, prompt: str | None
) -> tuple[tuple[int, ...], str]:
    """The tokens of the session that a prompt cache becomes, and the role whose message they end in.

    Raises:
        InvalidRequest: nothing says what they are, or what says it does not fit.
    """
    from mlx_mcp.chat.message import Message
    from mlx_mcp.mlx_backend.loader import config_value

    if prompt is None:
        said, after, num_ids = own.get("tokens"), own.get("after"), config_value(prepared.config, "vocab_size") or 0
        # Anybody may have written the file, and MLX reads foreign memory for an id that the model does not have.
        tokens = tuple(said) if isinstance(said, list) else ()
        sound = all(type(token) is int and 0 <= token < num_ids for token in tokens)
        if sound and len(tokens) >= cache.num_tokens == own.get("num_kept") and after in ("user", "assistant"):
            return tokens, str(after)
        raise InvalidRequest(
            f"{file} has the keys and values of {cache.num_tokens} tokens, and does not say which tokens. Give the "
            "text that mlx_lm.cache_prompt was given: --prompt TEXT, or --prompt - to read it from stdin."
        )
    text = sys.stdin.read() if prompt == "-" else prompt
    tokens = prepared.tokenizer.encode_context([Message("user", text)]).ids
    if len(tokens) != cache.num_tokens:
        raise InvalidRequest(
            f"With the chat template of {prepared.name!r} the prompt has {len(tokens)} tokens, and {file} has "
            f"{cache.num_tokens}: give exactly the text that mlx_lm.cache_prompt was given, and the same model."
        )
    return tokens, "user"
