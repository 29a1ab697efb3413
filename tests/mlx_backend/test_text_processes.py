"""Foreign templates and tokenizers that never end, or take all there is."""

import gc
import os
import subprocess
import sys
import threading

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from mlx_mcp.chat.message import Message
from mlx_mcp.core.ports import ModelSpec, never
from mlx_mcp.errors import Abandoned, CapacityError, InvalidRequest, ModelError
from mlx_mcp.mlx_backend import text_processes
from mlx_mcp.mlx_backend.loader import MlxLoader
from mlx_mcp.mlx_backend.template_proof import Proved
from mlx_mcp.mlx_backend.text_processes import MAX_PROCESSES, Failed, Overdue, TextProcesses
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from tests.models_made import TEMPLATE, make_model, write_tokenizer
from tests.process.windows import is_alive, wait_until

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LOOPS_IF_ASKED = "{% if 'loop' in messages[-1].content %}" + LOOP + "{% endif %}" + TEMPLATE
NO_END = [
    LOOP,
    "{{ ('a' * 200000000) | sort | list | length }}",  # one call in C
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{{ 9 ** (9 ** 9) }}",
]


@pytest.fixture
def processes():
    gc.collect()  # tokenizers that other tests have left in cycles, whose processes would be counted
    return TextProcesses()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(text_processes, "WORK_S", 1.0)


