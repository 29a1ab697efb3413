"""`mlx-mcp top`: what it draws, and where it gets it from."""

import asyncio
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from mlx_mcp.cli.main import app
from mlx_mcp.cli.output import length
from mlx_mcp.cli.top_lines import Rates, lines
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.service.overview import overview
from mlx_mcp.service.sessions import create_session, fork_session
from tests.api.page.scenes import US, busy, server
from tests.cli.terminal import Terminal
from tests.process.windows import Window, run, state_folder
from tests.service.house import asked, unheard


@pytest.fixture(scope="module")
def state():
    """The state of a server with five calls that run, four that wait, and twenty sessions."""

    async def seen():
        async with server() as (_, service), busy(service):
            return overview(service)

    return asyncio.run(seen())


def drawn(state, width=80, height=24, rates=None):
    return [line for line, _ in lines(state, rates or Rates(), width, height)]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60), (20, 3), (80, 7), (80, 1)])
def test_what_is_drawn_fits_the_terminal(state, width, height):
    shown = drawn(state, width, height)
    assert len(shown) <= height
    assert all(length(line) <= width for line in shown)


def test_at_80_by_24_there_is_something_of_everything(state):
    shown = drawn(state)
    assert shown[0].startswith("mlx-mcp  ok  up ")
    assert shown[1].startswith("5 running  4 waiting  20 sessions")
    assert sum("generating: " in line for line in shown) == 5
    assert any("queued" in line for line in shown)
    assert any(line.startswith("handbook") and line.endswith("pinned") for line in shown)
    assert any(line.startswith("  reviewer") for line in shown)
    assert shown[-1].endswith(" more")
    assert len(shown) == 24


def test_workflows_come_first_with_how_far_they_are(state):
    running = {"number": 1, "tool": "sandbox_run", "name": "mail", "does": "3 of 9 answers, 6 running", "since_s": 61}
    shown = drawn(state | {"workflows": [running]})
    at = shown.index("WORKFLOWS")
    assert shown[at + 1].split("  ")[0] == "sandbox_run"
    assert shown[at + 1].endswith("1 min    3 of 9 answers, 6 running")
    assert "WORKFLOWS" not in drawn({key: value for key, value in state.items() if key != "workflows"})


def test_a_tree_of_sessions_is_indented_by_its_forks(state):
    shown = drawn(state, height=60)
    named = [line for line in shown if "planner" in line and "tokens" in line and "generating" not in line]
    assert [len(line) - len(line.lstrip()) for line in named] == [2, 4, 4, 4]


def test_reasons_take_the_place_of_counts_where_calls_should_not_be_sent(state):
    dead = state | {"status": "dead", "reasons": ["The engine has ended."]}
    assert lines(dead, Rates(), 80, 24)[0][1] == "red"
    assert drawn(dead)[1] == "The engine has ended."


def test_nothing_in_a_name_speaks_to_the_terminal(state):
    state = state | {"models": [{"name": "\x1b[2J\rmodel"}]}
    assert "\x1b" not in "".join(drawn(state))


def test_rates_are_what_was_added_between_two_looks():
    rates = Rates()
    for now, output in ((0.0, 100), (2.0, 300), (3.0, 300), (4.0, 0), (5.0, 10)):
        rates.take({"tokens": {"output": output, "computed": 0}}, now)
    assert list(rates.output) == [100, 0, 10]  # the third look is of another process


ANSWERS = {"/none": (404, b""), "/text": (200, b"hello"), "/other": (200, b"{}"), "/locked": (401, b"")}


class Odd(BaseHTTPRequestHandler):
    def do_GET(self):
        status, body = ANSWERS[self.path.removesuffix("/page/state")]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def odd_server():
    with HTTPServer(("127.0.0.1", 0), Odd) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/none", "answers with status 404"),
        ("/text", "is no mlx-mcp. Give the address of one"),
        ("/other", "has no state to show"),
        ("/locked", "wants another token: set MLX_MCP_TOKEN"),
    ],
)
def test_what_is_no_server_of_ours_is_said_to_be_none(path, words):
    with odd_server() as address:
        done = CliRunner().invoke(app, ["top", "--once", "--http", address + path])
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("url", "words"), [("ftp://x", "is no address: give one such as"), ("http://127.0.0.1:1", "cannot be reached")]
)
def test_an_address_where_nothing_is_names_the_next_step(url, words):
    done = CliRunner().invoke(app, ["top", "--once", "--http", url])
    assert done.exit_code == 2
    assert words in done.stderr


async def test_a_server_is_looked_at_over_http():
    async with server() as (address, service):
        await create_session(service, US, asked("|x"), "tiny", (), SessionOptions("base"), unheard)
        await fork_session(service, US, "base", 1, ("left",), "")
        arguments = ["top", "--once", "--interval", "0.1", "--http", address]
        done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        as_json = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    assert "  left" in done.stdout
    assert [each["name"] for each in json.loads(as_json.stdout)["sessions"]] == ["base", "left"]


def test_without_an_engine_it_says_so():
    with state_folder() as (_, env):
        done = run(env, "top", "--once")
    assert done.returncode == 1
    assert "There is no engine process." in done.stderr


@pytest.mark.long
def test_the_user_s_engine_is_looked_at_by_its_socket_and_drawn_until_ctrl_c():
    with state_folder() as (_, env), Window(env) as window:
        window.ask("create_session", system="canary", name="facts")
        once = run(env, "top", "--once", "--interval", "0.1")
        assert once.returncode == 0, once.stderr
        assert "facts" in once.stdout
        assert "canary" not in once.stdout
        with Terminal("top", "--interval", "0.1", **env) as terminal:
            terminal.until("SESSIONS  1")
            terminal.type(b"\x03")
            assert terminal.end() == 130
