"""What the tools about sandboxes return, and how what a run left becomes that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from mlx_mcp.api.mcp.results import compact
from mlx_mcp.api.web.results import Closed, KeptSession, SessionList
from mlx_mcp.service.files import Texts
from mlx_mcp.service.values import Origin
from mlx_mcp.workflows.sandbox.keeping import PersistedSandbox
from mlx_mcp.workflows.sandbox.sandbox import Ran, Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import SandboxInfo

HEAD = 0.7  # of what is shown of an output that is too long, the rest is its end
MAX_LISTED = 100  # variables, or sandboxes
ROLLED_BACK = "The variables are as they were before this run."


class Fault(BaseModel):
    """The exception that a program ended with."""

    type: str
    message: str
    line: int | None = None
    hint: str | None = None


class Calls(BaseModel):
    """What a run had of the models."""

    calls: int
    failed: int | None = None
    prompt_tokens: int
    cached_tokens: int
    restored_tokens: int
    computed_tokens: int
    written_tokens: int


class Unanswered(BaseModel):
    """A question that has no answer: the program got None in its place."""

    index: int
    error: str


class Failed(BaseModel):
    """How many questions have no answer, and the first of them."""

    count: int
    first: list[Unanswered]


class SandboxRun(BaseModel):
    """What `sandbox_run` returns."""

    sandbox: str
    name: str | None = None
    output: str | None = None
    value: Any = None
    error: Fault | None = None
    variables: dict[str, str] | None = None
    remembered: list[str] | None = None
    calls: Calls | None = None
    failed: Failed | None = None
    isolation: str
    functions: list[str] | None = None
    note: str | None = None


class HeldSandbox(BaseModel):
    """One of the sandboxes that `list_sessions` lists."""

    sandbox: str
    name: str | None = None
    model: str | None = None
    parent: str | None = None
    busy: bool
    variables: int
    remembered: list[str] | None = None
    state_bytes: int
    idle_s: int
    expires_in_s: int
    persisted: bool | None = None
    versions: list[str] | None = None


class HeldSession(KeptSession):
    """One of the sessions that `list_sessions` lists; of one found by a text `asked` says when, and who."""

    asked: str | None = None


class Held(BaseModel):
    """What `list_sessions` returns."""

    sessions: list[HeldSession]
    not_shown: int | None = None
    sandboxes: list[HeldSandbox] | None = None
    sandboxes_not_shown: int | None = None


class Forked(BaseModel):
    """What `fork_session` returns: of sandboxes there are neither a model nor tokens."""

    sessions: list[str]
    names: list[str] | None = None
    model: str | None = None
    tokens: int | None = None


class Kept(BaseModel):
    """What `persist_session` returns: of sandboxes there are no tokens, but what they remember."""

    session: str
    name: str | None = None
    version: str | None = None
    tokens: int | None = None
    kept_tokens: int | None = None
    remembered: int | None = None
    written_bytes: int
    expires_in_s: int


def kept(made: PersistedSandbox) -> Kept:
    """A sandbox that was made durable."""
    return Kept(
        session=made.sandbox.sandbox_id,
        name=made.sandbox.name or None,
        version=made.version or None,
        remembered=made.num_remembered or None,
        written_bytes=made.stored_bytes,
        expires_in_s=round(made.expires_in_s),
    )


def held_list(sessions: SessionList, origins: Sequence[Origin | None], infos: Sequence[SandboxInfo]) -> Held:
    """The sessions and sandboxes of a caller, no more than a host takes.

    If the sessions were found by a text, the `origins` are of the turns in which it was said, one for each.
    """
    lines = [None if origin is None else origin.line for origin in origins] or [None] * len(sessions.sessions)
    return Held(
        sessions=[
            HeldSession(**entry.model_dump(), asked=line)
            for entry, line in zip(sessions.sessions, lines, strict=False)  # there may be more than are listed
        ],
        not_shown=sessions.not_shown,
        sandboxes=[held(info) for info in infos[:MAX_LISTED]] or None,
        sandboxes_not_shown=len(infos[MAX_LISTED:]) or None,
    )


def forked(sandboxes: Sequence[Sandbox]) -> Forked:
    """The forks of a sandbox."""
    names = [sandbox.name for sandbox in sandboxes]
    return Forked(sessions=[sandbox.sandbox_id for sandbox in sandboxes], names=names if any(names) else None)


def closed_with(sandboxes: Sequence[Sandbox], closed: Closed) -> Closed:
    """What was closed, sandboxes too."""
    return closed.model_copy(update={"closed": [*closed.closed, *(sandbox.sandbox_id for sandbox in sandboxes)]})


def described(info: SandboxInfo, isolation: str, *notes: str, **more: Any) -> SandboxRun:
    """A sandbox as it is, with what else there is to say."""
    shown = shown_variables(dict(list(info.variables.items())[:MAX_LISTED]))
    num_hidden = len(info.variables) - len(shown)
    hidden = f"Of its variables, {num_hidden} are not shown: print their names in parts." if num_hidden else ""
    return SandboxRun(
        sandbox=info.sandbox_id,
        name=info.name or None,
        variables=shown or None,
        remembered=list(info.remembered) or None,
        isolation=isolation,
        note=" ".join(filter(None, (*notes, hidden))) or None,
        **more,
    )


def shown_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """What each variable is, without the beginning of its value: the program prints what is to be seen of that."""
    return {name: line.partition(": ")[0] for name, line in variables.items()}


def run_of(ran: Ran, info: SandboxInfo, isolation: str, texts: Texts, max_chars: int) -> SandboxRun:
    """What came of a run; `max_chars` of its output are shown, and a value as long."""
    ended, said, notes = ran.ended, ran.said, [*ran.said.notes]
    value = None if ended.error else ended.value
    num_chars = len(compact(value))
    if num_chars > max_chars:
        value = None
        notes.append(
            f"The value has {num_chars} characters of JSON and was left out: keep it in a variable, and print parts; "
            "or give a larger output_chars."
        )
    if ended.spoiled:
        notes.append(ROLLED_BACK)
    failed = None
    if said.num_failed:
        first = [Unanswered(index=each.index, error=each.error) for each in said.failures]
        failed = Failed(count=said.num_failed, first=first)
    counts = asdict(ran.counts)
    return described(
        info,
        isolation,
        *notes,
        left_out(texts),
        output=cut(ran.output, max_chars) or None,
        value=value,
        error=None if ended.error is None else Fault(**asdict(ended.error) | {"hint": ended.error.hint or None}),
        calls=Calls(**counts | {"failed": counts["failed"] or None}),
        failed=failed,
    )


def cut(output: str, max_chars: int) -> str:
    """The output, or its beginning and its end with what is said of the rest between."""
    if len(output) <= max_chars:
        return output
    head = round(max_chars * HEAD)
    tail = max_chars - head
    said = f"[{len(output) - max_chars} of {len(output)} characters are left out: print less, or give output_chars]"
    return f"{output[:head]}\n{said}\n{output[len(output) - tail :]}"


def left_out(texts: Texts) -> str:
    """What is said of files that patterns found and that are no text."""
    if not texts.left_out:
        return ""
    first = "; ".join(list(texts.left_out.values())[:3])
    return f"Files that were left out: {len(texts.left_out)}. {first}"


def held(info: SandboxInfo) -> HeldSandbox:
    """A sandbox in a list."""
    return HeldSandbox(
        sandbox=info.sandbox_id,
        name=info.name or None,
        model=info.model or None,
        parent=info.parent_id or None,
        busy=info.busy,
        variables=len(info.variables),
        remembered=list(info.remembered) or None,
        state_bytes=info.state_bytes,
        idle_s=round(info.idle_s),
        expires_in_s=round(info.expires_in_s),
        persisted=info.persisted or None,
        versions=list(info.versions) or None,
    )
