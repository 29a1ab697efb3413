"""What `mlx-mcp top` draws: a state as lines that fit a terminal. Prints nothing itself."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.cli.output import cut, encodes, length, printable

State = dict[str, Any]
HEAD_ROWS = 6  # what is above the lists
COLORS = {"ok": "green", "dead": "red"}  # of the status; else yellow


@dataclass
class Rates:
    """Tokens a second between looks, the latest last."""

    output: deque[float] = field(default_factory=lambda: deque(maxlen=600))
    computed: deque[float] = field(default_factory=lambda: deque(maxlen=600))
    _before: tuple[float, int, int] | None = None

    def take(self, state: State, now: float | None = None) -> None:
        """Take what a look has brought."""
        at, tokens = time.monotonic() if now is None else now, state["tokens"]
        latest = at, tokens["output"], tokens["computed"]
        if self._before is not None and latest[0] > self._before[0] and latest[1] >= self._before[1]:
            seconds = latest[0] - self._before[0]
            self.output.append((latest[1] - self._before[1]) / seconds)
            self.computed.append(max(0, latest[2] - self._before[2]) / seconds)
        self._before = latest


Line = tuple[str, str]  # a line, and its style


def lines(state: State, rates: Rates, width: int, height: int) -> list[Line]:
    """What is shown of a state on a terminal of that size: never more lines, and none longer."""
    room = max(0, height - HEAD_ROWS)
    calls, sessions = [*workflow_lines(state), *call_lines(state, width)], session_lines(state, width)
    # Sessions get at least half of what is left, if there are so many.
    for_calls = max(room - len(sessions), room // 2)
    shown = [*head_lines(state, rates, width), *fitted(calls, for_calls)]
    shown += fitted(sessions, height - len(shown))
    return [(cut(printable_line(line), width, mark()), style) for line, style in shown[:height]]


def head_lines(state: State, rates: Rates, width: int) -> list[Line]:
    """What is known of the whole engine."""
    memory, models = state["memory"], ", ".join(model["name"] for model in state["models"]) or "no model"
    loading = [f"loading {name}" for name in state["loading"]] + [f"{name} waits for room" for name in state["awaited"]]
    status = f"mlx-mcp  {state['status']}  up {span(state['up_s'])}  {', '.join([models, *loading])}"
    reasons = " ".join(state["reasons"])
    counts = f"{state['running']} running  {state['waiting']} waiting  {state['num_sessions']} sessions"
    tokens = state["tokens"]
    reused = f"  {100 * tokens['cached'] // tokens['prompt']} % of prompts from the cache" if tokens["prompt"] else ""
    plot = max(10, width // 2 - 14)
    weights, most_weights = memory["weights"], memory["max_weights"]
    kept, most_kept = memory["rows"] + memory["cached"], memory["max_kv"]
    return [
        (status, COLORS.get(state["status"], "yellow")),
        (reasons or counts + reused, "yellow" if reasons else ""),
        (f"generated {spark(rates.output, plot)} {latest(rates.output)}/s", ""),
        (f"computed  {spark(rates.computed, plot)} {latest(rates.computed)}/s", ""),
        (f"weights   {bar(weights, most_weights, plot)} {of(weights, most_weights)}", ""),
        (f"keys      {bar(kept, most_kept, plot)} {of(kept, most_kept)}, {size(memory['pinned'])} pinned", ""),
    ]


def workflow_lines(state: State) -> list[Line]:
    """The workflows that go on, each in a line; an engine of an earlier version knows none."""
    told: list[Line] = []
    for each in state.get("workflows", ()):
        who = f"{width_of(each['tool'], 16)}{width_of(each['name'], 19)}"
        told.append((f"{who}{width_of(span(each['since_s']), 9)}{each['does']}", "cyan"))
    return [("WORKFLOWS", "bold"), *told] if told else []


def call_lines(state: State, width: int) -> list[Line]:
    """The calls, each in a line: those that run first."""
    calls = sorted(state["calls"], key=lambda call: not call["runs"])
    if not calls:
        return [("CALLS", "bold"), ("nothing runs and nothing waits", "dim")]
    title = f"CALLS{width_of('', 3)}{width_of('session', 17)}{width_of('tokens/s', 10)}{width_of('since', 9)}does"
    told = [(title, "bold")]
    for call in calls:
        speed = f"{call['tokens_per_s']:.1f}" if call["runs"] and call["tokens"] else ""
        who = call["session"] or call["model"] or ""
        line = f"{width_of(str(call['number']), 8)}{width_of(who, 17)}{width_of(speed, 10)}"
        told.append((f"{line}{width_of(span(call['since_s']), 9)}{call['does']}", "" if call["runs"] else "yellow"))
    return told


def session_lines(state: State, width: int) -> list[Line]:
    """The sessions as a tree, each in a line."""
    below: dict[str, list[State]] = {}
    for each in state["sessions"]:
        below.setdefault(each["parent"], []).append(each)
    told: list[Line] = [(f"SESSIONS  {state['num_sessions']}", "bold")] if state["sessions"] else []

    def draw(parent: str, depth: int) -> None:
        for each in below.get(parent, ()):
            tags = [tag for tag in ("busy", "pinned", "persisted", "ephemeral") if each[tag]]
            used = "now" if each["busy"] else f"{span(each['idle_s'])} ago"
            name = "  " * depth + (each["name"] or "another caller's")
            line = f"{width_of(name, 32)}{each['tokens']:>9,} tokens  {width_of(used, 14)}{' '.join(tags)}"
            told.append((line, "cyan" if each["busy"] else ""))
            draw(each["id"], depth + 1)

    draw("", 0)
    return told


def fitted(all_lines: list[Line], room: int) -> list[Line]:
    """As many lines as there is room for; the last says how many there are not."""
    if len(all_lines) <= room:
        return all_lines
    if room < 1:
        return []
    return [*all_lines[: room - 1], (f"{len(all_lines) - room + 1} more", "dim")]


def width_of(text: str, wide: int) -> str:
    """A text in a column, with a space after it."""
    shown = cut(printable_line(text), wide - 1, mark())
    return shown + " " * (wide - length(shown))


def printable_line(text: str) -> str:
    """A text in which nothing speaks to the terminal; its spaces at the beginning stay."""
    inside = text.lstrip(" ")
    return " " * (len(text) - len(inside)) + printable(inside)


def mark() -> str:
    """What stands where something was cut off."""
    return "…" if encodes("…") else "..."


def spark(values: deque[float], wide: int) -> str:
    """The latest values as a row of bars."""
    steps = " ▁▂▃▄▅▆▇█" if encodes("▁█") else " .:-=+*#@"
    shown = list(values)[-wide:]
    most = max([1.0, *shown])
    drawn = "".join(steps[min(len(steps) - 1, round((len(steps) - 1) * value / most))] for value in shown)
    return drawn.rjust(wide)


def bar(value: float, limit: float, wide: int) -> str:
    """A part of a whole as a bar."""
    full, rest = ("█", "░") if encodes("█░") else ("#", "-")
    filled = round(wide * min(1.0, value / limit)) if limit else 0
    return full * filled + rest * (wide - filled)


def latest(values: deque[float]) -> str:
    """The latest of some rates."""
    return f"{values[-1]:,.0f}" if values else "-"


def of(value: float, limit: float) -> str:
    """A size, and what it may be at most."""
    return f"{size(value)} of {size(limit)}" if limit else size(value)


def size(num_bytes: float) -> str:
    """Bytes, in the unit that leaves few digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def span(seconds: float) -> str:
    """A duration, in the unit that leaves few digits."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
