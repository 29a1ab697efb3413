"""Who asked for the turns of a session, and when. Knows no text: a turn is known by where its tokens begin."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

MAX_ORIGINS = 512  # the latest turns of a session; of earlier ones nothing is known
MAX_WHO = 64  # characters
LATEST = 1e11  # a time that no clock shows, in the year 5138


@dataclass(frozen=True)
class Origin:
    """Who asked for a turn, and when."""

    who: str = ""  # what the client calls itself, and nobody has checked; empty if it does not say
    at: float = 0.0  # by the wall clock, in seconds since 1970
    begin: int = 0  # the number of the session's tokens before the turn

    @property
    def line(self) -> str:
        """The time in UTC, and who asked, as people read them."""
        told = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.at))
        return f"{told}, {self.who}" if self.who else told


UNKNOWN = Origin()


def with_turn(origins: tuple[Origin, ...], latest: Origin, begin: int) -> tuple[Origin, ...]:
    """The origins, with that of one more turn, which begins after so many tokens. No more than MAX_ORIGINS are kept."""
    return (*origins, replace(latest, begin=begin))[-MAX_ORIGINS:]


def called(*words: str) -> str:
    """What a client is called by these words: one line of printable characters, MAX_WHO of them at most."""
    said = " ".join(filter(None, words))
    return "".join(letter for letter in said if letter.isprintable())[:MAX_WHO].strip()


def is_sound(origins: tuple[Origin, ...], num_tokens: int) -> bool:
    """Whether origins that came from outside can be those of a session with so many tokens."""
    begins = [origin.begin for origin in origins]
    return (
        len(origins) <= MAX_ORIGINS
        and begins == sorted(set(begins))
        and all(0 <= begin < num_tokens for begin in begins)
        and all(0 <= origin.at < LATEST and origin.who == called(origin.who) for origin in origins)
    )
