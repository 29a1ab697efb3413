"""What a template can be given beside messages and tools. Knows templates as texts; the worker process reads them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

# What makers' own code gives templates that show the date and do not say what else they would show.
DATES = {
    "date": "%Y-%m-%d",
    "today": "%Y-%m-%d",
    "current_date": "%Y-%m-%d",
    "date_string": "%d %b %Y",
    "datetime": "%Y-%m-%d %H:%M:%S",
    "current_time": "%H:%M:%S",
}


def read_variables(environment: Any, template: str) -> dict[str, list[Any]]:
    """The variables that a template uses and need not set itself, each with the constants it is compared with.

    A variable that the template asks about, by `is defined` or as a condition, has True among them: it can do without.
    """
    from jinja2 import meta, nodes

    tree = environment.parse(template)
    variables: dict[str, list[Any]] = {name: [] for name in meta.find_undeclared_variables(tree)}

    def names(node: Any) -> set[str]:
        return {each.name for each in [*node.find_all(nodes.Name), node] if isinstance(each, nodes.Name)}

    # Variables that the template sets to something with one of these count for it.
    stand_for = {name: {name} for name in variables}
    for assigned in tree.find_all(nodes.Assign):
        for name in names(assigned.target):
            stand_for.setdefault(name, set()).update(names(assigned.node) & variables.keys())

    def note(node: Any, *constants: Any) -> None:
        for variable in {each for name in names(node) for each in stand_for.get(name, ())}:
            variables[variable] += constants

    for test in tree.find_all(nodes.Test):
        if test.name in ("defined", "undefined", "none"):
            note(test.node, True)
    for each in tree.find_all(nodes.Filter):
        if each.name in ("default", "d") and each.node is not None:
            note(each.node, True, *(arg.value for arg in each.args if isinstance(arg, nodes.Const)))
    for condition in tree.find_all((nodes.If, nodes.CondExpr)):
        if isinstance(condition.test, nodes.Name):
            note(condition.test, True)
    for compared in tree.find_all(nodes.Compare):
        note(compared, *(constant.value for constant in compared.find_all(nodes.Const)))
    return {name: [each for each in flat(found) if isinstance(each, str | int)] for name, found in variables.items()}


def flat(values: list[Any]) -> list[Any]:
    """Values, and those of lists in place of the lists."""
    return [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]


def of_makers(variables: dict[str, list[Any]], tools: list[dict[str, Any]]) -> dict[str, str]:
    """What makers' own code gives a template, as far as it asks for that and cannot do without."""
    now = datetime.now().astimezone()
    needed = {name for name, constants in variables.items() if True not in constants}
    given = {name: now.strftime(form) for name, form in DATES.items() if name in needed}
    if "functions" in needed and "tools" not in variables:  # Fireworks' templates
        given["functions"] = as_text(tools)
    return given


def as_text(tools: list[dict[str, Any]] | None) -> str:
    """The functions of tools in JSON, as Fireworks' code has them."""
    return json.dumps([tool.get("function", tool) for tool in tools or ()], indent=4, ensure_ascii=False)
