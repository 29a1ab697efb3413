"""Which tool a model would use, given ours: the measure of their descriptions.

Run with `python benchmarks/choice.py [--url URL --model NAME [--api openai|anthropic] [--key-env VARIABLE]]`, or with a
local model, `[--folder FOLDER]`, by default the SmolLM2 that tests/real makes (`make test-real`, or `python -m
tests.real.smollm2 build/smollm2`), which takes minutes. Asks the tasks of choice.toml, each in a conversation of its
own that has the server's instructions and the schemas of all its tools, as a host shows them.

A local model gets the schemas as text, whether it has tools of its own or not, and its answer is held to a JSON object
of tool and arguments; the last line says so. Prints a line for each task, and how many had the right tool, and how many
all key arguments as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tomllib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client
from mcp_types import Tool
from rich.console import Console
from rich.table import Table

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire

TASKS = Path(__file__).with_name("choice.toml")
SMOLLM2 = Path("build/smollm2/float32")
ANSWER_TOKENS = 300
ANSWER_S = 600.0
AT_ONCE = 8
ANTHROPIC_VERSION = "2023-06-01"


@dataclass(frozen=True)
class Task:
    """What somebody says, and what answers it."""

    ask: str
    tool: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What a model would call; no tool if it answers in words, or not so that it can be read."""

    tool: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """How a choice answers a task; `wrong` are the key arguments that are not as they should be."""

    task: Task
    choice: Choice
    wrong: tuple[str, ...]

    @property
    def has_tool(self) -> bool:
        """Whether it is the right tool."""
        return self.choice.tool == self.task.tool

    @property
    def has_all(self) -> bool:
        """Whether it is the right tool, with all key arguments right."""
        return self.has_tool and not self.wrong


Ask = Callable[[str], Awaitable[Choice]]


def read_tasks() -> list[Task]:
    """The tasks of choice.toml."""
    return [Task(**entry) for entry in tomllib.loads(TASKS.read_text())["task"]]


def score(task: Task, choice: Choice) -> Score:
    """Compare what a model would call with what answers the task."""
    options = choice.arguments.get("options")
    given = {**(options if isinstance(options, dict) else {}), **choice.arguments}
    return Score(
        task, choice, tuple(name for name, wanted in task.arguments.items() if not fits(given.get(name), wanted))
    )


def fits(value: Any, wanted: Any) -> bool:
    """Whether an argument is as a task wants it."""
    match wanted:
        case {"given": True}:
            return value is not None
        case {"length": int(length)}:
            return isinstance(value, list) and len(value) == length
        case {"has": str(part)}:
            texts = value if isinstance(value, list) else [value]
            return any(isinstance(text, str) and part.lower() in text.lower() for text in texts)
        case bool() | str():
            return type(value) is type(wanted) and value == wanted
        case _:
            return isinstance(value, int | float) and not isinstance(value, bool) and value == wanted


def read_choice(name: Any, arguments: Any) -> Choice:
    """A choice, with arguments as an object or as its JSON text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {}
    return Choice(str(name), arguments if isinstance(arguments, dict) else {})


def openai_request(model: str, system: str, tools: Sequence[Tool], ask: str) -> dict[str, Any]:
    """A request to OpenAI's chat completions."""
    functions = [{"name": t.name, "description": t.description, "parameters": t.input_schema} for t in tools]
    return {
        "model": model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": ask}],
        "tools": [{"type": "function", "function": function} for function in functions],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    }


def openai_choice(answer: dict[str, Any]) -> Choice:
    """The first call in an answer of OpenAI's form."""
    calls = answer["choices"][0]["message"].get("tool_calls") or []
    return read_choice(calls[0]["function"]["name"], calls[0]["function"]["arguments"]) if calls else Choice()


def anthropic_request(model: str, system: str, tools: Sequence[Tool], ask: str) -> dict[str, Any]:
    """A request to Anthropic's messages."""
    return {
        "model": model,
        "system": system,
        "messages": [{"role": "user", "content": ask}],
        "tools": [{"name": t.name, "description": t.description, "input_schema": t.input_schema} for t in tools],
        "max_tokens": ANSWER_TOKENS,
    }


def anthropic_choice(answer: dict[str, Any]) -> Choice:
    """The first call in an answer of Anthropic's form."""
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    return read_choice(calls[0]["name"], calls[0]["input"]) if calls else Choice()


def over_http(client: httpx2.AsyncClient, options: argparse.Namespace, system: str, tools: Sequence[Tool]) -> Ask:
    """Asks an endpoint; what it answers with another status than 200 is raised."""
    key = os.environ.get(options.key_env, "") if options.key_env else ""
    anthropic = options.api == "anthropic"
    made, read = (anthropic_request, anthropic_choice) if anthropic else (openai_request, openai_choice)
    path = "/v1/messages" if anthropic else "/chat/completions"
    secret = {"x-api-key": key} if anthropic else {"Authorization": f"Bearer {key}"}
    headers = (secret if key else {}) | ({"anthropic-version": ANTHROPIC_VERSION} if anthropic else {})

    async def ask(text: str) -> Choice:
        request = made(options.model, system, tools, text)
        response = await client.post(options.url.rstrip("/") + path, json=request, headers=headers, timeout=ANSWER_S)
        response.raise_for_status()
        return read(response.json())

    return ask


