"""Reads answers that consist of messages with headers: gpt-oss's Harmony, and Muse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.formats.format import Format, Headers, Marks
from mlx_mcp.chat.reader import Reader, could_become, first_of


class HeadedReader(Reader):
    """Reads one answer whose messages say in their headers what they are.

    A paragraph's break stands between the texts of two messages to the user, such as what is said before a call and
    the final answer. A header that cannot be read is returned as answer, with a note.
    """

    def __init__(self, form: Format, headers: Headers, reasoning: bool, tools: Sequence[dict[str, Any]]) -> None:
        self._headers = headers
        self._has_answered = self._new_message = False
        self._within_header = headers.opened
        super().__init__(form, reasoning, tools)
        self._ends = (*headers.stops, headers.start)

    def _next(self) -> bool:
        """Where a message may begin."""
        if self._within_header:
            self._within_header, self._state = False, self._header
            return True
        text = self._buffer.lstrip("\n")
        if not self._ended and could_become(text, self._headers.begins):
            return False
        if first_of(text, self._headers.begins):
            self._buffer, self._state = text, self._header
        else:
            self._state = self._answer  # the prompt had the header
        return bool(text)

    def _header(self) -> bool:
        headers = self._headers
        at = self._buffer.find(headers.message)
        stops = [place for end in (*headers.stops, headers.start) if (place := self._buffer.find(end, 1)) >= 0]
        stop = min(stops, default=len(self._buffer) if self._ended else -1)
        if at < 0 and stop < 0:
            return False
        if at < 0 or 0 <= stop < at:
            if headers.cut and stop == len(self._buffer) and headers.cut.fullmatch(self._buffer):
                self._buffer = ""
                self._notes.nothing_followed()
                return False
            self._notes.broken_header(self._buffer[:stop])
            self._emit(TextKind.ANSWER, self._buffer[:stop])
            self._buffer = self._buffer[stop:]
            self._ends, self._state = (*headers.stops, headers.start), self._answer
            return True
        self._enter_message(self._buffer[: at + len(headers.message)])
        return True

    def _enter_message(self, header: str) -> None:
        kind = self._headers.kind(header)
        self._ends = (*self._headers.stops, self._headers.start)
        if kind is TextKind.TOOL_CALL:
            self._enter_call(header, "", self._buffer)
            return
        self._new_message, self._skip_breaks = True, False
        self._buffer = self._buffer[len(header) :]
        self._state = self._answer
        if kind is TextKind.REASONING:
            self._marks, self._state = Marks("", ""), self._thoughts

    def _leave(self, end: str) -> None:
        super()._leave("" if end == self._headers.start else end)

    def _emit(self, kind: TextKind, text: str) -> None:
        if kind is TextKind.ANSWER and text:
            if self._new_message and self._has_answered:
                text = f"\n\n{text}"
            self._has_answered, self._new_message = True, False
        super()._emit(kind, text)
