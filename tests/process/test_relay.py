"""The relay between a host and an engine that does as the test says."""

import json
import os
import queue
import random
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mcp.errors import EngineUnavailable
from mlx_mcp.process import link as link_module
from mlx_mcp.process import relay as relay_module
from mlx_mcp.process.environment import window_hello
from mlx_mcp.process.lines import ALIVE, ENDING, LONGEST_LINE, envelope, notice, pieces
from mlx_mcp.process.relay import Relay, serve_options
from tests.effort import drawn
from tests.process.windows import WAIT_S, state_folder


@pytest.mark.parametrize(
    ("line", "id_", "method"),
    [
        (b'{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"id":6,"method":"x"}}', 5, "tools/call"),
        (
            b'{"method":"tools/call","params":{"a":[{"id":9}],"t":"\\"id\\":7, {"},"jsonrpc":"2.0","id":"a\\"b"}',
            'a"b',
            "tools/call",
        ),
        (b'{"id": -3 , "method" : "ping"}', -3, "ping"),
        (b'{"method":"notifications/initialized"}', None, "notifications/initialized"),
        (b'{"id":1,"result":{"id":2,"method":"no"}}', 1, ""),
        (b'{"params":"id","id":1.5,"method":5}', None, ""),
        (b'{"params":{"id":4}, broken', None, ""),
        (b'{"id":"\\ud83d\\ude00"}', "\U0001f600", ""),
        (b'{"x":"' + b'\\"' * 100_000 + b'","id":8}', 8, ""),
        (b"[" * 100_000, None, ""),
        (b'"' * 100_001, None, ""),
        (b"garbage", None, ""),
        (b"", None, ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_top_level_of_a_line_is_read_and_nothing_below(line, id_, method):
    seen = envelope(line)
    assert (seen.id, seen.method) == (id_, method)


def test_an_answer_is_known_by_its_result_or_error():
    assert envelope(b'{"id":1,"result":{}}').answers
    assert envelope(b'{"id":1,"error":{"code":1}}').answers
    assert not envelope(b'{"id":1}').answers
    assert not envelope(b'{"id":1,"method":"result","params":{"result":1}}').answers


def read_from(*chunks):
    left = list(chunks)
    return lambda _: left.pop(0) if left else b""


def test_lines_come_whole_however_they_were_cut():
    got = list(pieces(read_from(b"ab", b"c\nd\n\ne", b"f")))
    assert got == [(b"abc\n", True, True), (b"d\n", True, True), (b"\n", True, True), (b"ef", True, True)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["id", "method", "result"]), inner),
    max_leaves=8,
)
MEMBERS = {
    "id": st.integers() | st.text(),
    "method": st.text(),
    "params": JSON,
    "result": JSON,
    "jsonrpc": st.just("2.0"),
}


@settings(max_examples=drawn(200, least=50), deadline=None)
@given(st.fixed_dictionaries({}, optional=MEMBERS), st.randoms(), st.booleans(), st.sampled_from([None, 1]))
def test_a_line_is_understood_as_a_parser_does(message, random, ascii, indent):
    members = list(message.items())
    random.shuffle(members)
    line = json.dumps(dict(members), ensure_ascii=ascii, indent=indent).replace("\n", " ").encode("utf-8", "replace")
    parsed = json.loads(line)
    seen = envelope(line)
    assert seen.id == parsed.get("id")
    assert seen.method == parsed.get("method", "")


@settings(max_examples=drawn(100, least=50), deadline=None)
@given(st.lists(st.binary(max_size=30) | st.just(b"\n"), max_size=30))
def test_whatever_is_read_comes_out_in_whole_lines(chunks):
    got = list(pieces(read_from(*filter(None, chunks))))
    whole = b"".join(chunks)
    assert b"".join(data for data, _, _ in got) == whole
    assert all(data.find(b"\n") in (-1, len(data) - 1) for data, _, _ in got)


def test_a_line_that_is_too_long_comes_in_pieces_and_the_next_one_whole():
    chunk = b"x" * (1 << 16)
    got = list(pieces(read_from(*[chunk] * 130, b"end\nnext\n")))
    assert [(first, last) for _, first, last in got] == [(True, False), (False, False), (False, True), (True, True)]
    assert max(len(data) for data, _, _ in got) <= LONGEST_LINE + (1 << 16)
    assert b"".join(data for data, _, _ in got) == chunk * 130 + b"end\nnext\n"


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--model", "x"], {"model": "x"}),
        (["-m", "x", "--no-openblas"], {"model": "x", "openblas": "0"}),
        (["--model=x", "--openblas"], {"model": "x", "openblas": "1"}),
        (["--model"], None),
        (["--model="], None),
        (["--http"], None),
        (["--standalone"], None),
        (["--help"], None),
        (["x"], None),
    ],
)
def test_only_what_a_relay_can_do_is_taken_from_the_command_line(arguments, given):
    assert serve_options(arguments) == given


