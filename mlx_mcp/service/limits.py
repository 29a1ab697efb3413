"""How much each principal may use: requests, tokens, calls at once, places in the queue, sessions, memory and disk.

Checked once, here, for every face. What is refused has cost nothing: everything is checked before anything is taken.
All of it runs on one event loop.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlx_mcp.core.session import SessionInfo
from mlx_mcp.engine.requests import Delta, Progress, Result, Update
from mlx_mcp.errors import InvalidRequest, RateLimited

FULL_RETRY_S = 1.0  # when one of the principal's own calls may have ended
KEPT_RETRY_S = 60.0  # what is kept goes when the principal gives it up, or when it expires
MINUTE_S = 60.0
ROUNDING = 1e-6


@dataclass(frozen=True)
class Limits:
    """What one principal may use; None for no limit.

    A request is what makes the server work: each prompt that is answered (a batch has as many as there are answers), a
    session made, forked or persisted, a prompt counted, a model loaded. Tokens are those that are computed: of prompts,
    without what was cached, and of answers. `waiting` are calls for which nothing has been computed yet.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    calls_at_once: int | None = None
    waiting: int | None = None
    sessions: int | None = None
    session_bytes: int | None = None  # keys and values of its sessions in memory; what sessions share counts once
    disk_bytes: int | None = None  # of what it has persisted; each session counts by itself


NO_LIMITS = Limits()


def unlimited(tenant: str) -> Limits:
    """No limits, whoever it is."""
    return NO_LIMITS


@dataclass
class Bucket:
    """What of a minute's amount is left. It fills up evenly, and may be overdrawn by what is known only afterwards."""

    level: float = math.inf
    since: float = 0.0  # as of when

    def fill(self, per_minute: int, now: float) -> float:
        """The level now."""
        self.level = min(per_minute, self.level + (now - self.since) * per_minute / MINUTE_S)
        self.since = now
        return self.level

    def is_full(self, per_minute: int | None, now: float) -> bool:
        """Whether it is as if nothing had ever been taken."""
        return per_minute is None or self.fill(per_minute, now) >= per_minute


@dataclass
class Account:
    """What a principal uses at the moment."""

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    num_calls: int = 0
    num_waiting: int = 0
    num_opening: int = 0  # sessions that are about to be made


class AdmittedCall:
    """One generation that was let in, and what it has used."""

    def __init__(self, account: Account) -> None:
        self._account, self._waits = account, True
        self._read_from: int | None = None  # the first token of the prompt that is computed for it
        self._read = self._used = 0
        account.num_calls += 1
        account.num_waiting += 1

    def take(self, update: Update) -> None:
        """Charge for what has been computed meanwhile."""
        used = 0
        if isinstance(update, Result):
            computed = update.prompt_tokens - update.cached_tokens - update.restored_tokens
            used = computed + update.completion_tokens
        elif isinstance(update, Delta):
            used = self._read + update.num_tokens
        elif isinstance(update, Progress) and update.phase == "prefill":
            self._read_from = update.done if self._read_from is None else self._read_from
            self._read = used = update.done - self._read_from
        else:
            return
        self._begin()
        self._account.tokens.level -= max(0, used - self._used)
        self._used = max(used, self._used)

    def end(self) -> None:
        """Give the call's place back."""
        self._begin()
        self._account.num_calls -= 1

    def _begin(self) -> None:
        if self._waits:
            self._waits = False
            self._account.num_waiting -= 1


