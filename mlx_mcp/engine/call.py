"""A call, from its arrival to its end, and the table of all calls: the one place where calls wait and are woken.

Engine thread only. Knows neither models nor sessions; who ends a call gives back what it holds (`Turns.drop`).
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

# Told of a call's events, on the engine thread; must not block. False means that nobody listens to the call any more.
Emit = Callable[[int, Event], bool]


@dataclass(eq=False)
class Call:
    """One request and how far it is."""

    request: Request
    since: float  # when it was last seen to wait for nothing, or for something that goes on
    awaits: Awaited | None = None  # what it waits for in the table; None also while it waits for the scheduler
    ended: bool = False
    # Of a generation:
    sequence: Sequence | None = None  # from when the scheduler has it
    resident: Resident | None = None  # the model that computes it
    session: Session | None = None  # the session that goes on with what comes of it
    told: Awaited | None = None  # the latest reason to wait that its caller was told

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
        """How far it is."""
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
    """Every call that has not ended, by its id, and who waits for what."""

    emit: Emit = lambda call_id, event: True
    by_id: dict[int, Call] = field(default_factory=dict)
    # What is waited for → the calls that wait for it, first come first.
    waiting: dict[Awaited, dict[int, Call]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Call]:
        """The calls as they are now; the table may change meanwhile."""
        return iter(list(self.by_id.values()))

    def __bool__(self) -> bool:
        """Whether there is a call."""
        return bool(self.by_id)

    def get(self, call_id: int) -> Call | None:
        """The call of that id; None if it has ended, or never was."""
        return self.by_id.get(call_id)

    def add(self, request: Request, now: float) -> Call:
        """A call that has arrived."""
        assert request.call_id not in self.by_id, f"two calls have the id {request.call_id}"
        call = self.by_id[request.call_id] = Call(request, now)
        return call

    def wait(self, call: Call, awaited: Awaited) -> None:
        """Have a call wait until somebody wakes those that wait for this."""
        assert call.awaits is None, f"call {call.call_id} waits for {call.awaits} already"
        call.awaits = awaited
        self.waiting.setdefault(awaited, {})[call.call_id] = call

    def num_waiting(self, awaited: Awaited) -> int:
        """How many calls wait for this."""
        return len(self.waiting.get(awaited, ()))

    def waiting_for(self, awaited: Awaited) -> list[Call]:
        """The calls that wait for this, first come first."""
        return list(self.waiting.get(awaited, {}).values())

    def wake(self, awaited: Awaited) -> list[Call]:
        """The calls that waited for this, first come first; they wait no more."""
        calls = list(self.waiting.pop(awaited, {}).values())
        for call in calls:
            call.awaits = None
        return calls

    def wake_first(self, awaited: Awaited) -> Call | None:
        """The call that has waited for this the longest; it waits no more."""
        call = next(iter(self.waiting.get(awaited, {}).values()), None)
        if call is not None:
            self._leave(call)
        return call

    def tell(self, call: Call, event: Event) -> bool:
        """Tell the caller; False if nobody listens any more."""
        return self.emit(call.call_id, event)

    def end(self, call: Call) -> None:
        """Take a call out of the table; nothing for one that has ended."""
        if self.by_id.get(call.call_id) is call:
            del self.by_id[call.call_id]
        self._leave(call)
        call.ended = True

    def answer(self, call: Call, event: Event) -> None:
        """End a call, with its last event."""
        self.end(call)
        self.tell(call, event)

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
