"""The sandboxes of a process, from the settings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlx_mcp.config import Config
from mlx_mcp.process.place import sandbox_folder
from mlx_mcp.wiring import open_sandbox_log
from mlx_mcp.workflows.sandbox.keeping import Keeping, KeepingOptions
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, runtime_in


def sandboxes_of(config: Config) -> Sandboxes:
    """The sandboxes of a process, and where they are kept on disk, if they are."""
    options = KeepingOptions(config.sandbox_autosave_s, config.session_ttl_s, config.persisted_ttl_s)
    keeping = Keeping(None, options=options)
    if config.max_ssd_bytes and config.max_sandbox_disk_bytes:
        keeping = Keeping(partial(open_sandbox_log, config), config.sandbox_dir.exists, options)
    return Sandboxes(partial(runtime_in, Path(sandbox_folder())), keeping, config.session_ttl_s)
