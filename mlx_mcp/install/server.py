"""What hosts are told to start or to connect to, and whether an entry of theirs is this server's."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.errors import InstallError

PACKAGE = "mlx-mcp"
OWN = re.compile(r"(^|[/\\])(mlx-mcp|mlx_mcp)([=@\[].*)?$")
# Where uv keeps environments that it may remove at any time.
EPHEMERAL = re.compile(r"[/\\](archive|builds|environments)-v\d+[/\\]")


@dataclass(frozen=True)
class Server:
    """A server over stdio: what starts it."""

    command: str
    args: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Remote:
    """A server over HTTP, and the token that it wants: the variable that holds it, or in clear."""

    url: str
    token_variable: str = ""
    token: str = ""


def command_here(
    prefix: str = sys.prefix, executable: str = sys.executable, uvx: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """What starts this server from anywhere: absolute, since hosts do not have a shell's PATH.

    That is the console script of this environment, or its Python where there is no script. An environment of `uvx` may
    be gone tomorrow, so there it is uvx itself.

    Raises:
        InstallError: this is such an environment, and there is no uvx in PATH.
    """
    if EPHEMERAL.search(prefix + os.sep):
        uvx = uvx or shutil.which("uvx")
        if not uvx:
            raise InstallError(
                f"This runs in an environment that uv may remove ({prefix}), and no uvx in PATH can make it anew. "
                "Install it with `uv tool install mlx-mcp`, and run `mlx-mcp install` from there."
            )
        return os.path.abspath(uvx), (PACKAGE, "serve")
    script = os.path.join(prefix, "bin", PACKAGE)
    # The script before `python -m`, which would look for modules in the host's working folder first.
    if os.access(script, os.X_OK):
        return script, ("serve",)
    return os.path.abspath(executable), ("-m", "mlx_mcp", "serve")


def server_here(model: str | None, env: Mapping[str, str]) -> Server:
    """This server, with a default model and settings; a model's folder is made absolute, since hosts start elsewhere.

    Raises:
        InstallError: there is no command for it that lasts, or something is not UTF-8.
    """
    command, args = command_here()
    if model:
        args = (*args, "--model", os.path.abspath(model) if os.path.isdir(model) else model)
    for text in (command, *args, *env, *env.values()):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InstallError(f"{text!r} is not UTF-8, and hosts' files are. Give it another name.") from error
    return Server(command, args, dict(env))


def is_own(entry: Any) -> bool:
    """Whether an entry starts this server, however it was registered."""
    if not isinstance(entry, Mapping):
        return False
    command = entry.get("command", entry.get("cmd"))
    words = [*command] if isinstance(command, list) else [command]
    words += entry.get("args") or []
    return any(isinstance(word, str) and OWN.search(word) for word in words) and "serve" in words
