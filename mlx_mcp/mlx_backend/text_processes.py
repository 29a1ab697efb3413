"""Runs chat templates and tokenizers of models in other processes, which are killed at a deadline.

Guarantees:
    - A piece of work ends within its limit, in another process, whatever the template or tokenizer does: it may loop,
      or hold the interpreter in one call, or take all memory.
    - When nobody waits for it any more its process is killed at once.
    - One piece of work delays no other while fewer than MAX_PROCESSES are stuck; then the others wait for a process.
    - The processes end with their owner, and with this process, however it ends.
"""

from __future__ import annotations

import array
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from mlx_mcp.core.ports import never
from mlx_mcp.errors import Abandoned, CapacityError
from mlx_mcp.mlx_backend import text_worker
from mlx_mcp.mlx_backend.memory_watch import MemoryWatch
from mlx_mcp.mlx_backend.template_proof import Proved

MAX_PROCESSES = 4  # for one tokenizer
START_ANOTHER_S = 0.3  # how long to wait for a busy process before another is started
WAIT_S = 60.0  # for a process, while all are stuck
LOOK_S = 0.05  # how often to look whether anybody still waits
READ_S = 60.0  # to start, and to read a tokenizer
WORK_S = 10.0  # to render a chat or encode a text
WORK_S_PER_MILLION = 5.0  # so much more for every million characters of it


