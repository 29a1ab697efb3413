"""What a user has set for models by name: options, aliases; and how a model is named on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mlx_mcp.core.ports import ModelOptions, ModelSpec
from mlx_mcp.core.sampling import NEUTRAL, PARAMETERS
from mlx_mcp.errors import ConfigError, nearest

ADAPTER_FILES = ("adapters.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class ModelSettings:
    """What is set for one model."""

    options: ModelOptions = field(default_factory=ModelOptions)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What is set for models by the names that the settings have for them, and for all others."""

    by_name: Mapping[str, ModelSettings] = field(default_factory=dict)
    defaults: ModelOptions = field(default_factory=ModelOptions)

    def dressed(self, spec: ModelSpec, own: ModelSettings | None = None) -> ModelSpec:
        """A model with its options; one that has an adapter keeps it."""
        options = merged((own or self.by_name.get(spec.name) or ModelSettings()).options, self.defaults)
        return replace(spec, options=replace(options, adapter=spec.options.adapter))

    def default_named(self, name: str | None) -> str | None:
        """The name that a default model stands for, if it is an alias."""
        return next((each for each, own in self.by_name.items() if name in own.aliases), name)


def merged(own: ModelOptions, general: ModelOptions) -> ModelOptions:
    """A model's own options, and the general ones where it has none."""
    unset = ModelOptions()
    taken = {
        each.name: getattr(general if getattr(own, each.name) == getattr(unset, each.name) else own, each.name)
        for each in fields(ModelOptions)
    }
    return ModelOptions(**taken | {"sampling": {**general.sampling, **own.sampling}})


def named(name: str) -> ModelSpec:
    """The model that the user named on the command line or in the settings, perhaps with an adapter: MODEL+FOLDER.

    Raises:
        ConfigError: it looks like a path and is no folder, or the adapter is none.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelSpec(path.resolve().name, "folder", str(path.resolve()), f"The folder {path.resolve()}.")
    base, plus, adapter = name.rpartition("+")
    if base and plus:
        return with_adapter(named(base), Path(adapter).expanduser())
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(f"No model at {name!r}: give `embedded`, a folder, or a hub id such as 'owner/name'.")
    summary = "From the Hugging Face hub; downloaded at its first use."
    return ModelSpec(name, "hub", name, summary, may_fetch=True)


def with_adapter(base: ModelSpec, folder: Path) -> ModelSpec:
    """A model with a LoRA adapter on it, which is a model of its own.

    Raises:
        ConfigError: the folder has no adapter.
    """
    lacking = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if lacking:
        raise ConfigError(
            f"{str(folder)!r} is no adapter: it has no {' and no '.join(lacking)}. Give, after `+`, the "
            "folder that `mlx_lm.lora` wrote."
        )
    folder = folder.resolve()
    summary = f"{base.summary} With the adapter {folder}."
    options = replace(base.options, adapter=str(folder))
    return replace(base, name=f"{base.name}+{folder.name}", summary=summary, options=options)


def check_aliases(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """The aliases, with the names in the settings that they stand for.

    Raises:
        ConfigError: one stands for two models, is a model's own name, or cannot be one.
    """
    known, found = {*names, "default"}, dict[str, str]()
    for name, own in settings.by_name.items():
        for alias in own.aliases:
            if re.fullmatch(r"[\w.:-]{1,64}", alias) is None:
                raise ConfigError(
                    f"{alias!r} cannot be an alias: take 1 to 64 letters, digits, dots, dashes, underscores, colons."
                )
            if alias in known or found.get(alias, name) != name:
                raise ConfigError(f"{alias!r} cannot be an alias of {name!r}: it is a name already. Take another one.")
            found[alias] = name
    return found


def sampling_of(values: Mapping[str, Any], where: str) -> dict[str, float]:
    """Sampling defaults from the settings.

    Raises:
        ConfigError: one is none that a model can have, with the name that was probably meant; or is out of range.
    """
    for name, value in values.items():
        if name not in NEUTRAL:
            near = nearest(name, NEUTRAL)
            hint = f"did you mean {near}? Correct it." if near else f"take one of: {', '.join(NEUTRAL)}."
            raise ConfigError(f"{where}: {name} is no default for sampling; {hint}")
        if not PARAMETERS[name].bounds.hold(value):
            raise ConfigError(f"{where}: {name} is {value}; it must be {PARAMETERS[name].words}.")
    return {name: int(value) if name == "top_k" else float(value) for name, value in values.items()}
