"""Answers that come as events: when a stream begins, and how it ends."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

from mlx_mcp.api.openai.errors import error_in_stream
from mlx_mcp.api.openai.shape import Given, event
from mlx_mcp.api.web.events import encoded
from mlx_mcp.errors import MlxMcpError
from mlx_mcp.service.several import Piece
from mlx_mcp.service.values import Progress

# A stream begins when the prompt is read, since an error before that has a status of its own; and after so long at the
# latest, since from then on comments keep clients and proxies from taking the server for dead.
BEGIN_S = 10.0
DONE = encoded("[DONE]")


class Beginning:
    """Tells when a stream has to begin."""

    def __init__(self) -> None:
        self.begun = False
        self._asked_at = time.monotonic()

    def at(self, piece: Piece) -> bool:
        """Whether it begins with this piece, which is so once."""
        if self.begun:
            return False
        update = piece[1]
        waits = isinstance(update, Progress) and update.phase in ("loading", "queued")
        self.begun = not waits or time.monotonic() - self._asked_at >= BEGIN_S
        return self.begun


async def chunk_events(
    pieces: AsyncGenerator[Piece, None],
    opening: Callable[[], Iterable[Given]],
    chunks: Callable[[Piece], Iterable[bytes]],
    closing: Callable[[], Iterable[Given]],
) -> AsyncGenerator[bytes, None]:
    """The events of a stream of chunks, as chat completions and completions have it.

    An error before the first event is raised; after that it is the last event, with no "[DONE]" after it.
    """
    beginning = Beginning()
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                begun = map(event, opening()) if beginning.at(piece) else ()
                if made := b"".join((*begun, *chunks(piece))):  # what comes together is written at once
                    yield made
        except MlxMcpError as error:
            if not beginning.begun:
                raise
            yield event(error_in_stream(error))
            return
    yield b"".join((*map(event, closing()), DONE))