class Overdue(Exception):
    """A piece of work took too long, and was ended."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"it did not end within {limit_s:g} s, and was stopped")


class Failed(Exception):
    """A piece of work ended otherwise than with a result; the text says why."""


def limit_s(num_chars: int) -> float:
    """How long work on a text may take."""
    return WORK_S + WORK_S_PER_MILLION * (num_chars // 1_000_000)


class TextProcess:
    """One process; used by one thread at a time."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", "-m", text_worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
            close_fds=False,  # so that Python spawns and need not fork a process that holds a model; no fd is inherited
        )
        assert self._child.stdin is not None, "a pipe"
        assert self._child.stdout is not None, "a pipe"
        self._in, self._out = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self.usable = True

    def ask(
        self, header: dict[str, Any], blob: bytes, limit_s: float, gone: Callable[[], bool]
    ) -> tuple[dict[str, Any], bytes]:
        """Send the process a request, and wait for its answer. Unless one comes, it is not `usable` any more.

        Raises:
            Failed: with what the process says is wrong, or how it ended.
            Overdue: it takes longer than the limit.
            Abandoned: nobody waits any more.
        """
        message = BytesIO()
        text_worker.write(message, header | {"limit_s": limit_s}, blob)
        unsent, came = memoryview(message.getvalue()), bytearray()
        deadline, want = time.monotonic() + limit_s, 16
        memory = MemoryWatch(self._child.pid, text_worker.MAX_BYTES)
        self.usable = False
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            selector.register(self._in, selectors.EVENT_WRITE)
            while len(came) < want:
                if gone():
                    raise Abandoned
                if time.monotonic() >= deadline:
                    raise Overdue(limit_s)
                if memory.look():
                    raise Failed(f"it takes more than {text_worker.MAX_BYTES >> 30} GiB of memory")
                for key, _ in selector.select(LOOK_S):
                    try:
                        if key.fd == self._in:
                            unsent = unsent[os.write(self._in, unsent) :]
                        else:
                            data = os.read(self._out, 1 << 20)
                            if not data:
                                raise BrokenPipeError
                            came += data
                    except BrokenPipeError:
                        raise Failed("it takes too much memory or time, or breaks its library") from None
                    if not unsent and key.fd == self._in:
                        selector.unregister(self._in)
                if want == 16 and len(came) >= 16:
                    want += sum(struct.unpack("<QQ", came[:16]))
        answer = text_worker.read(BytesIO(came))
        assert answer is not None, "a whole message"
        self.usable = True
        if "error" in answer[0]:
            raise Failed(answer[0]["error"])
        return answer

    def end(self) -> None:
        """Kill it."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


@dataclass
class _Pool:
    """The processes of one tokenizer, in an object of their own, so that they can be ended when that is collected."""

    tokenizer: bytes = b""  # serialised
    idle: list[TextProcess] = field(default_factory=list)
    num_busy: int = 0  # at work, or being started
    ended: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def end(self) -> None:
        with self.changed:
            idle, self.idle, self.ended = self.idle, [], True
        for process in idle:
            process.end()


class TextProcesses:
    """Renders and encodes with one model's template and tokenizer; any thread may call it."""

    def __init__(self) -> None:
        self._pool = _Pool()
        weakref.finalize(self, self._pool.end)

    def try_reading(self, path: Path) -> None:
        """See that a tokenizer's file can be read, and encodes and decodes, within bounds of time and memory.

        Raises:
            Failed or Overdue: it cannot.
        """
        self._run({"do": "try", "path": str(path)}, READ_S, never)

    def use(self, tokenizer: bytes) -> None:
        """Encode with this from now on.

        Raises:
            Failed or Overdue: it cannot be read.
        """
        self._run({"do": "use"}, READ_S, never, tokenizer)
        self._pool.tokenizer = tokenizer

    def render(
        self,
        template: str,
        given: dict[str, Any],
        num_chars: int,
        encode: bool,
        gone: Callable[[], bool],
        marks: str = "",
    ) -> tuple[Proved, list[int] | None]:
        """What a template makes of what it is given, of so many characters; and the ids of that, if `encode` says so.

        `marks` are for the proof, see template_proof. To have text and ids at once saves a short call half the time.
        There are no ids where the tokenizer fails.

        Raises:
            Failed: the template refuses it, or takes too much memory.
            Overdue: the template does not end in time.
            Abandoned: nobody waits any more.
            CapacityError: all processes are stuck.
        """
        asked = {"do": "render", "template": template, "given": given, "marks": marks, "encode": encode}
        header, blob = self._run(asked, limit_s(num_chars), gone)
        found = Proved(header["text"], header["lost"], header["end"])
        return found, array.array("I", blob).tolist() if "lengths" in header else None

    def variables(self, template: str, gone: Callable[[], bool]) -> dict[str, list[Any]]:
        """What a template can be given; see template_variables. Raises as `render`."""
        header, _ = self._run({"do": "inspect", "template": template}, limit_s(len(template)), gone)
        found: dict[str, list[Any]] = header["variables"]
        return found

    def encode(self, texts: list[str], special: bool, gone: Callable[[], bool]) -> list[list[int]]:
        """The ids of each text, with the special tokens around it if `special` says so; raises as `render`."""
        limit = limit_s(sum(map(len, texts)))
        header, blob = self._run({"do": "encode", "texts": texts, "special": special}, limit, gone)
        flat = array.array("I", blob)
        ends = accumulate(header["lengths"], initial=0)
        return [flat[start:end].tolist() for start, end in pairwise(ends)]

    def _run(
        self, header: dict[str, Any], limit_s: float, gone: Callable[[], bool], blob: bytes = b""
    ) -> tuple[dict[str, Any], bytes]:
        process = self._take(gone)
        try:
            return process.ask(header, blob, limit_s, gone)
        finally:
            with self._pool.changed:
                self._pool.num_busy -= 1
                keep = process.usable and not self._pool.ended
                if keep:
                    self._pool.idle.append(process)
                self._pool.changed.notify()
            if not keep:
                process.end()

    def _take(self, gone: Callable[[], bool]) -> TextProcess:
        """A process to work with: one that is idle, one that becomes idle soon, or a new one."""
        pool, began = self._pool, time.monotonic()
        with pool.changed:
            while not pool.idle:
                waited = time.monotonic() - began
                if not pool.num_busy or (pool.num_busy < MAX_PROCESSES and waited >= START_ANOTHER_S):
                    break
                if gone():
                    raise Abandoned
                if waited > WAIT_S:
                    raise CapacityError("The model's chat template or tokenizer is busy with other calls.", 10)
                pool.changed.wait(LOOK_S)
            pool.num_busy += 1
            if pool.idle:
                return pool.idle.pop()
        try:
            return self._start(gone)
        except BaseException:
            with pool.changed:
                pool.num_busy -= 1
                pool.changed.notify()
            raise

    def _start(self, gone: Callable[[], bool]) -> TextProcess:
        try:
            process = TextProcess()
        except OSError as error:
            raise CapacityError(f"No process could be started for the model's chat template: {error}.", 10) from error
        try:  # to start takes none of the time for work
            process.ask({"do": "use"}, self._pool.tokenizer, READ_S, gone)
        except BaseException:
            process.end()
            raise
        return process
