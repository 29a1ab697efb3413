"""How engines ended: what relays say of it, what the next one takes, and that nothing that was kept is lost."""

import os
import signal
import threading

import pytest

from mlx_mcp.process import endings
from mlx_mcp.process.daemon import ask, kill
from mlx_mcp.process.place import Place
from tests.process.windows import LONG, Window, run, state_folder, status, wait_until

NAMES = ("Alice", "Bob", "Carol", "Dana", "Erin")


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(str(tmp_path / "state"))
    place.prepare()
    monkeypatch.setattr(endings, "WAIT_S", 0.05)
    return place


def test_after_each_death_less_memory_is_taken_and_never_less_than_half(place):
    assert [endings.begin(place) for _ in range(3)] == [1.0, 0.875, 0.765625]
    assert "77% of the memory's ceiling" in endings.told(place)
    for _ in range(9):
        share = endings.begin(place)
    assert share == 0.5


def test_a_good_end_takes_no_memory_from_the_next_and_gives_none_back_too_early(place):
    endings.begin(place)
    endings.end(place)
    assert endings.begin(place) == 1.0
    assert endings.begin(place) == 0.875  # the one before had died
    endings.end(place)
    assert endings.begin(place) == 0.875
    endings.prove(place)
    endings.end(place)
    assert endings.begin(place) == 1.0
    assert endings.told(place) == ""


@pytest.mark.parametrize("text", ["", "[]", "{", '{"share": "x"}', '{"share": -3}', "\0"])
def test_a_damaged_mark_never_keeps_an_engine_from_serving(place, text):
    with open(endings.running(place), "w") as file:
        file.write(text)
    assert 0.5 <= endings.begin(place) <= 1.0


def test_says_the_signal_and_the_last_line_of_the_log(place):
    with open(place.log, "w") as log:
        log.write("mlx-mcp: listens\nlibc++abi: terminating: [METAL] Insufficient Memory\n\n")
    assert endings.how_ended(place, None) == ""
    assert endings.how_ended(place, 7) == " Its log ends: libc++abi: terminating: [METAL] Insufficient Memory"
    endings.note_end(place, 7, -signal.SIGABRT)
    assert endings.how_ended(place, 7) == (
        " It was ended by SIGABRT. Its log ends: libc++abi: terminating: [METAL] Insufficient Memory"
    )
    endings.note_end(place, 8, 0)
    assert endings.how_ended(place, 8) == ""
    assert endings.words_of(3) == "It ended with status 3."
    assert endings.words_of(-250) == "It was ended by signal 250."


def test_how_an_engine_ended_is_waited_for(place, monkeypatch):
    monkeypatch.setattr(endings, "WAIT_S", 30)
    threading.Timer(0.05, endings.note_end, (place, 9, -signal.SIGKILL)).start()
    assert "ended by SIGKILL" in endings.how_ended(place, 9)


@pytest.mark.parametrize("number", [signal.SIGABRT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_five_windows_survive_the_death_of_the_engine_in_the_middle_of_a_step(tmp_path, number):
    kept = {"MLX_MCP_STORE_DIR": str(tmp_path / "store"), "MLX_MCP_MAX_SSD_BYTES": str(1 << 28)}
    with state_folder(**kept) as (place, env):
        windows = [Window(env) for _ in NAMES]
        try:
            for n, (window, name) in enumerate(zip(windows, NAMES, strict=True)):
                window.ask("create_session", name=name, system=f"{name}'s badge is {310 + n}.")
                window.ask("persist_session", session=name)
            calls = [window.call("generate", **LONG) for window in windows]
            wait_until(lambda: status(place)["rows"] == len(windows))
            pid = status(place)["pid"]
            os.kill(pid, number)
            for window, call in zip(windows, calls, strict=True):
                result = window.answer(call)["result"]
                assert result["isError"]
                text = result["content"][0]["text"]
                assert "The engine process ended during this call" in text
                assert f"It was ended by {number.name}. Its log ends: " in text
            answers = [
                window.call("generate", prompt=f"What is {name}'s badge?", session=name)
                for window, name in zip(windows, NAMES, strict=True)
            ]
            for n, (window, call) in enumerate(zip(windows, answers, strict=True)):
                result = window.answer(call)["result"]
                assert not result.get("isError"), result
                assert str(310 + n) in result["structuredContent"]["text"]
            assert status(place)["pid"] != pid
            shown = run(env, "engine", "status").stdout
            assert "88% of the memory's ceiling are taken" in shown
        finally:
            for window in windows:
                window.close()


@pytest.mark.long
def test_an_engine_that_its_user_kills_takes_no_memory_from_the_next():
    with state_folder() as (place, env), Window(env) as window:
        assert window.serves()
        os.kill(status(place)["pid"], signal.SIGSTOP)
        assert kill(place, 30)
        assert window.serves()
        assert endings.told(place) == ""
        assert ask(place, "status") is not None
