"""The commands as a user types them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mcp import Client, StdioServerParameters
from typer.testing import CliRunner

import mlx_mcp
from mlx_mcp.cli.main import app
from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError
from tests.cli.test_sessions import keep
from tests.process.windows import command

OPTIONS = {"capture_output": True, "text": True, "timeout": 60}


def mlx_mcp_command(*arguments, stdin="", **env):
    environment = {**os.environ, **env}
    return subprocess.run([sys.executable, "-m", "mlx_mcp", *arguments], input=stdin, env=environment, **OPTIONS)


def invoked(*arguments, stdin="", **env):
    """A command in this process, which spares its start; descriptor 0 is a file of what is piped in."""
    own = os.dup(0)
    with tempfile.TemporaryFile() as file:
        file.write(stdin if isinstance(stdin, bytes) else stdin.encode())
        file.seek(0)
        os.dup2(file.fileno(), 0)
        try:
            return CliRunner().invoke(app, arguments, prog_name="mlx-mcp", env=env)
        finally:
            os.dup2(own, 0)
            os.close(own)


def test_run_prints_the_answer_on_stdout_and_the_figures_on_stderr():
    done = mlx_mcp_command("run", "Alice's badge is 771. What is Alice's badge?")
    assert (done.returncode, done.stdout) == (0, "771\n")
    assert "prompt tokens" in done.stderr


def test_run_reads_the_prompt_from_stdin():
    done = invoked("run", "-", "--system", "The port of the server is 8931.", stdin="What is the server's port?")
    assert (done.exit_code, done.stdout) == (0, "8931\n")


def test_a_seed_gives_the_same_text_again():
    asked = ("run", "Tell me a story.", "--temperature", "5", "--max-tokens", "20", "--seed")
    first, again, other = (invoked(*asked, seed).stdout for seed in ("3", "3", "4"))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", ""], "The prompt is empty. Say what the model should do: mlx-mcp run"),
        (["run", "x", "--model", "/nowhere"], "give `embedded`, a folder, or a hub id"),
        (["run", "x", "--max-tokens", "0"], "at least 1"),
        (["run", "x", "--max-tokens", "1000000000"], "Lower max_tokens"),
        (["run", "x", "--model", "nobody/nothing"], "offline"),
        (["serve", "--host", "0.0.0.0", "--http"], "lets others in, so it needs a token"),
        (["serve", "--host", "127.0.0.1"], "--tls-cert and --tls-key go with --http: give it"),
        (["--show-completion", "tcsh"], "There is no completion for 'tcsh'. Give one of: bash"),
        (["models", "--model", "a/b/c"], "hub id"),
    ],
)
def test_a_mistake_is_told_in_one_line_that_names_the_next_step(arguments, words):
    done = invoked(*arguments)
    assert done.exit_code == 2
    assert words.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("port", "99999", "Correct the flag, the variable"),
        ("kv_bits", "3", "it must be 8 or 4, or unset for full precision"),
        ("chunk_tokens", "100", "multiple of 64"),
        ("prefill_tokens_busy", "64", "must be at least chunk_tokens (128)"),
        ("prefill_tokens_idle", "64", "must be at least chunk_tokens (128)"),
        ("prefill_wait_ms", "5", "greater than"),
        ("block_tokens", "48", "must be a multiple of block_tokens (48)"),
        ("session_ttl_s", "0", "greater than 0"),
        ("max_sessions", "0", "greater than"),
        ("shared_prefix_rows", "-1", "greater than"),
        ("file_roots", "/nowhere", "Correct the flag, the variable"),
        ("max_kv_bytes", "0", "greater than"),
        ("token", "é", "MLX_MCP_TOKEN must be ASCII"),
    ],
)
def test_a_setting_that_is_out_of_range_is_named_with_what_it_must_be(setting, value, words):
    done = invoked("models", **{f"MLX_MCP_{setting.upper()}": value})
    assert done.exit_code == 2
    assert setting in done.stderr.lower()
    assert words in done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MLX_MCP_MAX_KV_BYTE", "MLX_MCP_MAX_KV_BYTE is no setting; did you mean MLX_MCP_MAX_KV_BYTES?"),
        ("MLX_MCP_MODLE", "did you mean MLX_MCP_MODEL?"),
        ("MLX_MCP_STATEDIR", "did you mean MLX_MCP_STATE_DIR?"),
        ("mlx_mcp_max_kv_byte", "mlx_mcp_max_kv_byte is no setting; did you mean MLX_MCP_MAX_KV_BYTES?"),
        ("MLX_MCP_ZZZZ", "MLX_MCP_ZZZZ is no setting. There are: MLX_MCP_A"),
    ],
)
def test_a_typo_in_the_environment_is_refused_with_the_name_that_was_meant(monkeypatch, name, words):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError) as refused:
        Config.load()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("arguments", [["models"], ["serve", "--standalone"], ["serve", "--http"]])
def test_a_typo_ends_a_command_with_one_line(arguments):
    done = mlx_mcp_command(*arguments, MLX_MCP_MODLE="x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mlx-mcp: MLX_MCP_MODLE is no setting; did you mean MLX_MCP_MODEL?\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('modle = "x"', "modle is no setting; did you mean model?"),
        ('MLX_MCP_MODEL = "x"', "MLX_MCP_MODEL is no setting; did you mean model?"),
        ("max-kv-bytes = 5", "max-kv-bytes is no setting; did you mean max_kv_bytes?"),
        ('[server]\nmodel = "x"', "server is no setting"),
        ('port = "lots"', "port: Input should be a valid integer"),
        ("port = true", "port: Value error, it cannot be true"),
        ("session_ttl_s = false", "session_ttl_s: Value error, it cannot be false"),
        ("model = 5", "model: Input should be a valid string"),
        ("file_roots = 5", "file_roots: Input should be"),
        ("port = ", "cannot be read: "),
    ],
)
def test_a_fault_in_the_settings_file_is_told_in_one_line(tmp_path, monkeypatch, text, words):
    (tmp_path / "config.toml").write_text(text + "\n")
    monkeypatch.setenv("MLX_MCP_CONFIG", str(tmp_path / "config.toml"))
    with pytest.raises(ConfigError) as refused:
        Config.load()
    assert words in str(refused.value)
    assert str(tmp_path / "config.toml") in str(refused.value)
    assert words != "cannot be read: " or "Correct that file" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_variable_that_is_empty_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("MLX_MCP_MODLE", "")
    monkeypatch.setenv("MLX_MCP_MODEL", "")
    assert Config.load().model is None


def test_settings_come_from_the_file_then_the_environment_then_the_flag(tmp_path):
    (tmp_path / "from-file").mkdir()
    (tmp_path / "from-env").mkdir()
    (tmp_path / "config.toml").write_text(f'model = "{tmp_path}/from-file"\n')
    env = {"MLX_MCP_CONFIG": str(tmp_path / "config.toml")}
    assert "from-file (default)" in invoked("models", **env).stdout
    env["MLX_MCP_MODEL"] = str(tmp_path / "from-env")
    assert "from-env (default)" in invoked("models", **env).stdout
    assert "embedded (default)" in invoked("models", "--model", "embedded", **env).stdout


def test_folders_are_written_as_in_path_or_as_a_list(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    folders = (tmp_path / "a", tmp_path / "b")
    monkeypatch.setenv("MLX_MCP_FILE_ROOTS", f"{folders[0]}{os.pathsep}{folders[1]}{os.pathsep}")
    assert Config.load().file_roots == folders
    monkeypatch.delenv("MLX_MCP_FILE_ROOTS")
    assert Config.load().file_roots is None
    (tmp_path / "config.toml").write_text(f'file_roots = ["{folders[0]}", "~"]\n')
    monkeypatch.setenv("MLX_MCP_CONFIG", str(tmp_path / "config.toml"))
    assert Config.load().file_roots == (folders[0], Path.home())
    (tmp_path / "config.toml").write_text("file_roots = []\n")
    assert Config.load().file_roots == ()


@pytest.mark.parametrize(("roots", "readable"), [(None, "project"), ("other", "other")])
async def test_serve_reads_the_projects_files_or_those_of_the_folders_that_are_set(tmp_path, roots, readable):
    for name in ("project", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fact.txt").write_text("The port of the server is 8931.")
    env = os.environ | {"CLAUDE_PROJECT_DIR": str(tmp_path / "project")}
    env |= {"MLX_MCP_FILE_ROOTS": str(tmp_path / roots)} if roots else {}
    server = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve"], env=env)
    async with Client(server) as client:
        for name in ("project", "other"):
            path = str(tmp_path / name / "fact.txt")
            arguments = {"prompt": "What is the server's port?", "files": [path]}
            result = await client.call_tool("generate", arguments)
            if name == readable:
                assert result.structured_content["text"] == "8931"
            else:
                assert "outside the allowed folders" in result.content[0].text


def test_a_broken_settings_file_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("model = ")
    done = invoked("models", MLX_MCP_CONFIG=str(tmp_path / "config.toml"))
    assert done.exit_code == 2
    assert "config.toml" in done.stderr


def test_doctor_finds_a_sound_installation_and_says_what_would_help():
    done = invoked("doctor")
    assert done.exit_code == 0, done.stdout + done.stderr
    for words in ("mcp 2.3", "mlx 0.32", "device", "embedded", "answers right", "--model"):
        assert words in done.stdout
    assert "FAULT" not in done.stdout


@pytest.mark.long
def test_doctor_calls_a_damaged_embedded_model_a_fault(tmp_path):
    import shutil

    package = tmp_path / "mlx_mcp"
    shutil.copytree(os.path.dirname(mlx_mcp.__file__), package)
    weights = package / "assets" / "embedded" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = mlx_mcp_command("doctor", PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    assert done.returncode == 1
    assert "damaged" in done.stdout


def test_version_and_help():
    assert invoked("--version").stdout == f"mlx-mcp {mlx_mcp.__version__}\n"
    shown = invoked("--help").stdout
    assert all(command in shown for command in ("serve", "run", "models", "doctor"))


@pytest.mark.parametrize("path", [(), ("run",), ("serve",), ("sessions",), ("sessions", "rm"), ("engine", "stop")])
def test_every_command_has_a_short_help_flag(path):
    short, long = invoked(*path, "-h"), invoked(*path, "--help")
    assert (short.exit_code, short.output) == (0, long.output)
    assert "Usage: mlx-mcp" in short.output


def test_version_is_a_command_too():
    assert invoked("version").stdout == f"mlx-mcp {mlx_mcp.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["modls"], "models"),
        (["sessions", "lst"], "list"),
        (["models", "--modle", "x"], "--model"),
        (["run", "--jsn"], "--json"),
    ],
)
def test_a_typo_is_refused_with_what_was_meant(arguments, meant):
    done = invoked(*arguments)
    assert done.exit_code == 2
    assert meant in done.output.split("Error", 1)[1]


@pytest.mark.parametrize(
    ("shell", "words"), [("bash", "complete -o default"), ("zsh", "#compdef mlx-mcp"), ("fish", "complete ")]
)
def test_completion_is_shown_for_the_shell_that_is_named(shell, words):
    done = invoked("--show-completion", shell)
    assert (done.exit_code, words in done.output) == (0, True)
    assert "bash, zsh" in invoked("--show-completion", "tcsh").output


def test_completion_knows_commands_options_models_and_sessions(tmp_path):
    keep(tmp_path / "store")

    def completed(*words):
        line = {"COMP_WORDS": " ".join(("mlx-mcp", *words)), "COMP_CWORD": str(len(words))}
        store = {"MLX_MCP_STORE_DIR": str(tmp_path / "store")}
        return invoked(_MLX_MCP_COMPLETE="complete_bash", **line, **store).output.split()

    assert completed("mod") == ["models"]
    assert completed("run", "--sch") == ["--schema"]
    assert completed("run", "--model", "emb") == ["embedded"]
    assert completed("sessions", "show", "fa") == ["facts"]


def test_a_reader_that_stops_early_is_no_error():
    with subprocess.Popen(command("models"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.wait(60) == 141
        assert running.stderr.read() == b""


@pytest.mark.long
def test_a_terminal_without_unicode_gets_escapes_and_no_traceback(tmp_path):
    (tmp_path / "модель").mkdir()
    env = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    shown = mlx_mcp_command("models", "--model", str(tmp_path / "модель"), **env)
    assert shown.returncode == 0, shown.stderr
    assert r"\u043c\u043e" in shown.stdout
    models = json.loads(mlx_mcp_command("models", "--json", "--model", str(tmp_path / "модель"), **env).stdout)
    assert "модель" in [model["name"] for model in models]
    for encoding in ("ascii", "latin-1"):
        assert mlx_mcp_command("-h", PYTHONUTF8="0", PYTHONIOENCODING=encoding).returncode == 0


def test_doctor_reports_for_an_issue_without_secrets(tmp_path):
    (tmp_path / "config.toml").write_text("autosave_s = 60\n")
    env = {"MLX_MCP_TOKEN": "CANARY-TOKEN", "MLX_MCP_CONFIG": str(tmp_path / "config.toml"), "HOME": str(tmp_path)}
    done = invoked("doctor", "--json", **env)
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["sound"] is True
    assert {"token", "autosave_s"} <= set(report["settings"])
    assert {"kind", "text"} == set(report["findings"][0])
    assert "CANARY" not in done.stdout
    assert str(tmp_path) not in done.stdout
    assert "launch code" not in done.stdout


def test_models_as_json_say_what_the_table_says():
    (model,) = json.loads(invoked("models", "--json").stdout)
    assert (model["name"], model["default"]) == ("embedded", True)
    assert model["weights_bytes"] > 1_000_000
