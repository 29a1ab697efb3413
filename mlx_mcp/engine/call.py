"""A call, from its arrival to its end, and the table of all calls: the one place where calls wait and are woken.

Engine thread only. Knows neither models nor sessions. Whoever ends a call frees what it holds (`Turns.drop`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.session import Session
from mlx_mcp.engine.awaited import Awaited, CallState
from mlx_mcp.engine.messages import Event, Failed, Request, Submit
from mlx_mcp.engine.residents import Resident
from mlx_mcp.errors import MlxMcpError

# Called with a call's id and its event, on the engine thread; must not block. False means that nobody listens any more.
Emit = Callable[[int, Event], bool]


@dataclass(eq=False)
class Call:
    """One request and its progress."""

    request: Request
    since: float  # when it last made progress, or waited for something that makes progress
    arrived_at: float
    awaits: Awaited | None = None  # what it waits for in the table; None also while it waits for the scheduler
    ended: bool = False
    # Of a generation:
    sequence: Sequence | None = None  # once the scheduler has it
    resident: Resident | None = None  # the model that computes it
    session: Session | None = None  # the session whose turn it is
    uses: Resident | None = None  # the model that stays for it from its arrival on
    told: Awaited | None = None  # the latest reason to wait of which its caller was told
    admitted_at: float | None = None  # when it first got a row

    @property
    def call_id(self) -> int:
        """The id that its caller gave it."""
        return self.request.call_id

    @property
    def submit(self) -> Submit:
        """The request of a generation."""
        assert isinstance(self.request, Submit), f"{self.request} is no generation"
        return self.request

    @property
    def row(self) -> tuple[Sequence, Resident]:
        """The sequence and the model of a generation that the scheduler has."""
        assert self.sequence is not None, f"call {self.call_id} is not with the scheduler"
        assert self.resident is not None, f"call {self.call_id} has no model"
        return self.sequence, self.resident

    @property
    def state(self) -> CallState:
        """Its state."""
        awaits = self.awaits_now
        if self.ended:
            return CallState.ENDED
        if awaits is not None:
            return awaits.state
        if self.sequence is None:
            return CallState.ARRIVED
        return CallState.DECODE if self.sequence.decoding else CallState.PREFILL

    @property
    def awaits_now(self) -> Awaited | None:
        """What it waits for, in the table or with the scheduler; None if it runs, or has only arrived."""
        if self.awaits is not None or self.sequence is None or self.resident is None:
            return self.awaits
        return self.resident.awaits(self.sequence)


@dataclass
class Calls:
    """Every call that has not ended, by its id, and what it waits for."""

    emit: Emit = lambda call_id, event: True
    by_id: dict[int, Call] = field(default_factory=dict)
    # What is waited for → the calls that wait for it, in the order in which they came.
    waiting: dict[Awaited, dict[int, Call]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Call]:
        """The calls that there are now. The table may change meanwhile."""
        return iter(list(self.by_id.values()))

    def __bool__(self) -> bool:
        """Whether there is a call."""
        return bool(self.by_id)

    def get(self, call_id: int) -> Call | None:
        """The call of that id; None if it has ended or never existed."""
        return self.by_id.get(call_id)

    def add(self, request: Request, now: float) -> Call:
        """Add a call that has arrived."""
        assert request.call_id not in self.by_id, f"two calls have the id {request.call_id}"
        call = self.by_id[request.call_id] = Call(request, now, now)
        return call

    def wait(self, call: Call, awaited: Awaited) -> None:
        """Have a call wait until `wake` is called for what it waits for."""
        assert call.awaits is None, f"call {call.call_id} waits for {call.awaits} already"
        call.awaits = awaited
        self.waiting.setdefault(awaited, {})[call.call_id] = call

    def num_waiting(self, awaited: Awaited) -> int:
        """The number of calls that wait for this."""
        return len(self.waiting.get(awaited, ()))

    def waiting_for(self, awaited: Awaited) -> list[Call]:
        """The calls that wait for this, in the order in which they came."""
        return list(self.waiting.get(awaited, {}).values())

    def wake(self, awaited: Awaited) -> list[Call]:
        """Wake the calls that wait for this; returns them in the order in which they came."""
        calls = list(self.waiting.pop(awaited, {}).values())
        for call in calls:
            call.awaits = None
        return calls

    def wake_first(self, awaited: Awaited) -> Call | None:
        """Wake the call that has waited for this the longest; returns it, or None."""
        call = next(iter(self.waiting.get(awaited, {}).values()), None)
        if call is not None:
            self._leave(call)
        return call

    def end(self, call: Call) -> None:
        """Take a call out of the table. Nothing is done if it has ended."""
        if self.by_id.get(call.call_id) is call:
            del self.by_id[call.call_id]
        self._leave(call)
        call.ended = True

    def answer(self, call: Call, event: Event) -> None:
        """End a call, with its last event."""
        self.end(call)
        self.emit(call.call_id, event)

    def fail(self, call: Call, error: MlxMcpError) -> None:
        """End a call that holds nothing, with an error."""
        self.answer(call, Failed(error))

    def check_integrity(self) -> None:
        """Prove that every call waits where it says, and no other does."""
        there = {(awaited, call_id) for awaited, calls in self.waiting.items() for call_id in calls}
        said = {(call.awaits, call.call_id) for call in self.by_id.values() if call.awaits is not None}
        assert there == said, f"calls wait elsewhere than they say: {there ^ said}"
        assert all(self.waiting.values()), "nobody waits for something"

    def _leave(self, call: Call) -> None:
        if call.awaits is not None:
            waiting = self.waiting[call.awaits]
            del waiting[call.call_id]
            if not waiting:
                del self.waiting[call.awaits]
            call.awaits = None
