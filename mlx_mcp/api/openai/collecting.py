"""Answers that are sent when they are whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from mlx_mcp.api.openai.counts import Thinking
from mlx_mcp.service.several import Piece
from mlx_mcp.service.values import Delta, Result


async def collected(pieces: AsyncGenerator[Piece, None], num: int) -> tuple[list[Result], list[Thinking]]:
    """All answers when they are whole, and what of each the model was thinking."""
    results, thinking = dict[int, Result](), [Thinking() for _ in range(num)]
    async with aclosing(pieces):
        async for index, update in pieces:
            if isinstance(update, Delta):
                thinking[index].take(update)
            elif isinstance(update, Result):
                results[index] = update
    return [results[index] for index in range(num)], thinking