@pytest.mark.figures
def test_the_relay_imports_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import mlx_mcp.process.relay\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - {'mlx_mcp'}\n"
        "print(sorted(new - sys.stdlib_module_names), 'subprocess' in sys.modules, 'typing' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"], capture_output=True, text=True
    )
    assert done.stdout == "[] False False\n", done.stderr


def test_a_link_knows_what_its_engine_has_not_answered():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = relay_module.Link(ours, {})
        for id_ in (1, "two", 3):
            assert link.expect(id_, "tools/call", b"")
        link.note_from_engine(b'{"jsonrpc":"2.0","id":1,"result":{}}\n')
        link.forget(3)
        left, again = link.end()
        assert ({id_: asked.method for id_, asked in left.items()}, again) == ({"two": "tools/call"}, [])
        assert not link.expect(4, "tools/call", b"")
        assert link.end() == ({}, [])


class Engine:
    """Takes connections at a place, and does with them what a test says."""

    def __init__(self, place):
        self.listener = place.listen()
        self.listener.settimeout(WAIT_S)
        self.accepted = []

    def accept(self, **reply):
        connection, _ = self.listener.accept()
        connection.settimeout(WAIT_S)
        self.accepted.append(connection)
        wire = connection.makefile("rwb", buffering=0)
        hello = json.loads(wire.readline())
        wire.write(json.dumps({"pid": 1} | reply).encode() + b"\n")
        return connection, wire, hello

    def end(self):
        """Hang up on every relay that a test which failed has left connected."""
        self.listener.close()
        for connection in self.accepted:
            with suppress(OSError):  # it was closed
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def relaying():
    """A relay on pipes, in this process; yields the engine, and the host's ends of the pipes."""
    with state_folder() as (place, _):
        engine = Engine(place)
        (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
        relay = Relay(place, window_hello("stdio", None), in_read, out_write)
        thread = threading.Thread(target=relay.run)
        thread.start()
        with os.fdopen(in_write, "wb", buffering=0) as to_relay, os.fdopen(out_read, "rb", buffering=0) as from_relay:
            lines = Lines(from_relay)
            try:
                yield engine, to_relay, lines
            except BaseException:
                os.unlink(place.socket)  # the relay must not wait for an engine that answers no more
                engine.end()
                raise
            finally:
                to_relay.close()
                thread.join(WAIT_S)
                os.close(out_write)
                lines.thread.join(WAIT_S)  # or it might read from whoever gets the descriptor next
            assert not thread.is_alive()
        os.close(in_read)
        os.unlink(place.socket)  # a thread may still accept there
        engine.listener.close()


class Lines:
    """What the relay says, a line at a time, each waited for with a bound."""

    def __init__(self, file):
        self.queue = queue.Queue()
        self.thread = threading.Thread(target=self._read, args=(file,), daemon=True)
        self.thread.start()

    def _read(self, file):
        with suppress(OSError, ValueError):  # the test has closed it
            for line in file:
                self.queue.put(line)

    def next(self):
        return self.queue.get(timeout=WAIT_S)


def hang_up(connection, wire):
    """End as a process does that is killed."""
    wire.close()
    connection.close()


def end_during_a_call(connection, wire, to_relay, lines):
    """End, and wait until the relay has seen it."""
    to_relay.write(message(99, "tools/call"))
    wire.readline()
    hang_up(connection, wire)
    answer = json.loads(lines.next())
    assert answer["id"] == 99
    assert "The engine process ended during this call" in str(answer)
    assert "Call again: a new one is started by itself" in str(answer)


def message(id_, method, **params):
    return json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, "params": params}).encode() + b"\n"


