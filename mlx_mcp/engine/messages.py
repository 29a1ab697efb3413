"""What crosses the border between event loop and engine thread: commands down, events up, all frozen values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx_mcp.core.ports import LoadedModel, PreparedModel
from mlx_mcp.core.sequence import Constraint, FinishReason, SamplingParams, TokenLogprobs
from mlx_mcp.errors import MlxMcpError


@dataclass(frozen=True)
class Waiting:
    """Queued behind `num_ahead` sequences."""

    num_ahead: int


@dataclass(frozen=True)
class Prefilled:
    """The prompt's first `num_tokens` tokens are computed."""

    num_tokens: int


@dataclass(frozen=True)
class Token:
    """The next token of the answer."""

    token_id: int
    logprobs: TokenLogprobs | None = None  # if it was asked for


@dataclass(frozen=True)
class Finished:
    """The sequence ended on its own; its row is free."""

    reason: FinishReason


@dataclass(frozen=True)
class Failed:
    """The sequence or the load broke; its row is free."""

    error: MlxMcpError


@dataclass(frozen=True)
class Unloaded:
    """The model that the sequence asked for is not in memory (any more); load it and submit again."""


@dataclass(frozen=True)
class Loading:
    """The model's weights are `share` (0 to 1) read."""

    share: float


@dataclass(frozen=True)
class Loaded:
    """The model is ready."""

    model: LoadedModel


Event = Waiting | Prefilled | Token | Finished | Failed | Unloaded | Loading | Loaded

# Called on the engine thread; must not block. False means that nobody listens any more.
Sink = Callable[[Event], bool]


@dataclass(frozen=True)
class Find:
    """Ask for a model that may be in memory: `Loaded` or `Unloaded` comes back."""

    name: str
    sink: Sink


@dataclass(frozen=True)
class Load:
    """Read a prepared model's weights; whoever asks for one that is being read waits for the same reading."""

    prepared: PreparedModel
    sink: Sink


@dataclass(frozen=True)
class Submit:
    """Generate: events go to `sink` until Finished, Failed or Unloaded.

    Sessions take turns; a call without one counts as its own. The constraint is the engine's from here on.
    """

    sequence_id: int
    model: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    sink: Sink
    session: str = ""
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Cancel:
    """Drop a sequence and free its row before the next step; unknown ids are ignored."""

    sequence_id: int


@dataclass(frozen=True)
class Stop:
    """End the thread."""


Command = Find | Load | Submit | Cancel | Stop
