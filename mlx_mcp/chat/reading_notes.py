"""What the caller should know of how an answer was read, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.message import ToolCall

# Elements that answers begin with when they are a page or a picture.
_PAGES = frozenset(
    "a article b body br code details div em figure h1 h2 h3 h4 head html i img li main ol p pre rss section span "
    "strong sub summary sup svg table td tr ul xml".split()
)
_MARKED = re.compile(r"\s*(?:<([A-Za-z][\w:.-]*)>.*?</\1>|\[([A-Z_]{3,})\].*?\[/\2\])", re.DOTALL)
_MARKER = re.compile(r"\s*(<\|[^|<>]{1,40}\|>|<[｜|][^<>]{1,40}[｜|]>)")


class ReadingNotes:
    """The notes of one answer, each once."""

    def __init__(self, tools: Offered) -> None:
        self._tools = tools
        self._found: dict[str, None] = {}
        self._texts: dict[TextKind, list[str]] = {kind: [] for kind in TextKind}
        self._refused = False  # whether a note already says that what seemed to be a call is text

    @property
    def texts(self) -> tuple[str, ...]:
        """The notes, in order."""
        return tuple(self._found)

    def add(self, note: str) -> None:
        """Add a note, unless it is there already."""
        self._found[note] = None

    def read(self, kind: TextKind, text: str) -> None:
        """Take text that is returned."""
        self._texts[kind].append(text)

    def no_call(self, why: str, marker: str) -> None:
        """What stands behind a marker of calls is none."""
        if self._tools.names and marker:
            self._refused = True
            self.add(f"What the model wrote as a tool call ({marker.strip()} …) could not be read, and is text: {why}.")

    def not_offered(self, names: list[str]) -> None:
        """A call was read that nobody can answer."""
        self._refused = True
        what = f"names {', '.join(map(repr, names))}, which was not offered" if names else "has no call in it"
        self.add(f"What the model wrote as a tool call {what}; it is text.")

    def incomplete(self, text: str, opener: str, cut: bool) -> None:
        """The answer ended within a call, which may have no opener."""
        if self._tools.names and (opener or any(_looks_called(name, text) for name in self._tools.names)):
            self._refused = True
            end = "at max_tokens, which may be raised" if cut else "before it was complete"
            self.add(f"A tool call is text, because the answer ended within it {end}.")

    def nothing_followed(self) -> None:
        """The answer ended behind a marker of calls."""
        self.add("The answer ended where a tool call would have begun.")

    def empty_section(self) -> None:
        """There are the markers of calls, and no call between them."""
        self.add("The model opened a section of tool calls, and closed it without a call.")

    def broken_header(self, header: str) -> None:
        """A message's header has no end."""
        self._refused = True
        self.add(f"The header of a message could not be read, and is text: {header[:80]!r}.")

    def checked(self, calls: list[ToolCall]) -> None:
        """Calls of offered tools were read; what of them does not fit the tools' schemas is said."""
        for call in calls:
            if misfits := self._tools.misfits(call):
                self.add(f"The call of {call.name!r} does not obey its schema: {'; '.join(misfits)}.")

    def finish(self, markers: Iterable[str]) -> None:
        """The answer has ended; `markers` are those that calls begin with."""
        answer, thoughts = ("".join(self._texts[kind]) for kind in (TextKind.ANSWER, TextKind.REASONING))
        marked = _MARKED.match(answer)
        if self._refused:
            pass
        elif marked and (marked[2] or (marked[1] and marked[1].lower() not in _PAGES)):
            self.add(f"The answer begins with a marker that is not known for this model: {answer.strip()[:40]!r} …")
        elif found := _MARKER.match(answer):
            self.add(f"The answer begins with a marker that is not known for this model: {found[1]!r}.")
        if self._tools.names and any(marker in thoughts for marker in markers):
            self.add("The model drafted a tool call in its thoughts; drafts are not taken for calls.")
        named = [name for name in self._tools.names if _looks_called(name, answer)]
        if named and not self._refused:
            self.add(f"The text may call {', '.join(map(repr, named))} in a notation that is not known for this model.")


def _looks_called(name: str, text: str) -> bool:
    """Whether a text names the tool and has brackets, quotes or signs right beside the name, as notations have."""
    if name not in text:
        return False
    around = re.compile(rf"""[<>="'|:]{re.escape(name)}(?!\w)|(?<!\w){re.escape(name)}(?:[(\[{{<>=|]|["']\s*[,:}}])""")
    return around.search(text) is not None
