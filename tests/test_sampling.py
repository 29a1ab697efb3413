"""A new sampling parameter is one line in the table, and its use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_mcp
from mlx_mcp.core.sampling import PARAMETERS, Bounds, defaults_of

LINE = '    typical_p: float = parameter(1.0, Bounds(gt=0, le=1), "at most 1", "For tools.", flag="For people.")\n'
LOOK = """
import asyncio, json
from mcp import Client
from typer.testing import CliRunner
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.cli import main, run
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from tests.fakes import fake_client

async def call(typical_p):
    engine = fake_client()
    async with Client(build_server(Service(engine, Registry(None)))) as client:
        (tool,) = [tool for tool in (await client.list_tools()).tools if tool.name == "generate"]
        result = await client.call_tool("generate", {"prompt": "a", "model": "tiny", "typical_p": typical_p})
    steps = engine.loader.runner.steps
    engine.close()
    reached = [row.params.typical_p for row in steps[0].admitted] if steps else []
    return tool.input_schema["properties"]["options"]["description"], result.content[0].text, reached

asked = []
run.generate = lambda config, request, as_json: asked.append(request.sampling.typical_p)
shown = CliRunner().invoke(main.app, ["run", "--help"]).output
CliRunner().invoke(main.app, ["run", "a", "--typical-p", "0.5"])
shown_as, _, reached = asyncio.run(call(0.5))
_, refusal, not_reached = asyncio.run(call(2))
print(json.dumps([shown_as, reached, refusal, not_reached, asked, shown]))
"""


def test_a_parameter_that_is_one_line_is_an_argument_a_flag_and_the_engines(tmp_path):
    copy = tmp_path / "mlx_mcp"
    shutil.copytree(Path(mlx_mcp.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    table = copy / "core" / "sampling.py"
    lines = table.read_text().splitlines(keepends=True)
    lines.insert(next(i for i, line in enumerate(lines) if line.startswith("    min_p: ")), LINE)
    table.write_text("".join(lines))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    environ = os.environ | {"PYTHONPATH": path, "COLUMNS": "150"}
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown_as, reached, refusal, not_reached, asked, shown = json.loads(done.stdout)
    assert "typical_p" in shown_as
    assert reached == [0.5]
    assert "typical_p: Input should be less than or equal to 1" in refusal
    assert not_reached == []
    assert asked == [0.5]
    assert "--typical-p" in shown
    assert "For people." in shown


def test_bounds_hold_what_is_inside_and_no_nan():
    bounds = Bounds(gt=0, le=1)
    assert [bounds.hold(value) for value in (None, 0.5, 1, 0, 1.1, float("nan"))] == [True, True, True, *[False] * 3]
    assert [Bounds(max_length=1).hold(value) for value in ((), (1,), (1, 2))] == [True, True, False]


def test_every_default_is_inside_its_bounds():
    for name, parameter in PARAMETERS.items():
        assert parameter.bounds.hold(parameter.default), name
        assert parameter.asked.hold(parameter.default), name


@pytest.mark.parametrize(
    ("generation_config", "defaults"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "repetition_penalty": 1.05}, ...),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.3, "eos_token_id": [1, 2]}, {"temperature": 0.3}),
        ({"temperature": -1, "top_p": 0, "top_k": 2.5, "min_p": True, "repetition_penalty": "1.1"}, {}),
        ({"temperature": float("nan"), "top_k": -1, "top_p": None}, {}),
    ],
)
def test_what_makers_recommend_is_read_from_generation_config(generation_config, defaults):
    assert defaults_of(generation_config) == (generation_config if defaults is ... else defaults)
