"""What crosses the border between event loop and engine thread: commands down, events up, all frozen values.

A command that asks for something has a call id, which its sender chooses, and every event belongs to one. Who is told
of a call's events is known to the thread that owns the engine, so that commands can be printed, compared and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.core.cache.misses import Miss
from mlx_mcp.core.durable import Transfer
from mlx_mcp.core.origin import UNKNOWN, Origin
from mlx_mcp.core.ports import ChatTokenizer, LoadedModel, LoadProgress, PreparedModel
from mlx_mcp.core.sequence import Constraint, FinishReason, SamplingParams, TokenLogprobs
from mlx_mcp.core.session import SessionInfo, SessionOptions
from mlx_mcp.engine.awaited import Awaited
from mlx_mcp.engine.results import ThreadResult
from mlx_mcp.errors import MlxMcpError


@dataclass(frozen=True)
class Waiting:
    """Queued behind `num_ahead` calls; `awaits` is what it waits for, if that is known and not only its turn."""

    num_ahead: int
    awaits: Awaited | None = None


@dataclass(frozen=True)
class Prefilled:
    """The prompt's first `num_tokens` tokens are there.

    `num_cached` were before, of which a tier brought `num_restored`, and `miss` says why not more. The call got its row
    at `admitted_at`, by the engine's clock.
    """

    num_tokens: int
    num_cached: int = 0
    num_restored: int = 0
    miss: Miss | None = None
    admitted_at: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Token:
    """The next token of the answer."""

    token_id: int
    logprobs: TokenLogprobs | None = None  # if it was asked for


@dataclass(frozen=True)
class Finished:
    """The sequence ended; its row is free, and its session, if it is kept in one, is ready for the next turn."""

    reason: FinishReason
    session: SessionInfo | None = None


@dataclass(frozen=True)
class Failed:
    """The call came to nothing; what it held is free."""

    error: MlxMcpError


@dataclass(frozen=True)
class Unloaded:
    """The model is not in memory, or not any more: `num_bytes` of weights went now."""

    num_bytes: int = 0


@dataclass(frozen=True)
class EncodeAgain:
    """The call waits for its prompt to be encoded again, until an `Encoded` brings that.

    Either its model is not in memory (any more) and has to be loaded first, or its session's tokens end otherwise by
    now than the prompt was encoded for.
    """

    loaded: bool  # whether the model is in memory


@dataclass(frozen=True)
class Loading:
    """How much of the model's weights is read."""

    progress: LoadProgress


@dataclass(frozen=True)
class Loaded:
    """The model is ready."""

    model: LoadedModel


@dataclass(frozen=True)
class Sessions:
    """The sessions that a command was about, as they are now."""

    infos: tuple[SessionInfo, ...]
    held_bytes: int = 0  # of their keys and values in memory, if that was asked for; what they share counts once


@dataclass(frozen=True)
class Persisted:
    """The session would survive a power cut now: its tokens, and keys and values of the first `num_kept`."""

    info: SessionInfo
    version: str
    num_kept: int
    num_bytes: int  # written for it now


@dataclass(frozen=True)
class Told:
    """What came of an `OnDisk`; which type that has is said there."""

    value: Any


@dataclass(frozen=True)
class SessionTokens:
    """What a session consists of. `text` has its transcript if there is no `tokenizer`: its model was not used yet."""

    info: SessionInfo
    tokens: tuple[int, ...]
    tokenizer: ChatTokenizer | None
    text: str
    origins: tuple[Origin, ...] = ()


# A call's last event. One that holds its model goes on after Loaded, and is told nothing more.
LastEvent = Finished | Failed | Unloaded | Loaded | Sessions | SessionTokens | Persisted | Told
Event = Waiting | Prefilled | Token | EncodeAgain | Loading | LastEvent


@dataclass(frozen=True)
class Find:
    """Ask for a model that may be in memory: `Loaded` or `Unloaded` comes back.

    With `hold` a model that is there stays until a `Submit` names this call, or it is cancelled.
    """

    call_id: int
    name: str
    hold: bool = False


@dataclass(frozen=True)
class Load:
    """Read a prepared model's weights; whoever asks for one that is being read waits for the same reading.

    `hold` is as for `Find`. `asked_for` says that a user wants it loaded, so that it comes back after a model that it
    had to go for has failed to load.
    """

    call_id: int
    prepared: PreparedModel
    hold: bool = False
    asked_for: bool = False


@dataclass(frozen=True)
class Unload:
    """Have a model's weights go from memory: `Unloaded` comes back."""

    call_id: int
    name: str


