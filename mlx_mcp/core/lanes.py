"""Who is served next: lanes of waiting sequences, and the order in which running lanes get prefill chunks.

Groups of lanes are served round-robin, and so are the lanes of a group. Knows no memory and no steps.
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
        """The first lane that can begin, of the groups that run the fewest sequences; None if none can."""
        counts = Counter(sequence.group for sequence in running)
        for count in sorted({counts[queue[0].group] for queue in self.queues.values()}):
            for lane, queue in self.queues.items():
                if counts[queue[0].group] == count and not must_wait(queue[0]):
                    return lane
        return None

    def choose_victim(self, running: Seq[Sequence], must_wait: MustWait) -> tuple[str, Sequence] | None:
        """A lane that gets a place though there is none, and a sequence to preempt: the youngest where most run.

        Groups that run nothing come before lanes that run nothing, and these take from no group that runs less than
        theirs. No sequence is preempted twice for that: lanes that come and go could have it computed for ever.
        """
        groups, lanes = Counter(s.group for s in running), Counter(s.lane for s in running)
        may = [s for s in reversed(running) if not s.made_place]
        victim = max(may, key=lambda s: groups[s.group], default=None)
        if victim is not None and groups[victim.group] > 1:
            for lane, queue in self.queues.items():
                if not groups[queue[0].group] and not must_wait(queue[0]):
                    return lane, victim
        if all(count == 1 for count in lanes.values()):
            return None
        for lane, queue in self.queues.items():
            if lanes[lane] or must_wait(queue[0]):
                continue
            group = queue[0].group
            of = [s for s in may if s.group == group or groups[s.group] > groups[group]]
            victim = max(of, key=lambda s: lanes[s.lane], default=None)
            if victim is not None and lanes[victim.lane] > 1:
                return lane, victim
        return None

    def check_integrity(self) -> None:
        """Prove that no waiting sequence holds anything, and that no lane is empty."""
        assert all(s.slot is None and not s.num_computed for s in self)
        assert all(self.queues.values()), "an empty queue was kept"


class PrefillOrder:
    """When each running lane, and each running group, was last served with a prefill chunk."""

    def __init__(self) -> None:
        self.lanes: dict[str, int] = {}
        self.groups: dict[str, int] = {}
        self._clock = 0

    def admit(self, sequence: Sequence) -> None:
        """Know of a sequence that runs; a lane that is new comes after the others of its group."""
        if sequence.lane not in self.lanes:
            self._clock += 1
            self.lanes[sequence.lane] = self._clock
        self.groups.setdefault(sequence.group, self._clock)

    def serve(self, sequence: Sequence) -> None:
        """Note that a sequence gets a chunk."""
        self._clock += 1
        self.lanes[sequence.lane] = self.groups[sequence.group] = self._clock

    def rank(self, sequence: Sequence) -> tuple[int, int]:
        """The lower it is, the longer the sequence's group, and then its lane, has not been served."""
        return self.groups[sequence.group], self.lanes[sequence.lane]

    def leave(self, sequence: Sequence, running: Seq[Sequence]) -> None:
        """Forget the lane and the group of a sequence that has left, unless others of theirs run."""
        if all(other.lane != sequence.lane for other in running):
            del self.lanes[sequence.lane]
        if all(other.group != sequence.group for other in running):
            del self.groups[sequence.group]

    def check_integrity(self, running: Seq[Sequence]) -> None:
        """Prove that the lanes and groups are those that run."""
        assert set(self.lanes) == {s.lane for s in running}, "order of lanes that do not run"
        assert set(self.groups) == {s.group for s in running}, "order of groups that do not run"
