"""Finds stop strings in text that comes in pieces. Knows nothing of tokens."""

from __future__ import annotations


class StopStrings:
    """Passes text on until a stop string begins. Neither the string nor a part of it is ever passed on.

    Of several stop strings the one that is whole first counts, however the text is split into pieces.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.pending = ""  # the end of the text so far, while it may be the beginning of a stop string
        self.found = ""  # the one that was met

    @property
    def met(self) -> bool:
        """Whether one was met."""
        return bool(self.found)

    def feed(self, piece: str) -> str:
        """Take the next piece, and return the text that can safely be shown; none after a stop string was met."""
        if self.met:
            return ""
        text, self.pending = self.pending + piece, ""
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            return text[:at]
        longest = max((self._overlap(text, stop) for stop in self.stops), default=0)
        if longest:
            text, self.pending = text[:-longest], text[-longest:]
        return text

    def finish(self) -> str:
        """Return the text that was held back, and turned out to be no stop string."""
        text, self.pending = self.pending, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The length of the longest end of `text` with which `stop` begins."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
