"""What `mlx-mcp bench` has measured: figures, as a table and as JSON. Knows nothing of how they come about."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SECTIONS = ("memory", "limits", "prefill", "decode", "first token", "fan-out")  # in this order
FORMAT = 1  # of the JSON; it changes with the meaning of a field


@dataclass(frozen=True)
class Figure:
    """One line: `value` in `unit`, and what mlx_lm alone reaches in the same run, where it can do the same.

    A value of None was left out, and `note` says why.
    """

    section: str
    name: str
    value: float | None
    unit: str  # "tokens/s", "s", "tokens" or "bytes"
    mlx_lm: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as mlx_lm; None where there is nothing to compare."""
        return self.value / self.mlx_lm if self.value is not None and self.mlx_lm else None


@dataclass
class Report:
    """What is known so far; `complete` is set when everything was measured."""

    version: str
    system: str
    device: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    complete: bool = False

    @property
    def title(self) -> str:
        """The model and the device in one line."""
        return f"{self.model.get('name', 'no model')} on {self.device.get('name', 'an unknown device')}"

    def rows(self) -> list[tuple[str, ...]]:
        """The table: section, name, value, mlx_lm's, ratio, note."""
        return [row(figure) for section in SECTIONS for figure in self.figures if figure.section == section]

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs. Nothing in it names a user or a folder."""
        return {
            "format": FORMAT,
            "version": self.version,
            "system": self.system,
            "complete": self.complete,
            "device": self.device,
            "model": self.model,
            "figures": [{**asdict(figure), "ratio": figure.ratio} for figure in self.figures],
        }


def row(figure: Figure) -> tuple[str, ...]:
    """A figure's cells."""
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}x"
    return (
        figure.section,
        figure.name,
        spelled(figure.value, figure.unit),
        "" if figure.mlx_lm is None else spelled(figure.mlx_lm, figure.unit),
        ratio,
        figure.note,
    )


def spelled(value: float | None, unit: str) -> str:
    """A value with its unit, in the size that reads best."""
    if value is None:
        return "left out"
    if unit == "bytes":
        size, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= pair[0]), (1, "bytes"))
        return f"{value / size:,.1f} {name}" if size > 1 else f"{value:,.0f} {name}"
    if unit == "s":
        return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:,.2f} {unit}"
