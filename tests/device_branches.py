"""Whether the tests have every question to the device answered both ways: `make coverage-device`.

Two runs of the tests, with a CPU's ways and with a GPU's, write down at which line `on_cpu` said what, and coverage
which branches were taken. A question within an expression has no branch of its own, and an `if` on another function of
device.py asks `on_cpu` elsewhere: together they tell of every line.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_mcp.mlx_backend import device

ROOT = Path(__file__).parent.parent
BACKEND = ROOT / "mlx_mcp" / "mlx_backend"
Line = tuple[str, int]  # a file's path in the project, and a line's number


class Asked:
    """Writes down what `on_cpu` said to whom, in place of it."""

    def __init__(self, on_cpu: Callable[[], bool]) -> None:
        self.on_cpu = on_cpu
        self.said: set[tuple[str, int, bool]] = set()

    def __call__(self) -> bool:
        said = self.on_cpu()
        frame = sys._getframe(1)
        self.said.add((frame.f_code.co_filename, frame.f_lineno, said))
        return said

    def write(self, folder: Path) -> None:
        """Leave it in the folder, in a file of this process."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"asked-{os.getpid()}.json").write_text(json.dumps(sorted(self.said)))


def called(node: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    """The calls of functions of these names within a node."""
    for each in ast.walk(node):
        if isinstance(each, ast.Call):
            name = each.func.attr if isinstance(each.func, ast.Attribute) else getattr(each.func, "id", "")
            if name in names:
                yield each


def questions() -> tuple[set[Line], set[Line]]:
    """The lines that call `on_cpu`, and those of each `if` on a function of device.py that says yes or no."""
    asks, ifs = set(), set()
    for path in BACKEND.rglob("*.py"):
        where = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        asks |= {(where, call.lineno) for call in called(tree, {"on_cpu"})}
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and any(called(node.test, {"on_cpu", "uses_cpu_attention"})):
                ifs.add((where, node.lineno))
    return asks, ifs


def missing(said: set[tuple[str, int, bool]], coverage: dict[str, Any]) -> list[str]:
    """What was never answered, or never taken, in words."""
    asks, ifs = questions()
    heard = {(Path(file).relative_to(ROOT).as_posix(), line, yes) for file, line, yes in said if inside(file)}
    found = [
        f"{where}:{line}: on_cpu() never said {yes}"
        for where, line in sorted(asks)
        for yes in (True, False)
        if (where, line, yes) not in heard
    ]
    for where, line in sorted(ifs):
        report = coverage["files"].get(where)
        if report is None or line in report["missing_lines"]:
            found.append(f"{where}:{line}: never reached")
            continue
        found += [
            f"{where}:{line}: never went on at line {to}" for start, to in report["missing_branches"] if start == line
        ]
    return found


def inside(file: str) -> bool:
    """Whether a file is one of the backend's."""
    return Path(file).is_relative_to(BACKEND)


def main(folder: Path) -> None:
    """Compare what two runs have left in the folder; the exit status is 1 where something is missing."""
    said = {tuple(each) for file in folder.glob("asked-*.json") for each in json.loads(file.read_text())}
    found = missing(said, json.loads((folder / "coverage.json").read_text()))
    asks, ifs = questions()
    print("\n".join(found) or f"{len(asks)} questions answered both ways, {len(ifs)} branches taken both ways")
    raise SystemExit(bool(found))


def listen() -> Asked:
    """Have every question to the device written down from now on."""
    asked = Asked(device.on_cpu)
    device.on_cpu = asked
    return asked


if __name__ == "__main__":
    main(Path(sys.argv[1]))
