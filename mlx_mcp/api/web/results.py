"""The shapes that faces answer with: small, since hosts show them to a model; what is not there is left out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class CalledTool(BaseModel):
    """A call that the local model asks for; nobody has carried it out."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


class LikelyToken(BaseModel):
    """A token of the answer: how it reads, its log-probability, and the likeliest ones in its place."""

    token: str
    logprob: float
    top: list[tuple[str, float]]


class Miss(BaseModel):
    """Why more was computed than was to be expected, from token `index` on."""

    reason: str
    index: int
    before: str | None = None
    after: str | None = None
    earlier: str | None = None
    detail: str | None = None


class Generation(BaseModel):
    """What `generate` returns."""

    text: str
    finish_reason: Literal["stop", "length", "tool_calls"]
    model: str
    session: str | None = None
    prompt_tokens: int
    cached_tokens: int
    restored_tokens: int
    computed_tokens: int
    completion_tokens: int
    reasoning: str | None = None
    tool_calls: list[CalledTool] | None = None
    logprobs: list[LikelyToken] | None = None
    miss: Miss | None = None
    note: str | None = None


class Branch(BaseModel):
    """One answer of `generate_batch`, or why there is none."""

    text: str | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    session: str | None = None
    cached_tokens: int | None = None
    restored_tokens: int | None = None
    computed_tokens: int | None = None
    completion_tokens: int | None = None
    tool_calls: list[CalledTool] | None = None
    miss: Miss | None = None
    note: str | None = None
    error: str | None = None


class Batch(BaseModel):
    """What `generate_batch` returns: n answers to the first prompt, then to the second, and so on."""

    results: list[Branch]
    model: str
    note: str | None = None


class NewSession(BaseModel):
    """What `create_session` returns."""

    session: str
    name: str | None = None
    model: str
    tokens: int
    cached_tokens: int
    restored_tokens: int
    computed_tokens: int
    miss: Miss | None = None
    note: str | None = None


class Forks(BaseModel):
    """What `fork_session` returns."""

    sessions: list[str]
    names: list[str] | None = None
    model: str
    tokens: int


class KeptSession(BaseModel):
    """One session of `list_sessions`."""

    session: str
    name: str | None = None
    model: str
    tokens: int
    cached_tokens: int
    busy: bool
    pinned: bool
    ephemeral: bool
    idle_s: int
    expires_in_s: int
    parent: str | None = None
    persisted: bool
    versions: list[str] | None = None


class PersistedSession(BaseModel):
    """What `persist_session` returns."""

    session: str
    name: str | None = None
    version: str | None = None
    tokens: int
    kept_tokens: int
    written_bytes: int
    expires_in_s: int


class SessionList(BaseModel):
    """What `list_sessions` returns: the ones used last come first."""

    sessions: list[KeptSession]
    not_shown: int | None = None


class Closed(BaseModel):
    """What `close_session` returns."""

    closed: list[str]
    not_shown: int | None = None


class ModelEntry(BaseModel):
    """One model of `list_models`."""

    name: str
    aliases: list[str] | None = None
    default: bool
    loaded: bool
    loading: bool | None = None
    fits: Literal["yes", "after unloading", "no", "unknown"]
    weights_mb: float | None = None
    kv_mb_per_1k_tokens: float | None = None
    context_tokens: int | None = None
    tools: bool | None = None
    thinks: bool | None = None
    pinned: bool | None = None
    calls: int | None = None
    sampling: dict[str, float] | None = None
    about: str


class UnloadedModel(BaseModel):
    """What `unload_model` returns; 0 if it was not in memory."""

    model: str
    freed_mb: float


class ModelList(BaseModel):
    """What `list_models` returns."""

    models: list[ModelEntry]


class ResultEntry(BaseModel):
    """A call whose result can be fetched."""

    result_id: str
    tool: str
    status: Literal["running", "done", "failed", "cancelled"]
    age_s: int
    progress: str | None = None
    fetched: bool | None = None


class ResultList(BaseModel):
    """What `get_result` returns without a handle: the newest first."""

    results: list[ResultEntry]


class CancelledCall(BaseModel):
    """What `cancel` returns: where the call was by then."""

    result_id: str
    status: Literal["running", "done", "failed", "cancelled"]


class TokenCount(BaseModel):
    """What `count_tokens` returns: of the prompt, the session's tokens included."""

    tokens: int
    model: str
    context_tokens: int
    left_tokens: int
    note: str | None = None
