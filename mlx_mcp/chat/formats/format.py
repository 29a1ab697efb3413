"""What a format consists of: the markers of thoughts, the frame of an answer, the notation of calls."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More
from mlx_mcp.chat.formats.grammar import Rules, Spell, functions, one_of, quoted, sequence
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.message import ToolCall


@dataclass(frozen=True)
class Marks:
    """The markers that a part of an answer stands between."""

    begin: str
    end: str


@dataclass(frozen=True, kw_only=True)
class CallSyntax(ABC):
    """How the models of a family write tool calls.

    A unit is one call, or one list of calls. It begins with one of `openers` wherever that stands in an answer, and
    ends with `after`; where that is empty, with its last bracket. Units stand alone or in one of `sections`, in which
    they may begin with `within` too. Where an answer begins, a unit may begin with one of `bare`; if it is no call
    there, it is text. A unit that never ends is text to behind the first `resume`, or to the end of the answer where
    that is empty: calls may be quoted in it there.
    """

    name: str
    openers: tuple[str, ...] = ()
    after: str = ""
    sections: tuple[Marks, ...] = ()
    within: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    resume: str = ""

    @property
    def begin(self) -> str:
        """The marker at which calls begin; empty where they begin without one."""
        if self.sections:
            return self.sections[0].begin
        return "" if self.bare else next(iter(self.openers), "")

    @property
    def end(self) -> str:
        """The marker at which calls end; empty where they end without one."""
        return self.sections[0].end if self.sections else self.after

    def take_opener(self, cursor: Cursor) -> str:
        """Go behind the opener that stands here, and return it; empty if none does."""
        return next((opener for opener in self.openers if cursor.skip(opener)), "")

    def take_after(self, cursor: Cursor) -> None:
        """Go behind the marker that ends the unit; at the end of the answer, or before a next unit, it may be missing.

        Raises:
            More or Malformed: see Cursor.
        """
        cursor.space()
        if self.after and not cursor.skip(self.after):
            follows = any(cursor.sees(opener) for opener in self.openers)
            if not follows and (cursor.cut or not cursor.at_end):
                cursor.take(self.after)

    @abstractmethod
    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """The calls of one unit, from its opener on.

        Raises:
            More or Malformed: see Cursor.
        """

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> list[ToolCall]:
        """The calls in a text that consists of calls only, which are not checked against the tools' schemas.

        Raises:
            Malformed: it has something else in it.
        """
        cursor, calls, offered = Cursor(text, ended=True), [], Offered(tools)
        try:
            cursor.space()
            while not cursor.at_end:
                calls += self._units(cursor, offered)
                cursor.space()
        except More as error:
            raise Malformed("the call is incomplete") from error
        return calls

    def _units(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """The calls of a section, or of a unit that stands alone."""
        section = next((section for section in self.sections if cursor.skip(section.begin)), None)
        if section is None:
            return self.read(cursor, tools)
        calls: list[ToolCall] = []
        cursor.space()
        while not (cursor.skip(section.end) or (cursor.at_end and calls)):
            calls += self.read(cursor, tools)
            cursor.space()
        return calls

    def grammar(self, tools: Sequence[dict[str, Any]], spell: Spell = quoted) -> str | None:
        """A grammar in llguidance's dialect of Lark of one call of one of `tools`, which begins with `begin`.

        None if this notation cannot be held to one. `spell` gives the source of a marker or a text.
        """
        rules = Rules()
        calls = [self.rule(rules, name, schema, spell) for name, schema in functions(tools)]
        if not all(calls):
            return None
        before, after = (self.sections[0].begin, self.sections[0].end) if self.sections else ("", "")
        parts = [spell(before) if before else "", one_of(filter(None, calls)), spell(after) if after else ""]
        return rules.source(sequence(*parts))

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """A rule for one call of this tool, markers included; None if there can be none."""
        return None


@dataclass(frozen=True, kw_only=True)
class EitherCalls(CallSyntax):
    """Several notations, which differ in their openers."""

    alternatives: tuple[CallSyntax, ...]

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        for syntax in self.alternatives:
            if any(cursor.sees(opener) for opener in syntax.openers):
                return syntax.read(cursor, tools)
        raise Malformed("there is no call")

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax."""
        return self.alternatives[0].rule(rules, name, schema, spell)


def either(name: str, *alternatives: CallSyntax) -> CallSyntax:
    """The notation of calls that may be written in each of these."""
    return EitherCalls(
        name=name,
        openers=tuple(opener for syntax in alternatives for opener in syntax.openers),
        sections=tuple(section for syntax in alternatives for section in syntax.sections),
        alternatives=alternatives,
    )


@dataclass(frozen=True)
class Headers:
    """How answers consist of messages, each with a header before it.

    A header begins with one of `begins`, and ends with `message`. A message ends with one of `stops`, or where
    another one starts with `start`. `opened` says that prompts end within a header.
    """

    begins: tuple[str, ...]
    start: str
    message: str
    stops: tuple[str, ...]
    kind: Callable[[str], TextKind]  # what a message is, by its header
    opened: bool = False
    cut: re.Pattern[str] | None = None  # a header that was not written to its end, with nothing else in it


@dataclass(frozen=True)
class Format:
    """How a family of models marks the parts of its answers."""

    name: str
    thoughts: tuple[Marks, ...] = ()
    calls: CallSyntax | None = None
    frame: tuple[str, ...] = ()  # markers around answers, which say nothing and are not shown
    envelopes: tuple[Marks, ...] = ()  # what an answer as a whole may stand in, which is not shown either
    calls_in_thoughts: bool = False  # calls that stand in thoughts are meant
    headers: Headers | None = None  # where answers consist of messages

    @property
    def markers(self) -> frozenset[str]:
        """All texts that the format itself consists of."""
        return frozenset(_texts(self))

    def opened_thoughts(self, rendered: str) -> Marks | None:
        """The marks of the thoughts that a rendered prompt ends inside of, if it does."""
        end = rendered.rstrip()
        return next((marks for marks in self.thoughts if end.endswith(marks.begin.rstrip())), None)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item)
    elif is_dataclass(value):
        for one in fields(value):
            yield from _texts(getattr(value, one.name))


PLAIN = Format("plain")
