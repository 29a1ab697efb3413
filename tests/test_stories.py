"""The five stories of docs/workflows.md, run as the page has them, on the built-in model through a real client."""

import json
import os
import sys

import anyio
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from tests.process.windows import state_folder
from tests.stories import CANARY, SESSION, checked, stories, write_inputs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A project with the files of the stories, and the environment of an engine of its own with a disk."""
    folder = tmp_path_factory.mktemp("project")
    write_inputs(folder)
    store = str(tmp_path_factory.mktemp("store"))
    with state_folder(MLX_MCP_STORE_DIR=store, MLX_MCP_MAX_SSD_BYTES="1000000000") as (_, env):
        yield folder, env


@pytest.mark.long
@pytest.mark.parametrize("number", range(1, 6))
async def test_a_story_goes_as_the_page_says_and_shows_nothing_of_its_input(number, place):
    folder, env = place
    story, results = stories()[number - 1], []
    server = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve"], env=env, cwd=folder)
    async with Client(stdio_client(server)) as client:
        for tool, arguments in (call for block in story.blocks for call in block):
            if arguments.get("session") == SESSION:
                arguments["session"] = results[-1]["branches"][-1]["session"]
            answer = await client.call_tool(tool, arguments)
            assert not answer.is_error, answer.content
            results.append(answer.structured_content)
        checked(number, results)
        if number != 5:  # what branches write is the model's, and the model has read everything
            assert CANARY not in json.dumps(results)
        for command in story.commands:
            path = os.pathsep.join([os.path.dirname(sys.executable), env["PATH"]])
            await anyio.run_process(command, cwd=folder, env=env | {"PATH": path})
            assert len(json.loads((folder / "labels.json").read_text())) == results[0]["calls"]["calls"]
