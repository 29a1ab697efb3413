"""Contexts that a user has named in the settings: sessions that are there without a call having made them.

They are computed once their model has answered its first call or was loaded by name, or when a call names one of them.
Each tenant has its own, since tenants share no keys and values. One that was closed or has expired is made again when
it is named.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlx_mcp.core.session import SessionOptions
from mlx_mcp.errors import MlxMcpError
from mlx_mcp.service.activity import Meter
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.limits import Limiter

if TYPE_CHECKING:
    from mlx_mcp.service.service import Service

logger = logging.getLogger(__name__)

TELL_S = 1.0
WHO = "warm context"  # by whom its first turn is said to be asked for

# What makes a session of a context: service.sessions.create_session, which is above this file.
Create = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class WarmContext:
    """A context that is to be warm, as a session of this name."""

    name: str
    context: Context
    model: str = ""  # the default one if empty
    pinned: bool = True


@dataclass
class Warm:
    """The warm contexts of a process, and the work on them."""

    contexts: tuple[WarmContext, ...] = ()
    files: FileReader = field(default_factory=lambda: FileReader((), 0, 0))
    create: Create | None = None
    _tasks: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)  # by tenant and name

    def begin(self, service: Service, caller: Caller, model: str) -> None:
        """Have the contexts of a model that is in memory computed, each once; nobody waits for them."""
        for warm in self.contexts:
            if (caller.tenant, warm.name) not in self._tasks:
                spec = service.registry.at_hand(warm.model or None)
                if model == (warm.model if spec is None else spec.name):
                    self._start(service, caller, warm)

    async def ready(
        self, service: Service, caller: Caller, session: str, waiting: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Have a session there that a call is about to name, if that is a warm context.

        Awaits `waiting` about once a second until then.

        Raises:
            MlxMcpError: it cannot be computed; see create_session.
        """
        warm = next((warm for warm in self.contexts if warm.name == session), None)
        if warm is None:
            return
        task = self._tasks.get((caller.tenant, session))
        if task is None or (task.done() and not self._is_there(service, caller, session)):
            task = self._start(service, caller, warm)
        while not (await asyncio.wait([task], timeout=TELL_S))[0]:  # if the caller is cancelled, it goes on
            if waiting is not None:
                await waiting()
        task.result()

    def _is_there(self, service: Service, caller: Caller, name: str) -> bool:
        infos = list(service.engine.thread.sessions.values())
        return any((info.tenant, info.name) == (caller.tenant, name) for info in infos)

    def _start(self, service: Service, caller: Caller, warm: WarmContext) -> asyncio.Task[None]:
        task = asyncio.create_task(self._prime(service, Caller(caller.tenant, files=self.files, who=WHO), warm))
        self._tasks[caller.tenant, warm.name] = task
        task.add_done_callback(log_failure)
        return task

    async def _prime(self, service: Service, caller: Caller, warm: WarmContext) -> None:
        assert self.create is not None, "contexts come with what makes sessions of them"
        if not self._is_there(service, caller, warm.name):
            options = SessionOptions(warm.name, pinned=warm.pinned)
            # The operator wants it there, so it is not counted to whoever calls first.
            await self.create(
                replace(service, limits=Limiter()), caller, warm.context, warm.model, (), options, unheard
            )


def log_failure(task: asyncio.Task[None]) -> None:
    """Log why a context could not be computed."""
    if not task.cancelled() and isinstance(error := task.exception(), MlxMcpError):
        logger.warning("a warm context could not be computed: %s", error)


async def unheard(meters: Sequence[Meter]) -> None:
    """Take a report of what nobody waits for."""