def test_lines_go_through_byte_for_byte_both_ways():
    with relaying() as (engine, to_relay, lines):
        connection, wire, hello = engine.accept()
        assert (hello["kind"], hello["again"], hello["folder"]) == ("stdio", False, os.getcwd())
        for line in (b' {"id" :1, "method":"a"} \n', b"\xff garbage \n", b"\r\n", "é☃\n".encode()):
            to_relay.write(line)
            assert wire.readline() == line
            wire.write(line)
            assert lines.next() == line
        hang_up(connection, wire)


def test_a_line_that_is_too_long_goes_through_too():
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        long = b'{"jsonrpc":"2.0","id":3,"method":"tools/call","params":"' + b"x" * (5 << 20) + b'"}\n'
        writing = threading.Thread(target=to_relay.write, args=(long,))
        writing.start()
        buffered = connection.makefile("rb")
        assert buffered.readline() == long
        writing.join()
        buffered.close()
        hang_up(connection, wire)
        # Its id was in its first piece.
        assert json.loads(lines.next())["id"] == 3


def test_every_request_that_was_not_answered_is_answered_once_and_the_next_finds_another_engine():
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        for line in (
            message(1, "tools/call"),
            message("two", "tools/call"),
            message(3, "tools/list"),
            message(4, "ping"),
        ):
            to_relay.write(line)
            wire.readline()
        wire.write(b'{"jsonrpc":"2.0","id":4,"result":{}}\n{"jsonrpc":"2.0","id":1,"resu')  # it ends within a line
        assert json.loads(lines.next())["id"] == 4
        hang_up(connection, wire)
        failed = [json.loads(lines.next()) for _ in range(3)]
        assert [answer["id"] for answer in failed] == [1, "two", 3]
        assert all(answer["result"]["isError"] for answer in failed[:2])
        assert "Call again" in failed[2]["error"]["message"]

        to_relay.write(message(5, "tools/list"))
        connection, wire, hello = engine.accept()
        assert hello["again"] is True
        assert wire.readline() == message(5, "tools/list")
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == 5


def test_the_handshake_is_replayed_and_its_second_answer_swallowed():
    initialize = message(0, "initialize", clientInfo={"name": "x"})
    initialized = b'{"jsonrpc":"2.0","method":"notifications/initialized"}\n'
    answer = b'{"jsonrpc":"2.0","id":0,"result":{}}\n'
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        to_relay.write(initialize)
        assert wire.readline() == initialize
        wire.write(answer)
        assert lines.next() == answer
        to_relay.write(initialized)
        assert wire.readline() == initialized
        end_during_a_call(connection, wire, to_relay, lines)
        to_relay.write(message(1, "tools/list"))
        connection, wire, _ = engine.accept()
        assert wire.readline() == initialize
        wire.write(answer)
        assert wire.readline() == initialized
        assert wire.readline() == message(1, "tools/list")
        wire.write(b'{"jsonrpc":"2.0","id":1,"result":{}}\n')
        assert json.loads(lines.next())["id"] == 1
        hang_up(connection, wire)


def test_a_request_that_was_cancelled_is_not_answered_and_wakes_nobody():
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        cancel = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}\n'
        for line in (message(1, "tools/call"), cancel, message(2, "tools/call")):
            to_relay.write(line)
            assert wire.readline() == line
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == 2
        to_relay.write(cancel)  # to nobody
        to_relay.write(message(3, "tools/list"))
        connection, wire, _ = engine.accept()
        assert wire.readline() == message(3, "tools/list")
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == 3


def test_what_an_engine_asked_that_is_gone_is_taken_back_and_its_answer_kept_from_the_next():
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        wire.write(message(7, "elicitation/create"))
        assert lines.next() == message(7, "elicitation/create")
        hang_up(connection, wire)
        taken_back = json.loads(lines.next())
        assert (taken_back["method"], taken_back["params"]["requestId"]) == ("notifications/cancelled", 7)
        to_relay.write(message(1, "tools/list"))
        connection, wire, _ = engine.accept()
        assert wire.readline() == message(1, "tools/list")
        to_relay.write(b'{"jsonrpc":"2.0","id":7,"result":{}}\n')
        to_relay.write(message(2, "tools/list"))
        assert wire.readline() == message(2, "tools/list")
        hang_up(connection, wire)
        assert {json.loads(lines.next())["id"] for _ in range(2)} == {1, 2}


