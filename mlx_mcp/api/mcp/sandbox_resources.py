"""The resources of sandboxes: what each has, as JSON, and what was run in it, in Markdown."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from mcp.server.mcpserver import MCPServer

from mlx_mcp.api.mcp.calls import tenant
from mlx_mcp.api.mcp.icon import ICONS
from mlx_mcp.api.mcp.resources import JSON, MARKDOWN, read
from mlx_mcp.api.mcp.workflow_results import shown_variables
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.journal import Cell
from mlx_mcp.workflows.sandbox.sandbox import Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

SANDBOX, TRAJECTORY = "mlx://sandboxes/{id}", "mlx://sandboxes/{id}/trajectory"
LEFT_OUT = "Its runs took too much room to be kept with their inputs and answers, so the oldest may be missing here."


def add_sandbox_resources(server: MCPServer[Any], service: Service, sandboxes: Sandboxes) -> None:
    """Give a server the resources of sandboxes. A caller sees those of its own tenant and no others."""

    async def found(id: str) -> Sandbox:
        await sandboxes.ready(service)
        return sandboxes.get(tenant(), id)

    @server.resource(SANDBOX, name="sandbox", title="Variables of a sandbox", mime_type=JSON, icons=ICONS)
    @read
    async def sandbox(id: str) -> str:
        """What variables a sandbox of yours has, by handle or name, and what it remembers; their values are not shown.

        `mlx-mcp sandbox get` writes a variable to a file.
        """
        info = sandboxes.info(await found(id))
        return json.dumps(
            {
                "sandbox": info.sandbox_id,
                "name": info.name,
                "model": info.model,
                "parent": info.parent_id,
                "variables": shown_variables(info.variables),
                "remembered": list(info.remembered),
                "persisted": info.persisted,
                "versions": list(info.versions),
                "state_bytes": info.state_bytes,
            }
        )

    @server.resource(TRAJECTORY, name="trajectory", title="Runs of a sandbox", mime_type=MARKDOWN, icons=ICONS)
    @read
    async def trajectory(id: str) -> str:
        """What was run in a sandbox of yours, by handle or name: code, the beginning of the output, how it ended."""
        asked = await found(id)
        journal = await sandboxes.keeping.journal_of(asked)
        cells = await asyncio.to_thread(list, journal.cells())  # which may have megabytes of inputs
        runs = [as_markdown(number, cell) for number, cell in enumerate(cells, 1)]
        head = f"# Sandbox {asked.name or asked.sandbox_id}\n"
        return "\n".join([head if journal.is_whole else f"{head}\n{LEFT_OUT}\n", *runs])


def as_markdown(number: int, cell: Cell) -> str:
    """One run."""
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(cell.moment))
    said = [f"## Run {number}, {began}", fenced(cell.code, "python")]
    if cell.output:
        said += ["It printed:", fenced(cell.output)]
    ended = f"It ended with {cell.failed}." if cell.failed else ""
    said.append(" ".join(filter(None, (f"Calls: {cell.num_calls}.", ended))))
    return "\n\n".join(said) + "\n"


def fenced(text: str, language: str = "") -> str:
    """A text in a fence that is longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
