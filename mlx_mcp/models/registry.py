"""What can be served: the embedded model, the one the user configured, and what the local hub cache holds.

A name is looked up here and nowhere else: no caller can make the server open a path or download a repository that its
user did not name. Reads directory listings and config.json only; imports no mlx.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.sampling import defaults_of
from mlx_mcp.errors import ConfigError, UnknownModel
from mlx_mcp.models.hub_cache import find_weights

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "assets" / "embedded"
EMBEDDED_SUMMARY = (
    "Built in, 0.9M parameters, works offline. It recalls, repeats, lists and counts what it is told and calls tools; "
    "it cannot reason or write. For real work start the server with --model and a folder or hub id, such as "
    "`mlx-mcp serve --model mlx-community/Qwen3-4B-4bit`."
)


@dataclass(frozen=True)
class Entry:
    """A model as list_models shows it."""

    spec: ModelSpec
    default: bool
    weights_bytes: int | None  # None before a download
    context_tokens: int | None
    sampling: dict[str, float] = field(default_factory=dict)  # what its makers recommend, by the names of parameters


class Registry:
    """The models that can be asked for by name.

    `default` is None (the embedded model serves), "embedded", the path of a folder, or a hub id, which is downloaded at
    its first use. `named` are models that the same user has named elsewhere; more may come. `sampling_defaults` says
    whether what makers recommend for sampling holds.
    """

    def __init__(
        self,
        default: str | None = None,
        hub_cache: Path | None = None,
        named: dict[str, ModelSpec] | None = None,
        sampling_defaults: bool = True,
    ) -> None:
        self._named = {} if named is None else named
        self._hub_cache = hub_cache or Path(constants.HF_HUB_CACHE)
        self._embedded = ModelSpec(EMBEDDED, "embedded", str(EMBEDDED_FOLDER), EMBEDDED_SUMMARY)
        self._configured = self._embedded if default in (None, EMBEDDED) else configured(str(default))
        self.nothing_configured = default is None
        self._sampling_defaults = sampling_defaults

    def resolve(self, name: str | None) -> ModelSpec:
        """The model of that name; the default one for None or "default".

        Raises:
            UnknownModel: with the names there are.
        """
        found = self.at_hand(name) or self._specs().get(str(name))
        if found is None:
            raise UnknownModel(str(name), list(self._specs()))
        return found

    def at_hand(self, name: str | None) -> ModelSpec | None:
        """See core.ports.ModelRegistry."""
        if name is None or name == "default":
            return self._configured
        return {spec.name: spec for spec in (self._configured, self._embedded)}.get(name) or self._named.get(name)

    def entries(self) -> list[Entry]:
        """Every model that can be asked for, the default one first."""
        return [self.entry(spec) for spec in self._specs().values()]

    def _specs(self) -> dict[str, ModelSpec]:
        found: dict[str, ModelSpec] = {}
        for spec in (self._configured, self._embedded, *list(self._named.values()), *cached(self._hub_cache)):
            found.setdefault(spec.name, spec)
        return found

    def entry(self, spec: ModelSpec) -> Entry:
        """What there is to say of a model; reads the disk."""
        folder = find_weights(self._hub_cache, spec.location) if spec.source == "hub" else Path(spec.location)
        config = read_json(folder / "config.json") if folder else {}
        generation = read_json(folder / "generation_config.json") if folder and self._sampling_defaults else {}
        return Entry(
            spec,
            default=spec.name == self._configured.name,
            weights_bytes=sum(p.stat().st_size for p in folder.glob("model*.safetensors")) if folder else None,
            context_tokens=config.get("max_position_embeddings")
            or config.get("text_config", {}).get("max_position_embeddings"),
            sampling=defaults_of(generation),
        )


def configured(name: str) -> ModelSpec:
    """The model that the user named on the command line or in the settings.

    Raises:
        ConfigError: it looks like a path and is no folder.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelSpec(path.resolve().name, "folder", str(path.resolve()), f"The folder {path.resolve()}.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(f"No model at {name!r}: give `embedded`, a folder, or a hub id such as 'owner/name'.")
    summary = "From the Hugging Face hub; downloaded at its first use."
    return ModelSpec(name, "hub", name, summary, may_fetch=True)


def cached(hub_cache: Path) -> list[ModelSpec]:
    """Language models of the hub cache that mlx_lm can load, in order of their names."""
    supported = architectures()
    specs = []
    for folder in sorted(hub_cache.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        files = find_weights(hub_cache, repo)
        if files is not None and str(read_json(files / "config.json").get("model_type")).replace("-", "_") in supported:
            specs.append(ModelSpec(repo, "hub", repo, "In the local hub cache."))
    return specs


def architectures() -> set[str]:
    """The model types that mlx_lm has a file for; finds them without importing it."""
    package = importlib.util.find_spec("mlx_lm")
    assert package is not None, "mlx_lm is a dependency"
    assert package.origin is not None, "mlx_lm is a package of files"
    return {path.stem for path in (Path(package.origin).parent / "models").glob("*.py")}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where it is missing or broken, since a listing must not fail over one model."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
