"""What can be served: the embedded model, the one the user configured, and what the local hub cache holds.

A name is looked up here and nowhere else: no caller can make the server open a path or download a repository that its
user did not name. Reads directory listings and config.json only; imports no mlx.
"""

from __future__ import annotations

import importlib.util
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from mlx_mcp.chat.formats.detect import format_of
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.sampling import defaults_of
from mlx_mcp.errors import ConfigError, UnknownModel
from mlx_mcp.models.hub_cache import find_weights
from mlx_mcp.models.settings import ModelSettings, Settings, check_aliases, named, with_adapter

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
    sampling: dict[str, float] = field(default_factory=dict)  # what holds where a call says nothing
    aliases: tuple[str, ...] = ()
    tools: bool | None = None  # whether its chat template takes tools; None where it is not known
    thinks: bool | None = None  # whether it marks thoughts
    architecture: str = ""


class Registry:
    """The models that can be asked for by name.

    `default` is None (the embedded model serves), "embedded", the path of a folder, or a hub id, which is downloaded at
    its first use. `named` are models that the same user has named elsewhere; more may come. `sampling_defaults` says
    whether what makers recommend for sampling holds. Models that `settings` name can be asked for too, also by alias.

    Raises:
        ConfigError: the default, or a name or an alias in the settings, cannot be one.
    """

    def __init__(
        self,
        default: str | None = None,
        hub_cache: Path | None = None,
        named: dict[str, ModelSpec] | None = None,
        sampling_defaults: bool = True,
        settings: Settings | None = None,
    ) -> None:
        self._named = {} if named is None else named
        self._hub_cache = hub_cache or Path(constants.HF_HUB_CACHE)
        self._settings = settings or Settings()
        embedded = self._settings.dressed(ModelSpec(EMBEDDED, "embedded", str(EMBEDDED_FOLDER), EMBEDDED_SUMMARY))
        self.nothing_configured = default is None
        default = self._settings.default_named(default)
        self._configured = (
            embedded if default in (None, EMBEDDED) else self._settings.dressed(found_by(str(default), embedded))
        )
        self._own = {spec.name: spec for spec in (self._configured, embedded)}  # what the user has named
        at = {name: self._of_settings(name, own) for name, own in self._settings.by_name.items()}
        aliases = check_aliases(self._settings, [*self._own, *at])
        self.aliases = {alias: at[name] for alias, name in aliases.items()}
        self._sampling_defaults = sampling_defaults

    def _of_settings(self, name: str, own: ModelSettings) -> str:
        """Note a model that the settings name, by its name or as the command line would; returns its name."""
        if name not in self._own:
            spec = found_by(name, self._own[EMBEDDED])
            known = self._own.setdefault(spec.name, self._settings.dressed(spec, own))
            if known.location != spec.location:
                raise ConfigError(
                    f"Two models are named {spec.name!r}: {known.location} and {spec.location}. Rename one of the "
                    "folders."
                )
            self._own[spec.name] = self._settings.dressed(spec, own)
            if spec.name == self._configured.name:
                self._configured = self._own[spec.name]
            return spec.name
        return name

    def resolve(self, name: str | None) -> ModelSpec:
        """The model of that name or alias; the default one for None or "default".

        Raises:
            UnknownModel: with the names there are.
        """
        found = self.at_hand(name) or self._specs().get(str(name))
        if found is None:
            raise UnknownModel(str(name), [*self._specs(), *self.aliases])
        return found

    def at_hand(self, name: str | None) -> ModelSpec | None:
        """See core.ports.ModelRegistry."""
        if name is None or name == "default":
            return self._configured
        name = self.aliases.get(name, name)
        return self._own.get(name) or self._named.get(name)

    def entries(self) -> list[Entry]:
        """Every model that can be asked for, the default one first."""
        return [self.entry(spec) for spec in self._specs().values()]

    def _specs(self) -> dict[str, ModelSpec]:
        found: dict[str, ModelSpec] = {}
        here = map(self._settings.dressed, cached(self._hub_cache))
        for spec in (*self._own.values(), *list(self._named.values()), *here):
            found.setdefault(spec.name, spec)
        return found

    def entry(self, spec: ModelSpec) -> Entry:
        """What there is to say of a model; reads the disk."""
        folder = find_weights(self._hub_cache, spec.location) if spec.source == "hub" else Path(spec.location)
        config = read_json(folder / "config.json") if folder else {}
        generation = read_json(folder / "generation_config.json") if folder and self._sampling_defaults else {}
        options, context = spec.options, config_context(config)
        template = template_text(folder) if folder else None
        return Entry(
            spec,
            default=spec.name == self._configured.name,
            weights_bytes=sum(p.stat().st_size for p in folder.glob("model*.safetensors")) if folder else None,
            context_tokens=min(filter(None, (context, options.context_tokens)), default=None),
            sampling=defaults_of(generation) | dict(options.sampling),
            aliases=tuple(alias for alias, name in self.aliases.items() if name == spec.name),
            tools=None if template is None else "tools" in template,
            thinks=None if template is None else bool(format_of(template, ()).thoughts),
            architecture=str(config.get("model_type") or ""),
        )


def found_by(name: str, embedded: ModelSpec) -> ModelSpec:
    """The model that the user named: the embedded one, perhaps with an adapter, or see `named`.

    Raises:
        ConfigError: there can be no such model.
    """
    base, _, adapter = name.rpartition("+")
    if name == EMBEDDED:
        return embedded
    return with_adapter(embedded, Path(adapter).expanduser()) if base == EMBEDDED else named(name)


def config_context(config: dict[str, Any]) -> int | None:
    """The tokens of context that a config names; None where it names none."""
    found = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return int(found) if found else None


def template_text(folder: Path) -> str | None:
    """The text of all chat templates of a folder; None where it has none."""
    texts = []
    with suppress(OSError, UnicodeError):
        texts.append((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(folder / name).get("chat_template")
        texts += [str(found)] if found else []
    return "\n".join(texts) or None


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
