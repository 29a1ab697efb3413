"""Opens the files that sessions are exported to and imported from, with the rights of the user."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_mcp.core.durable import Transfer
from mlx_mcp.errors import StorageError


def to_file(path: Path) -> Transfer:
    """A transfer that writes a file, in place of one that is there already.

    Raises:
        StorageError: no such file can be written.
    """
    path = path.absolute()
    if path.is_dir():
        raise StorageError(f"{path} is a folder: give the file that is to be written.")
    try:
        return Transfer(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path.name)
    except FileNotFoundError as error:
        raise StorageError(f"There is no folder {path.parent}. Make it first, or choose another.") from error
    except OSError as error:
        raise StorageError(f"{path.parent} cannot be written to: {error.strerror}. Choose another folder.") from error


def from_file(path: Path) -> Transfer:
    """A transfer that reads a file.

    Raises:
        StorageError: there is no such file, or it cannot be read.
    """
    path = path.absolute()
    if path.is_dir():
        raise StorageError(f"{path} is a folder: give a file that `mlx-mcp sessions export` wrote.")
    try:
        # O_NONBLOCK: opening a FIFO would wait for somebody to write to it.
        return Transfer(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), str(path))
    except FileNotFoundError as error:
        raise StorageError(f"There is no file {path}. Give one that `mlx-mcp sessions export` wrote.") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}. Give another file.") from error
