"""The contexts that the settings want warm, as the service knows them."""

from __future__ import annotations

from pathlib import Path

from mlx_mcp.config import Config
from mlx_mcp.service.context import Context
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.sessions import create_session
from mlx_mcp.service.warm import Warm, WarmContext


def warm_of(config: Config) -> Warm:
    """The warm contexts of a process; their files are read wherever they are, since the user named them."""
    contexts = tuple(
        WarmContext(each.name, Context(each.system, tuple(map(str, each.files))), each.model, each.pinned)
        for each in config.warm
    )
    roots = {Path(file).parent for each in config.warm for file in each.files}
    return Warm(contexts, FileReader(tuple(roots), config.max_file_bytes, config.max_files_bytes), create_session)
