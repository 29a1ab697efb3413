"""Reads what a model writes, as it comes: text is split into thoughts, answer and tool calls. Knows no tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from mlx_mcp.chat.answer import Piece, TextKind
from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More
from mlx_mcp.chat.formats.format import Format, Marks
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.message import ToolCall
from mlx_mcp.chat.reading_notes import ReadingNotes

# How often the characters of a call that is still coming may be read, on average, and how many in any case. A call is
# read from its beginning each time, and whether that is done sooner or later changes nothing in what is returned.
MAX_READINGS = 64
FREE_READING = 4096
CLOSERS = ">}])|"  # a call may be complete behind one of these


class Reader:
    """Reads one answer in the format of its model's family.

    What it returns depends on the text alone, and not on how that is cut into pieces. Every character is returned
    once, in order, except the markers of the format, the line breaks right behind them, and white space before
    thoughts. A tool call is returned in one piece once it is complete. What was written as a call and is none is
    returned as answer, as it was written, with a note.
    """

    def __init__(self, form: Format, reasoning: bool = False, tools: Sequence[dict[str, Any]] = ()) -> None:
        """`reasoning` says that the prompt opened thoughts. `tools` are function definitions in OpenAI's form."""
        self._form, self._offered = form, Offered(tools)
        self._notes = ReadingNotes(self._offered)
        self._openers = form.calls.openers if form.calls else ()
        self._openers_within = (*self._openers, *form.calls.within) if form.calls else ()
        self._sections = {one.begin: one.end for one in form.calls.sections} if form.calls else {}
        self._markers = (*self._openers, *self._sections, *form.frame)  # of an answer
        self._buffer, self._ended, self._cut = "", False, False
        self._pieces: list[Piece] = []
        self._calls: list[ToolCall] = []
        self._skip_breaks = False  # a marker was read, so that line breaks are skipped
        self._may_think = True
        self._marks = Marks("", "")  # of the thoughts that are being read
        self._ends: tuple[str, ...] = ()  # what else ends the part that is being read
        self._prefix = ""  # what stands before a call and is shown only if the call cannot be read
        self._opener = ""  # what the call begins with
        self._kind = TextKind.ANSWER  # what the call stands in
        self._closers: tuple[str, ...] = ()  # ends of sections that may follow a call whose section did not begin
        self._section_end = ""  # of the section that is being read
        self._reading = _Economy()
        self._state: Callable[[], bool] = self._next
        if reasoning and form.thoughts:
            self._open(form.thoughts[0])
            self._ends = tuple(marks.end for marks in form.thoughts[1:])  # the prompt may have opened any

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that are complete by now."""
        return tuple(self._calls)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know of how the answer was read."""
        return self._notes.texts

    @property
    def within_part(self) -> bool:
        """Whether the next text belongs to thoughts or to what may be a call."""
        return self._state in (self._thoughts, self._call, self._section)

    def feed(self, text: str) -> list[Piece]:
        """Take more text; returns what became certain with it."""
        self._buffer += text
        return self._run()

    def finish(self, cut: bool = False) -> list[Piece]:
        """Take the end of the text; returns what was held back. `cut` says that it ended at a limit of tokens."""
        self._ended, self._cut = True, cut
        pieces = self._run()
        calls = self._form.calls
        self._notes.finish(filter(None, (calls.begin, *calls.openers)) if calls else ())
        return pieces

    def _run(self) -> list[Piece]:
        while self._state():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _next(self) -> bool:
        """Where an answer begins, or goes on after a part of it."""
        return self._begin()

    # Each state takes what it can from the buffer, and returns whether to go on with the state that it leaves behind.
    # It returns False when it needs more text, or when all is read.

    def _begin(self) -> bool:
        """Where an answer begins, or goes on after thoughts or after a call."""
        text = self._buffer.lstrip()
        thoughts = self._form.thoughts if self._may_think else ()
        hidden = (*(marks.begin for marks in (*thoughts, *self._form.envelopes)), *self._form.frame, *self._closers)
        bare = self._form.calls.bare if self._form.calls and self._offered.names else ()
        if not self._ended and could_become(text, (*hidden, *bare)):
            return False
        found = first_of(text, hidden)
        if found:
            self._buffer = text[len(found) :]
            opened = {marks.begin: marks for marks in thoughts}.get(found)
            if opened:
                self._open(opened)
            else:
                self._skip_breaks = True
                self._ends = tuple(marks.end for marks in self._form.envelopes if marks.begin == found)
        elif first_of(text, bare):
            self._enter_call("", self._buffer[: len(self._buffer) - len(text)], text)
        else:
            self._closers, self._state = (), self._answer
        return True

    def _open(self, marks: Marks) -> None:
        self._marks, self._skip_breaks, self._state = marks, True, self._opened

    def _opened(self) -> bool:
        """Where thoughts begin; the prompt and the model may both have written their marker, or the model has none."""
        text, begin = self._buffer.lstrip(), self._marks.begin
        if not self._ended and could_become(text, (begin, *self._form.frame)):
            return False
        self._state = self._begin if first_of(text, self._form.frame) else self._thoughts
        if text.startswith(begin):
            self._buffer = text[len(begin) :]
        return True

    def _thoughts(self) -> bool:
        calls = self._openers if self._form.calls_in_thoughts else ()
        end = self._take_text(TextKind.REASONING, (self._marks.end, *self._ends, *calls))
        if end in calls:
            self._kind = TextKind.REASONING
            self._enter_call(end, "", self._buffer)
        elif end:
            self._leave(end)
        return bool(end)

    def _answer(self) -> bool:
        found = self._take_text(TextKind.ANSWER, (*self._markers, *self._ends) if self._ends else self._markers)
        if not found:
            return False
        rest = self._buffer[len(found) :]
        if found in self._openers:
            self._enter_call(found, "", self._buffer)
        elif found in self._sections:
            self._prefix, self._section_end = found, self._sections[found]
            self._buffer, self._state = rest, self._section
        elif found in self._ends:
            self._leave(found)
        else:
            self._buffer, self._skip_breaks = rest, True
        return True

    def _leave(self, end: str) -> None:
        """Go behind the end of a part."""
        self._buffer = self._buffer[len(end) :]
        self._skip_breaks, self._ends, self._state = True, (), self._next

    def _section(self) -> bool:
        """Between the calls of a section."""
        text, openers = self._buffer.lstrip(), self._openers_within
        if not text and self._ended:
            self._buffer = ""
            if self._prefix:
                self._notes.nothing_followed()
            return False
        if not self._ended and could_become(text, (self._section_end, *openers)):
            return False
        if text.startswith(self._section_end):
            if self._prefix:
                self._notes.empty_section()
            self._prefix = ""
            self._buffer, self._skip_breaks = text[len(self._section_end) :], True
            self._section_end, self._state = "", self._next
        elif first_of(text, openers):
            space = self._buffer[: len(self._buffer) - len(text)] if self._prefix else ""
            self._enter_call(first_of(text, openers), self._prefix + space, text)
        else:
            self._opener = ""
            self._refuse("there is no call in it")
        return True

    def _enter_call(self, opener: str, prefix: str, text: str) -> None:
        """Read a call, which `text` begins with; `prefix` is shown before it if it is none."""
        self._opener, self._prefix, self._buffer = opener, prefix, text
        self._reading, self._state = _Economy(), self._call

    def _call(self) -> bool:
        if not self._ended and not self._reading.is_due(self._buffer):
            return False
        cursor = Cursor(self._buffer, 0, self._ended, self._cut)
        assert self._form.calls is not None, "a call without a notation"
        try:
            calls = self._form.calls.read(cursor, self._offered)
        except More:
            if not self._ended:
                return False
            self._give_up()
        except Malformed as error:
            self._refuse(str(error))
        else:
            written, self._buffer = self._buffer[: cursor.pos], self._buffer[cursor.pos :]
            self._accept(calls, written)
        return True

    def _accept(self, calls: list[ToolCall], written: str) -> None:
        calls = [self._offered.named(call) for call in calls]
        unknown = [call.name for call in calls if call.name not in self._offered]
        if unknown or not calls:
            if self._opener or any(call.arguments for call in calls):
                self._notes.not_offered(unknown)
            self._emit(self._kind, self._prefix + written)
            self._section_end = "" if self._prefix else self._section_end  # whose beginning is text
        else:
            self._calls += calls
            self._notes.checked(calls)
            self._pieces.append(Piece(TextKind.TOOL_CALL, written))
            self._skip_breaks = True
            self._closers = () if self._section_end else tuple(self._sections.values())
        self._prefix, self._may_think = "", False
        self._state = self._section if self._section_end else self._behind_call(self._next)

    def _refuse(self, why: str) -> None:
        """What seemed to begin a call is text, and what follows it is read as any text."""
        self._notes.no_call(why, self._opener or self._prefix)
        self._emit(self._kind, self._prefix + self._opener)
        self._buffer = self._buffer[len(self._opener) :]
        self._prefix = self._opener = self._section_end = ""
        self._state = self._behind_call(self._answer)

    def _behind_call(self, state: Callable[[], bool]) -> Callable[[], bool]:
        """Where to go on behind a call: in the thoughts that it stands in, or with `state`."""
        kind, self._kind = self._kind, TextKind.ANSWER
        return self._thoughts if kind is TextKind.REASONING else state

    def _give_up(self) -> None:
        """The answer has ended within what seemed to be a call."""
        resume = self._form.calls.resume if self._form.calls else ""
        end = self._buffer.find(resume) if resume else -1
        text = self._buffer[: end + len(resume)] if end >= 0 else self._buffer
        if text.strip() == self._opener.strip() and self._opener:
            self._notes.nothing_followed()
        else:
            self._notes.incomplete(text, self._opener, self._cut)
            self._emit(self._kind, self._prefix + text)
        self._buffer = self._buffer[len(text) :]
        self._prefix = self._section_end = ""
        self._state = self._behind_call(self._answer)

    def _take_text(self, kind: TextKind, markers: tuple[str, ...]) -> str:
        """Return the text before the first of `markers`, and which one follows; empty if none does as yet."""
        place, marker = find_marker(self._buffer, markers, self._ended)
        self._emit(kind, self._buffer[:place])
        self._buffer = self._buffer[place:]
        return marker

    def _emit(self, kind: TextKind, text: str) -> None:
        if self._skip_breaks:
            text = text.lstrip("\r\n")
        if not text:
            return
        self._skip_breaks = False
        self._notes.read(kind, text)
        self._pieces.append(Piece(kind, text))


