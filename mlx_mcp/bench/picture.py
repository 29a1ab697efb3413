"""A report as an SVG picture: bars with labels on a light ground. Written by hand, so that it needs no package."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from mlx_mcp.bench.report import Figure, Report, spelled

WIDTH, MARGIN, LABEL, BAR = 900, 32, 190, 400  # pixels; labels end at MARGIN + LABEL
LINE, THICK, GAP = 22, 16, 12
GROUND, INK, FAINT, OURS, THEIRS = "#fcfcfb", "#1f2328", "#656d76", "#1f6feb", "#b6bcc4"
TITLES = {
    "prefill": "Prompts read, tokens a second",
    "decode": "Decoding, tokens a second of all rows together",
    "first token": "Time to the first token",
    "fan-out": "A fan-out over one context, tokens",
}


def picture(report: Report) -> str:
    """The picture as SVG: a title, memory in words, and a panel for each section that has figures."""
    parts: list[str] = []
    y = 44
    parts.append(text(MARGIN, y, report.title, size=20, weight="600"))
    y += 24
    device = report.device
    versions = f"mlx-mcp {report.version}, mlx {device.get('mlx', '?')}, mlx-lm {device.get('mlx_lm', '?')}"
    openblas = " with OpenBLAS" if device.get("openblas") else ""
    parts.append(text(MARGIN, y, f"{versions}; {device.get('backend', '?')}{openblas}; {report.system}", fill=FAINT))
    for section in ("memory", "limits"):
        said = ", ".join(f"{f.name} {spelled(f.value, f.unit)}" for f in report.figures if f.section == section)
        if said:
            y += 19
            parts.append(text(MARGIN, y, f"{section.capitalize()}: {said}", fill=FAINT))
    y += 28
    parts.append(legend(y))
    y += 18
    for section, title in TITLES.items():
        figures = [figure for figure in report.figures if figure.section == section]
        if figures:
            y += 30
            parts.append(text(MARGIN, y, title, size=15, weight="600"))
            shown, words = bars_and_words(figures)
            if words:
                y += 18
                parts.append(text(MARGIN, y, cut(words, 110), fill=FAINT))
            y += GAP
            for part, height in panel(shown, y):
                parts.append(part)
                y += height
    if not report.complete:
        y += 28
        parts.append(text(MARGIN, y, "Not everything was measured.", fill=FAINT))
    height = y + MARGIN
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif">\n'
        f"<title>{safe(report.title)}</title>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="{GROUND}"/>\n{body}\n</svg>\n'
    )


def bars_and_words(figures: list[Figure]) -> tuple[list[Figure], str]:
    """The figures of a section that are bars, and what stands under its title."""
    if figures[0].section == "fan-out":
        words = ", ".join(f"{f.name}: {spelled(f.value, f.unit)}" for f in figures if f.unit == "s")
        return [f for f in figures if f.unit != "s"], words
    if figures[0].section == "first token":
        return figures, figures[0].note
    notes = list(dict.fromkeys(f.note for f in figures if f.value is not None))
    return figures, "; ".join(notes)


def panel(figures: list[Figure], y: int) -> Iterator[tuple[str, int]]:
    """Each figure's bars from `y` on, and how high they are, on one scale."""
    most = max((value for f in figures for value in (f.value, f.mlx_lm) if value), default=1.0)
    for figure in figures:
        paired = figure.mlx_lm is not None
        label = text(MARGIN + LABEL - 10, y + (THICK + 5 if paired else 13), figure.name, anchor="end")
        bars = [label, bar(y, figure.value, most, figure.unit, OURS, figure.note)]
        height = LINE
        if figure.mlx_lm is not None:
            bars.append(bar(y + THICK + 1, figure.mlx_lm, most, figure.unit, THEIRS))
            ratio = f"{figure.ratio or 0:.2f}x"
            bars.append(text(WIDTH - MARGIN, y + THICK + 5, ratio, size=14, weight="600", anchor="end"))
            height = 2 * THICK + GAP
        yield "\n".join(bars), height
        y += height


def bar(y: int, value: float | None, most: float, unit: str, fill: str, note: str = "") -> str:
    """A bar with its value after it; in the place of one that was left out stands why."""
    left = MARGIN + LABEL
    if value is None:
        return text(left, y + 13, cut(f"left out: {note}", 90), fill=FAINT)
    wide = max(1.0, BAR * value / most)
    shown = spelled(value, unit)
    drawn = f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="{THICK}" rx="2" fill="{fill}"/>'
    return drawn + text(left + wide + 8, y + 13, shown, fill=INK if fill == OURS else FAINT)


def legend(y: int) -> str:
    """Which colour is whose."""
    ours = f'<rect x="{MARGIN}" y="{y - 10}" width="12" height="12" rx="2" fill="{OURS}"/>'
    theirs = f'<rect x="{MARGIN + 100}" y="{y - 10}" width="12" height="12" rx="2" fill="{THEIRS}"/>'
    words = text(MARGIN + 18, y, "mlx-mcp") + text(MARGIN + 118, y, "mlx_lm's BatchGenerator, in the same run")
    said = text(WIDTH - MARGIN, y, "ratio: above 1 is faster than mlx_lm", fill=FAINT, anchor="end")
    return ours + theirs + words + said


def text(
    x: float, y: float, said: str, size: int = 13, fill: str = INK, weight: str = "400", anchor: str = "start"
) -> str:
    """A line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{safe(said)}</text>'
    )


def safe(said: str) -> str:
    """Text that XML may have."""
    return escape("".join(c if c.isprintable() else " " for c in said))


def cut(said: str, most: int) -> str:
    """At most so many characters of a text."""
    return said if len(said) <= most else said[: most - 1].rstrip() + "…"
