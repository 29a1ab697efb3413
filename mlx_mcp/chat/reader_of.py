"""The reader of a format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_mcp.chat.formats.format import Format
from mlx_mcp.chat.headed_reader import HeadedReader
from mlx_mcp.chat.reader import Reader


def reader_of(form: Format, reasoning: bool = False, tools: Sequence[dict[str, Any]] = ()) -> Reader:
    """A new reader of one answer.

    `reasoning` says that the prompt opened thoughts. `tools` are function definitions in OpenAI's form.
    """
    if form.headers is not None:
        return HeadedReader(form, form.headers, reasoning, tools)
    return Reader(form, reasoning, tools)
