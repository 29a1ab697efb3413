"""The lines of the sharing benchmark's table, their goals, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    workload: str
    what: str
    goal: float | None = None


REPEAT = Line("W1", "exact repeat", 0.05)
SECOND_TURN = Line("W1", "second turn, in its session")
SENT_AGAIN = Line("W1", "second turn, all of it sent again")
PRIMED = {
    "children": (Line("W2", "children, median", 0.25), Line("W2", "children, last", 0.45)),
    "forks": (Line("W2", "forked children, median", 0.25), Line("W2", "forked children, last", 0.45)),
}
BURST = Line("W3", "last of a burst", 1.3)
ROUND_2 = Line("W4", "second round, median", 0.05)
ROUND_2_WORST = Line("W4", "second round, worst")
STORED = Line("W7", "bytes stored / bytes needed", 1.1)
FORK = Line("fork", "of a long session / of a short one")
ROUND_TRIP = Line("fork", "of a long session / list_models")
FORK_ALONE = Line("fork", "in the engine alone, long / short")
Sample = tuple[float, float]  # the cold run, and what is compared with it: seconds, or bytes for W7


def show(samples: dict[tuple[str, Line], list[Sample]], names: Seq[str], chosen: list[str], verdict: bool) -> bool:
    """Print the table, with goals where there is a verdict; returns whether all of these were met."""
    met = True
    others = "".join(f"{name:>15}" for name in names[1:])
    print(f"{'':42}{names[0]:>10}{'goal':>8}{'':8}{others}   cold → then: {' | '.join(names)}")
    for line in sorted({line: None for _, line in samples}, key=lambda line: line.workload):
        if line.workload not in chosen:
            continue
        taken = [samples.get((name, line)) for name in names]
        ours, *theirs = [median(then / cold for cold, then in each) if each else None for each in taken]
        goal = judged = ""
        if verdict and line.goal is not None:
            reached = ours is not None and ours <= min([line.goal, *(ratio for ratio in theirs if ratio is not None)])
            met, goal, judged = met and reached, f"≤ {line.goal:g}", "met" if reached else "MISSED"
        times = " | ".join(spans(line, each) if each else "–" for each in taken)
        shown = f"{figure(ours):>10}{goal:>8} {judged:7}{''.join(f'{figure(ratio):>15}' for ratio in theirs)}"
        print(f"{line.workload:5}{line.what:37}{shown}   {times}")
    return met


def figure(ratio: float | None) -> str:
    """A ratio, with three digits."""
    return "–" if ratio is None else f"{ratio:.3g}"


def spans(line: Line, samples: list[Sample]) -> str:
    """The medians that a ratio is of."""
    cold, then = (median(values) for values in zip(*samples, strict=True))
    if line is STORED:
        return f"{cold / 1e6:.1f} → {then / 1e6:.1f} MB"
    return f"{cold:.2f} → {then:.3f} s" if cold > 0.1 else f"{cold * 1e3:.3f} → {then * 1e3:.3f} ms"
