"""What the project says of itself beside its code: make targets, workflows, versions of Python."""

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# The log is of other days.
DOCUMENTS = [path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if path.name != "log.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Parts of the others, in distributions of their own.
COMES_WITH = {"mcp_types": "mcp", "pydantic_monty": "pydantic-monty"}


def imported(folder):
    """The outside packages that are imported anywhere in a folder."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            yield from (name.partition(".")[0] for name in names)


def canonical(name):
    """As one distribution may be spelled."""
    return name.lower().replace("_", "-")


def test_every_package_that_is_imported_is_a_declared_dependency():
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpython"]]
    declared = {canonical(re.split(r"[\[<>=;]", line)[0]) for line in wanted}
    outside = set(imported(ROOT / "mlx_mcp")) - set(sys.stdlib_module_names) - {"mlx_mcp"}
    providers = packages_distributions()
    undeclared = {name for name in outside if not declared & set(map(canonical, providers[name]))}
    assert undeclared - COMES_WITH.keys() == set()
    assert COMES_WITH.keys() <= outside


def targets(makefile):
    return set(" ".join(re.findall(r"^([\w -]+):(?!=)", makefile, re.M)).split())


def asked_for(text):
    """The targets of every `make …` in a text: after its beginning, a quote, a prompt or a `run:`, up to a comment."""
    lines = re.findall(r"(?:^|`|run: |&& )[ ]*make((?: [a-z][\w-]*)+)", text, re.M)
    return set(" ".join(lines).split())


def jobs(workflow):
    return yaml.safe_load(workflow.read_text())["jobs"].values()


def pythons(workflow):
    for job in jobs(workflow):
        yield from job.get("strategy", {}).get("matrix", {}).get("python", [])
        for step in job["steps"]:
            version = step.get("with", {}).get("python-version", "")
            if version and not version.startswith("${{"):
                yield version


def supported():
    prefix = "Programming Language :: Python :: 3."
    return [c.removeprefix(prefix[:-2]) for c in PROJECT["classifiers"] if c.startswith(prefix)]


@pytest.mark.parametrize("path", [*DOCUMENTS, *WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_every_make_target_that_a_document_or_a_workflow_names_is_there(path):
    assert asked_for(path.read_text()) - targets((ROOT / "Makefile").read_text()) == set()


def test_targets_are_found_where_they_are_asked_for():
    text = "`make lint types`\n      - run: make test\nmake demo    # sets up\nthings make sense\n"
    assert asked_for(text) == {"lint", "types", "test", "demo"}


def test_the_nightly_run_makes_targets_that_are_there():
    (job,) = jobs(ROOT / ".github" / "workflows" / "nightly.yml")
    matrix = job["strategy"]["matrix"]
    made = {target.split()[0] for target in [*matrix["target"], *(entry["target"] for entry in matrix["include"])]}
    assert made - targets((ROOT / "Makefile").read_text()) == set()


def test_ci_runs_on_every_python_that_the_package_says_it_supports():
    assert PROJECT["requires-python"] == f">={supported()[0]}"
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["check"]["strategy"][
        "matrix"
    ]
    assert matrix["python"] == supported()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_uses_a_python_that_is_supported_pinned_actions_and_no_more_rights_than_it_needs(workflow):
    assert set(pythons(workflow)) <= set(supported())
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    for action in re.findall(r"uses: (\S+)", workflow.read_text()):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), f"{action} is not pinned by commit"
    for job in jobs(workflow):
        assert job["timeout-minutes"] <= 360
        assert job.get("permissions", {"id-token": "write"}) == {"id-token": "write"}  # to publish


@pytest.mark.parametrize("form", ["bug.yml", "feature.yml"])
def test_issue_forms_ask_for_what_doctor_says(form):
    assert "`mlx-mcp doctor --json`" in (ROOT / ".github" / "ISSUE_TEMPLATE" / form).read_text()


def test_the_guide_names_the_versions_of_the_clients_that_are_tried():
    hosts = ROOT / "benchmarks" / "hosts"
    lines = [line for path in hosts.glob("clients/*.txt") for line in path.read_text().splitlines()]
    pinned = [line.partition("==")[::2] for line in lines]
    wanted = json.loads((hosts / "package.json").read_text())
    packages = wanted["dependencies"] | wanted["devDependencies"]
    pinned += [(name, packages[name]) for name in ("@anthropic-ai/claude-code", "@modelcontextprotocol/sdk")]
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert len(pinned) >= 9
    assert [name for name, version in pinned if not re.search(rf"^\| [^|]* {re.escape(version)} \|", guide, re.M)] == []
