"""Claude Code on a model of this server, as `mlx-mcp launch claude-code` starts it: one conversation of five turns.

The model has its answers in its weights, and keys and values that are computed like every model's: what the results say
of them is what a user would see. It is not the embedded one, whose context is a seventh of Claude Code's first prompt.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.hosts.claude_code import PROJECT
from tests.hosts.scripted_model import CALL_WORD, WORDS, make_scripted
from tests.process.windows import state_folder

WAIT_S = 300
NEW_TOKENS = 1500  # more than a turn of the user's with what Claude Code adds, and less than its system and tools


@dataclass(frozen=True)
class Turn:
    """What Claude Code says of a turn; the tokens are of all calls to the model in it."""

    words: str
    calls: int
    computed: int
    cached: int
    said: int


@pytest.fixture(scope="module")
def talk(program, tmp_path_factory):
    """Say something in one conversation; returns its turn."""
    home = tmp_path_factory.mktemp("home")
    project, folder = home / PROJECT, home / "scripted"
    project.mkdir()
    (home / "bin").mkdir()
    (home / "bin" / "claude").symlink_to(program)
    (project / "notes.txt").write_text("The deploy code is 4096.\n")
    make_scripted(folder, "Read", "file_path", str(project / "notes.txt"))
    with state_folder(MLX_MCP_MAX_SSD_BYTES="0") as (_, env):
        of_hosts = ("CLAUDE", "ANTHROPIC", "XDG_", "MCP_")
        kept = {name: value for name, value in env.items() if not name.startswith(of_hosts)}
        kept |= {"HOME": str(home), "PATH": f"{home / 'bin'}{os.pathsep}{env['PATH']}"}
        launch = [sys.executable, "-m", "mlx_mcp", "launch", "claude-code", "--model", str(folder), "--"]

        def say(words, *more):
            asked = ["-p", words, "--output-format", "json", "--allowedTools", "Read", *more]
            done = subprocess.run(
                [*launch, *asked],
                env=kept,
                cwd=project,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=WAIT_S,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            result = json.loads(done.stdout.splitlines()[-1])
            used = result["usage"]
            counts = (used["input_tokens"], used["cache_read_input_tokens"], used["output_tokens"])
            return Turn(result["result"], result["num_turns"], *counts)

        yield say


@pytest.mark.timeout(900)
def test_a_conversation_computes_in_each_turn_only_what_is_new(talk):
    first = talk("Hello.")
    assert (first.words, first.calls, first.cached) == (WORDS, 1, 0)
    assert first.computed > 5 * NEW_TOKENS, "its system prompt and tools are there"
    known = first.computed + first.said
    for number, words in enumerate(("Go on.", f"Please {CALL_WORD}.", "And now?", "Goodbye."), start=2):
        turn = talk(words, "--continue")
        calls = 2 if CALL_WORD in words else 1
        assert (turn.words, turn.calls) == (WORDS, calls), number
        assert turn.computed < NEW_TOKENS, number
        assert turn.cached >= calls * known, number
        known += (turn.computed + turn.cached) // calls - known
