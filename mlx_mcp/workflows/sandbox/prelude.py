"""What of the files in `inside/` a program needs: the definitions that it uses, and those that these use."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

# What programs find under these names without an import.
HELPERS = frozenset(
    "chunks grep lines map filter callable issubclass ascii exit quit open ThreadPoolExecutor as_completed StringIO "
    "OrderedDict".split()
)
# Gives the variables by name, with a line about each; `_helpers` are names that are not shown while they are helpers.
DESCRIBE = "_described(locals(), _helpers)"


@functools.cache
def _parts() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name → its definition, and the names of others that this uses."""
    found: dict[str, ast.stmt] = {}
    files = sorted(Path(__file__).with_name("inside").glob("*.py"))
    for node in (node for path in files for node in ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    parts = {}
    for name, node in found.items():
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        parts[name] = (ast.unparse(_without_docstrings(node)), tuple(sorted(used & found.keys() - {name})))
    return parts


def _without_docstrings(node: ast.stmt) -> ast.stmt:
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(each) is not None:
            each.body = each.body[1:] or [ast.Pass()]
    return node


def names() -> frozenset[str]:
    """The names of all definitions."""
    return frozenset(_parts())


def needed(wanted: Iterable[str]) -> list[str]:
    """These names and those that they use, in the order in which they must be defined."""
    parts = _parts()
    found: dict[str, None] = {}

    def need(name: str, within: frozenset[str]) -> None:
        if name not in found and name not in within:
            for each in parts[name][1]:
                need(each, within | {name})
            found[name] = None

    for name in sorted(wanted):
        need(name, frozenset())
    return list(found)


def source_of(names: Iterable[str]) -> str:
    """A program that defines these names, except what is defined already."""
    parts = _parts()
    return "\n".join(f"if {name!r} not in locals():\n{_indented(parts[name][0])}" for name in names)


def _indented(text: str) -> str:
    return "\n".join(f" {line}" for line in text.split("\n"))
