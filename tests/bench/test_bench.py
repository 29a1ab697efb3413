"""`mlx-mcp bench` on models that are there, and what it says where it cannot go on. No figure is judged."""

import json
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from mlx_mcp.bench import measure
from mlx_mcp.bench.report import SECTIONS, Figure
from mlx_mcp.bench.rows import QUICK
from mlx_mcp.bench.sides import Ours
from mlx_mcp.cli.main import app
from mlx_mcp.config import Config
from mlx_mcp.core.prefill import Prefill
from tests.models_made import make_model

BESIDE_MLX_LM = [
    "passes of 128",
    "passes of 512",
    "passes of 2048",
    "1 row",
    "4 rows",
    "16 rows",
    "4 rows, mixed",
    "16 rows, mixed",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def bench(*arguments, **env):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="mlx-mcp", env=env)


def assert_all_measured(model, folder):
    done = bench(model, "--quick", "--json", folder / "b.json", "--picture", folder / "b.svg")
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "b.json").read_text())
    figures = {(f["section"], f["name"]): f for f in report["figures"]}
    assert report["complete"]
    assert {section for section, _ in figures} == set(SECTIONS)
    assert [f["name"] for f in report["figures"] if f["mlx_lm"]] == BESIDE_MLX_LM
    assert all(f["value"] > 0 for f in report["figures"])
    assert all(f["ratio"] == f["value"] / f["mlx_lm"] for f in report["figures"] if f["mlx_lm"])
    total, computed = (figures["fan-out", name]["value"] for name in ("tokens of the prompts", "computed of these"))
    assert computed < total / 4, "eight calls over one context compute it once"
    drawn = ET.parse(folder / "b.svg").getroot()
    words = [element.text for element in drawn.iter() if element.text]
    assert all(name in words for name in BESIDE_MLX_LM)
    assert str(folder.parent) not in json.dumps(report) + (folder / "b.svg").read_text()
    assert all(name in done.stdout for name in BESIDE_MLX_LM)
    assert "nothing was sent anywhere" in done.stderr
    assert f"attach {folder / 'b.json'} and {folder / 'b.svg'} to an issue" in done.stderr


@pytest.mark.long
def test_everything_is_measured_on_a_tiny_model(tiny, tmp_path):
    assert_all_measured(tiny, tmp_path)


@pytest.mark.parametrize("pass_tokens", [128, 512])
def test_prompts_are_read_in_passes_of_the_length_that_a_line_names(tiny, pass_tokens):
    rows = measure.loaded_rows(Config.load(model=str(tiny)), QUICK, measure.new_report())
    ours = Ours(rows.subject, Prefill(pass_tokens, 512, pass_tokens))
    launch, passes = ours.runner.launch, []
    ours.runner.launch = lambda step: passes.extend(c.end - c.start for c in step.prefill) or launch(step)
    rows._fill(ours, [600])
    ours.close()
    assert max(passes) == pass_tokens


@pytest.mark.long
def test_everything_is_measured_on_the_embedded_model(tmp_path):
    assert_all_measured("embedded", tmp_path)


def test_a_model_that_does_not_fit_is_told_in_one_line(tiny):
    done = bench(tiny, "--quick", MLX_MCP_MAX_WEIGHTS_BYTES="1000")
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.endswith("…")]
    assert line.startswith("mlx-mcp: ")
    assert "max_weights_bytes" in line
    assert done.stdout == ""


def test_ctrl_c_leaves_what_was_measured_until_then(monkeypatch, tmp_path):
    def parts(config, effort, report, say):
        yield Figure("decode", "1 row", 5.0, "tokens/s", 4.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "parts", parts)
    done = bench("--json", tmp_path / "b.json", "--picture", tmp_path / "b.svg")
    assert done.exit_code == 130
    assert "1 row" in done.stdout
    assert "not everything was measured" in done.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    assert (report["complete"], len(report["figures"])) == (False, 1)
    assert "Not everything was measured" in (tmp_path / "b.svg").read_text()


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    done = bench("--json", tmp_path / "nowhere" / "b.json")
    assert done.exit_code == 2
    assert "to write b.json to. Make it first" in done.stderr
    assert "starting MLX" not in done.stderr


def test_a_file_that_cannot_be_written_after_all_is_told_under_the_table(monkeypatch, tmp_path):
    figure = Figure("decode", "1 row", 5.0, "tokens/s", 4.0)
    monkeypatch.setattr(measure, "parts", lambda config, effort, report, say: iter([figure]))
    (tmp_path / "b.json").symlink_to(tmp_path / "nowhere" / "b.json")
    done = bench("--json", tmp_path / "b.json")
    assert done.exit_code == 2
    assert "1 row" in done.stdout
    assert "The measured figures cannot be written to" in done.stderr
