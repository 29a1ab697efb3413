"""`mlx-mcp run`: what it reads, and how it answers."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess

import pytest

from mlx_mcp.cli import progress
from mlx_mcp.cli.reporting import at_a_terminal
from mlx_mcp.engine.requests import Progress
from mlx_mcp.errors import NotOnDisk, PromptTooLong, UnknownModel
from mlx_mcp.service.activity import Meter
from tests.cli.test_main import OPTIONS, invoked
from tests.process.windows import WAIT_S, command, wait_until

FACT = "The port of the server is 8931."
QUESTION = "What is the server's port?"
SCHEMA = {"type": "object", "properties": {"ok": {"enum": [True]}}, "required": ["ok"], "additionalProperties": False}


def piped(*arguments, stdin=subprocess.DEVNULL):
    return subprocess.Popen(command(*arguments), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.long
def test_what_is_piped_in_comes_before_the_prompt_or_is_the_prompt(tmp_path):
    assert invoked("run", QUESTION, stdin=FACT).stdout == "8931\n"
    assert invoked("run", stdin=f"{FACT} {QUESTION}\n").stdout == "8931\n"
    done = subprocess.run(command("run", QUESTION), input=FACT, **OPTIONS)
    assert done.stdout == "8931\n"


@pytest.mark.parametrize(
    ("closed", "status", "words"),
    [
        ("<&-", 2, "stdin is closed. Give the prompt as an argument"),
        (">&- </dev/null", 2, "The prompt is empty. Say what"),
        ("0>/dev/null", 2, "stdin cannot be read: Bad file descriptor. Give the prompt"),
    ],
)
def test_a_run_without_stdin_or_stdout_ends_in_one_line(closed, status, words):
    line = f"{shlex.join(command('run'))} {closed}"
    done = subprocess.run(line, shell=True, **OPTIONS)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_at_a_terminal_without_a_prompt_says_how_it_is_given():
    ours, terminal = os.openpty()
    done = subprocess.run(command("run"), stdin=terminal, **OPTIONS)
    os.close(ours)
    os.close(terminal)
    assert done.returncode == 2
    assert 'Say what the model should do: mlx-mcp run "…", or `… | mlx-mcp run`' in done.stderr


@pytest.mark.long
def test_a_socket_that_a_program_left_open_is_not_waited_for():
    ours, theirs = socket.socketpair()
    with ours, theirs, piped("run", f"{FACT} {QUESTION}", stdin=theirs) as running:
        out, _ = running.communicate(timeout=WAIT_S)
    assert out == b"8931\n"


def test_files_come_before_the_prompt_whoever_writes_them(tmp_path):
    (tmp_path / "fact.txt").write_text(FACT)
    assert invoked("run", QUESTION, "--file", str(tmp_path / "fact.txt")).stdout == "8931\n"
    end, begin = os.pipe()
    os.write(begin, FACT.encode())
    os.close(begin)
    assert invoked("run", QUESTION, "-f", f"/dev/fd/{end}").stdout == "8931\n"
    os.close(end)


def test_json_is_the_whole_result_and_nothing_else_is_on_stdout():
    done = invoked("run", f"{FACT} {QUESTION}", "--json")
    result = json.loads(done.stdout)
    assert (result["text"], result["finish_reason"], result["model"]) == ("8931", "stop", "embedded")
    assert result["prompt_tokens"] == result["computed_tokens"] > 10
    assert done.stderr == ""


def test_an_answer_obeys_a_schema_from_a_file_or_the_command_line(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    for given in (json.dumps(SCHEMA), str(tmp_path / "schema.json")):
        done = invoked("run", "Is it?", "--schema", given)
        assert json.loads(done.stdout) == {"ok": True}, done.stderr
    done = invoked("run", "Is it?", "--schema", json.dumps(SCHEMA), "--max-tokens", "2")
    assert "cut off by --max-tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["x", "--file", "{0}/nowhere"], b"", "Give the path of one"),
        (["x", "--file", "{0}"], b"", "is a folder: give the files in it, one by one"),
        (["x", "--file", "{0}/latin"], b"", "no UTF-8 text: byte 3 is 0xe9"),
        (["x", "--file", "{0}/long"], b"", "bytes. Give the part that matters, or raise MLX_MCP_MAX_FILE_BYTES"),
        (["x", *["--file", "{0}/half"] * 4], b"", "20000 are read at most. Give fewer, or raise"),
        (["x", *["--file", "{0}/half"] * 65], b"", "65 files are too many: give at most 64"),
        (["x"], b"\xff", "'stdin' is no UTF-8 text"),
        (["x"], b"x" * 20_001, "More than 20000 bytes come through stdin"),
        ([], b" \n", "The prompt is empty. Say what the model should do"),
        (["x", "--schema", "{0}/nowhere"], b"", "--schema must be a JSON object, or a file that can be read"),
        (["x", "--schema", "{{"], b"", "The schema in --schema is no JSON"),
        (["x", "--schema", "{0}/half"], b"", "is no JSON"),
        (["x", "--schema", "{0}/list"], b"", "must be a JSON object, such as"),
        (["x", "--file", "{0}/" + "x" * 300], b"", "File name too long. Give another file"),
        (["x", "--model", "nobody"], b"", "hub id"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_next_step(tmp_path, arguments, stdin, words):
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    (tmp_path / "long").write_bytes(b"x" * 10_001)
    (tmp_path / "half").write_bytes(b"x" * 6000)
    (tmp_path / "list").write_text("[]")
    limits = {"MLX_MCP_MAX_FILE_BYTES": "10000", "MLX_MCP_MAX_FILES_BYTES": "20000"}
    done = invoked("run", *(argument.format(tmp_path) for argument in arguments), stdin=stdin, **limits)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_pipe_that_stays_open_is_spoken_of():
    with piped("run", QUESTION, stdin=subprocess.PIPE) as running:
        assert b"waiting for the end of stdin" in running.stderr.readline()
        out, _ = running.communicate(FACT.encode(), timeout=WAIT_S)
        assert out == b"8931\n"


def test_errors_speak_of_commands_and_not_of_tools():
    done = invoked("run", "x" * 9000)
    assert "(`mlx-mcp models` shows each)" in done.stderr
    for error in (UnknownModel("x", ["embedded"]), NotOnDisk("x"), PromptTooLong(9, 1, 5)):
        assert not re.search(r"list_\w+|create_session|`prompt`|call ", at_a_terminal(error))


@pytest.mark.long
def test_who_stops_reading_ends_a_run_without_a_word():
    with piped("run", "Count from 1 to 99.", "--max-tokens", "1900") as running:
        assert running.stdout.read(1)
        running.stdout.close()
        assert running.wait(WAIT_S) == 141
        assert running.stderr.read() == b""


@pytest.mark.long
def test_an_interrupt_ends_a_run_at_once():
    with piped("run", "Count from 1 to 99.", "--max-tokens", "1900") as running:
        assert running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        assert running.wait(WAIT_S) == 130
        assert running.stderr.read() == b""


def test_bytes_of_a_load_are_not_on_a_hosts_scale_of_tokens():
    meter = Meter()
    meter.take(Progress("loading", "loading x", 50, 100, "bytes"))
    assert (meter.done, meter.total) == (0, None)


def test_a_bar_counts_bytes_and_pulses_while_it_does_not_know(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    display = progress.Display()
    half = Progress("loading", "loading x: fetching 1.5 of 4.0 MB", 1_500_000, 4_000_000, "bytes")
    updates = (
        (Progress("loading", "loading x: preparing", unit="bytes"), None, "", "loading x: preparing"),
        (half, 4_000_000, "1.5 of 4.0 MB", "loading x"),
        (Progress("loading", "loading x: fetching", 2_500_000, None, "bytes"), None, "2.5 MB", "loading x"),
        (Progress("queued", "queued"), None, "", "queued"),
        (Progress("prefill", "reading", 5, 20), 20, "", "reading"),
    )
    with display:
        for update, total, amount, words in updates:
            display.show(update)
            (task,) = display._bar[0].tasks
            assert (task.total, task.fields["amount"], task.description) == (total, amount, words)
    wait_until(lambda: display._bar is None)
