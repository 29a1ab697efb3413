"""What is put around the interpreter of a sandbox: bubblewrap on Linux, Seatbelt on macOS, where they work.

pydantic-monty itself gives its programs no files, no network and no processes. What is around it holds even where it
has a fault: its process sees no file but itself and the system's libraries, has no network, and sees no other process.
CPython gives its programs all of that. It sees its own files and packages besides, and does not run without enclosure.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mcp.errors import SandboxFailed

BUBBLEWRAP, SEATBELT, NOTHING = "bubblewrap", "seatbelt", "interpreter only"
TRIAL_TIMEOUT_S = 20.0
INSIDE = "/interpreter"
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")  # what the interpreter is linked with
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")  # that CPython's library opens
SCRATCH = "/tmp"  # where CPython's programs may write, in bubblewrap
SCRATCH_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Interpreter:
    """What is to be enclosed. Without `reads` it needs no file but itself, and may run where nothing is around it."""

    path: Path
    answer: bytes  # is in what it says to --version, in small letters
    missing: str  # what a user can do where it does not run
    reads: tuple[Path, ...] = ()  # files and folders that it sees, at their own places
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its script is called by, beside what is around it."""
        return "cpython-" if self.reads else ""


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


def enclose(interpreter: Interpreter, folder: Path) -> Enclosed:
    """The best enclosure that works here, as a script in `folder`.

    Blocks for as long as it takes to try them out, some 20 ms each.

    Raises:
        SandboxFailed: the interpreter does not run at all, or must be enclosed and cannot be.
    """
    why = "there is neither bubblewrap nor sandbox-exec"
    for name, command in _enclosures(interpreter):
        # What the interpreter says on stderr when it dies is told otherwise, and its memory does not go to disk.
        text = f"#!/bin/sh\nulimit -c 0\n{command} 2>/dev/null\n"
        enclosed = Enclosed(name, folder / (interpreter.name + name.replace(" ", "-")), text)
        try:
            tried = subprocess.run(
                [enclosed.ready(), "--version"], capture_output=True, timeout=TRIAL_TIMEOUT_S, env={}, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            why = type(exc).__name__
            continue
        if tried.returncode == 0 and interpreter.answer in tried.stdout.lower():
            return enclosed
        why = f"exit status {tried.returncode}"
    raise SandboxFailed(
        f"The sandbox's interpreter {interpreter.path} does not run here ({why}). {interpreter.missing} "
        "`mlx-mcp doctor` tries it again."
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


def _enclosures(interpreter: Interpreter) -> list[tuple[str, str]]:
    """Names and shell commands, the best first."""
    found = []
    bwrap = shutil.which("bwrap")
    if sys.platform == "linux" and bwrap:
        # Without `exec`: bubblewrap ends with the thread that started it, and threads of a pool end early. The shell
        # is what gets killed, bubblewrap ends with the shell, and the interpreter with bubblewrap.
        found.append((BUBBLEWRAP, f'{shlex.join(_bubblewrap(bwrap, interpreter))} "$@"'))
    seatbelt = Path("/usr/bin/sandbox-exec")
    if sys.platform == "darwin" and seatbelt.exists():
        given = [f"{name}={value}" for name, value in interpreter.environment.items()]
        profile = _seatbelt_profile(interpreter)
        before = ["/usr/bin/env", "-i", *given] if given else []
        words = shlex.join([*before, str(seatbelt), "-p", profile, str(interpreter.path)])
        found.append((SEATBELT, f'exec {words} "$@"'))
    if not interpreter.reads:
        found.append((NOTHING, f'cd / && exec {shlex.quote(str(interpreter.path))} "$@"'))
    return found


def _bubblewrap(bwrap: str, interpreter: Interpreter) -> list[str]:
    common = (bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL")
    libraries = [word for folder in LIBRARIES for word in ("--ro-bind-try", folder, folder)]
    path = str(interpreter.path)
    if not interpreter.reads:
        return [*common, *libraries, *("--ro-bind", path, INSIDE, "--chdir", "/", INSIDE)]
    # What is written goes to memory: a little of it in one place, and nothing anywhere else. The place comes before the
    # files, which may lie under it.
    scratch = ("--size", str(SCRATCH_BYTES), "--tmpfs", SCRATCH)
    devices = [word for device in DEVICES for word in ("--dev-bind", device, device)]
    reads = [word for each in map(str, interpreter.reads) for word in ("--ro-bind", each, each)]
    given = [word for name, value in interpreter.environment.items() for word in ("--setenv", name, value)]
    return [*common, *given, *scratch, *libraries, *devices, *reads, *("--remount-ro", "/", "--chdir", SCRATCH, path)]


def _seatbelt_profile(interpreter: Interpreter) -> str:
    path = _quoted(interpreter.path)
    lines = [
        "(version 1)",
        "(deny default)",
        f"(allow process-exec (literal {path}))",
        f'(allow file-read* (literal {path}) (literal "/") (subpath "/usr/lib") (subpath "/System/Library"))',
        '(allow file-read* (subpath "/System/Volumes/Preboot/Cryptexes") (literal "/dev/urandom"))',
        '(allow file-read* file-write-data (literal "/dev/null"))',
        "(allow sysctl-read)",
    ]
    if interpreter.reads:  # CPython also asks for the folders above its own
        lines += ["(allow file-read-metadata)"]
        lines += [f"(allow file-read* process-exec (subpath {_quoted(each)}))" for each in interpreter.reads]
    return "\n".join(lines)


def _quoted(path: Path) -> str:
    return '"' + str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"') + '"'
