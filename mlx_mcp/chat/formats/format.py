"""What a format consists of: the markers of thoughts, the frame of an answer, the notation of calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More
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
    ends with `after`; where that is empty, with its last bracket. Units stand alone or in a `section`, in which they
    may begin with `within` too. Where an answer begins, a unit may begin with one of `bare`; if it is no call there,
    it is text. A unit that never ends is text to behind the first `resume`, or to the end of the answer where that is
    empty: calls may be quoted in it there.
    """

    name: str
    openers: tuple[str, ...] = ()
    after: str = ""
    section: Marks | None = None
    within: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    resume: str = ""

    @property
    def begin(self) -> str:
        """The marker at which calls begin; empty where they begin without one."""
        return self.section.begin if self.section else next(iter(self.openers), "")

    @property
    def end(self) -> str:
        """The marker at which calls end; empty where they end without one."""
        return self.section.end if self.section else self.after

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
            within = self.section is not None and cursor.skip(self.section.begin)
            cursor.space()
            while not cursor.at_end:
                if within and self.section is not None and cursor.skip(self.section.end):
                    within = False
                else:
                    calls += self.read(cursor, offered)
                cursor.space()
        except More as error:
            raise Malformed("the call is incomplete") from error
        return calls

    def grammar(self, tools: Sequence[dict[str, Any]]) -> str | None:
        """A grammar in llguidance's Lark dialect of one call of one of `tools`, markers included, or None."""
        return None


@dataclass(frozen=True)
class Headers:
    """How answers consist of messages, each with a header before it.

    A header begins with one of `begins`, and ends with `message`. A message ends with one of `stops`, or where
    another one starts with `start`.
    """

    begins: tuple[str, ...]
    start: str
    message: str
    stops: tuple[str, ...]
    kind: Callable[[str], TextKind]  # what a message is, by its header


@dataclass(frozen=True)
class Format:
    """How a family of models marks the parts of its answers."""

    name: str
    thoughts: tuple[Marks, ...] = ()
    calls: CallSyntax | None = None
    frame: tuple[str, ...] = ()  # markers around answers, which say nothing and are not shown
    headers: Headers | None = None  # where answers consist of messages

    def opened_thoughts(self, rendered: str) -> Marks | None:
        """The marks of the thoughts that a rendered prompt ends inside of, if it does."""
        end = rendered.rstrip()
        return next((marks for marks in self.thoughts if end.endswith(marks.begin.rstrip())), None)


PLAIN = Format("plain")