class Limiter:
    """The limits of all principals of a process. `limits_of` says which hold for a principal now."""

    def __init__(
        self, limits_of: Callable[[str], Limits] = unlimited, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits_of, self._clock = limits_of, clock
        self._kept: Counter[str] = Counter()  # by tenant: what counts as a session, and is not the engine's
        self._accounts: dict[str, Account] = {}

    @contextmanager
    def calls(self, tenant: str, num: int = 1) -> Iterator[list[AdmittedCall]]:
        """Let generations in, all or none, which go on until the end of the block.

        Raises:
            RateLimited: they would be more than the principal may have now.
            InvalidRequest: they are more than it may ever have at once.
        """
        with self._account(tenant) as (account, limits):
            check_places("calls at once", "have them run", num, account.num_calls, limits.calls_at_once)
            check_places("calls that wait", "have them begin", num, account.num_waiting, limits.waiting)
            now = self._clock()
            if limits.tokens_per_minute is not None:
                level = account.tokens.fill(limits.tokens_per_minute, now)
                if level + ROUNDING < 1:
                    raise RateLimited(
                        f"You may have {limits.tokens_per_minute} tokens computed a minute, and have used "
                        f"{limits.tokens_per_minute - level:.0f} of late. Send less, or let more of it be cached.",
                        until_filled(1 - level, limits.tokens_per_minute),
                    )
            self._take_requests(account, limits, num, now)
            admitted = [AdmittedCall(account) for _ in range(num)]
            try:
                yield admitted
            finally:
                for call in admitted:
                    call.end()

    def request(self, tenant: str, num: int = 1) -> None:
        """Count requests that generate nothing.

        Raises:
            RateLimited: they are more than the principal may make now.
        """
        with self._account(tenant) as (account, limits):
            self._take_requests(account, limits, num, self._clock())

    def is_over(self, tenant: str) -> bool:
        """Whether the next request of the principal would be refused, since it has made as many as it may."""
        account, per_minute = self._accounts.get(tenant), self.limits_of(tenant).requests_per_minute
        if account is None or per_minute is None:
            return False
        return account.requests.fill(per_minute, self._clock()) + ROUNDING < 1

    @contextmanager
    def opening(self, tenant: str, num: int, sessions: Iterable[SessionInfo]) -> Iterator[None]:
        """Let sessions be made, which are among the `sessions` of all principals from the end of the block on.

        Raises:
            RateLimited: the principal would have too many.
        """
        with self._account(tenant) as (account, limits):
            if limits.sessions is not None:
                # Those without tokens are being made: they are among the others.
                made = sum(info.tenant == tenant and info.num_tokens > 0 for info in sessions)
                have = made + account.num_opening + self._kept[tenant]
                if have + num > limits.sessions:
                    raise RateLimited(
                        f"You have {have} sessions and sandboxes and may have {limits.sessions}, so {num} more cannot "
                        "be made. Close some that you no longer need (close_session).",
                        KEPT_RETRY_S,
                    )
            account.num_opening += num
            try:
                yield
            finally:
                account.num_opening -= num

    def keep(self, tenant: str, num: int) -> None:
        """Count so many sandboxes among the sessions of a principal from now on; fewer if it is negative."""
        self._kept[tenant] += num
        if not self._kept[tenant]:
            del self._kept[tenant]

    def weighs_memory(self, tenant: str) -> bool:
        """Whether `check_memory` needs to be asked for this principal."""
        return self.limits_of(tenant).session_bytes is not None

    def weighs_disk(self, tenant: str) -> bool:
        """Whether `check_disk` needs to be asked for this principal."""
        return self.limits_of(tenant).disk_bytes is not None

    def check_memory(self, tenant: str, held_bytes: int) -> None:
        """Check that the sessions of a principal may grow; they hold `held_bytes` of keys and values in memory.

        Raises:
            RateLimited: they may not.
        """
        limit = self.limits_of(tenant).session_bytes
        if limit is not None and held_bytes >= limit:
            raise RateLimited(
                f"Your sessions hold {held_bytes / 1e6:.1f} MB of keys and values and may hold {limit / 1e6:.1f} MB. "
                "Close some that you no longer need (close_session), or send prompts without a session.",
                KEPT_RETRY_S,
            )

    def check_disk(self, tenant: str, stored_bytes: int, more_bytes: int) -> None:
        """Check that a principal, which has `stored_bytes` on disk, may have `more_bytes` written there.

        Raises:
            RateLimited: it may not.
        """
        limit = self.limits_of(tenant).disk_bytes
        if limit is not None and stored_bytes + more_bytes > limit:
            raise RateLimited(
                f"What you have persisted takes {stored_bytes / 1e6:.1f} MB, this session {more_bytes / 1e6:.1f} MB "
                f"more, and you may have {limit / 1e6:.1f} MB on disk. Close some of it first (close_session).",
                KEPT_RETRY_S,
            )

    def _take_requests(self, account: Account, limits: Limits, num: int, now: float) -> None:
        per_minute = limits.requests_per_minute
        if per_minute is None:
            return
        if num > per_minute:
            raise InvalidRequest(f"These are {num} requests, and you may make {per_minute} a minute. Split the call.")
        level = account.requests.fill(per_minute, now)
        if level + ROUNDING < num:
            raise RateLimited(
                f"You may make {per_minute} requests a minute, and have made {per_minute - level:.0f} of late. Make "
                "fewer, or ask for more in each.",
                until_filled(num - level, per_minute),
            )
        account.requests.level -= num

    @contextmanager
    def _account(self, tenant: str) -> Iterator[tuple[Account, Limits]]:
        """A principal's account, which is forgotten once it is as good as new."""
        account, limits = self._accounts.setdefault(tenant, Account()), self.limits_of(tenant)
        try:
            yield account, limits
        finally:
            now = self._clock()
            if (
                account.num_calls == account.num_opening == 0
                and account.requests.is_full(limits.requests_per_minute, now)
                and account.tokens.is_full(limits.tokens_per_minute, now)
                and self._accounts.get(tenant) is account
            ):
                del self._accounts[tenant]


def until_filled(amount: float, per_minute: int) -> float:
    """How many seconds it takes until there is so much more, in tenths, and none too few."""
    return math.ceil(10 * amount * MINUTE_S / per_minute) / 10


def check_places(what: str, wait: str, num: int, have: int, limit: int | None) -> None:
    """Check that there may be so many more of something.

    Raises:
        RateLimited: there may be once others have gone.
        InvalidRequest: there may never be so many.
    """
    if limit is None or have + num <= limit:
        return
    if num > limit:
        raise InvalidRequest(f"These are {num} {what}, and you may have {limit}. Split the call.")
    raise RateLimited(
        f"You have {have} {what} and may have {limit}. Wait for some to end, and {wait} then.", FULL_RETRY_S
    )
