"""Makes the pages and pictures of the documentation that show what the code says: `make docs-made`.

`tools.md` comes from the tools' schemas, `cli.md` from the command line, `http-api.md` from the OpenAPI document, and a
table in `watching.md` from the metrics; tests/test_docs.py compares them. The pictures are what real commands print,
run one after the other in a home of their own, on an engine of their own.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.text import Text
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from docs.http_page import http_page
from mlx_mcp.api.http.metrics import ServiceCollector
from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.cli.main import app
from mlx_mcp.config import Config
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire

DOCS = Path(__file__).parent
WIDTH = 110
METRICS_BEGIN, METRICS_END = "<!-- metrics: made by docs/made.py -->", "<!-- end of metrics -->"
# The steps of five-minutes.md, each with what is run for its picture.
PICTURES = {
    "doctor": ["mlx-mcp doctor"],
    "install": ["mlx-mcp install claude-code --dry-run"],
    "run": ["mlx-mcp run \"Alice's badge is 771. What is Alice's badge?\""],
    "fan-out": ["python fan_out.py"],
    "status": ["mlx-mcp engine status", "mlx-mcp engine stop"],
}


def tools_page() -> str:
    """The tools as hosts are told of them: what each does and takes, and its schema."""
    engine, registry = wire(Config())
    try:
        tools = make_tools(Service(engine, registry))
    finally:
        engine.close()
    return "\n".join(["# Tools", "", "Made from the code by `docs/made.py`.", *map(tool_section, tools)]) + "\n"


def tool_section(tool: Any) -> str:
    """What is said of one tool."""
    schema = tool.parameters
    required = set(schema.get("required", []))
    rows = [
        f"| `{name}`{' (required)' if name in required else ''} | {kind(each)} | {cell(each.get('description', ''))} |"
        for name, each in schema["properties"].items()
    ]
    table = ["| argument | type | |", "|---|---|---|", *rows] if rows else ["No arguments."]
    shown = ["<details><summary>Schema</summary>", "", "```json", json.dumps(schema, indent=2), "```", "", "</details>"]
    return "\n".join(["", f"## {tool.name}", "", tool.description.strip(), "", *table, "", *shown])


def kind(schema: dict[str, Any]) -> str:
    """The type of an argument, in a word or two."""
    if "anyOf" in schema:
        return " or ".join(kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    name = str(schema.get("type", "any"))
    return f"{name} of {kind(schema['items'])}" if name == "array" and "items" in schema else name


def cell(text: str) -> str:
    """A text as it may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def cli_page() -> str:
    """The commands and their options."""
    command = get_command(app)
    text: str = get_docs_for_click(obj=command, ctx=Context(command, info_name="mlx-mcp"), name="mlx-mcp")
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip() + "\n"


def metrics_table() -> str:
    """The metrics that /metrics has, with their kinds and labels."""
    engine, registry = wire(Config())
    try:
        families = list(ServiceCollector(Service(engine, registry)).collect())
    finally:
        engine.close()
    rows = [
        f"| `{family.name}{'_total' if family.type == 'counter' else ''}` | {family.type} "
        f"| {', '.join(f'`{label}`' for label in family._labelnames)} | {family.documentation} |"
        for family in families
    ]
    return "\n".join(["| metric | kind | labels | |", "|---|---|---|---|", *rows])


def watching_page() -> str:
    """The page about watching a server, with that table as it is now."""
    page = (DOCS / "watching.md").read_text()
    before, _, rest = page.partition(METRICS_BEGIN)
    _, _, after = rest.partition(METRICS_END)
    return f"{before}{METRICS_BEGIN}\n{metrics_table()}\n{METRICS_END}{after}"


def picture(commands: list[str], folder: Path, env: dict[str, str]) -> str:
    """What commands print in a terminal, as an SVG."""
    with (folder / "nothing").open("w") as nothing:
        console = Console(record=True, width=WIDTH, file=nothing, force_terminal=True, color_system="truecolor")
        for command in commands:
            console.print(Text(f"$ {command}", "bold"))
            ran = subprocess.run(
                shlex.split(command), cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            console.print(Text.from_ansi(shortened(ran.stdout, folder)))
        return console.export_svg(title="mlx-mcp")


def shortened(text: str, folder: Path) -> str:
    """What was printed, without the folders of whoever made the picture."""
    return text.replace(str(folder), "~").replace(str(Path(sys.executable).parent), "/full/path/to")


def pictures() -> Iterator[tuple[str, str]]:
    """The names of the pictures, and what they show."""
    with TemporaryDirectory(prefix="mlx-") as name:
        folder = Path(name)
        (folder / "fan_out.py").write_text((DOCS / "fan_out.py").read_text())
        path = f"{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin"
        env = {
            "PATH": path,
            "HOME": name,
            "COLUMNS": str(WIDTH),
            "LANG": "C.UTF-8",
            "MLX_MCP_STATE_DIR": f"{name}/state",
        }
        for title, commands in PICTURES.items():
            yield title, picture(commands, folder, env)


def main() -> None:
    """Write the pages, and with `--pictures` the pictures too."""
    (DOCS / "tools.md").write_text(tools_page())
    (DOCS / "cli.md").write_text(cli_page())
    (DOCS / "http-api.md").write_text(http_page())
    (DOCS / "watching.md").write_text(watching_page())
    if "--pictures" in sys.argv:
        for name, svg in pictures():
            (DOCS / "pictures" / f"{name}.svg").write_text(svg)


if __name__ == "__main__":
    main()
