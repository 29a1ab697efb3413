"""The engine thread.

Guarantees:
    - One thread makes the engine, handles every command and runs every step; nobody else touches it.
    - A command is handled before the next step begins: a cancel waits for one step at most.
    - `send` never blocks. What was sent before the thread died is failed, what is sent after raises EngineDead: no
      waiter is left without an answer.
    - The thread blocks, using no processor, while there is nothing to do.
    - `step_s` says for how long the thread has been at one command or step. Long steps are no fault, since a model may
      be large; after `step_timeout_s` the thread counts as dead, for it may never come back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mlx_mcp.core.session import SessionInfo
from mlx_mcp.engine.engine import Engine, EngineFactory
from mlx_mcp.engine.messages import Command, Event, Failed, LastEvent, Stop
from mlx_mcp.errors import EngineDead
from mlx_mcp.stats import EngineStats

logger = logging.getLogger(__name__)

IDLE_S = 0.02

# Takes an event, on the event loop that it was given with; without one on the engine thread, where it must not block.
Sink = Callable[[Event], Any]
Loop = asyncio.AbstractEventLoop
Heard = tuple[int, Sink, Event]  # a call, who hears of it, and what


class EngineThread:
    """Runs one Engine on one thread, which starts with the first command."""

    def __init__(
        self, make_engine: EngineFactory, step_timeout_s: float = math.inf, stats: EngineStats | None = None
    ) -> None:
        self._make_engine, self._step_timeout_s = make_engine, step_timeout_s
        self._step_began = math.inf  # infinite while the thread waits
        self.ids = itertools.count(1)  # of calls, for all who send any
        self._inbox: deque[Command] = deque()
        self._sinks: dict[int, tuple[Loop | None, Sink]] = {}  # by the call whose events they take
        self._told: dict[Loop | None, list[Heard]] = {}  # events that were not handed over yet
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._dead: EngineDead | None = None
        self._stats = stats or EngineStats()  # before there is an engine
        self._stopping, self._deadline = False, 0.0
        self._sessions: dict[str, SessionInfo] = {}

    @property
    def sessions(self) -> dict[str, SessionInfo]:
        """The sessions by handle, as of the latest command or step; to look up, not to change."""
        return self._sessions

    @property
    def stats(self) -> EngineStats:
        """The engine's counts after its latest step or command."""
        return self._stats

    @property
    def dead(self) -> EngineDead | None:
        """Why the engine will never answer again; None while it lives or has not started."""
        if self._dead is None and (step_s := self.step_s) > self._step_timeout_s:
            return EngineDead(f"one step has taken {step_s:.0f} s, longer than step_timeout_s")
        return self._dead

    @property
    def step_s(self) -> float:
        """For how many seconds the thread has been at what it does now; 0 while it waits."""
        return max(0.0, time.monotonic() - self._step_began)

    def listen(self, call_id: int, sink: Sink, loop: Loop | None = None) -> None:
        """Have a call's events go to a sink, up to the last one; say so before the call is sent."""
        self._sinks[call_id] = loop, sink

    def unlisten(self, call_id: int) -> None:
        """Have nobody hear of a call any more."""
        self._sinks.pop(call_id, None)

    def send(self, command: Command) -> None:
        """Give the engine a command.

        Raises:
            EngineDead: the thread has ended, or counts as dead.
        """
        with self._wake:
            if (dead := self.dead) is not None:
                raise EngineDead(dead.cause)
            if self._thread is None:
                # A daemon: a host that is killed must not leave a process waiting for a step.
                self._thread = threading.Thread(target=self._main, name="mlx-engine", daemon=True)
                self._thread.start()
            self._inbox.append(command)
            self._wake.notify()

    def stop(self, timeout_s: float) -> bool:
        """Fail every waiter and end the thread; returns whether it ended in time. Idempotent."""
        with self._wake:
            if self._thread is None:
                self._dead = self._dead or EngineDead()
                return True
            self._inbox.append(Stop(time.monotonic() + 0.9 * timeout_s))
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        engine: Engine | None = None
        dead = EngineDead()
        self._step_began = time.monotonic()
        try:
            engine = self._make_engine()
            engine.tell(self._emit)
            self._sessions = engine.sessions.infos
            self._loop(engine)
        except BaseException as error:
            # The one place that may catch everything: a dead thread that told nobody would hang every caller.
            logger.exception("the engine thread died")
            dead = EngineDead(repr(error))
        self._step_began = math.inf
        with self._wake:
            self._dead = dead
            self._inbox.clear()
        if engine is not None:
            engine.fail_all(dead)
        for call_id in list(self._sinks):  # of calls that the engine has not seen
            self._emit(call_id, Failed(dead))
        self._hand_over()
        if engine is not None:
            engine.close(self._deadline)
        self._stats = EngineStats()

    def _emit(self, call_id: int, event: Event) -> bool:
        """Take an event of a call for whoever listens; False if nobody does any more."""
        listening = self._sinks.get(call_id)
        if listening is None:
            return False
        loop, sink = listening
        self._told.setdefault(loop, []).append((call_id, sink, event))
        if isinstance(event, LastEvent):
            self.unlisten(call_id)
        return True

    def _publish(self, engine: Engine) -> None:
        """Hand over the events since the last time, after the counts: who hears of a change reads it there as well."""
        self._stats = engine.stats
        self._hand_over()

    def _hand_over(self) -> None:
        """Hand over the events since the last time.

        Each event loop is woken once: every time, it may take the interpreter's lock from this thread.
        """
        told, self._told = self._told, {}
        for loop, heard in told.items():
            if loop is None:
                take(heard)
                continue
            try:
                loop.call_soon_threadsafe(take, heard)
            except RuntimeError:  # it was closed: nobody listens any more
                for call_id, _, _ in heard:
                    self.unlisten(call_id)

    def _loop(self, engine: Engine) -> None:
        while True:
            with self._wake:
                self._step_began = math.inf
                while not self._inbox and not engine.has_work and not self._stopping:
                    if not self._wake.wait(engine.idle_s):
                        break  # something may be due
                commands, self._inbox = self._inbox, deque()
            while commands:
                self._step_began = time.monotonic()
                command = commands.popleft()
                if isinstance(command, Stop):
                    self._stopping, self._deadline = True, command.deadline
                    engine.stop()
                else:
                    engine.handle(command)
                self._publish(engine)
            if self._stopping and (engine.all_saved or time.monotonic() >= self._deadline):
                return
            self._step_began = time.monotonic()
            engine.check_time()
            if self._told:
                self._publish(engine)
            stepped = engine.has_work and engine.step()
            self._publish(engine)
            if not stepped and (engine.has_work or self._stopping):
                self._step_began = math.inf
                with self._wake:  # everything waits for time to pass, or for a command
                    self._wake.wait_for(lambda: bool(self._inbox), IDLE_S)


def take(heard: list[Heard]) -> None:
    """Give events to those who hear of them."""
    for _, sink, event in heard:
        sink(event)