def on_our_engine(client: Client, system: str, tools: Sequence[Tool]) -> Ask:
    """Asks the model that our server serves, with the tools as text and an answer that is held to the choice's form."""
    shown = [{"name": t.name, "description": t.description, "arguments": t.input_schema} for t in tools]
    told = f"{system}\n\nAnswer with the tool to call and its arguments, as JSON. The tools:\n{json.dumps(shown)}"
    schema = {
        "type": "object",
        "properties": {"tool": {"enum": [t.name for t in tools]}, "arguments": {"type": "object"}},
        "required": ["tool", "arguments"],
        "additionalProperties": False,
    }
    given = {"system": told, "json_schema": schema, "max_tokens": ANSWER_TOKENS, "temperature": 0, "wait_s": ANSWER_S}

    async def ask(text: str) -> Choice:
        result = await client.call_tool("generate", {"prompt": text, **given}, read_timeout_seconds=ANSWER_S)
        if result.is_error or result.structured_content is None:
            raise RuntimeError(f"{result.content}")
        return read_answer(result.structured_content["text"])

    return ask


def read_answer(text: str) -> Choice:
    """The choice in a JSON object; its tool alone where `max_tokens` cut it off later on."""
    try:
        answer = json.loads(text)
    except ValueError:
        begun = re.match(r'\s*{\s*"tool"\s*:\s*"(\w+)"', text)
        return Choice(begun[1] if begun else "")
    return read_choice(answer.get("tool", ""), answer.get("arguments"))


async def ask_all(ask: Ask, tasks: Sequence[Task], at_once: int = AT_ONCE) -> list[Score]:
    """Ask every task, a few at a time; scores in the order of the tasks."""
    places = asyncio.Semaphore(at_once)

    async def one(task: Task) -> Score:
        async with places:
            return score(task, await ask(task.ask))

    return await asyncio.gather(*(one(task) for task in tasks))


def show(scores: Sequence[Score], num_left_out: int) -> None:
    """Print a line for each task, and the totals."""
    table = Table("task", "wanted", "chosen", "arguments", box=None)
    for one in scores:
        wrong = "wrong: " + ", ".join(one.wrong) if one.wrong else "right"
        table.add_row(one.task.ask[:60], one.task.tool, one.choice.tool or "none", wrong if one.has_tool else "")
    Console(width=140).print(table)
    print(summary(scores, num_left_out))


def summary(scores: Sequence[Score], num_left_out: int) -> str:
    """The totals, in a line."""
    tools, whole = sum(one.has_tool for one in scores), sum(one.has_all for one in scores)
    line = f"right tool {tools} of {len(scores)}; with all key arguments {whole} of {len(scores)}"
    return f"{line}; {num_left_out} tasks left out, since their tools are not offered" if num_left_out else line


async def run(options: argparse.Namespace) -> None:
    """Ask all tasks of the model that was chosen."""
    config = Config.load(**({} if options.url else {"model": str(options.folder)}))
    engine, registry = wire(config)
    try:
        async with Client(build_server(Service(engine, registry))) as ours, httpx2.AsyncClient() as http:
            tools, system = (await ours.list_tools()).tools, ours.instructions or ""
            names = {tool.name for tool in tools}
            tasks = [task for task in read_tasks() if task.tool in names][: options.tasks]
            ask = over_http(http, options, system, tools) if options.url else on_our_engine(ours, system, tools)
            show(await ask_all(ask, tasks), sum(task.tool not in names for task in read_tasks()))
            if not options.url:
                print("The schemas were text, and the answers were held to JSON.")
    finally:
        engine.close()


def main() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description="Which of our tools a model would use for 40 tasks.")
    parser.add_argument("--url", help="an endpoint: https://host/v1 of OpenAI's form, https://host of Anthropic's")
    parser.add_argument("--model", default="default", help="the model's name there")
    parser.add_argument("--api", choices=["openai", "anthropic"], default="openai")
    parser.add_argument("--key-env", help="the environment variable that has the key")
    parser.add_argument("--folder", type=Path, default=SMOLLM2, help="a local model in place of an endpoint")
    parser.add_argument("--tasks", type=int, help="ask the first so many alone")
    options = parser.parse_args()
    if not options.url and not options.folder.is_dir():
        sys.exit(
            f"There is no {options.folder}. Make it with `python -m tests.real.smollm2 build/smollm2`, or give --url."
        )
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