@dataclass(frozen=True)
class Turn:
    """What a generation has to do with sessions: it goes on with one, branches off one, opens one, or none of these."""

    tenant: str = ""  # prompts of one tenant share keys and values, never those of two
    session: str = ""  # handle or name of the session whose tokens come before the prompt
    after: str = "assistant"  # the role that the prompt was encoded to come after
    keep: bool = False  # the session goes on with prompt and output; else it stays as it is
    queue: bool = False  # wait for another turn of the session, rather than fail
    shorten: bool = False  # max_tokens may be less, if the session has grown or memory does not hold so many
    opens: SessionOptions | None = None  # a new session keeps prompt and output
    tools: tuple[dict[str, Any], ...] = ()  # of the new session
    context: str = ""  # nothing is generated: the session opens with the prompt, which ends in this role's message
    origin: Origin = UNKNOWN  # who asks; where the turn begins is known at its end


@dataclass(frozen=True)
class Submit:
    """Generate: events come until Finished or Failed.

    When there is not room for all, groups of callers take turns, and within each its lanes; a call without a lane takes
    its session's, or one of its own. The constraint is the engine's from here on.
    """

    call_id: int
    model: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    lane: str = ""
    constraint: Constraint | None = None
    turn: Turn = Turn()
    group: str = ""
    hold: int = 0  # the call that holds its model, and ends with the arrival of this one


@dataclass(frozen=True)
class Encoded:
    """A call's prompt, encoded again to come after a message of the role `after`; ignored if no call waits for it."""

    call_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    constraint: Constraint | None
    after: str
    hold: int = 0


@dataclass(frozen=True)
class Finish:
    """End a generation after its first `num_output` tokens, as if the model had; unknown ids are ignored.

    One that has ended on its own meanwhile is shortened in its session, unless that has gone on.
    """

    call_id: int
    num_output: int


@dataclass(frozen=True)
class Cancel:
    """Drop a call and free its row before the next step; unknown ids are ignored."""

    call_id: int


@dataclass(frozen=True)
class Fork:
    """Have `count` sessions go on from where one is, or was as a version was persisted: `Sessions` comes back."""

    call_id: int
    tenant: str
    session: str
    count: int
    names: tuple[str, ...]
    version: str = ""


@dataclass(frozen=True)
class Persist:
    """Make a session durable as its latest finished turn left it, or as a named version: `Persisted` comes back."""

    call_id: int
    tenant: str
    session: str
    version: str


@dataclass(frozen=True)
class Close:
    """End sessions and their turns: `Sessions` comes back. If none is named, all of the tenant's but persisted ones."""

    call_id: int
    tenant: str
    sessions: tuple[str, ...]


@dataclass(frozen=True)
class ListSessions:
    """Ask for a tenant's sessions, and for what they hold if they are to be weighed: `Sessions` comes back."""

    call_id: int
    tenant: str
    weigh: bool = False


@dataclass(frozen=True)
class ReadTokens:
    """Ask for what a session consists of: `SessionTokens` comes back."""

    call_id: int
    tenant: str
    session: str


@dataclass(frozen=True)
class Heads:
    """What sessions are on disk: a list of SessionHead."""


@dataclass(frozen=True)
class Read:
    """All that is on disk of a session, by handle or name, or of a version of it: a SessionRecord."""

    session: str
    version: str = ""


@dataclass(frozen=True)
class Remove:
    """End a session and its turns and remove it from disk, or remove one version: how many versions went."""

    session: str
    version: str | None = None


@dataclass(frozen=True)
class Purge:
    """End every session of which something is on disk, and remove all from there, cached blocks too: None."""


@dataclass(frozen=True)
class Export:
    """Write a session, as it is on disk, to a file: its bytes."""

    session: str
    version: str
    transfer: Transfer


@dataclass(frozen=True)
class Import:
    """Take in an exported session, in place of one of the same handle: the SessionHead."""

    transfer: Transfer
    name: str = ""  # what it is called from now on, if not as it was


@dataclass(frozen=True)
class OnDisk:
    """Look at, or change, what is on disk of sessions, whoever's they are: `Told` comes back."""

    call_id: int
    what: Heads | Read | Remove | Purge | Export | Import


@dataclass(frozen=True)
class Stop:
    """End the thread; what has to be written may take until `deadline`, by time.monotonic."""

    deadline: float = 0.0


AboutSessions = Fork | Persist | Close | ListSessions | ReadTokens
Request = Find | Load | Unload | Submit | AboutSessions | OnDisk
Command = Request | Encoded | Finish | Cancel | ThreadResult | Stop
