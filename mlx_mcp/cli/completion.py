"""Shell completion: typer's, which guesses the shell that it is for; and one can say it, too."""

from __future__ import annotations

from typing import Any

import typer
from typer.completion import get_completion_script, install  # type: ignore[attr-defined]  # typer's only door to these
from typer.core import TyperGroup

SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
PROGRAM = "mlx-mcp"
VARIABLE = "_MLX_MCP_COMPLETE"


class Commands(TyperGroup):
    """Takes a shell's name after --show-completion and --install-completion."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click; shows or installs what was asked for instead."""
        if len(args) == 2 and args[0] in ("--show-completion", "--install-completion"):
            shell = args[1]
            if shell not in SHELLS:
                ctx.fail(f"There is no completion for {shell!r}. Give one of: {', '.join(SHELLS)}.")
            if args[0] == "--show-completion":
                typer.echo(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell))
            else:
                _, path = install(shell=shell, prog_name=PROGRAM, complete_var=VARIABLE)
                typer.echo(f"Completion for {shell} is in {path}; it works in the next terminal.")
            ctx.exit()
        return super().parse_args(ctx, args)


def session_names(incomplete: str) -> list[str]:
    """Names and handles of the sessions on disk that begin so."""
    from mlx_mcp.config import Config
    from mlx_mcp.errors import MlxMcpError
    from mlx_mcp.storage.folder import Calls, ReadOnlyFolder
    from mlx_mcp.storage.session_log import SessionLog

    try:
        folder = ReadOnlyFolder.open(Config.load().store_dir, Calls())
    except MlxMcpError:
        return []
    try:
        heads = SessionLog(folder).heads()
    finally:
        folder.close()
    words = {head.name or head.session_id for head in heads} | {head.session_id for head in heads}
    return sorted(word for word in words if word.startswith(incomplete))


def sandbox_names(incomplete: str) -> list[str]:
    """Names and handles of the sandboxes on disk that begin so."""
    from contextlib import closing

    from mlx_mcp.config import Config
    from mlx_mcp.errors import MlxMcpError
    from mlx_mcp.storage.sandbox_log import SandboxLog

    try:
        with closing(SandboxLog.look(Config.load().sandbox_dir)) as log:
            heads = log.heads()
    except MlxMcpError:
        return []
    words = {head.name or head.sandbox_id for head in heads} | {head.sandbox_id for head in heads}
    return sorted(word for word in words if word.startswith(incomplete))


def model_names(incomplete: str) -> list[str]:
    """Names and aliases of the models that are here and begin so."""
    from mlx_mcp.config import Config
    from mlx_mcp.errors import MlxMcpError
    from mlx_mcp.wiring import registry_of

    try:
        registry = registry_of(Config.load())
    except MlxMcpError:
        return []
    words = [*(entry.spec.name for entry in registry.entries()), *registry.aliases]
    return [word for word in words if word.startswith(incomplete)]
