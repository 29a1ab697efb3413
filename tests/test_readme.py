"""The commands of the documents for beginners, copied and run as a stranger does, in a home of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.windows import state_folder

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "five-minutes.md", ROOT / "docs" / "uninstall.md"]
# What is not run here, and why.
ELSEWHERE = {
    "make demo": "CI runs it as a step of its own",
    "make test": "CI runs it as a step of its own; it is what runs here",
    "pip install .": "`make wheel-smoke` and the release install the package in empty environments",
    "pip uninstall mlx-mcp": "it would take the package away from the tests that run beside",
    "mlx-mcp bench": "it takes two minutes; tests/bench runs it with --quick",
    "mlx-mcp serve --http --host 0.0.0.0": "it serves until a signal comes; tests/hosting does so",
    "mlx-mcp launch claude-code --model embedded": "it needs Claude Code; `make test-claude-code` runs it",
    "mlx-mcp serve": "it serves until its host closes stdin; tests/process and tests/hosts have hosts do so",
}


def commands(document):
    """The lines of a document's blocks of shell, without comments."""
    for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.S):
        for line in block.splitlines():
            if command := re.sub(r"\s+#.*", "", line).strip():
                yield command


def test_every_reason_not_to_run_a_command_is_of_one_that_is_there():
    assert ELSEWHERE.keys() <= {command for document in DOCUMENTS for command in commands(document)}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The environment of somebody with nothing but mlx-mcp and a file of notes, in an empty home."""
    home = tmp_path_factory.mktemp("stranger")
    (home / "notes.txt").write_text("Alice's badge is 771.\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    with state_folder() as (_, env):
        state = {"MLX_MCP_STATE_DIR": env["MLX_MCP_STATE_DIR"], "MLX_MCP_OPENBLAS": env["MLX_MCP_OPENBLAS"]}
        kept = {
            name: value for name, value in env.items() if not name.startswith(("MLX_MCP_", "XDG_", "HF_", "CLAUDE"))
        }
        yield home, {**kept, **state, "HOME": str(home), "PATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.mark.long
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_that_a_stranger_copies_works(document, stranger):
    home, env = stranger
    for command in commands(document):
        if command not in ELSEWHERE:
            done = subprocess.run(
                ["sh", "-c", command], cwd=home, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
            assert done.returncode in okay(command), f"{command}\n{done.stdout}\n{done.stderr}"


def okay(command):
    """The statuses with which a command ends where there is no engine, no session and no host."""
    return {0, 1} if command.startswith(("mlx-mcp engine status", "mlx-mcp engine stop", "mlx-mcp top")) else {0}
