"""Makes dashboard.json, for Grafana, from the list of panels below: `python docs/deploy/make_dashboard.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = {"type": "prometheus", "uid": "${source}"}
OF = '{instance=~"$instance"}'


def rate(name: str, by: str = "", where: str = OF) -> str:
    """How much a counter grows a second."""
    return f"sum{f' by ({by}) ' if by else ' '}(rate(mlx_mcp_{name}{where}[$__rate_interval]))"


def quantile(part: float, name: str) -> str:
    """A part of the values is below this."""
    return f"histogram_quantile({part}, sum by (le) (rate(mlx_mcp_{name}_bucket{OF}[$__rate_interval])))"


def quantiles(name: str) -> list[tuple[str, str]]:
    """The median and the slowest twentieth."""
    return [(quantile(0.5, name), "median"), (quantile(0.95, name), "slowest twentieth")]


def gauge(name: str, by: str = "", more: str = "") -> str:
    """A gauge, summed."""
    return f'sum{f" by ({by}) " if by else " "}(mlx_mcp_{name}{{instance=~"$instance"{more}}})'


# A row's title, or a panel: title, unit, width, what is drawn with its legend.
PANELS: list[str | tuple[str, str, int, list[tuple[str, str]]]] = [
    "Now",
    ("Ready", "bool_yes_no", 4, [(f"min(mlx_mcp_ready{OF})", "ready")]),
    ("Running", "none", 4, [(gauge("running"), "running")]),
    ("Waiting", "none", 4, [(gauge("waiting"), "waiting")]),
    ("Sessions", "none", 4, [(gauge("sessions"), "sessions")]),
    (
        "Generated a second",
        "none",
        4,
        [(rate("tokens_total", where='{instance=~"$instance", kind="output"}'), "tokens")],
    ),
    ("Memory for keys and values in use", "percentunit", 4, [(f"max(mlx_mcp_kv_used_ratio{OF})", "used")]),
    "Tokens",
    ("Tokens a second", "none", 12, [(rate("tokens_total", "kind"), "{{kind}}")]),
    (
        "Tokens of answered calls a second, by model",
        "none",
        12,
        [(rate("model_tokens_total", "model, kind"), "{{model}} {{kind}}")],
    ),
    ("Time to the first token", "s", 8, quantiles("time_to_first_token_seconds")),
    ("Time between tokens", "s", 8, quantiles("time_between_tokens_seconds")),
    ("Duration of generations", "s", 8, quantiles("generation_seconds")),
    "Calls",
    ("Generations a second, by outcome", "none", 8, [(rate("generations_total", "outcome"), "{{outcome}}")]),
    ("Errors a second, by kind", "none", 8, [(rate("errors_total", "kind"), "{{kind}}")]),
    ("Tools a second", "none", 8, [(rate("tool_calls_total", "tool, outcome"), "{{tool}} {{outcome}}")]),
    ("HTTP requests a second", "none", 12, [(rate("http_requests_total", "route, status"), "{{route}} {{status}}")]),
    ("Wait in the queue", "s", 12, quantiles("queue_wait_seconds")),
    "Engine",
    ("Rows a step", "none", 8, quantiles("batch_rows")),
    ("Running and waiting", "none", 8, [(gauge("running"), "running"), (gauge("waiting"), "waiting")]),
    (
        "Preemptions and steps a second",
        "none",
        8,
        [(rate("preemptions_total"), "preemptions"), (rate("steps_total"), "steps")],
    ),
    "Memory and disk",
    (
        "Memory",
        "bytes",
        8,
        [(gauge("memory_bytes", "kind"), "{{kind}}"), (gauge("memory_limit_bytes", "kind"), "limit of {{kind}}")],
    ),
    (
        "Blocks a second",
        "none",
        8,
        [(rate("blocks_total", "event"), "{{event}}"), (rate("evictions_total", "tier"), "evicted from {{tier}}")],
    ),
    ("Blocks on disk", "bytes", 8, [(gauge("disk_bytes"), "blocks")]),
    ("Duration of persists", "s", 12, quantiles("persist_seconds")),
    ("Sessions persisted", "none", 12, [(rate("persists_total", "outcome"), "{{outcome}}")]),
    "Models",
    (
        "Models",
        "none",
        8,
        [(gauge("models"), "in memory"), (gauge("models_loading"), "loading"), (gauge("models_waiting"), "waiting")],
    ),
    (
        "Loads and swaps a second",
        "none",
        8,
        [(rate("model_loads_total"), "loads"), (rate("model_swaps_total"), "swaps")],
    ),
    ("Duration of loads", "s", 8, quantiles("model_load_seconds")),
]


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    x = y = 0
    for number, panel in enumerate(PANELS, 1):
        if isinstance(panel, str):
            y, x = y + (8 if x else 0), 0
            panels.append(
                {
                    "id": number,
                    "type": "row",
                    "title": panel,
                    "collapsed": False,
                    "panels": [],
                    "gridPos": place(0, y, 24, 1),
                }
            )
            y += 1
            continue
        title, unit, width, queries = panel
        height = 4 if width == 4 else 8
        if x + width > 24:
            x, y = 0, y + height
        panels.append(
            {
                "id": number,
                "type": "stat" if width == 4 else "timeseries",
                "title": title,
                "datasource": SOURCE,
                "gridPos": place(x, y, width, height),
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
                    for i, (expr, legend) in enumerate(queries)
                ],
            }
        )
        x += width
        if x == 24:
            x, y = 0, y + height
    return {
        "title": "mlx-mcp",
        "uid": "mlx-mcp",
        "tags": ["mlx-mcp"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"},
                {
                    "name": "instance",
                    "type": "query",
                    "label": "Server",
                    "datasource": SOURCE,
                    "query": {"query": "label_values(mlx_mcp_ready, instance)", "refId": "instance"},
                    "refresh": 2,
                    "includeAll": True,
                    "allValue": ".*",
                    "multi": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    """Where a panel is on the grid of 24 columns."""
    return {"x": x, "y": y, "w": w, "h": h}


if __name__ == "__main__":
    (HERE / "dashboard.json").write_text(json.dumps(dashboard(), indent=1) + "\n")
