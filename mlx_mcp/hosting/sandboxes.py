"""The sandboxes of a process, from the settings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlx_mcp.config import Config
from mlx_mcp.errors import NoSharedEngine, SandboxFailed
from mlx_mcp.process.place import sandbox_folder, trials_file
from mlx_mcp.wiring import open_sandbox_log
from mlx_mcp.workflows.sandbox.keeping import Keeping, KeepingOptions
from mlx_mcp.workflows.sandbox.opening import Python, open_runtime
from mlx_mcp.workflows.sandbox.runtime import Runtime
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes
from mlx_mcp.workflows.sandbox.trials import Trials


def sandboxes_of(config: Config) -> Sandboxes:
    """The sandboxes of a process, and where they are kept on disk, if they are."""
    options = KeepingOptions(config.sandbox_autosave_s, config.session_ttl_s, config.persisted_ttl_s)
    keeping = Keeping(None, options=options)
    if config.max_ssd_bytes and config.max_sandbox_disk_bytes:
        keeping = Keeping(partial(open_sandbox_log, config), config.sandbox_dir.exists, options)
    runtime = partial(user_runtime, config.sandbox_python)
    return Sandboxes(runtime, keeping, config.session_ttl_s, trials=Trials(trials_file()))


async def user_runtime(python: Python) -> Runtime:
    """What runs programs here; what starts it is in the user's state folder.

    Raises:
        SandboxFailed: it does not run here, or that folder cannot be made.
        EngineUnavailable: something else is in the folder's place, or others may enter.
    """
    try:
        folder = Path(sandbox_folder())
    except NoSharedEngine as error:
        raise SandboxFailed(
            f"What starts sandboxes has no place: {error}. Set MLX_MCP_STATE_DIR to a folder of yours, and start again."
        ) from error
    return await open_runtime(folder, python)
