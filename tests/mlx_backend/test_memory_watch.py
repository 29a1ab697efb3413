"""Where the system has no limit for a child's memory, the parent looks at it."""

import subprocess
import sys
import threading

import pytest

from mlx_mcp.mlx_backend import constraint, memory_watch, text_processes
from mlx_mcp.mlx_backend.memory_watch import MemoryWatch, resident_bytes
from mlx_mcp.mlx_backend.text_processes import Failed, TextProcess


def test_a_process_says_what_it_has_in_memory():
    child = subprocess.Popen(
        [sys.executable, "-c", "x = bytearray(80 << 20); print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        child.stdout.readline()
        assert 80 << 20 < resident_bytes(child.pid) < 200 << 20
        child.kill()
    assert resident_bytes(child.pid) == 0


def test_only_macos_is_asked_and_seldom(monkeypatch):
    monkeypatch.setattr(memory_watch, "FIRST_S", 0)
    asked = []
    on_linux = MemoryWatch(1, 10, lambda pid: asked.append(pid) or 99, "linux")
    assert not on_linux.look()
    assert asked == []
    on_mac = MemoryWatch(1, 10, lambda pid: asked.append(pid) or 99, "darwin")
    assert on_mac.look()
    assert not on_mac.look()  # too soon to ask again
    assert asked == [1]


@pytest.fixture
def on_a_mac_without_room(monkeypatch):
    monkeypatch.setattr(memory_watch, "FIRST_S", 0)
    seen = threading.Event()

    def watch(pid, most):
        return MemoryWatch(pid, most, lambda pid: seen.set() or 1 << 60, "darwin")

    monkeypatch.setattr(text_processes, "MemoryWatch", watch)
    monkeypatch.setattr(constraint, "MemoryWatch", watch)
    return seen


def test_a_tokenizer_that_takes_too_much_there_is_ended(on_a_mac_without_room):
    process = TextProcess()
    try:
        with pytest.raises(Failed, match="takes more than 2 GiB of memory"):
            process.ask({"do": "use"}, b"", 60, lambda: False)
        assert not process.usable
    finally:
        process.end()


def test_a_grammar_that_takes_too_much_there_is_refused(on_a_mac_without_room):
    with pytest.raises(ValueError, match="takes too much memory to compile"):
        constraint.try_in_process("start: /a+/", lambda: False)
    assert on_a_mac_without_room.is_set()
