"""docs/programs.md names what programs can call, and what a run may use, as it is."""

from __future__ import annotations

from pathlib import Path

from mlx_mcp.api.mcp.workflow_arguments import SandboxArguments
from mlx_mcp.workflows.sandbox.host_calls import FUNCTIONS

PAGE = (Path(__file__).parent.parent / "docs" / "programs.md").read_text()


def test_the_page_names_every_function_and_every_budget_as_it_is() -> None:
    for name in FUNCTIONS:
        assert f"`{name}(" in PAGE
    for name, field in SandboxArguments.model_fields.items():
        option = (field.json_schema_extra or {}).get("option") if isinstance(field.json_schema_extra, dict) else None
        if option:
            assert f"| `{name}` | {field.default:,.10g} |" in PAGE, name
