"""What is put around the interpreter of a sandbox: bubblewrap on Linux, Seatbelt on macOS, where they work.

The interpreter itself gives its programs no files, no network and no processes. What is around it holds even where
the interpreter has a fault: its process sees no file but itself and the system's libraries, has no network, and sees no
other process.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_mcp.errors import SandboxFailed

BUBBLEWRAP, SEATBELT, NOTHING = "bubblewrap", "seatbelt", "interpreter only"
TRIAL_TIMEOUT_S = 20.0
INSIDE = "/interpreter"
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")  # what the interpreter is linked with


@dataclass(frozen=True)
class Enclosed:
    """A script that runs the interpreter: its arguments, input and output are the interpreter's."""

    isolation: str
    script: Path
    text: str

    def ready(self) -> Path:
        """The script, written where it is not there, or is another. Other processes may do the same meanwhile."""
        try:
            if self.script.read_text() == self.text:
                return self.script
        except OSError:
            pass
        _make_private(self.script.parent)
        new = self.script.with_name(f"{self.script.name}.{os.getpid()}")
        new.write_text(self.text)
        new.chmod(0o700)
        new.replace(self.script)
        return self.script


def _make_private(folder: Path) -> None:
    """Make a folder, and those above it that are not there, for the user alone."""
    if not folder.is_dir():
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def enclose(interpreter: Path, folder: Path) -> Enclosed:
    """The best enclosure that works here, as a script in `folder`.

    Blocks for as long as it takes to try them out, some 20 ms each.

    Raises:
        SandboxFailed: the interpreter does not run at all.
    """
    why = ""
    for name, command in _enclosures(interpreter):
        # What the interpreter says on stderr when it dies is told otherwise, and its memory does not go to disk.
        text = f"#!/bin/sh\nulimit -c 0\n{command} 2>/dev/null\n"
        enclosed = Enclosed(name, folder / name.replace(" ", "-"), text)
        try:
            tried = subprocess.run(
                [enclosed.ready(), "--version"], capture_output=True, timeout=TRIAL_TIMEOUT_S, env={}, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            why = type(exc).__name__
            continue
        if tried.returncode == 0 and b"monty" in tried.stdout.lower():
            return enclosed
        why = f"exit status {tried.returncode}"
    raise SandboxFailed(
        f"The sandbox's interpreter {interpreter} does not run here ({why}). Reinstall it: "
        "pip install --force-reinstall 'pydantic-monty>=1.4,<2'. `mlx-mcp doctor` tries it again."
    )


def advice(isolation: str) -> str:
    """What a user can do where nothing is around the interpreter; "" where something is."""
    if isolation != NOTHING or sys.platform != "linux":
        return ""
    if shutil.which("bwrap"):
        return (
            "bubblewrap is installed and does not work here: allow user namespaces (on Ubuntu, a profile of AppArmor "
            "for bwrap does)"
        )
    return "install bubblewrap, and the system keeps it in as well (on Debian and Ubuntu: apt-get install bubblewrap)"


def _enclosures(interpreter: Path) -> list[tuple[str, str]]:
    """Names and shell commands, the best first."""
    found = []
    bwrap = shutil.which("bwrap")
    if sys.platform == "linux" and bwrap:
        # Without `exec`: bubblewrap ends with the thread that started it, and threads of a pool end early. The shell
        # is what gets killed, bubblewrap ends with the shell, and the interpreter with bubblewrap.
        found.append((BUBBLEWRAP, f'{shlex.join(_bubblewrap(bwrap, interpreter))} "$@"'))
    seatbelt = Path("/usr/bin/sandbox-exec")
    if sys.platform == "darwin" and seatbelt.exists():
        words = shlex.join([str(seatbelt), "-p", _seatbelt_profile(interpreter), str(interpreter)])
        found.append((SEATBELT, f'exec {words} "$@"'))
    found.append((NOTHING, f'cd / && exec {shlex.quote(str(interpreter))} "$@"'))
    return found


def _bubblewrap(bwrap: str, interpreter: Path) -> list[str]:
    libraries = [word for folder in LIBRARIES for word in ("--ro-bind-try", folder, folder)]
    return [
        *(bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
        *libraries,
        *("--ro-bind", str(interpreter), INSIDE, "--chdir", "/", INSIDE),
    ]


def _seatbelt_profile(interpreter: Path) -> str:
    path = str(interpreter.resolve()).replace("\\", "\\\\").replace('"', '\\"')
    return "\n".join(
        (
            "(version 1)",
            "(deny default)",
            f'(allow process-exec (literal "{path}"))',
            f'(allow file-read* (literal "{path}") (literal "/") (subpath "/usr/lib") (subpath "/System/Library"))',
            '(allow file-read* (subpath "/System/Volumes/Preboot/Cryptexes") (literal "/dev/urandom"))',
            '(allow file-read* file-write-data (literal "/dev/null"))',
            "(allow sysctl-read)",
        )
    )
