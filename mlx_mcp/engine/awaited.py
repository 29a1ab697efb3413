"""What a call may wait for, as values, with the words in which its caller is told.

To add a reason to wait, add a value here, have calls wait for it (`Calls.wait`), and wake them (`Calls.wake`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar


class CallState(StrEnum):
    """The states of a call."""

    ARRIVED = "arrived"
    AWAITS_STORE = "awaits store"
    AWAITS_SESSION = "awaits session"
    AWAITS_TURN = "awaits turn"
    AWAITS_TOKENS = "awaits tokens"
    AWAITS_ROOM = "awaits room"
    AWAITS_MODEL = "awaits model"
    HOLDS_MODEL = "holds model"
    AWAITS_PREFIX = "awaits prefix"
    AWAITS_BLOCKS = "awaits blocks"
    AWAITS_MEMORY = "awaits memory"
    AWAITS_DISK = "awaits disk"
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


@dataclass(frozen=True)
class StoreOpening:
    """The store is being opened. Until then it is not known which sessions are on disk."""

    state: ClassVar[CallState] = CallState.AWAITS_STORE
    words: ClassVar[str] = "for the sessions on disk to be known"


@dataclass(frozen=True)
class SessionReading:
    """A session's tokens are being read from disk."""

    session_id: str
    state: ClassVar[CallState] = CallState.AWAITS_SESSION
    words: ClassVar[str] = "for its session to be read from disk"


@dataclass(frozen=True)
class VersionReading:
    """A version of a session is being read from disk for a fork."""

    call_id: int
    state: ClassVar[CallState] = CallState.AWAITS_SESSION
    words: ClassVar[str] = "for a version of its session to be read from disk"


@dataclass(frozen=True)
class TurnOf:
    """Another turn of the session is under way."""

    session_id: str
    state: ClassVar[CallState] = CallState.AWAITS_TURN
    words: ClassVar[str] = "for another turn of its session"


@dataclass(frozen=True)
class Encoding:
    """The caller encodes the prompt again, because its session ends with another role by now."""

    call_id: int
    state: ClassVar[CallState] = CallState.AWAITS_TOKENS
    words: ClassVar[str] = "for its prompt to be encoded again"


@dataclass(frozen=True)
class Reloading:
    """The caller has the model loaded again, which was unloaded, and encodes the prompt again."""

    call_id: int
    state: ClassVar[CallState] = CallState.AWAITS_MODEL
    words: ClassVar[str] = "for its model to be loaded again"


@dataclass(frozen=True)
class ModelLoading:
    """A model's weights are being read."""

    name: str
    state: ClassVar[CallState] = CallState.AWAITS_MODEL
    words: ClassVar[str] = "for a model that is being read"


@dataclass(frozen=True)
class ModelRoom:
    """Other models have the room that this one needs."""

    name: str
    busy: tuple[str, ...] = field(default=(), compare=False)  # those others, where that is told
    state: ClassVar[CallState] = CallState.AWAITS_ROOM

    @property
    def words(self) -> str:
        """The words, with the models that have the room."""
        return f"for {' and '.join(self.busy) or 'other models'} to make room for {self.name}"


@dataclass(frozen=True)
class ModelHeld:
    """The caller encodes a prompt for the model, which stays in memory until the caller cancels this."""

    name: str
    state: ClassVar[CallState] = CallState.HOLDS_MODEL
    words: ClassVar[str] = "for a prompt to be encoded for its model"


@dataclass(frozen=True)
class BlocksReading:
    """Keys and values are being read from disk."""

    number: int
    state: ClassVar[CallState] = CallState.AWAITS_BLOCKS
    words: ClassVar[str] = "for keys and values to be read from disk"


@dataclass(frozen=True)
class PrefixComputing:
    """Another call computes the next tokens of this one."""

    state: ClassVar[CallState] = CallState.AWAITS_PREFIX
    words: ClassVar[str] = "for a prefix that another call computes"


@dataclass(frozen=True)
class Place:
    """As many calls run as are allowed to run at once."""

    state: ClassVar[CallState] = CallState.AWAITS_MEMORY
    words: ClassVar[str] = "for a place in the batch"


@dataclass(frozen=True)
class Memory:
    """There is no room for the call's keys and values."""

    num_bytes: int
    state: ClassVar[CallState] = CallState.AWAITS_MEMORY

    @property
    def words(self) -> str:
        """The words, with the memory that it needs."""
        digits = 0 if self.num_bytes >= 10_000_000 else 1
        return f"for memory: needs {self.num_bytes / 1e6:.{digits}f} MB"


@dataclass(frozen=True)
class SessionWriting:
    """A session is being written to disk."""

    number: int
    state: ClassVar[CallState] = CallState.AWAITS_DISK
    words: ClassVar[str] = "for its session to be written to disk"


@dataclass(frozen=True)
class SessionsRemoving:
    """Sessions that were closed are being removed from disk."""

    call_id: int
    state: ClassVar[CallState] = CallState.AWAITS_DISK
    words: ClassVar[str] = "for its sessions to be removed from disk"


@dataclass(frozen=True)
class FileWork:
    """A user's command about sessions on disk is under way."""

    call_id: int
    state: ClassVar[CallState] = CallState.AWAITS_DISK
    words: ClassVar[str] = "for the disk"


Awaited = (
    StoreOpening
    | SessionReading
    | VersionReading
    | TurnOf
    | Encoding
    | Reloading
    | ModelLoading
    | ModelRoom
    | ModelHeld
    | BlocksReading
    | PrefixComputing
    | Place
    | Memory
    | SessionWriting
    | SessionsRemoving
    | FileWork
)
