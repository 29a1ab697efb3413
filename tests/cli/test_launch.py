"""Claude Code as the command starts it: its environment, its end, and what the user is told where it is not there."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from mlx_mcp.cli.launch import environment, first_words, run
from mlx_mcp.errors import ConfigError
from tests.process.windows import state_folder, wait_until

LAUNCH = [sys.executable, "-m", "mlx_mcp", "launch", "claude-code"]
SHOWN = ("ANTHROPIC_", "CLAUDE_CODE_", "DISABLE_", "API_TIMEOUT_MS")
# In place of Claude Code: tells what it was started with, and asks the server for its models.
STAND_IN = f"""#!{sys.executable}
import json, os, sys, urllib.request
base, token = os.environ["ANTHROPIC_BASE_URL"], os.environ["ANTHROPIC_AUTH_TOKEN"]
headers = {{"anthropic-version": "2023-06-01", "authorization": f"Bearer {{token}}"}}
def ask(headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(base + "/v1/models", headers=headers)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code
models = ask(headers)
print(json.dumps({{"arguments": sys.argv[1:], "models": models, "env": dict(os.environ)}}))
sys.exit(7)
"""


@pytest.fixture
def path(tmp_path):
    """A PATH with a stand-in for Claude Code."""
    program = tmp_path / "bin" / "claude"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def launched(env, *arguments):
    return subprocess.run([*LAUNCH, *arguments], env=env, capture_output=True, text=True, timeout=90)


def test_it_is_started_on_a_server_of_its_own_and_its_exit_status_passed_on(path):
    with state_folder(MLX_MCP_MAX_SSD_BYTES="0") as (_, env):
        done = launched(env | {"PATH": path, "ANTHROPIC_API_KEY": "of-anthropic"}, "--", "-p", "hi there")
    assert done.returncode == 7, done.stderr
    said = json.loads(done.stdout)
    assert said["arguments"] == ["-p", "hi there"]
    assert said["models"]["data"][0]["id"] == "embedded"
    own = said["env"]
    assert own["ANTHROPIC_BASE_URL"].startswith("http://127.0.0.1:")
    assert len(own["ANTHROPIC_AUTH_TOKEN"]) > 30
    assert own["ANTHROPIC_API_KEY"] == ""
    assert {own[name] for name in own if name.startswith("ANTHROPIC_") and name.endswith("_MODEL")} == {"embedded"}
    assert own["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "2048"


def test_where_claude_code_is_not_installed_the_command_that_installs_it_is_told(tmp_path):
    done = launched(os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "no `claude` is on the PATH" in done.stderr
    assert "npm install -g @anthropic-ai/claude-code" in done.stderr


def test_its_environment_can_be_printed_for_a_shell(tmp_path):
    env = os.environ | {"MLX_MCP_TOKEN": "it's", "PATH": str(tmp_path)}
    done = launched(env, "--print", "--url", "http://gpu:8080", "--model", "embedded")
    assert done.returncode == 0, done.stderr
    words = [shlex.split(line) for line in done.stdout.splitlines()]
    assert {word for word, _ in words} == {"export"}
    printed = dict(pair.split("=", 1) for _, pair in words)
    assert printed == environment("http://gpu:8080", "it's", "embedded", 2048)
    assert all(name.startswith(SHOWN) for name in printed)


def test_a_server_that_does_not_come_up_is_told_with_what_it_said():
    with open(os.devnull) as nothing, pytest.raises(ConfigError, match="Code has no server to ask.*: it said nothing"):
        first_words(nothing)


def test_the_status_of_a_program_that_a_signal_ended_is_as_a_shell_has_it():
    assert run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"], {}) == 128 + 15
    assert run([sys.executable, "-c", "import os; raise SystemExit(int(os.environ['N']))"], {"N": "3"}) == 3


def test_a_signal_goes_on_to_the_program_and_ctrl_c_is_left_to_it(tmp_path):
    there = tmp_path / "there"
    inner = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(there)!r}).write_text('')\n"
        "time.sleep(60)\n"
    )
    outer = f"import sys; from mlx_mcp.cli.launch import run; sys.exit(run([sys.executable, '-c', {inner!r}], {{}}))"
    with subprocess.Popen([sys.executable, "-c", outer]) as process:
        wait_until(there.exists)
        os.kill(process.pid, signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 5
