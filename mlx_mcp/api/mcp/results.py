"""What tools return: a shape of `api/web/results`, or one of these, as a result of the protocol.

Some hosts show the structured result, some the text blocks, some both: each must have all of it.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from mcp_types import CallToolResult, TextContent
from pydantic import BaseModel

NO_TEXT = "(no text)"  # an answer in a batch that failed, or is nothing but tool calls


class Running(BaseModel):
    """What a call returns that still runs: how far it is, and the handle of its result."""

    status: Literal["running"] = "running"
    result_id: str
    tool: str
    progress: str
    text: str | None = None  # what there is of the answer
    texts: list[str] | None = None  # what there is of each branch's answer
    note: str = "It goes on. get_result with this result_id waits for it; cancel ends it."


class Part(BaseModel):
    """A part of a result that is too long for one answer; the whole of it is the resource `uri`."""

    status: Literal["part"] = "part"
    result_id: str
    uri: str
    text: str
    next_offset: int | None = None
    total_chars: int
    note: str | None = None


def reply(result: BaseModel) -> CallToolResult:
    """A tool's result: structured, and as text for hosts that show their model nothing else.

    The texts of answers are blocks of their own, as they are. A last block says as JSON what these do not: it has no
    text again, since some hosts show everything.
    """
    structured = result.model_dump(mode="json", exclude_none=True)
    texts, rest = apart(structured)
    content = [TextContent(type="text", text=text) for text in (*texts, compact(rest))]
    return CallToolResult(content=list(content), structured_content=structured)


def apart(structured: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The texts of a result's answers, and the rest of it.

    A single answer without text has no block, in a batch every answer has one. Counts of 0 are left out of a batch's
    rest, which has many.
    """
    rest = {key: value for key, value in structured.items() if key != "text"}
    if "results" not in rest:
        return [structured["text"]] if structured.get("text") else [], rest
    branches = rest["results"]
    rest["results"] = [{key: value for key, value in b.items() if key != "text" and value != 0} for b in branches]
    return [branch.get("text") or NO_TEXT for branch in branches], rest


def compact(value: Any) -> str:
    """As JSON that is cheap to read."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
