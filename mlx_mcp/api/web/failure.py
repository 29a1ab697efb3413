"""Errors as HTTP has them: a status, and when to try again."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_mcp.errors import (
    CapacityError,
    EngineDead,
    MlxMcpError,
    ModelBusy,
    ModelError,
    NotOnDisk,
    RateLimited,
    RequestError,
    SessionBusy,
    StorageError,
    UnknownModel,
    UnknownReply,
    UnknownResult,
    UnknownSession,
    UnknownVersion,
)

# The first class that an error belongs to says its status.
STATUSES: tuple[tuple[type[MlxMcpError], int], ...] = (
    (UnknownModel, 404),
    (UnknownSession, 404),
    (UnknownResult, 404),
    (UnknownReply, 404),
    (UnknownVersion, 404),
    (NotOnDisk, 404),
    (SessionBusy, 409),
    (ModelBusy, 409),
    (RequestError, 400),
    (RateLimited, 429),
    (CapacityError, 503),
    (EngineDead, 503),
    (ModelError, 503),
    (StorageError, 503),
)


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer, before an API puts it into its own form."""

    status: int
    message: str
    retry_after_s: float | None = None
    argument: str = ""  # the one that is at fault, where that is known
    error: MlxMcpError | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def failure_of(error: MlxMcpError) -> Failure:
    """The failure that an error is."""
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    return Failure(status, str(error), getattr(error, "retry_after_s", None), error=error)