def test_a_broken_line_is_answered_even_where_there_is_no_engine():
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        end_during_a_call(connection, wire, to_relay, lines)
        to_relay.write(b'\n{"id":7}\ngarbage\n{"id":8,"result":{}}\n{"jsonrpc":"2.0","method":"notifications/x"}\n')
        answers = [json.loads(lines.next()) for _ in range(2)]
        assert [answer["id"] for answer in answers] == [7, None]
        assert all(
            "Not a JSON-RPC message. Send one message per line" in answer["error"]["message"] for answer in answers
        )


def test_an_engine_that_ends_again_and_again_is_given_up_and_the_call_answered():
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        to_relay.write(message(0, "initialize"))
        wire.readline()
        wire.write(b'{"jsonrpc":"2.0","id":0,"result":{}}\n')
        lines.next()
        end_during_a_call(connection, wire, to_relay, lines)
        to_relay.write(message(1, "tools/call"))
        for _ in range(relay_module.TRIES):
            connection, wire, _ = engine.accept()
            wire.readline()  # the handshake
            hang_up(connection, wire)
        answer = json.loads(lines.next())
        assert (answer["id"], answer["result"]["isError"]) == (1, True)


def test_whenever_engines_end_every_request_is_answered_once():
    rng, count = random.Random(6), drawn(50, least=10)
    with relaying() as (engine, to_relay, lines):

        def serve():
            with suppress(OSError):
                while True:
                    connection, wire, _ = engine.accept()
                    for _ in range(rng.randint(1, 12)):
                        line = wire.readline()
                        if not line:
                            break
                        wire.write(json.dumps({"jsonrpc": "2.0", "id": json.loads(line)["id"], "result": {}}).encode())
                        wire.write(b"\n")
                    hang_up(connection, wire)

        threading.Thread(target=serve, daemon=True).start()
        for first in range(0, 8 * count, 8):
            to_relay.write(b"".join(message(id_, "tools/list") for id_ in range(first, first + 8)))
            answered = sorted(json.loads(lines.next())["id"] for _ in range(8))
            assert answered == list(range(first, first + 8))


def test_requests_that_an_engine_has_not_taken_up_go_to_the_next_one_and_others_do_not():
    with relaying() as (engine, to_relay, lines):
        connection, wire, hello = engine.accept()
        assert hello["notices"] is True
        for line in (message(1, "tools/call"), message(2, "tools/call"), message(3, "tools/list")):
            to_relay.write(line)
            wire.readline()
        to_relay.write(message("four", "tools/call"))
        wire.readline()
        wire.write(notice(ENDING, num_read=3, returned=[2]))
        hang_up(connection, wire)
        connection, wire, _ = engine.accept()
        assert [wire.readline(), wire.readline()] == [message(2, "tools/call"), message("four", "tools/call")]
        lost = [json.loads(lines.next()) for _ in range(2)]
        assert (lost[0]["id"], lost[0]["result"]["isError"], lost[1]["id"]) == (1, True, 3)
        for id_ in (2, "four"):
            wire.write(json.dumps({"jsonrpc": "2.0", "id": id_, "result": {}}).encode() + b"\n")
            assert json.loads(lines.next()) == {"jsonrpc": "2.0", "id": id_, "result": {}}
        hang_up(connection, wire)


def test_a_request_that_was_cancelled_is_not_asked_again():
    cancel = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}\n'
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        for line in (message(1, "tools/call"), message(2, "tools/call"), cancel):
            to_relay.write(line)
            wire.readline()
        wire.write(notice(ENDING, num_read=0, returned=[]))
        hang_up(connection, wire)
        connection, wire, _ = engine.accept()
        assert wire.readline() == message(2, "tools/call")
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == 2


@pytest.fixture
def fast_clock(monkeypatch):
    """A relay that looks four times a second whether its engine lives, and tells of it twice."""
    monkeypatch.setattr(link_module, "TICK_S", 0.25)
    monkeypatch.setattr(relay_module, "TELL_S", 0.5)


