"""Shows by rendering that a template leaves out nothing of what a caller says.

Beside the chat itself a copy is rendered that has marks inside its texts. Marks that are missing there are what the
template leaves out. Standard library only: the process that renders templates imports it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.mlx_backend.template_variables import as_text

SWITCH = re.compile(r"\s+/\w+$")
END = 400  # characters of the marked text that are returned
# A list of parts that a template shows as JSON, since it expects a text. In Python's notation marks are escaped.
PARTS_AS_TEXT = ('{"type": "text"', '{"type":"text"')


@dataclass(frozen=True)
class Wanted:
    """Something that has to be in the prompt: what it is, what shows that it is there, and what that it is garbled.

    Tools may be there `in_python`, in the notation of a Python dictionary, which some makers' templates have.
    """

    what: str
    marks: tuple[str, ...]
    garbled: tuple[str, ...] = ()
    in_python: bool = False

    def is_in(self, text: str) -> bool:
        """Whether a marked text has it; `tojson` may have escaped the marks."""
        there = all(any(form in text for form in self._forms(mark)) for mark in self.marks)
        return there and not any(wrong in text for wrong in self.garbled)

    def _forms(self, mark: str) -> list[str]:
        return [mark, json.dumps(mark)[1:-1], *([repr(mark)[1:-1]] if self.in_python else [])]


@dataclass(frozen=True)
class Proved:
    """A rendered chat, what its template left out, and how the copy with marks ends."""

    text: str
    lost: list[str] = field(default_factory=list)
    end: str = ""


def proved(render: Callable[[dict[str, Any]], str], given: dict[str, Any], marks: str) -> Proved:
    """Render what a template is given, and a copy of it with `marks`: characters that are nowhere in it.

    Without marks nothing is proved.
    """
    text = render(given)
    if not marks:
        return Proved(text)
    wanted: list[Wanted] = []
    unused = iter(marks)
    messages = [marked_message(message, unused, wanted) for message in given["messages"]]
    tools = given["tools"]
    marked_tools = None if tools is None else [marked_tool(tool, unused, wanted) for tool in tools]
    # Some templates have the tools in variables of other names, or as a text.
    others: dict[str, Any] = {name: marked_tools for name, value in given.items() if tools and value == tools}
    others |= {name: as_text(marked_tools) for name, value in given.items() if tools and value == as_text(tools)}
    copy = render(given | {"messages": messages, "tools": marked_tools} | others)
    return Proved(text, [each.what for each in wanted if not each.is_in(copy)], copy[-END:])


def num_marks(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> int:
    """At least as many marks as these need."""
    parts = sum(len(message["content"]) for message in messages if isinstance(message["content"], list))
    return 2 * (len(messages) + parts + len(tools) + sum(len(message.get("tool_calls", ())) for message in messages))


def marked_message(message: dict[str, Any], unused: Iterator[str], wanted: list[Wanted]) -> dict[str, Any]:
    """A message with marks in its content and its calls.

    The content of an answer is looked for at its end only, since templates take thoughts out of it, and not beside
    calls, where some templates take it for thoughts.
    """
    made, calls = dict(message), message.get("tool_calls", ())
    what = f"a message of the role {message['role']!r}"
    content = message["content"]
    if isinstance(content, list):
        made["content"] = [
            part | {"text": marked(part["text"], what, unused, wanted, PARTS_AS_TEXT)} if "text" in part else part
            for part in content
        ]
    elif content:
        mine: list[Wanted] = []
        made["content"] = marked(content, what, unused, mine)
        if message["role"] != "assistant":
            wanted += mine
        elif not calls:
            wanted += [Wanted(each.what, each.marks[-1:]) for each in mine]
    if calls:
        made["tool_calls"] = [marked_call(call, unused, wanted) for call in calls]
    return made


def marked(text: str, what: str, unused: Iterator[str], wanted: list[Wanted], garbled: tuple[str, ...] = ()) -> str:
    """A text with a mark after its first character and one before its last, so that it is trimmed as before.

    A last word such as "/no_think" stays whole, since templates look for it.
    """
    kept = SWITCH.sub("", text.strip())
    if not kept:
        return text
    start = text.index(kept)
    end = start + len(kept)
    first, last = next(unused), next(unused)
    wanted.append(Wanted(what, (first, last), garbled))
    middle = max(start + 1, end - 1)
    return text[: start + 1] + first + text[start + 1 : middle] + last + text[middle:]


def marked_call(call: dict[str, Any], unused: Iterator[str], wanted: list[Wanted]) -> dict[str, Any]:
    """A call with marks in its name, in its id where that has the name, and in its first argument's name."""
    function = dict(call["function"])
    name, arguments = function["name"], function["arguments"]
    mark = next(unused)
    function["name"] = with_mark(name, mark)
    wanted.append(Wanted(f"a call of the tool {name!r}", (mark,)))
    made = call | {"function": function}
    if name in call.get("id", ""):
        made["id"] = call["id"].replace(name, function["name"])
    by_name = json.loads(arguments) if isinstance(arguments, str) else arguments
    if by_name:
        first, *rest = by_name
        key = with_mark(first, next(unused))
        # A text that became JSON once more is not what the model should read.
        wanted.append(Wanted(f"the arguments of a call of {name!r}", (key,), (f'\\"{key}',)))
        changed = {key: by_name[first], **{other: by_name[other] for other in rest}}
        function["arguments"] = json.dumps(changed, ensure_ascii=False) if isinstance(arguments, str) else changed
    return made


def marked_tool(tool: dict[str, Any], unused: Iterator[str], wanted: list[Wanted]) -> dict[str, Any]:
    """A tool with a mark in its name."""
    function = tool.get("function", tool)
    mark = next(unused)
    wanted.append(Wanted(f"the tool {function['name']!r}", (mark,), in_python=True))
    changed = function | {"name": with_mark(function["name"], mark)}
    return tool | {"function": changed} if "function" in tool else changed


def with_mark(name: str, mark: str) -> str:
    """A name with a mark after its first character."""
    return name[:1] + mark + name[1:]
