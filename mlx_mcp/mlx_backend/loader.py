"""Turns a folder into a running model.

Two parts: `prepare` checks files and reads the tokenizer on any thread; `materialise` builds the model on the engine
thread, a slice of the weights at a time, so that rows of other models go on meanwhile. Never runs code that comes with
a model, and reads no weights but safetensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_adapters, load_model

from mlx_mcp.core.memory import Budget
from mlx_mcp.core.ports import LoadedModel, LoadProgress, ModelOptions, ModelSpec, PreparedModel, Report
from mlx_mcp.core.prefill import PrefillOptions
from mlx_mcp.core.sampling import defaults_of
from mlx_mcp.errors import MlxMcpError, ModelError
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.device import SPARE_BYTES
from mlx_mcp.mlx_backend.device_memory import limit_mlx
from mlx_mcp.mlx_backend.pass_memory import PASS_TOKENS, pass_bytes
from mlx_mcp.mlx_backend.runner import Runner
from mlx_mcp.mlx_backend.streams import clear_streams
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer

SLICE_BYTES = 64 << 20
HASHED_BYTES = 64 << 20  # weights of up to so many bytes are told apart by their content
ADAPTER_WEIGHTS = "adapters.safetensors"
FALLBACK_CONTEXT_TOKENS = 4096  # where neither config nor tokenizer says


class MlxLoader:
    """Loads models with mlx_lm.

    `kv_bits` (8, 4 or None) is what their keys and values are stored in, `prefill` what is set for reading prompts.
    `sampling_defaults` says whether what a model's makers recommend for sampling holds. `budget` is what may take how
    much of the device's memory, if that is limited, and `wired_bytes` how much of it macOS keeps resident.
    """

    def __init__(
        self,
        kv_bits: int | None = None,
        prefill: PrefillOptions | None = None,
        sampling_defaults: bool = True,
        budget: Budget | None = None,
        wired_bytes: int = 0,
    ) -> None:
        self.kv_bits, self.sampling_defaults, self.budget = kv_bits, sampling_defaults, budget
        self.wired_bytes = wired_bytes
        self.prefill = prefill or PrefillOptions()

    def prepare(self, spec: ModelSpec, report: Report) -> PreparedModel:
        """Check the files in the folder that `spec` names, and read the tokenizer; see the port.

        Raises:
            ModelError: with what is wrong and what to do.
        """
        assert spec.source != "hub", "what is on the hub is fetched elsewhere"
        folder = Path(spec.location)
        report(LoadProgress("reading the tokenizer"))
        config = read_config(folder)
        weights_bytes = sum(checked_size(path) for path in weight_files(folder))
        try:
            tokenizer = ChatTokenizer(folder, config.get("eos_token_id"), isolated=spec.source != "embedded")
        except MlxMcpError:
            raise
        except Exception as error:  # transformers raises of every kind for a folder it cannot read
            raise ModelError(
                f"The tokenizer in {folder} cannot be read: {error}. Download the model again, or choose another."
            ) from error
        if device.on_cpu() and not is_quantized(config):
            weights_bytes *= 2  # halves become singles, see materialise
        adapter = spec.options.adapter
        if adapter:
            weights_bytes += checked_size(Path(adapter) / ADAPTER_WEIGHTS)
        prepared = PreparedModel(spec.name, folder, config, tokenizer, weights_bytes, spec.options)
        if self.budget is None or self.budget.ceiling_bytes is None:
            return prepared
        kv_bits = self._kv_bits(spec.options)
        taken = pass_bytes(config, max(PASS_TOKENS, self.prefill.on(device.prefill()).idle_tokens), kv_bits)
        return replace(prepared, kv_bits=kv_bits, pass_bytes=taken, budget=self.budget)

    def materialise(self, prepared: PreparedModel) -> Generator[LoadProgress, None, LoadedModel]:
        """Build the model and read its weights a slice at a time; yields the bytes done.

        On a CPU half-precision weights become float32: products of halves run there at a fraction of the speed.

        Raises:
            ModelError: architecture and weights do not fit, or the architecture is not supported.
        """
        mx.clear_cache()  # of what was unloaded for it
        if prepared.budget is not None:
            limit_mlx(prepared.budget, self.wired_bytes)
        try:
            model, _ = load_model(prepared.folder, lazy=True)
        except Exception as error:  # model code raises of every kind for a config or weights it does not expect
            raise ModelError(
                f"{prepared.name!r} cannot be loaded: {error}. Choose another model (list_models shows them), or "
                "convert this one again."
            ) from error
        options = prepared.options
        if options.adapter:
            put_adapter(model, options.adapter)
        if device.on_cpu():
            model.set_dtype(mx.float32)
            mx.set_cache_limit(SPARE_BYTES)  # there MLX keeps 32 MB, less than a row of some thousand tokens
        weights = list(dict(tree_flatten(model.parameters())).values())
        total, done = sum(array.nbytes for array in weights), 0
        yield LoadProgress("reading", 0, total)
        for some in slices(weights):
            mx.eval(some)
            done += sum(array.nbytes for array in some)
            yield LoadProgress("reading", done, total)
        assert isinstance(prepared.tokenizer, ChatTokenizer)
        kv_bits = self._kv_bits(options)
        context = context_tokens(prepared.config, prepared.tokenizer)
        prefill = self.prefill.on(device.prefill())
        recommended = defaults_of(read_generation_config(prepared.folder)) if self.sampling_defaults else {}
        return LoadedModel(
            name=prepared.name,
            runner=Runner(model, kv_bits, prefill.chunk_tokens),
            tokenizer=prepared.tokenizer,
            stop_ids=prepared.tokenizer.stop_ids,
            vocab_size=config_value(prepared.config, "vocab_size") or prepared.tokenizer.vocab_size,
            context_tokens=min(context, options.context_tokens or context),
            weights_bytes=total,
            fingerprint=fingerprint(prepared.folder, kv_bits, options.adapter),
            defaults={**recommended, **options.sampling},
            prefill=prefill,
        )

    def close(self) -> None:
        """See ModelLoader.close."""
        clear_streams()

    def _kv_bits(self, options: ModelOptions) -> int | None:
        return self.kv_bits if options.kv_bits is None else options.kv_bits or None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: it is missing or broken, or wants code of its own to be run.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json. Give one that `mlx_lm.convert` wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'} cannot be read: {error}. Correct it, or download the model again."
        ) from error
    # Where mlx_lm looks first for the tokens that end a turn.
    config["eos_token_id"] = read_generation_config(folder).get("eos_token_id") or config.get("eos_token_id")
    if "model_file" in config:
        raise ModelError(
            f"{folder} wants to run its own Python file ({config['model_file']!r}), which is never done. "
            "Choose another model."
        )
    return config


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json; empty where it is missing or broken, since models do without."""
    with suppress(OSError, ValueError):
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
    return {}


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files, all of which are there.

    Raises:
        ModelError: there are none in safetensors form, or the index names one that is missing.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no model*.safetensors. Other forms (GGUF, pickle) are not read: convert the model with "
            "`mlx_lm.convert`, or choose one from the mlx-community on the hub."
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(named - {path.name for path in files})
        if missing:
            raise ModelError(f"{folder} is incomplete: {', '.join(missing[:4])} missing. Download the model again.")
    return files


