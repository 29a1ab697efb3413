"""Programs of the kind that models write for a sandbox, and what they find there.

Each begins at a line `#%% name`. What it must print is what CPython prints, or what its lines `#= …` say.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = ("ann,open,12.50", "bob,closed,3.00", "ann,closed,7.25", "cid,open,99.99", "bob,open,0.75", "dee,waiting,41.10")
FILES = {
    "tickets.csv": "id,customer,status,amount\n" + "".join(f"{i},{row}\n" for i, row in enumerate(ROWS * 3, 1)),
    "notes.md": "# Meeting notes\n\nThe release of Atlas is planned for March. Ann is the owner of the plan. Bob asked "
    "for a refund for the March payment!\n\nWas the payment service down? It was, for an hour.\n\n- call Zoe\n- ship "
    "Atlas\n",
    "data.json": '{"users": [{"id": 1, "name": "Ann", "active": true}, {"id": 2, "name": "Bob", "active": false}], '
    '"orders": [{"id": 10, "user_id": 1, "total": 20.5}, {"id": 11, "user_id": 2, "total": 5.0}, {"id": 12, "user_id": '
    '1, "total": 1.25}, {"id": 13, "user_id": 9, "total": 2.0}]}',
}
MESSAGES = (
    "INFO payment accepted id=deadbeef{i:02d} took {t}ms",
    "WARN Timeout while calling mail gateway, attempt {i}",
    "ERROR payment refused for user {i} took {t}ms",
    "DEBUG cache miss key={i}",
    "INFO login user {i} took {t}ms",
)
CONTEXT = "".join(
    f"2026-01-{1 + i // 40:02d} {8 + i // 7 % 12:02d}:{i * 13 % 60:02d}:{i * 7 % 60:02d} "
    + MESSAGES[(i * i + i // 5) % 5].format(i=i, t=20 + i * 37 % 400)
    + "\n"
    for i in range(60)
)


@dataclass(frozen=True)
class Snippet:
    name: str
    code: str
    printed: str | None  # what it must print, where CPython is not asked


def read_snippets(*paths: Path) -> list[Snippet]:
    """Those of some files, or all that models write."""
    found = []
    for path in paths or sorted(Path(__file__).parent.glob("*.snippets")):
        for part in path.read_text().split("#%% ")[1:]:
            name, _, code = part.partition("\n")
            printed = "".join(f"{line[3:]}\n" for line in code.splitlines() if line.startswith("#= "))
            found.append(Snippet(f"{path.stem}: {name}", code, printed or None))
    return found


def answer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the functions of the sandbox give: texts and objects that depend on what is asked alone."""

    def one(prompt: str) -> Any:
        text = f"{'no' if len(prompt) % 2 == 0 else 'yes'} {len(prompt)}"
        return {"label": text.split()[0]} if kwargs.get("schema") else text

    match name:
        case "llm_query":
            return one(args[0])
        case "llm_query_batched":
            return [one(each) for each in args[0]]
        case "llm_map" | "llm_ask":
            return [one(args[0] + each) for each in args[1]]
        case _:
            raise SystemExit


FUNCTIONS = ("llm_query", "llm_query_batched", "llm_map", "llm_ask", "submit")


def printed_by_cpython(code: str) -> str:
    files = dict(FILES)

    class Kept(io.StringIO):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def close(self) -> None:
            files[self.name] = self.getvalue()
            super().close()

    def function(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: answer(name, args, kwargs)

    def opened(name: str, mode: str = "r") -> io.StringIO:
        return Kept(name) if mode == "w" else io.StringIO(files[name])

    names = {"__name__": "__main__", "context": CONTEXT, "files": files, "open": opened}
    names |= {name: function(name) for name in FUNCTIONS}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        exec(compile(code, "snippet", "exec"), names)
    return output.getvalue()
