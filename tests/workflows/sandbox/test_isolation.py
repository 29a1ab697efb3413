"""What is put around the interpreter: tried out, named, and chosen by what works."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox import isolation
from mlx_mcp.workflows.sandbox.isolation import BUBBLEWRAP, NOTHING, SEATBELT, Interpreter, advice, enclose

WORKS = "#!/bin/sh\necho monty 1.4.0\n"


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o700)
    return path


def monty(path: Path) -> Interpreter:
    return Interpreter(path, b"monty", "Reinstall it: pip install it.")


@pytest.fixture
def interpreter(tmp_path):
    """Something that says what the interpreter says, and shows where it runs."""
    return monty(executable(tmp_path / "monty", f"{WORKS}pwd\nenv\n"))


def test_without_anything_else_the_interpreter_runs_alone_and_in_the_root(interpreter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    enclosed = enclose(interpreter, tmp_path / "scripts")
    assert enclosed.isolation == NOTHING
    said = subprocess.run([enclosed.script], capture_output=True, text=True, env={}, check=True).stdout
    assert said.split("\n")[1] == "/"
    assert "apt-get install bubblewrap" in advice(NOTHING)


def test_bubblewrap_that_does_not_work_is_passed_over_and_said(interpreter, tmp_path, monkeypatch):
    bwrap = executable(tmp_path / "bwrap", "#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    monkeypatch.setattr(shutil, "which", lambda name: str(bwrap))
    monkeypatch.setattr("sys.platform", "linux")
    assert enclose(interpreter, tmp_path / "scripts").isolation == NOTHING
    assert "allow user namespaces" in advice(NOTHING)
    assert advice(BUBBLEWRAP) == ""


def test_bubblewrap_gets_no_network_no_environment_and_no_file_but_libraries(interpreter, tmp_path, monkeypatch):
    told = tmp_path / "told"
    bwrap = executable(tmp_path / "bwrap", f'#!/bin/sh\necho "$@" > {told}\necho monty\n')
    monkeypatch.setattr(shutil, "which", lambda name: str(bwrap))
    monkeypatch.setattr("sys.platform", "linux")
    assert enclose(interpreter, tmp_path / "scripts").isolation == BUBBLEWRAP
    words = told.read_text().split()
    assert {"--unshare-all", "--die-with-parent", "--clearenv", "--new-session"} <= set(words)
    bound = [words[at + 1] for at, word in enumerate(words) if "bind" in word]
    assert set(bound) == {*isolation.LIBRARIES, str(interpreter.path)}
    assert not any(word in ("--bind", "--dev-bind", "--share-net") for word in words)


def test_seatbelt_denies_what_is_not_named(tmp_path):
    profile = isolation._seatbelt_profile(monty(tmp_path / 'a "b'))
    assert "(deny default)" in profile
    assert "network" not in profile
    assert '(allow process-exec (literal "' in profile
    assert 'a \\"b' in profile
    assert SEATBELT == "seatbelt"


def test_an_interpreter_that_does_not_run_is_told_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    broken = executable(tmp_path / "monty", "#!/bin/sh\nexit 3\n")
    with pytest.raises(SandboxFailed, match=r"does not run here \(exit status 3\). Reinstall it: pip install"):
        enclose(monty(broken), tmp_path / "scripts")


def test_a_script_that_was_removed_or_changed_is_written_again(interpreter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    enclosed = enclose(interpreter, tmp_path / "state" / "scripts")
    assert {folder.stat().st_mode & 0o777 for folder in (tmp_path / "state", tmp_path / "state" / "scripts")} == {0o700}
    shutil.rmtree(enclosed.script.parent)
    assert enclosed.ready().read_text() == enclosed.text
    enclosed.script.write_text("other")
    assert enclosed.ready().read_text() == enclosed.text
    assert enclosed.script.stat().st_mode & 0o777 == 0o700
    assert [each.name for each in enclosed.script.parent.iterdir()] == [enclosed.script.name]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_within_bubblewrap_the_interpreter_sees_no_file_of_the_system_and_no_other_process(tmp_path):
    """What a fault of the interpreter would let out is looked at with a shell in its place."""
    looks = f"ls / /etc /home /root /proc 2>&1 | tr '\\n' ' '\nenv\necho done > {tmp_path}/out 2>/dev/null || echo no\n"
    shell = executable(tmp_path / "monty", WORKS + looks)
    words = isolation._bubblewrap(shutil.which("bwrap"), monty(shell))
    at = words.index("--ro-bind")
    words[at:at] = [word for folder in ("/bin", "/usr/bin") for word in ("--ro-bind-try", folder, folder)]
    said = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    if said.returncode != 0:
        pytest.skip("bubblewrap does not work here")
    assert "passwd" not in said.stdout
    assert str(tmp_path) not in said.stdout
    assert said.stdout.rstrip().endswith("no")
    assert not (tmp_path / "out").exists()
