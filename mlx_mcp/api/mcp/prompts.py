"""The prompts, which hosts show as slash commands: each tells the host's model which tools to call, in which order."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

from mcp import MCPError
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.prompts import Prompt
from mcp_types import INVALID_PARAMS
from pydantic import Field

from mlx_mcp.api.mcp.icon import ICONS
from mlx_mcp.service.batch import MAX_BRANCHES

# Claude Code cuts a command line at its spaces into arguments, and drops what is too many.
WHOLE = (
    "The above may be cut off: where the user's own command line says more, all of that is meant, and `model` is none "
    "of it."
)
Model = Annotated[str, Field(description="Name of a local model; the configured one if left out.")]


def add_prompts(server: MCPServer[Any]) -> None:
    """Give a server the prompts."""
    for prompt in prompts():
        server.add_prompt(prompt)


@cache  # pydantic takes 2 ms for each, and each connection has a server of its own
def prompts() -> list[Prompt]:
    """The prompts, in the order in which hosts show them."""
    titles: dict[Callable[..., str], str] = {
        delegate: "Delegate a task to a local model",
        fan_out: "Ask many things of files at once",
        review: "Have several local reviewers look, and compare",
        label_rows: "Label rows by a schema",
    }
    return [Prompt.from_function(function, title=title, icons=ICONS) for function, title in titles.items()]


def delegate(task: Annotated[str, Field(description="What is to be done.")], model: Model = "") -> str:
    """Have a local model do a task, and check its answer."""
    return f"""Have a local model do this task with the tools of mlx-mcp, and check what comes of it.

Task: {task}
{WHOLE}

1. Write a prompt that stands alone: the local model sees nothing of this conversation and has no tools. Say what the \
answer shall look like. Name files instead of pasting them.
2. Call {call("generate", prompt="…", files=["…"], model=model)}, without `files` if there are none. For data give \
`json_schema` as well: the answer then parses.
3. Check the answer against the task. If it falls short, say in a new call what was wrong, once; then do the task \
yourself.
4. Report the answer, and that a local model gave it."""


def fan_out(
    question: Annotated[str, Field(description="What is to be found out.")],
    files: Annotated[str, Field(description="Paths, separated by commas.")],
    model: Model = "",
) -> str:
    """Read files once into a session, and ask many things of them at once."""
    paths = items("files", files)
    return f"""Answer this with local models over files that they read once, with the tools of mlx-mcp.

Question: {question}
{WHOLE}

1. Call {call("create_session", files=paths, model=model)}; its result has the `session`. If the files are refused as \
too long, make one session for each.
2. Split the question into independent ones, at most {MAX_BRANCHES}, each of which stands alone and says what its \
answer shall look like.
3. Call {call("generate_batch", session="…", prompts=["…", "…"])} with that session: all are answered at once, and the \
files are not computed again.
4. Put the answers together, check what contradicts itself in the files, and say which answer each statement rests on.
5. Call {call("close_session", sessions=["…"])}."""


def review(
    subject: Annotated[str, Field(description="What is to be reviewed: paths, separated by commas, or a text.")],
    aspects: Annotated[
        str, Field(description="What the reviewers look at, one each, separated by commas.")
    ] = "correctness, simplicity, what is missing",
    model: Model = "",
) -> str:
    """Have several reviewers look at one context, each at something else, and compare what they say."""
    looks = items("aspects", aspects)
    return f"""Have local models review this, each from its own side, with the tools of mlx-mcp, and compare.

Subject: {subject}
{WHOLE}

1. Call {call("create_session", files=["…"], model=model)} with the files of the subject; if it is a text, give it as \
`system` instead of `files`. The result has the `session`.
2. Call {call("generate_batch", session="…", prompts=looks, keep=True)} with that session, where each prompt asks for \
the faults of one aspect, with the place and a reason for each, and for nothing if there are none. With keep every \
reviewer has a session of its own.
3. Compare: what several found comes first. Ask a reviewer for evidence of what only it found, with \
{call("generate", session="…", prompt="…")}. Look at the subject yourself before you report a fault.
4. Report the faults that hold, the worst first, and which you dismissed and why.
5. Call {call("close_session", sessions=["…"])} with all of these sessions."""


def label_rows(
    rows: Annotated[str, Field(description="Path of the file with the rows, or the rows.")],
    labels: Annotated[str, Field(description="The labels, separated by commas, or a JSON schema of an object.")],
    instruction: Annotated[str, Field(description="How to choose the label.")] = "",
    model: Model = "",
) -> str:
    """Have a local model label rows, with answers that obey a schema."""
    schema = schema_of(labels)
    return f"""Label rows with a local model, with the tools of mlx-mcp.

Rows: {rows}
{f"How to choose: {instruction}" if instruction else "How to choose: by the meaning of the labels."}
{WHOLE}

1. Read the rows, and number them.
2. Call {call("create_session", system="…", model=model)}, where `system` says how to choose, what each label means, \
and has three examples with their answers. The result has the `session`.
3. For every {MAX_BRANCHES} rows call {call("generate_batch", session="…", prompts=["…", "…"], json_schema=schema)} \
with that session, one prompt for each row, which is the row. The results come in the order of the rows.
4. Look at ten of the labels yourself. If more than one is wrong, improve `system` and begin again at 2, once.
5. Report the labels by row, and how many you looked at and how many of these were wrong.
6. Call {call("close_session", sessions=["…"])}."""


def call(tool: str, **arguments: Any) -> str:
    """A call as it is shown to the host's model; arguments that are empty are left out."""
    shown = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items() if value)
    return f"`{tool}({', '.join(shown)})`"


def items(argument: str, given: str) -> list[str]:
    """The items of a list that is separated by commas.

    Raises:
        MCPError: there is none.
    """
    found = [item.strip() for item in given.replace("\n", ",").split(",") if item.strip()]
    if not found:
        raise MCPError(INVALID_PARAMS, f"`{argument}` is empty: give at least one, separated by commas.")
    return found


def schema_of(labels: str) -> dict[str, Any]:
    """The JSON schema of a row's answer.

    Raises:
        MCPError: it is neither a list of labels nor the schema of an object.
    """
    if labels.lstrip().startswith("{"):
        try:
            schema: dict[str, Any] = json.loads(labels)
        except ValueError as error:
            raise MCPError(INVALID_PARAMS, f"`labels` is not JSON ({error}): give a JSON schema, or labels.") from error
        if schema.get("type") != "object":
            raise MCPError(INVALID_PARAMS, "`labels` is not the schema of an object: give one with type object.")
        return schema
    label = {"enum": items("labels", labels)}
    return {"type": "object", "properties": {"label": label}, "required": ["label"], "additionalProperties": False}