class _Economy:
    """Says when to read a call that is still coming, so that the cost does not grow with the square of its length."""

    def __init__(self) -> None:
        self._seen = self._tried = self._read = 0
        self._closed = False

    def is_due(self, text: str) -> bool:
        """Whether to read `text`, the call as far as it is here, once more."""
        self._closed |= any(closer in text[self._seen :] for closer in CLOSERS)
        self._seen = len(text)
        due = self._closed or self._seen >= 2 * self._tried
        if not due or self._read + self._seen > MAX_READINGS * self._seen + FREE_READING:
            return False
        self._read += self._seen
        self._tried, self._closed = self._seen, False
        return True


def find_marker(text: str, markers: tuple[str, ...], ended: bool) -> tuple[int, str]:
    """Where the first of `markers` begins, and which it is, the longest of several.

    If there is none, the marker is empty, and the place is where one may begin that is not all there, unless the text
    has `ended`.
    """
    pattern, first, longest = scanner(markers)
    if found := pattern.search(text):
        return found.start(), found[0]
    if not ended:
        for place in range(max(len(text) - longest + 1, 0), len(text)):
            if text[place] in first and could_become(text[place:], markers):
                return place, ""
    return len(text), ""


@lru_cache(maxsize=256)
def scanner(markers: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """What finds the first of `markers`, the characters that they begin with, and the length of the longest."""
    some = sorted(filter(None, markers), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, some)) if some else r"(?!)")
    return pattern, frozenset(marker[0] for marker in some), len(some[0]) if some else 0


def first_of(text: str, markers: Iterable[str]) -> str:
    """The longest of `markers` that the text begins with; empty if it begins with none."""
    return max((marker for marker in markers if marker and text.startswith(marker)), key=len, default="")


def could_become(text: str, markers: Iterable[str]) -> bool:
    """Whether the text is the beginning of one of `markers`, and less than it."""
    return any(len(text) < len(marker) and marker.startswith(text) for marker in markers)
