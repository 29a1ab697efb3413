"""The service that keeps a server running for a user: a launchd agent on macOS, a systemd unit on Linux.

Says what the file contains, where it lies, and what has the system take it up; the caller writes and runs.
"""

from __future__ import annotations

import os
import plistlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mcp.errors import InstallError
from mlx_mcp.install.server import command_here

LABEL = "io.github.mlx-mcp"
UNIT = "mlx-mcp.service"
END_S = 30  # it ends by SIGTERM: running calls have shutdown_timeout_s (5), then what is to be kept is written
MAX_FILES = 16384
# What would end a line, or be expanded, in a unit.
UNSAFE = frozenset('\n\r\0"\\$%')


@dataclass(frozen=True)
class ServiceFile:
    """A service's file, and the commands that begin and end it."""

    path: Path
    data: bytes
    begin: tuple[tuple[str, ...], ...]
    end: tuple[tuple[str, ...], ...]  # before the file is removed
    after: tuple[tuple[str, ...], ...] = ()  # once it is removed


def service_file(
    options: tuple[str, ...] = (),
    platform: str = sys.platform,
    home: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServiceFile:
    """The file for this system; `options` are further ones of `serve`.

    Raises:
        InstallError: this system has neither launchd nor systemd, or no command of ours lasts, or cannot be written.
    """
    home, environ = home or Path.home(), os.environ if environ is None else environ
    program, arguments = command_here()
    words = (program, *arguments, "--standalone", "--http", *options)
    for word in words:
        if UNSAFE & set(word):
            raise InstallError(
                f"{word!r} cannot stand in a service's file. Install mlx-mcp in a folder of a plain name."
            )
    if platform == "darwin":
        path, domain = home / "Library" / "LaunchAgents" / f"{LABEL}.plist", f"gui/{os.getuid()}"
        began = (("launchctl", "bootstrap", domain, str(path)),)
        return ServiceFile(path, agent(words, home), began, (("launchctl", "bootout", f"{domain}/{LABEL}"),))
    if not platform.startswith("linux"):
        raise InstallError(
            "There are services for macOS and Linux. Have `mlx-mcp serve --standalone --http` started by other means."
        )
    given = environ.get("XDG_CONFIG_HOME", "")
    folder = Path(given) if os.path.isabs(given) else home / ".config"
    control = ("systemctl", "--user")
    reload = (*control, "daemon-reload")
    return ServiceFile(
        folder / "systemd" / "user" / UNIT,
        unit(words).encode(),
        (reload, (*control, "enable", "--now", UNIT)),
        ((*control, "disable", "--now", UNIT),),
        (reload,),
    )


def agent(words: tuple[str, ...], home: Path) -> bytes:
    """The launchd agent that starts a command."""
    says: dict[str, Any] = {
        "Label": LABEL,
        "ProgramArguments": list(words),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ExitTimeOut": END_S,
        "ProcessType": "Interactive",  # else macOS slows it down as background work
        "Umask": 0o077,
        "SoftResourceLimits": {"NumberOfFiles": MAX_FILES},
        "StandardErrorPath": str(home / "Library" / "Logs" / "mlx-mcp.log"),
    }
    return plistlib.dumps(says, sort_keys=False)


def unit(words: tuple[str, ...]) -> str:
    """The systemd unit that starts a command."""
    command = " ".join(f'"{word}"' if " " in word else word for word in words)
    return f"""\
[Unit]
Description=mlx-mcp: local language models for agent hosts
Documentation=https://github.com/mlx-mcp/mlx-mcp

[Service]
ExecStart={command}
# Settings as MLX_MCP_… lines, if there are any beside config.toml; mode 0600.
EnvironmentFile=-%h/.config/mlx-mcp/environment
Restart=on-failure
RestartSec=2
KillMode=mixed
TimeoutStopSec={END_S}
UMask=0077
NoNewPrivileges=yes
LimitNOFILE={MAX_FILES}

[Install]
WantedBy=default.target
"""
