"""docs/programs.md: its programs run, in the order of the page, in the real interpreter and on the built-in model."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.api.mcp.workflow_arguments import SandboxArguments
from mlx_mcp.config import Config
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from mlx_mcp.workflows.sandbox.host_calls import FUNCTIONS
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, closing, runtime_in

PAGE = (Path(__file__).parent.parent / "docs" / "programs.md").read_text()
CANARY = "canary4711"


def make_files(folder: Path) -> None:
    """What the stories are about, small; each text has the canary."""
    log = [f"{hour:02}:00 GET /{CANARY} {200 + 300 * (hour % 2)}" for hour in range(6)] + ["disk 7 is full"]
    tickets = [{"id": index, "text": f"Ticket {index}: {CANARY} does not work"} for index in range(4)]
    texts = {
        "app.log": "\n".join(log),
        "tickets.jsonl": "\n".join(map(json.dumps, tickets)),
        "src/a.py": f"a = '{CANARY}'",
        "src/deep/b.py": f"b = '{CANARY}'",
        "contracts/one.txt": f"{CANARY}: the law of Oslo governs.",
        "contracts/two.txt": f"{CANARY}: the notice is one month.",
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.long
async def test_the_programs_of_the_page_run_and_no_text_of_the_input_comes_back(tmp_path: Path) -> None:
    make_files(tmp_path / "project")
    client, registry = wire(Config.load())
    files = FileReader((tmp_path / "project",), 1000, 1000)
    sandboxes = Sandboxes(partial(runtime_in, tmp_path / "runtime"))
    shown = re.findall(r"```json\n(.*?)\n```\n\n```python\n(.*?)```", PAGE, re.S)
    assert len(shown) == 7
    ran: list[dict[str, Any]] = []
    try:
        async with (
            closing(sandboxes),
            Client(build_server(Service(client, registry), files, sandboxes=sandboxes)) as host,
        ):
            for arguments, code in shown:
                if "security" in arguments:
                    await host.call_tool("fork_session", {"session": "repo", "names": ["security", "tests", "docs"]})
                result = await host.call_tool("sandbox_run", json.loads(arguments) | {"code": code})
                assert not result.is_error, result.content
                assert "error" not in (result.structured_content or {}), result.structured_content
                assert CANARY not in result.model_dump_json()
                ran.append(result.structured_content or {})
    finally:
        assert client.close()
    log, worst, tickets, repo, security, contracts, more = ran
    assert log["output"] == "7 lines of 2 shapes\n"
    assert log["calls"]["calls"] == 2
    assert worst["output"].endswith("shapes are errors\n")
    assert sum(tickets["value"].values()) == tickets["calls"]["calls"] == 4
    assert repo["output"] == "2 files\n"
    assert security["output"] == "2 answers, 2 purposes\n"
    assert security["calls"]["cached_tokens"] > 0
    assert contracts["value"] == {"contracts": 2, "answers": 6}
    assert contracts["calls"]["cached_tokens"] > 0
    assert more["value"] == 2


def test_the_page_names_every_function_and_every_budget_as_it_is() -> None:
    for name in FUNCTIONS:
        assert f"`{name}(" in PAGE
    for name, field in SandboxArguments.model_fields.items():
        option = (field.json_schema_extra or {}).get("option") if isinstance(field.json_schema_extra, dict) else None
        if option:
            assert f"| `{name}` | {field.default:,.10g} |" in PAGE, name
