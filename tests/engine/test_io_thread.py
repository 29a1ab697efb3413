"""The thread that reads and writes for the engine: order, errors, end."""

import threading

import pytest

from mlx_mcp.engine.io_thread import IoThread
from mlx_mcp.errors import EngineDead, StorageError

WAIT_S = 10


def same(outcome):
    return outcome


class Inbox(list):
    """What the engine is told; `wait` until there are so many."""

    def __init__(self):
        super().__init__()
        self.more = threading.Condition()

    def post(self, command):
        with self.more:
            self.append(command)
            self.more.notify_all()

    def wait(self, count):
        with self.more:
            assert self.more.wait_for(lambda: len(self) >= count, WAIT_S)


@pytest.fixture
def inbox():
    return Inbox()


@pytest.fixture
def io(inbox):
    io = IoThread(inbox.post)
    yield io
    assert io.close(lambda: None, WAIT_S)


def test_what_is_urgent_goes_first_and_the_rest_in_order(io, inbox):
    busy, go = threading.Event(), threading.Event()
    io.submit(lambda: (busy.set(), go.wait(WAIT_S)), lambda outcome: "busy")
    assert busy.wait(WAIT_S)
    for n in range(3):
        io.submit(lambda n=n: f"write {n}", same)
    for n in range(2):
        io.submit(lambda n=n: f"read {n}", same, urgent=True)
    go.set()
    inbox.wait(6)
    assert inbox == ["busy", "read 0", "read 1", "write 0", "write 1", "write 2"]


def test_whoever_waits_hears_of_an_error_and_the_next_piece_has_its_turn(io, inbox):
    def fail(error):
        raise error

    refused = StorageError("The disk is full.")
    io.submit(lambda: fail(refused), same)
    io.submit(lambda: fail(ValueError("broken")), same)
    io.submit(lambda: "fine", same)
    inbox.wait(3)
    assert inbox[0] is refused
    assert isinstance(inbox[1], StorageError)
    assert "The store failed: ValueError('broken'). Generations go on; restart the server" in str(inbox[1])
    assert inbox[2] == "fine"


def test_what_was_taken_is_done_before_the_end_and_the_last_at_last(inbox):
    io, done = IoThread(inbox.post), []
    for n in range(3):
        io.submit(lambda n=n: done.append(n), same)
    assert io.close(lambda: done.append("last"), WAIT_S)
    assert done == [0, 1, 2, "last"]


def test_an_engine_that_is_gone_is_told_nothing():
    def post(command):
        raise EngineDead

    io, done = IoThread(post), []
    io.submit(lambda: done.append(1), same)
    assert io.close(lambda: done.append("last"), WAIT_S)
    assert done == [1, "last"]
