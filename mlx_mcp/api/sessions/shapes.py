"""The shapes that this API answers with, beside those that all faces have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, RootModel

from mlx_mcp.api.sessions.problem import Problem
from mlx_mcp.api.web.results import (
    Batch,
    Generation,
    KeptSession,
    ModelEntry,
    NewSession,
    PersistedSession,
    TokenCount,
)


class SessionPage(BaseModel):
    """Some of the caller's sessions, in the order of their handles. `next` is there if more come after them."""

    sessions: list[KeptSession]
    next: str | None = None


class Said(BaseModel):
    """A message of a session; without a role if it is not known who speaks.

    `who` is what the client called itself that asked for its turn, `at` when that was, in seconds since 1970.
    """

    role: str | None = None
    text: str
    at: float | None = None
    who: str | None = None


class SessionDetail(KeptSession):
    """A session, and what was said in it where that was asked for."""

    transcript: list[Said] | None = None


class RunningCall(BaseModel):
    """A call that still runs: how far it is, and the handle of its result. GET /v1/results/{id} waits for it."""

    status: Literal["running"] = "running"
    result_id: str
    tool: str
    progress: str
    text: str | None = None  # what there is of the answer
    texts: list[str] | None = None  # what there is of each branch's answer


class EndedCall(BaseModel):
    """A call that has ended: what it answered, or why it has no answer."""

    status: Literal["done", "failed", "cancelled"]
    result_id: str
    tool: str
    result: Generation | Batch | NewSession | PersistedSession | ModelEntry | TokenCount | None = None
    error: Problem | None = None


class CallState(RootModel[RunningCall | EndedCall]):
    """A call that began with wait_s."""


class ProgressEvent(BaseModel):
    """How far the call is before there is text."""

    type: Literal["progress"] = "progress"
    phase: str
    message: str
    done: int
    total: int | None = None


class DeltaEvent(BaseModel):
    """New text. A tool call comes whole, in the model's own notation; the result has it by name and arguments."""

    type: Literal["delta"] = "delta"
    kind: Literal["answer", "reasoning", "tool_call"]
    text: str


class ResultEvent(BaseModel):
    """The whole answer; the last event."""

    type: Literal["result"] = "result"
    result: Generation


class GenerateEvent(RootModel[Annotated[ProgressEvent | DeltaEvent | ResultEvent, Field(discriminator="type")]]):
    """The data of one event; `type` is the name of the event too."""
