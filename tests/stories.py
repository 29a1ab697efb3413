"""The five stories of docs/workflows.md: their calls, as the page has them, and small files for them to read."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "workflows.md"
CANARY = "zanzibar-7719-heliotrope"  # in every file, and in nothing that a program of the page shows
SESSION = "SESSION OF THE LAST BRANCH"  # what the page has in place of a handle
NUM_LINES, NUM_TICKETS, NUM_SOURCES, NUM_CONTRACTS = 200, 30, 5, 4


@dataclass(frozen=True)
class Story:
    """One section of the page: its calls, one list for each block, and its shell commands."""

    title: str
    blocks: list[list[tuple[str, dict[str, Any]]]]
    commands: list[str]


def stories() -> list[Story]:
    """The stories of the page, in their order."""
    sections = re.split(r"^## \d\. ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [
        Story(
            section.partition("\n")[0],
            [calls(block) for block in re.findall(r"```python\n(.*?)```", section, re.S)],
            re.findall(r"```sh\n(.*?)\n```", section, re.S),
        )
        for section in sections
    ]


def calls(block: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls of tools in a block: names, and arguments that are literals."""
    made = []
    for statement in ast.parse(block).body:
        assert isinstance(statement, ast.Expr), block
        call = statement.value
        assert isinstance(call, ast.Call), block
        assert isinstance(call.func, ast.Name), block
        made.append((call.func.id, {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}))
    return made


def write_inputs(folder: Path) -> None:
    """Write the files that the stories read, each with the canary in it."""
    log = [f'2026-11-30T10:{at % 60:02}:00Z worker {at % 7} lost "{CANARY}" after {at} s' for at in range(NUM_LINES)]
    log[::3] = [f'2026-11-30T10:00:00Z disk {at} is full, user "{CANARY}"' for at in range(len(log[::3]))]
    tickets = [{"id": at, "text": f"Order {at} is late. {CANARY}"} for at in range(NUM_TICKETS)]
    files = {
        "app.log": "\n".join(log),
        "tickets.jsonl": "\n".join(map(json.dumps, tickets)),
        "change.diff": f"-    return cache[key]\n+    return cache.get(key)  # {CANARY}\n",
        "spec.md": f"A key that is missing is an error. {CANARY}\n",
        **{f"src/part{at}/code.py": f"def run{at}():\n    return '{CANARY}'\n" for at in range(NUM_SOURCES)},
        **{f"contracts/{at}.txt": f"Party {at} gives notice of {at} weeks. {CANARY}\n" for at in range(NUM_CONTRACTS)},
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def checked(number: int, results: list[dict[str, Any]]) -> None:
    """See that the calls of a story gave what the page says; `results` are those of all its calls, in order."""
    for result in results:
        assert not result.get("error"), result
    if number == 1:
        counted, printed = results
        assert counted["value"]["kinds"] == 2
        assert sum(counted["value"]["lines"].values()) == NUM_LINES
        assert counted["calls"]["calls"] == 2
        assert len(printed["output"].splitlines()) == 2
    elif number == 2:
        [table] = results
        assert sum(table["value"].values()) == table["calls"]["calls"] == NUM_TICKETS
        assert table["calls"]["cached_tokens"] > 0
    elif number == 3:
        read, persisted, forked, asked = results
        assert read["value"] == asked["value"]["files"] == NUM_SOURCES
        assert persisted["session"] == read["sandbox"]
        assert len(forked["sessions"]) == 3
        assert asked.get("calls", {}).get("calls", 0) == 0
    elif number == 4:
        read, persisted, later = results
        assert read["value"] == {"contracts": NUM_CONTRACTS, "answers": 3 * NUM_CONTRACTS}
        assert persisted["remembered"] == NUM_CONTRACTS
        assert later["value"] == NUM_CONTRACTS
        assert later["calls"]["cached_tokens"] > later["calls"]["computed_tokens"]
    else:
        reviewed, more = results
        assert len(reviewed["branches"]) == 5
        assert reviewed["text"]
        assert more["session"] == reviewed["branches"][-1]["session"]
