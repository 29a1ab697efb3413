"""The built wheel and source distribution: what is in them, and what the wheel does where nothing else is.

Run with `make wheel-smoke`, which builds both in dist/ and installs the wheel in build/wheel. Fails at the first thing
that is not as it should be.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
BIN = ROOT / "build" / "wheel" / "bin"
LIMIT_S = 300


def tracked(*paths: str) -> set[str]:
    """The files that git has below paths."""
    listed = subprocess.run(["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(filter(None, listed.stdout.split("\0")))


def check_contents() -> None:
    """The wheel has the package with its assets and nothing else; the source distribution has the tests, too."""
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == tracked("mlx_mcp"), f"{wheel.name}: {sorted(names ^ tracked('mlx_mcp'))}"
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    missing = tracked() - found - {".gitignore"}
    assert not missing, f"{sdist.name} lacks {sorted(missing)}"
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB; {sdist.name}: {len(found)} files")


def check_commands() -> None:
    """Installed alone it finds no fault with itself, answers, and serves an MCP client."""
    with TemporaryDirectory() as home:

        def run(*command: str | Path) -> str:
            env = {"HOME": home, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=LIMIT_S)
            assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
            return done.stdout

        where = run(BIN / "python", "-c", "import mlx_mcp; print(mlx_mcp.__file__)")
        assert "site-packages" in where, where
        try:
            json.loads(run(BIN / "mlx-mcp", "doctor", "--json"))
            answer = run(BIN / "mlx-mcp", "run", "The port of the server is 8931. What is the server's port?")
            assert "8931" in answer, answer
            run(BIN / "python", ROOT / "examples" / "recall.py")
        finally:
            run(BIN / "mlx-mcp", "engine", "stop")
    print("the wheel alone: no fault found, it answers, and it serves an MCP client")


if __name__ == "__main__":
    check_contents()
    check_commands()
