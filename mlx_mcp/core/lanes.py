"""Who is served next: lanes of waiting sequences, and the order in which running lanes get prefill chunks.

Principals are served round-robin, so are the groups of a principal, and so are the lanes of a group. A window is a
group, a session is a lane. Knows no memory and no steps.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

from mlx_mcp.core.sequence import Sequence

MustWait = Callable[[Sequence], bool]  # whether a sequence cannot begin now, even if it is served next


class Lanes:
    """The sequences that wait, first come first served within a lane."""

    def __init__(self) -> None:
        self.queues: dict[str, deque[Sequence]] = {}  # by lane, in the order in which lanes are served; none is empty

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence."""
        return (sequence for queue in self.queues.values() for sequence in queue)

    def __len__(self) -> int:
        """The number of sequences."""
        return sum(len(queue) for queue in self.queues.values())

    def append(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its lane, which is the last one if it is new."""
        self.queues.setdefault(sequence.lane, deque()).append(sequence)

    def prepend(self, sequence: Sequence) -> None:
        """Put a sequence at the beginning of its lane, and its lane before all others."""
        queue = self.queues.pop(sequence.lane, deque())
        queue.appendleft(sequence)
        self.queues = {sequence.lane: queue, **self.queues}

    def first(self, lane: str) -> Sequence:
        """The sequence of a lane that is served next."""
        return self.queues[lane][0]

    def pop(self, lane: str) -> Sequence:
        """Take the first sequence out of a lane, which is served last from now on."""
        sequence = self.queues[lane].popleft()
        self.move_to_end(lane)
        return sequence

    def move_to_end(self, lane: str) -> None:
        """Have a lane served after all others; forget it if nobody waits in it."""
        queue = self.queues.pop(lane)
        if queue:
            self.queues[lane] = queue

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out; returns whether it was there."""
        queue = self.queues.get(sequence.lane, ())
        if sequence not in queue:
            return False
        self.queues[sequence.lane].remove(sequence)
        if not self.queues[sequence.lane]:
            del self.queues[sequence.lane]
        return True

    def num_ahead(self, sequence: Sequence) -> int:
        """How many sequences are served before this one if nobody comes and all are of one group; 0 if it is gone."""
        queue = self.queues.get(sequence.lane, ())
        if sequence not in queue:
            return 0
        lanes = list(self.queues)
        position, at = queue.index(sequence), lanes.index(sequence.lane)
        before = sum(min(len(self.queues[s]), position + (i < at)) for i, s in enumerate(lanes) if i != at)
        return position + before

    def choose_next(self, running: Seq[Sequence], must_wait: MustWait) -> str | None:
        """The first lane that can begin, of the principals, and then groups, that run the fewest; None if none can."""
        runs = Running(running)
        for load in sorted({runs.load(queue[0]) for queue in self.queues.values()}):
            for lane, queue in self.queues.items():
                if runs.load(queue[0]) == load and not must_wait(queue[0]):
                    return lane
        return None

    def choose_victim(self, running: Seq[Sequence], must_wait: MustWait) -> tuple[str, Sequence] | None:
        """A lane that gets a place though there is none, and a sequence to preempt: the youngest where most run.

        Principals that run nothing come before groups that run nothing, and these before lanes that run nothing. None
        takes from a principal that runs no more than its own, nor from a group of its principal that runs no more than
        its own. No sequence is preempted twice for that: lanes that come and go could have it computed for ever.
        """
        runs = Running(running)
        may = [s for s in reversed(running) if not s.made_place]
        # Each level: what of a sequence must run nothing, and what of a victim must run more than once.
        for count in (runs.of_principal, runs.of_group, runs.of_lane):
            if all(count(s) == 1 for s in running):
                continue
            for lane, queue in self.queues.items():
                if count(queue[0]) or must_wait(queue[0]):
                    continue
                victim = max((s for s in may if runs.may_take(queue[0], s)), key=count, default=None)
                if victim is not None and count(victim) > 1:
                    return lane, victim
        return None

    def check_integrity(self) -> None:
        """Prove that no waiting sequence holds anything, and that no lane is empty."""
        assert all(s.slot is None and not s.num_computed for s in self)
        assert all(self.queues.values()), "an empty queue was kept"


class Running:
    """How many sequences run: of each principal, of each group, of each lane."""

    def __init__(self, running: Seq[Sequence]) -> None:
        self._principals = Counter(s.principal for s in running)
        self._groups = Counter(group_of(s) for s in running)
        self._lanes = Counter(s.lane for s in running)

    def of_principal(self, sequence: Sequence) -> int:
        """Those of a sequence's principal."""
        return self._principals[sequence.principal]

    def of_group(self, sequence: Sequence) -> int:
        """Those of its group."""
        return self._groups[group_of(sequence)]

    def of_lane(self, sequence: Sequence) -> int:
        """Those of its lane."""
        return self._lanes[sequence.lane]

    def load(self, sequence: Sequence) -> tuple[int, int]:
        """The less of its principal, and then of its group, runs, the sooner it is its turn."""
        return self.of_principal(sequence), self.of_group(sequence)

    def may_take(self, sequence: Sequence, victim: Sequence) -> bool:
        """Whether a sequence may take another's place: that of its own group, or of one that runs more."""
        if sequence.principal != victim.principal:
            return self.of_principal(victim) > self.of_principal(sequence)
        return sequence.group == victim.group or self.of_group(victim) > self.of_group(sequence)


def group_of(sequence: Sequence) -> tuple[str, str]:
    """What tells its group from others: two principals may call by one connection."""
    return sequence.principal, sequence.group


class PrefillOrder:
    """When each running lane, group and principal was last served with a prefill chunk."""

    def __init__(self) -> None:
        self.lanes: dict[str, int] = {}
        self.groups: dict[tuple[str, str], int] = {}
        self.principals: dict[str, int] = {}
        self._clock = 0

    def admit(self, sequence: Sequence) -> None:
        """Know of a sequence that runs; a lane that is new comes after the others of its group."""
        if sequence.lane not in self.lanes:
            self._clock += 1
            self.lanes[sequence.lane] = self._clock
        self.groups.setdefault(group_of(sequence), self._clock)
        self.principals.setdefault(sequence.principal, self._clock)

    def serve(self, sequence: Sequence) -> None:
        """Note that a sequence gets a chunk."""
        self._clock += 1
        self.lanes[sequence.lane] = self.groups[group_of(sequence)] = self._clock
        self.principals[sequence.principal] = self._clock

    def rank(self, sequence: Sequence) -> tuple[int, int, int]:
        """The lower it is, the longer its principal, then its group, and then its lane has not been served."""
        return self.principals[sequence.principal], self.groups[group_of(sequence)], self.lanes[sequence.lane]

    def leave(self, sequence: Sequence, running: Seq[Sequence]) -> None:
        """Forget the lane, the group and the principal of a sequence that has left, unless others of theirs run."""
        if all(other.lane != sequence.lane for other in running):
            del self.lanes[sequence.lane]
        if all(group_of(other) != group_of(sequence) for other in running):
            del self.groups[group_of(sequence)]
        if all(other.principal != sequence.principal for other in running):
            del self.principals[sequence.principal]

    def check_integrity(self, running: Seq[Sequence]) -> None:
        """Prove that the lanes, groups and principals are those that run."""
        assert set(self.lanes) == {s.lane for s in running}, "order of lanes that do not run"
        assert set(self.groups) == {group_of(s) for s in running}, "order of groups that do not run"
        assert set(self.principals) == {s.principal for s in running}, "order of principals that do not run"
