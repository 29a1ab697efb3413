"""Alert rules and dashboard: they are what Prometheus and Grafana take, and ask only for metrics that there are."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from docs import made
from docs.deploy.make_dashboard import HERE, dashboard
from mlx_mcp.api.http.metrics import ServiceCollector
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from tests.fakes import fake_client

PROMTOOL = shutil.which("promtool")
NAME = re.compile(r"\bmlx_mcp_\w+")
LABELS = re.compile(r"\bby \(([^)]*)\)|\{([^{}]*)\}")
FROM_PROMETHEUS = {"instance", "job", "le"}


def families():
    """The metrics that there are: the names of their samples, with the labels of each."""
    service = Service(fake_client(), Registry(None))
    service.observer.tools.add("generate", "ok", seconds=1)
    service.observer.requests.add("/mcp", "POST", "200", seconds=1)
    service.observer.errors["CapacityError"] += 1
    service.observer.generations["tiny", "stop"] += 1
    service.observer.tokens["tiny"] = [1, 1, 1, 1]
    return {s.name: set(s.labels) for family in ServiceCollector(service).collect() for s in family.samples}


def rules():
    return [rule for group in yaml.safe_load((HERE / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def expressions():
    yield from (rule["expr"] for rule in rules())
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_alerts_and_dashboard_ask_only_for_metrics_and_labels_that_there_are():
    there = families()
    for expression in expressions():
        names = NAME.findall(expression)
        assert [name for name in names if name not in there] == [], expression
        known = FROM_PROMETHEUS.union(*(there[name] for name in names))
        for by, within in LABELS.findall(expression):
            asked = {each.strip() for each in by.split(",") if each.strip()}
            asked |= set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", within))
            assert asked <= known, expression


def test_every_metric_is_shown_somewhere():
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    bare = {re.sub(r"_(bucket|count|sum|total)$", "", name) for name in asked}
    known = {re.sub(r"_(bucket|count|sum|total)$", "", name) for name in families()}
    unseen = {f"mlx_mcp_{name}" for name in "up_seconds generations_active cached_blocks model_unloads".split()}
    assert known - bare - unseen == {"mlx_mcp_http_request_seconds", "mlx_mcp_tool_call_seconds"}


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    assert len(rules()) >= 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "warn")
        assert {"summary", "what_to_do"} <= rule["annotations"].keys()
    assert len({rule["alert"] for rule in rules()}) == len(rules())


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: apt-get install prometheus")
def test_prometheus_takes_the_rules_and_every_query_of_the_dashboard(tmp_path):
    asked = [
        {"record": f"panel:{i}", "expr": each.replace("$__rate_interval", "5m").replace("$instance", ".*")}
        for i, each in enumerate(expressions())
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    for path in (HERE / "alerts.yml", tmp_path / "panels.yml"):
        checked = subprocess.run([PROMTOOL, "check", "rules", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr


ALERT_CASES = [
    ("MlxMcpNotReady", ['mlx_mcp_ready{instance="a"}'], ["0x10"]),
    ("MlxMcpStepHangs", ['mlx_mcp_engine_step_seconds{instance="a"}'], ["10+60x30"]),
    (
        "MlxMcpErrors",
        [f'mlx_mcp_generations_total{{instance="a",model="",outcome="{o}"}}' for o in ("GenerationFailed", "stop")],
        ["0+6x30", "0+60x30"],
    ),
    ("MlxMcpRefuses", ['mlx_mcp_errors_total{instance="a",kind="CapacityError"}'], ["0+60x30"]),
    (
        "MlxMcpPinnedMemory",
        ['mlx_mcp_memory_bytes{instance="a",kind="pinned"}', 'mlx_mcp_memory_limit_bytes{instance="a",kind="kv"}'],
        ["48x30", "100x30"],
    ),
    ("MlxMcpPersistFails", ['mlx_mcp_persists_total{instance="a",outcome="failed"}'], ["0x10 1x20"]),
]


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: apt-get install prometheus")
@pytest.mark.parametrize("bad", [True, False])
def test_an_alert_fires_when_it_should_and_only_then(tmp_path, bad):
    tests = []
    for alert, series, values in ALERT_CASES:
        good = ["100x30" if "limit" in each else "1x30" for each in series]
        given = values if bad else good
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": s, "values": v} for s, v in zip(series, given, strict=True)],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                        "eval_time": "17m" if alert != "MlxMcpNotReady" else "5m",
                        "exp_samples": [{"labels": "{}", "value": int(bad)}],
                    }
                ],
            }
        )
    told = {"rule_files": [str(HERE / "alerts.yml")], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "cases.yml").write_text(yaml.safe_dump(told))
    ran = subprocess.run([PROMTOOL, "test", "rules", str(tmp_path / "cases.yml")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_dashboard_is_the_one_that_is_made_and_has_the_shape_that_grafana_documents():
    assert json.loads((HERE / "dashboard.json").read_text()) == dashboard(), "run docs/deploy/make_dashboard.py"
    told = dashboard()
    assert {"title", "uid", "panels", "schemaVersion", "time", "templating"} <= told.keys()
    assert len({panel["id"] for panel in told["panels"]}) == len(told["panels"])
    taken = set()
    for panel in told["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        if panel["type"] != "row":
            assert panel["type"] in ("stat", "timeseries")
            assert panel["datasource"]["type"] == "prometheus"
            assert all({"refId", "expr", "legendFormat"} <= target.keys() for target in panel["targets"])


def test_the_page_about_watching_has_a_line_for_every_metric():
    assert made.metrics_table() in (made.DOCS / "watching.md").read_text(), "run `make docs-made`"