def children():
    """The processes that this one started and that are running."""
    found = subprocess.run(["ps", "-A", "-ww", "-o", "ppid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if line.split()[0] == str(os.getpid()) and "text_worker" in line]


@pytest.mark.parametrize("template", NO_END)
def test_a_template_without_end_is_stopped_at_the_deadline_with_its_process(processes, quick, template):
    with pytest.raises((Overdue, Failed), match=r"within 1 s|memory"):
        processes.render(template, {"messages": []}, 0, False, never)
    assert processes.render("{{ 1 + 1 }}", {}, 0, False, never) == (Proved("2"), None)
    assert len(children()) == 1


def test_all_memory_is_not_taken(processes):
    with pytest.raises(Failed, match="more than 2 GiB of memory"):
        processes.render("{{ 'a' * 3000000000 }}", {}, 0, False, never)


def test_a_prompt_without_bounds_is_not_taken(processes):
    with pytest.raises(Failed, match=r"it makes \d+ characters, more than 16777216"):
        processes.render("{{ 'a' * 20000000 }}", {}, 0, False, never)


def test_work_that_nobody_waits_for_any_more_is_stopped_at_once(processes):
    began, gone = threading.Event(), threading.Event()

    def left():
        began.set()
        return gone.is_set()

    errors = []

    def work():
        try:
            processes.render(LOOP, {}, 0, False, left)
        except Abandoned as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert began.wait(30)
    gone.set()
    for thread in threads:
        thread.join(30)  # less than the deadline of the first few would take
    assert len(errors) == 12
    assert children() == []
    assert processes.render("{{ 1 + 1 }}", {}, 0, False, never) == (Proved("2"), None)


def test_what_is_stuck_holds_up_no_other(processes, quick, monkeypatch):
    monkeypatch.setattr(text_processes, "WORK_S", 20.0)
    gone = threading.Event()

    def stuck():
        with pytest.raises(Abandoned):
            processes.render(LOOP, {}, 0, False, gone.is_set)

    threads = [threading.Thread(target=stuck) for _ in range(MAX_PROCESSES - 1)]
    for thread in threads:
        thread.start()
    try:
        assert processes.render("{{ 1 + 1 }}", {}, 0, False, never) == (Proved("2"), None)
        assert any(thread.is_alive() for thread in threads)
    finally:
        gone.set()
        for thread in threads:
            thread.join(30)


def test_where_no_process_is_free_or_can_be_started_it_is_told_when_to_try_again(processes, monkeypatch):
    def refuse(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", refuse)
        with pytest.raises(CapacityError, match=r"No process could be started for the model's .*Retry in 10 s"):
            processes.render("{{ 1 }}", {}, 0, False, never)
    with monkeypatch.context() as patched:
        patched.setattr(text_processes, "MAX_PROCESSES", 1)
        patched.setattr(text_processes, "WAIT_S", 0.1)
        gone = threading.Event()

        def stuck():
            with pytest.raises(Abandoned):
                processes.render(LOOP, {}, 0, False, gone.is_set)

        thread = threading.Thread(target=stuck)
        thread.start()
        wait_until(lambda: processes._pool.num_busy == 1)
        with pytest.raises(CapacityError, match=r"or tokenizer is busy with other calls\. Retry in 10 s"):
            processes.render("{{ 1 }}", {}, 0, False, never)
        gone.set()
        thread.join(30)
    assert processes.render("{{ 1 }}", {}, 0, False, never) == (Proved("1"), None)


def test_a_tokenizer_that_goes_takes_its_processes_along():
    processes = TextProcesses()
    processes.render("{{ 1 }}", {}, 0, False, never)
    del processes
    gc.collect()
    assert children() == []


@pytest.mark.skipif(sys.platform != "linux", reason="tells an orphan from a zombie by /proc")
def test_processes_end_with_whoever_started_them_even_if_it_is_killed_while_they_loop():
    program = f"""
import os, sys, threading
from mlx_mcp.core.ports import never
from mlx_mcp.mlx_backend import text_processes
processes = text_processes.TextProcesses()
processes.render("", {{}}, 0, False, never)
text_processes.WORK_S = 0.5
print(processes._pool.idle[0]._child.pid, flush=True)
threading.Thread(target=processes.render, args=({LOOP!r}, {{}}, 0, False, lambda: os.kill(os.getpid(), 9))).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    wait_until(lambda: not is_alive(int(done.stdout)))


# Through a tokenizer


def make_tokenizer(folder, template, change=lambda tokenizer: None):
    write_tokenizer(folder, template)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    change(tokenizer)
    tokenizer.save(path)
    return folder


def test_a_template_that_loops_for_one_prompt_serves_all_others(tmp_path, quick):
    tokenizer = ChatTokenizer(make_tokenizer(tmp_path, LOOPS_IF_ASKED), None)
    before = tokenizer.encode_chat([Message("user", "hi")])
    for encode in (
        lambda: tokenizer.encode_chat([Message("user", "loop")]),
        lambda: tokenizer.encode_context([Message("user", "loop")]),
        lambda: tokenizer.encode_turn([Message("user", "loop")], "assistant"),
    ):
        with pytest.raises(
            InvalidRequest,
            match=f"{tmp_path}. cannot be used with these messages: .*within 1 s.*or have the template mended",
        ):
            encode()
        assert tokenizer.encode_chat([Message("user", "hi")]) == before


def test_a_tokenizer_that_never_ends_with_some_text_is_stopped(tmp_path, quick):
    def change(tokenizer):  # each doubles what the one before has made of an x
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("x", "xx")] * 40)

    tokenizer = ChatTokenizer(make_tokenizer(tmp_path, TEMPLATE, change), None)
    before = tokenizer.encode_chat([Message("user", "hi")])
    with pytest.raises(InvalidRequest, match=rf"tokenizer .{tmp_path}. .*(within 1 s|memory)"):
        tokenizer.encode_chat([Message("user", "x")])
    assert tokenizer.encode_chat([Message("user", "hi")]) == before


def test_a_tokenizer_whose_expression_gives_up_is_told(tmp_path, quick):
    def change(tokenizer):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:x+x+)+y"), "isolated")

    tokenizer = ChatTokenizer(make_tokenizer(tmp_path, TEMPLATE, change), None)
    with pytest.raises(InvalidRequest, match=r"tokenizer .* cannot (encode this text: Onig|be used .* within 1 s)"):
        tokenizer.encode_chat([Message("user", "x" * 5000)])
    assert tokenizer.encode_chat([Message("user", "hi")]).ids


def test_a_tokenizer_that_cannot_be_read_within_bounds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_processes, "READ_S", 5.0)
    folder = make_model(tmp_path)

    def change(tokenizer):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    change(tokenizer)
    tokenizer.save(path)
    with pytest.raises(
        ModelError, match=r"tokenizer in .* cannot be read: it .*Download the model again, or choose another"
    ):
        MlxLoader().prepare(ModelSpec("tiny", "folder", str(folder)), lambda progress: None)
