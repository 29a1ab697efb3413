"""Holds an answer part by part: thoughts to their budget, what follows them to a grammar, calls to their tools.

The parts follow each other as in the text of a generator, a course: it yields what the next token is held to, and is
sent the token that came. Where it yields None it only looks on, and the row goes on like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from mlx_mcp.chat.formats.format import Marks
from mlx_mcp.mlx_backend.constraint import GrammarConstraint

Held = GrammarConstraint | bytes | None
Course = Generator[Held, int, str]  # returns text that was written and belongs to the part that follows

KEPT = 200  # characters of a text in which a marker is looked for; none is longer


class HeldAnswer:
    """The place of one answer in its course; see core.sequence.Constraint. Used by one thread at a time."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._held: Held = next(course, None)

    @property
    def awake(self) -> bool:
        """See core.sequence.Constraint."""
        return self._held is not None

    def mask(self) -> bytes | None:
        """See core.sequence.Constraint.

        Raises:
            GenerationFailed: see GrammarConstraint.mask.
        """
        return self._held.mask() if isinstance(self._held, GrammarConstraint) else self._held

    def accept(self, token_id: int) -> None:
        """See core.sequence.Constraint.

        Raises:
            GenerationFailed: see GrammarConstraint.accept.
        """
        if isinstance(self._held, GrammarConstraint):
            self._held.accept(token_id)
        try:
            self._held = self._course.send(token_id)
        except StopIteration:
            self._held = None


@dataclass(frozen=True)
class Tokens:
    """A model's tokens."""

    size: int
    stops: frozenset[int]
    text: Callable[[int], str]
    encode: Callable[[str], list[int]]

    def only(self, token_ids: Iterable[int]) -> bytes:
        """The mask that allows these."""
        return sum({1 << token_id for token_id in token_ids}).to_bytes((self.size + 7) // 8, "little")

    @property
    def but_stops(self) -> bytes:
        """The mask that allows all that do not end the turn."""
        stops = sum(1 << token_id for token_id in self.stops if token_id < self.size)
        return ((1 << self.size) - 1 - stops).to_bytes((self.size + 7) // 8, "little")


@dataclass(frozen=True)
class Thoughts:
    """What there is to say of the thoughts before an answer.

    `marks` are all that they may stand between; `opened` is the one that the prompt has opened. After `budget` tokens
    they are ended. `follow` is what the family puts between thoughts that have ended and the answer, and `lead` what it
    puts before an answer without thoughts. Where `again` is set more thoughts may follow thoughts.
    """

    marks: tuple[Marks, ...] = ()
    opened: Marks | None = None
    budget: int | None = None
    follow: str = ""
    lead: str = ""
    again: bool = False


@dataclass(frozen=True)
class Calls:
    """How calls are held to their tools: after each of `openers` in an answer to a new `body`."""

    openers: tuple[str, ...]
    body: Callable[[], GrammarConstraint]


def course(tokens: Tokens, thoughts: Thoughts, first: GrammarConstraint | None, calls: Calls | None) -> Course:
    """All of an answer: thoughts, then what `first` allows, to its end where calls may follow, and then `calls`."""
    text = yield from think(tokens, thoughts, first)
    if first is not None:
        while calls is None or not first.complete:
            yield first
        text = ""
    if calls is not None:
        yield from watch_calls(tokens, calls, text)
    return ""


def think(tokens: Tokens, thoughts: Thoughts, first: GrammarConstraint | None) -> Course:
    """The thoughts, and what leads from them to the answer; `first` is to come after them."""
    # An answer that has to come must not be left out by ending the turn within the thoughts.
    free = None if first is None else tokens.but_stops
    marks, num_left = thoughts.opened, thoughts.budget
    text = ""
    if marks is None:
        marks, text = yield from begin(tokens, thoughts, first)
        if marks is None and first is not None:
            yield from force(tokens, thoughts.lead)
    while marks is not None:
        while marks.end not in text:
            if num_left == 0:
                yield from force(tokens, unwritten(text, marks.end) + thoughts.follow)
                return ""
            text = (text + tokens.text((yield free)))[-KEPT:]
            if num_left is not None and marks.end not in text:
                num_left -= 1
        text = text.partition(marks.end)[2]
        marks = None
        if first is not None:
            yield from force(tokens, thoughts.follow)
        elif thoughts.again:
            marks, text = yield from begin(tokens, thoughts, None, text)
    return text


def begin(
    tokens: Tokens, thoughts: Thoughts, first: GrammarConstraint | None, text: str = ""
) -> Generator[Held, int, tuple[Marks | None, str]]:
    """See whether the model opens thoughts; returns their marks, or None, and the text of what has begun then."""
    if first is not None:
        return (yield from choose(tokens, thoughts, first)), ""
    while any(marks.begin.startswith(text) for marks in thoughts.marks):
        text = (text + tokens.text((yield None))).lstrip()
        for marks in thoughts.marks:
            if text.startswith(marks.begin):
                return marks, text.removeprefix(marks.begin)
    return None, text


def choose(tokens: Tokens, thoughts: Thoughts, first: GrammarConstraint) -> Generator[Held, int, Marks | None]:
    """Have the model open thoughts or begin with what `first` allows; returns the marks of the thoughts, or None."""
    if not thoughts.marks:
        return None
    marks = thoughts.marks[0]
    opening = tokens.encode(marks.begin)
    if thoughts.lead:  # the answer may begin with the same token: they were asked for
        yield from force(tokens, marks.begin)
        return marks
    allowed = int.from_bytes(first.mask() or b"", "little")
    token_id = yield (allowed | 1 << opening[0]).to_bytes((tokens.size + 7) // 8, "little")
    if allowed >> token_id & 1:
        first.accept(token_id)
        return None
    for token_id in opening[1:]:
        yield tokens.only([token_id])
    return marks


def watch_calls(tokens: Tokens, calls: Calls, text: str) -> Course:
    """An answer in which calls may begin at any time."""
    while True:
        ends = [text.find(opener) + len(opener) for opener in calls.openers if opener in text]
        if not ends:
            text = (text + tokens.text((yield None)))[-KEPT:]
            continue
        body, text = calls.body(), text[min(ends) :]
        if body.feed(text):
            while not body.complete:
                yield body
            text = ""


def force(tokens: Tokens, text: str) -> Generator[Held, int, None]:
    """A text, token by token."""
    for token_id in tokens.encode(text):
        yield tokens.only([token_id])


def unwritten(text: str, marker: str) -> str:
    """What of a marker is left to write where the text may end with a part of it."""
    return next(marker[n:] for n in range(len(marker), -1, -1) if text.endswith(marker[:n]))
