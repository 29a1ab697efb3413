"""Formats in which an answer consists of messages with headers: gpt-oss's Harmony, Muse, Functionary v3.2.

Source of Harmony: https://github.com/openai/harmony/blob/main/docs/format.md
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.formats.cursor import Cursor, Malformed
from mlx_mcp.chat.formats.format import CallSyntax, Format, Headers, Marks
from mlx_mcp.chat.formats.grammar import Rules, Spell, json_of, sequence
from mlx_mcp.chat.formats.json_calls import arguments_of, check_name
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.formats.xml_calls import XmlCalls
from mlx_mcp.chat.message import ToolCall

MESSAGE, CALL = "<|message|>", "<|call|>"
STOPS = ("<|end|>", "<|return|>")
_RECIPIENT = re.compile(r"(?:^|[\s>])to=([^\s<]+)")
_CUT = re.compile(r"(?:<\|start\|>\w*|<\|(?:channel|constrain)\|>\s*\w*|\s*to=\S*|\s)*(?:<\|?\w*\|?)?")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def recipient_of(header: str) -> str:
    """The tool that a message is for; empty if it is for the user. It may stand before or behind the channel."""
    found = [name for name in _RECIPIENT.findall(header) if name not in ("assistant", "user", "all")]
    return found[-1].removeprefix("functions.") if found else ""


def kind_of(header: str) -> TextKind:
    """What a message is, by its recipient and its channel."""
    if recipient_of(header):
        return TextKind.TOOL_CALL
    channels = _CHANNEL.findall(header)
    return TextKind.REASONING if channels and channels[-1] == "analysis" else TextKind.ANSWER


@dataclass(frozen=True, kw_only=True)
class HarmonyCalls(CallSyntax):
    """A message to `functions.NAME`, whose content is the arguments as JSON. Headers say where such messages are."""

    constrain: str = "<|constrain|>"  # stands before what the content is, such as json

    @property
    def begin(self) -> str:
        """See CallSyntax."""
        return "<|channel|>commentary to=functions."

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        name = recipient_of(cursor.until(MESSAGE))
        if not name:
            raise Malformed("the message is for no tool")
        cursor.take(MESSAGE)
        cursor.space()
        arguments: Any = {} if any(cursor.sees(end) for end in (CALL, *STOPS)) else cursor.json()
        cursor.space()
        if not (any(cursor.skip(end) for end in (CALL, *STOPS)) or cursor.sees("<|start|>") or cursor.at_end):
            raise Malformed("something follows its arguments")
        return [ToolCall(name, arguments_of(arguments))]

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax."""
        header = f"{self.begin}{name} {self.constrain}json{MESSAGE}"
        return rules.add(sequence(spell(header), json_of(schema), spell(self.after)))


HARMONY = Format(
    "harmony",
    calls=HarmonyCalls(name="harmony", after=CALL, resume=CALL),
    headers=Headers(
        begins=("<|channel|>", "<|start|>", " to=", "to="),
        start="<|start|>",
        message=MESSAGE,
        stops=STOPS,
        kind=kind_of,
        cut=_CUT,
    ),
)


@dataclass(frozen=True, kw_only=True)
class RecipientCalls(CallSyntax):
    """A message whose header is the name of the tool, and whose content is the arguments as JSON."""

    @property
    def begin(self) -> str:
        """Empty, because prompts end with the opener."""
        return ""

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        self.take_opener(cursor)
        name = check_name(cursor.until("\n"))
        cursor.space()
        return [ToolCall(name, arguments_of(cursor.json()))]

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax; a prompt ends with the opener."""
        return rules.add(sequence(spell(f"{name}\n"), json_of(schema)))


FUNCTIONARY = Format(
    "functionary-v3.2",
    calls=RecipientCalls(name="functionary-v3.2", openers=(">>>",)),
    headers=Headers(
        begins=(">>>",),
        start=">>>",
        message="\n",
        stops=(),
        kind=lambda header: TextKind.ANSWER if header.strip("> \n") == "all" else TextKind.TOOL_CALL,
        opened=True,
    ),
)

MUSE = Format(
    "muse",
    calls=XmlCalls(
        name="muse",
        openers=("<atem:invoke name=",),
        after="</atem:invoke>",
        sections=(Marks("<atem:function_calls>", "</atem:function_calls>"),),
        parameter=Marks("<atem:parameter", "</atem:parameter>"),
    ),
    headers=Headers(
        begins=("<|start|>", " to=", "to=", MESSAGE),
        start="<|start|>",
        message=MESSAGE,
        stops=("<|eom|>", "<|eot|>"),
        kind=lambda header: TextKind.REASONING if "to=self" in header else TextKind.ANSWER,
        cut=_CUT,
    ),
)
