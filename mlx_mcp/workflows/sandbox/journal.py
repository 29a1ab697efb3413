"""The journal of a sandbox: its runs with the answers of every host call, and how the state is rebuilt from it.

A dump can be loaded only by the version of the interpreter that wrote it. With the journal another version computes the
same state: it runs each cell again, at the same moment by its clock and with the same answers. No model is asked.

A journal holds MAX_BYTES. In a longer one the cells lose their inputs and answers, and later their oldest, so that it
still tells what was run, but cannot rebuild the state. A cell is a line of JSON. Values in it are written so that they
come back as they were, which JSON alone does not do: tuples, keys that are no texts, long integers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Worker

MAX_BYTES = 32 * 1024 * 1024
MAX_TOLD_BYTES = 1024 * 1024  # of a journal that has lost its inputs and answers
MAX_OUTPUT_CHARS = 2000  # of what a cell printed
LONG = 1 << 64  # integers from here on are written in hexadecimal: Python refuses decimal ones of 4301 digits


class CannotReplay(ValueError):
    """The runs of a journal do not give again what they gave. The text says where."""


@dataclass(frozen=True)
class Answer:
    """What a program got from a host call."""

    asked: str  # function and digest of the arguments
    value: Any = None  # or the message of what was raised
    refused: str = ""  # the type of what was raised; empty if a value was returned


@dataclass(frozen=True)
class Cell:
    """One run."""

    code: str
    moment: float  # when it began, by the wall clock, in seconds: its clock, and the seed of its random numbers
    inputs: dict[str, Any] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()
    num_calls: int = 0
    failed: str = ""  # the type of the exception that it ended with
    output: str = ""  # the beginning of what it printed


class Recording:
    """A run that goes on, and the answers that it has got."""

    def __init__(self, code: str, inputs: Mapping[str, Any], moment: float) -> None:
        self.code, self.inputs, self.moment = code, inputs, moment
        self.answers: list[Answer] = []
        self.end = Ended()  # how it ended

    def answered(self, call: HostCall, value: Any) -> None:
        """Note that a host call returned a value."""
        self.answers.append(Answer(asked(call), value))

    def refused(self, call: HostCall, type: str, message: str) -> None:
        """Note that a host call raised an exception."""
        self.answers.append(Answer(asked(call), message, type))

    def ended(self, output: str) -> Cell:
        """The run, which has ended and printed `output`."""
        failed = "" if self.end.error is None else self.end.error.type
        told, answers = output[:MAX_OUTPUT_CHARS], tuple(self.answers)
        return Cell(self.code, self.moment, dict(self.inputs), answers, len(answers), failed, told)


@dataclass(frozen=True)
class Journal:
    """All runs of a sandbox since it was made, of those that it was forked from too. A value, which forks share."""

    lines: tuple[bytes, ...] = ()  # a cell each
    is_whole: bool = True  # no cell has lost its inputs and answers

    @property
    def nbytes(self) -> int:
        """The bytes of all cells."""
        return sum(map(len, self.lines))

    def with_cell(self, cell: Cell) -> Journal:
        """The journal with one more cell. Inputs and answers go where they are too long, or cannot be written."""
        lines = list(self.lines)
        if self.is_whole:
            with suppress(ValueError, RecursionError):
                # First by a look: to write a long one takes a tenth of a second for each 20 MB.
                if self.nbytes + num_chars((cell.inputs, cell.answers)) <= MAX_BYTES:
                    line = encoded(cell)
                    if self.nbytes + len(line) <= MAX_BYTES:
                        return Journal((*lines, line))
            lines = [encoded(without_answers(earlier)) for earlier in self.cells()]
        lines.append(encoded(without_answers(cell)))
        while sum(map(len, lines)) > MAX_TOLD_BYTES:
            del lines[0]
        return Journal(tuple(lines), False)

    def cells(self) -> Iterator[Cell]:
        """The cells, in order."""
        return map(decoded, self.lines)

    def to_bytes(self) -> bytes:
        """The journal as it is stored; whether it is whole is stored beside it."""
        return b"\n".join(self.lines)

    @classmethod
    def from_bytes(cls, data: bytes, is_whole: bool) -> Journal:
        """What `to_bytes` gave."""
        return cls(tuple(data.split(b"\n")) if data else (), is_whole)


async def replay(journal: Journal, worker: Worker) -> None:
    """Run all cells again in a worker that has no variables yet. Host calls get the answers that they got before.

    Raises:
        CannotReplay: the journal is not whole, or a cell asks for something else, or ends in another way than it did.
    """
    if not journal.is_whole:
        raise CannotReplay(f"its runs have more than {MAX_BYTES // 2**20} MiB of inputs and answers")
    for number, cell in enumerate(journal.cells(), 1):
        step = await worker.run(cell.code, cell.inputs, cell.moment)
        for answer in cell.answers:
            if not isinstance(step, HostCall) or asked(step) != answer.asked:
                raise CannotReplay(f"run {number} does not ask what it asked")
            if answer.refused:
                step = await worker.refuse(answer.refused, answer.value)
            else:
                step = await worker.answer(answer.value)
        worker.take_output()
        if not isinstance(step, Ended):
            raise CannotReplay(f"run {number} asks more than it asked")
        if step.spoiled or ("" if step.error is None else step.error.type) != cell.failed:
            raise CannotReplay(f"run {number} does not end as it ended")


def asked(call: HostCall) -> str:
    """What tells a host call from others: its function, and a digest of its arguments."""
    try:
        said = json.dumps(tagged([call.args, call.kwargs])).encode()
    except (ValueError, RecursionError):  # whatever answers it will refuse it
        said = b""
    return f"{call.name} {hashlib.sha256(said).hexdigest()[:32]}"


def num_chars(value: Any) -> int:
    """The characters of all texts in a value, which are fewer than it takes as JSON."""
    match value:
        case str():
            return len(value)
        case list() | tuple():
            return sum(map(num_chars, value))
        case dict():
            return sum(num_chars(key) + num_chars(each) for key, each in value.items())
        case Answer():
            return num_chars(value.value)
    return 0


def without_answers(cell: Cell) -> Cell:
    """What is still told of a cell that is not run again."""
    return replace(cell, inputs={}, answers=())


def encoded(cell: Cell) -> bytes:
    """A cell as a line of JSON.

    Raises:
        ValueError, RecursionError: it has values that cannot be written.
    """
    said = asdict(replace(cell, inputs={}, answers=()))
    said["inputs"] = tagged(cell.inputs)
    said["answers"] = [[answer.asked, tagged(answer.value), answer.refused] for answer in cell.answers]
    return json.dumps(said, separators=(",", ":")).encode()


def decoded(line: bytes) -> Cell:
    """The cell that a line has."""
    said = json.loads(line)
    said["inputs"] = untagged(said["inputs"])
    said["answers"] = tuple(Answer(asked, untagged(value), refused) for asked, value, refused in said["answers"])
    return Cell(**said)


def tagged(value: Any) -> Any:
    """A value as JSON that tells its type: lists and scalars as they are, everything else as an object of one key.

    Raises:
        CannotReplay: no program can have such a value.
    """
    match value:
        case None | bool() | float() | str():
            return value
        case int():
            return value if abs(value) < LONG else {"int": hex(value)}
        case list():
            return [tagged(each) for each in value]
        case tuple():
            return {"tuple": [tagged(each) for each in value]}
        case dict():
            return {"dict": [[tagged(key), tagged(each)] for key, each in value.items()]}
    raise CannotReplay(f"a value of type {type(value).__name__} cannot be written")


def untagged(said: Any) -> Any:
    """The value that `tagged` took."""
    if isinstance(said, list):
        return [untagged(each) for each in said]
    if not isinstance(said, dict):
        return said
    ((kind, content),) = said.items()
    if kind == "int":
        return int(content, 16)
    if kind == "tuple":
        return tuple(untagged(each) for each in content)
    return {untagged(key): untagged(each) for key, each in content}