def test_an_engine_that_shows_no_life_is_told_of_in_progress_and_then_in_an_error(fast_clock):
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept(silence_s=1.5)
        to_relay.write(message(1, "tools/call", _meta={"progressToken": "p"}))
        to_relay.write(message(2, "tools/list"))
        to_relay.write(message(3, "subscriptions/listen"))
        progress = {"progressToken": "p", "progress": 7.5, "message": "8 tokens"}
        wire.write(notice("notifications/progress", **progress))
        assert json.loads(lines.next())["params"] == progress
        for value in (7.501, 7.502):
            told = json.loads(lines.next())["params"]
            assert told["progress"] == pytest.approx(value)
            assert "no sign of life" in told["message"]
        failed, other = json.loads(lines.next()), json.loads(lines.next())
        assert (failed["id"], failed["result"]["isError"]) == (1, True)
        assert "mlx-mcp engine stop --force" in failed["result"]["content"][0]["text"]
        assert other["id"] == 2
        assert "mlx-mcp engine stop --force" in other["error"]["message"]

        # One that is asked now is answered too, and so is every later one.
        to_relay.write(message(4, "ping"))
        assert "no sign of life" in json.loads(lines.next())["error"]["message"]

        # It lives after all: it hears what to drop, what it says of that goes nowhere, and others are answered again.
        asked = [wire.readline() for _ in range(4)]
        assert len(asked) == 4
        wire.write(b'{"jsonrpc":"2.0","id":1,"result":{}}\n')
        dropped = [json.loads(wire.readline())["params"]["requestId"] for _ in range(3)]
        assert dropped == [1, 2, 4]
        to_relay.write(message(5, "ping"))
        assert wire.readline() == message(5, "ping")
        wire.write(b'{"jsonrpc":"2.0","id":5,"result":{}}\n')
        assert json.loads(lines.next()) == {"jsonrpc": "2.0", "id": 5, "result": {}}
        hang_up(connection, wire)
        assert json.loads(lines.next())["id"] == 3


def test_an_engine_that_shows_life_is_waited_for_however_long_a_call_takes(fast_clock):
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept(silence_s=0.5)
        to_relay.write(message(1, "tools/call"))
        wire.readline()
        for _ in range(8):
            wire.write(notice(ALIVE))
            threading.Event().wait(0.2)
        wire.write(b'{"jsonrpc":"2.0","id":1,"result":{"late":true}}\n')
        assert json.loads(lines.next())["result"] == {"late": True}
        hang_up(connection, wire)


def test_an_engine_that_takes_nothing_and_shows_no_life_does_not_hold_up_the_relay(fast_clock):
    with relaying() as (engine, to_relay, lines):
        hangs = engine.accept(silence_s=1.0)
        long = message(1, "tools/call", text="x" * (1 << 20))
        writing = threading.Thread(target=lambda: [to_relay.write(long), to_relay.write(message(2, "ping"))])
        writing.start()
        assert json.loads(lines.next())["id"] == 1
        connection, wire, _ = engine.accept()  # the other one is hung up on: half a line lies in its way
        assert wire.readline() == message(2, "ping")
        writing.join()
        for each in (hangs[:2], (connection, wire)):
            hang_up(*each)
        assert json.loads(lines.next())["id"] == 2


@pytest.mark.parametrize("bad", ["null", "1.5", "true", "[1]", "{}"])
def test_a_request_whose_id_is_no_string_and_no_integer_is_answered_with_or_without_an_engine(bad):
    line = b'{"jsonrpc":"2.0","id":%s,"method":"tools/list"}\n' % bad.encode()
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        for _ in range(2):
            to_relay.write(line)
            answer = json.loads(lines.next())
            assert (answer["id"], answer["error"]["code"]) == (None, -32600)
            if connection is not None:
                end_during_a_call(connection, wire, to_relay, lines)
                connection = None


def test_the_end_of_stdin_is_passed_on_and_what_still_comes_is_too():
    with relaying() as (engine, to_relay, lines):
        connection, wire, _ = engine.accept()
        to_relay.write(message(1, "tools/list"))
        to_relay.close()
        assert wire.readline() == message(1, "tools/list")
        assert wire.readline() == b""
        wire.write(b'{"jsonrpc":"2.0","id":1,"result":{}}\n')
        assert json.loads(lines.next())["id"] == 1
        connection.shutdown(socket.SHUT_RDWR)
        hang_up(connection, wire)


def test_a_host_that_leaves_before_an_engine_is_there_is_told_so_and_the_relay_ends(monkeypatch, capfd):
    over = threading.Event()

    def join(*_):
        over.wait(WAIT_S)
        raise EngineUnavailable("late")

    monkeypatch.setattr(relay_module, "EXIT_S", 0.2)
    monkeypatch.setattr(relay_module, "join", join)
    with relaying() as (_, to_relay, _):
        to_relay.close()
    assert "not known whether an engine starts" in capfd.readouterr().err
    over.set()