def checked_size(path: Path) -> int:
    """The bytes of weights in a safetensors file.

    Raises:
        ModelError: header and length disagree: the file is cut or damaged.
    """
    size = os.path.getsize(path)
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(header_bytes))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if 8 + header_bytes + end != size:
            raise ValueError(f"it should have {8 + header_bytes + end} bytes and has {size}")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} is damaged: {error}. Download or convert the model again.") from error
    return int(end)


def put_adapter(model: Any, folder: str) -> None:
    """Put a LoRA adapter on a model.

    Raises:
        ModelError: it is no adapter of this model.
    """
    try:
        load_adapters(model, folder)
    except Exception as error:  # mlx_lm raises of every kind for an adapter that it does not expect
        raise ModelError(
            f"The adapter in {folder} cannot be put on the model: {error}. Give one that was trained on this model."
        ) from error
    model.eval()


def fingerprint(folder: Path, kv_bits: int | None, adapter: str = "") -> bytes:
    """A digest of what a model's keys and values depend on.

    Of weights of more than HASHED_BYTES that is their headers, sizes and times of change: to read them all would take
    as long as loading them.
    """
    digest = blake2b(f"2 {version('mlx')} {mx.default_device()} {kv_bits}".encode())
    if adapter:
        digest.update(fingerprint(Path(adapter), kv_bits))
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        stat = path.stat()
        digest.update(f"\0{path.name}\0{stat.st_size}\0".encode())
        if path.suffix == ".safetensors" and stat.st_size > HASHED_BYTES:
            digest.update(f"{stat.st_mtime_ns}".encode())
            with path.open("rb") as file:
                digest.update(file.read(struct.unpack("<Q", file.read(8))[0]))
        elif path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"):
            digest.update(path.read_bytes())
    return digest.digest()


def kept_dtype() -> str | None:
    """What keys and values are here, as safetensors files name it; None where that is what the model's weights are."""
    return "F32" if device.on_cpu() else None


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether the weights are stored in fewer than 16 bits."""
    return any(key in config for key in ("quantization", "quantization_config"))


def config_value(config: dict[str, Any], key: str) -> int | None:
    """A number of the config or of its text part, where multi-modal models keep it."""
    value = config.get(key) or config.get("text_config", {}).get(key)
    return int(value) if value else None


def context_tokens(config: dict[str, Any], tokenizer: ChatTokenizer) -> int:
    """How many tokens the model can attend to, prompt and answer together."""
    return config_value(config, "max_position_embeddings") or tokenizer.max_tokens or FALLBACK_CONTEXT_TOKENS


def slices(weights: list[mx.array]) -> Iterator[list[mx.array]]:
    """The weights in runs of about SLICE_BYTES."""
    some: list[mx.array] = []
    for array in weights:
        some.append(array)
        if sum(a.nbytes for a in some) >= SLICE_BYTES:
            yield some
            some = []
    if some:
        yield some
