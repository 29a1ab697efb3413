"""Changes config.toml, and keeps its comments and order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from mlx_mcp.config import listed
from mlx_mcp.errors import ConfigError


def set_alias(path: Path, alias: str, model: str | None) -> bool:
    """Have an alias stand for a model and no other, or for none; returns whether that changed the file.

    Raises:
        ConfigError: the file is no TOML, or cannot be read or written; then it is as it was.
    """
    try:
        text = path.read_bytes().decode() if path.exists() else ""
        document = tomlkit.parse(text)
        models: Any = document.get("models", {})
        for name in list(models):
            of_model = models[name]
            if alias in names_of(of_model) and name != model:
                write_names(of_model, [each for each in names_of(of_model) if each != alias])
                if not of_model:  # nothing else was set for it
                    del models[name]
        if model is not None:
            if "models" not in document:
                document["models"] = tomlkit.table(is_super_table=True)
            models = document["models"]
            if model not in models:
                models[model] = tomlkit.table()
            if alias not in names_of(models[model]):
                write_names(models[model], [*names_of(models[model]), alias])
        changed = tomlkit.dumps(document)
        if changed != text:
            replace_file(path, changed.encode())
    except (TOMLKitError, OSError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be changed: {error}. Put it right, or write the alias there.") from error
    return changed != text


def names_of(model: Any) -> list[str]:
    """The aliases in a model's table, written either way."""
    return [str(each) for each in listed(model.get("alias", []))]


def write_names(model: Any, names: list[str]) -> None:
    """Put aliases into a model's table."""
    if names:
        model["alias"] = names
    else:
        del model["alias"]


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in another one's place, or where a link leads, so that it is never half there."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            part.chmod(target.stat().st_mode & 0o777)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
