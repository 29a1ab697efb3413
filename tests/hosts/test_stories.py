"""The five stories of docs/workflows.md in Claude Code: as few calls as the page has, and nothing of the input seen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_mcp.process.place import Place
from tests.hosts.claude_code import PROJECT, ClaudeCode
from tests.hosts.conftest import hosting, served
from tests.hosts.endpoint import Call, Result, Scene
from tests.process.windows import state_folder
from tests.stories import CANARY, SESSION, checked, stories, write_inputs

AGENTS = ("security", "tests", "docs")  # of story 3, each in its own fork
MODEL_WRITES = 5  # the story whose branches read everything and write what they will


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, dict[str, str]]]:
    """An engine of its own that keeps things on disk, and the environment that leads there."""
    store = str(tmp_path_factory.mktemp("store"))
    with state_folder(MLX_MCP_STORE_DIR=store, MLX_MCP_MAX_SSD_BYTES="1000000000") as (place, env):
        yield place, env


@pytest.fixture(scope="module")
def user(
    program: Path, keeping: tuple[Place, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClaudeCode]:
    """Claude Code in a project with the files of the stories."""
    home, env = tmp_path_factory.mktemp("host"), keeping[1]
    own = {name: value for name, value in env.items() if name.startswith("MLX_MCP_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with served("stdio", env) as entry, hosting(ClaudeCode, program, entry, home, **own, PATH=path) as host:
        write_inputs(host.home / PROJECT)
        yield host


def tool(name: str, arguments: dict[str, object]) -> Call:
    return Call(f"mcp__mlx__{name}", arguments)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_story_takes_the_calls_of_the_page_and_shows_nothing_of_its_input(
    number: int, user: ClaudeCode, keeping: tuple[Place, dict[str, str]]
) -> None:
    story, came = stories()[number - 1], list[Result]()

    def told() -> Scene:
        for block in story.blocks:
            for name, arguments in block:
                if arguments.get("session") == SESSION:
                    arguments["session"] = came[-1].json["branches"][-1]["session"]
                came.extend((yield [tool(name, arguments)]))
        for command in story.commands:
            (done,) = yield [Call("Bash", {"command": command, "description": "Take the table out"})]
            assert not done.is_error, done.text
        checked(number, [result.json for result in came])
        return "Done."

    user.endpoint.requests.clear()
    assert user.play(told) == "Done."
    if number != MODEL_WRITES:
        assert CANARY not in json.dumps(user.endpoint.requests)
        assert CANARY not in Path(keeping[0].log).read_text()
    if story.commands:
        table = json.loads((user.home / PROJECT / "labels.json").read_text())
        assert len(table) == came[0].json["calls"]["calls"]


def test_three_sub_agents_each_go_on_in_a_fork_of_one_sandbox(user: ClaudeCode) -> None:
    def asks(name: str) -> Scene:
        (own,) = yield [tool("sandbox_run", {"sandbox": f"badges-{name}", "code": "num += 1\nsubmit(num)"})]
        return f"{name} has {own.json['value']}"

    def main() -> Scene:
        names = [f"badges-{name}" for name in AGENTS]
        (made,) = yield [tool("sandbox_run", {"name": "badges", "code": "num = 770"})]
        assert made.json["variables"] == {"num": "int"}
        yield [tool("fork_session", {"session": "badges", "names": names})]
        for name in AGENTS:
            user.endpoint.perform(f"agent-{name}", lambda name=name: asks(name))
        answers = yield [
            Call("Agent", {"description": "ask", "prompt": f"PLAY agent-{name}", "run_in_background": False})
            for name in AGENTS
        ]
        for name, answer in zip(AGENTS, answers, strict=True):
            assert f"{name} has 771" in answer.text
        (parent,) = yield [tool("sandbox_run", {"sandbox": "badges", "code": "submit(num)"})]
        return str(parent.json["value"])

    assert user.play(main) == "770"
