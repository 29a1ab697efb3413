"""The sandboxes of a process, by owner: made, found, run, forked, listed, closed, and which of them have a worker.

Guarantees:
    - An owner never sees another owner's sandboxes: a foreign handle and a missing one give the same error.
    - There are at most `max_workers` worker processes. A run waits for one (`places.py`). An idle sandbox gives its own
      up for it, and after `idle_s` without a run in any case; its state stays.
    - One run at a time goes on in a sandbox. Forks made meanwhile begin where its latest finished run ended.
    - Those that an earlier process kept on disk (`keeping.py`) are there from `ready` on.

One event loop uses it. Belongs to the process: connections share it, each with its own view of the service.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import anyio

from mlx_mcp.core.session import MAX_FORKS
from mlx_mcp.core.session_names import HANDLE_PREFIX as SESSION_PREFIX
from mlx_mcp.core.session_names import NAME
from mlx_mcp.errors import CapacityError, GenerationFailed, InvalidRequest, SandboxBusy, SandboxFailed, UnknownSandbox
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.workflows.asking import Asker, Budget, close_sessions, fork_all
from mlx_mcp.workflows.sandbox.host_calls import HostCalls
from mlx_mcp.workflows.sandbox.keeping import Keeping, adopt_all
from mlx_mcp.workflows.sandbox.places import Places
from mlx_mcp.workflows.sandbox.runtime import Limits, Runtime
from mlx_mcp.workflows.sandbox.sandbox import Program, Ran, Sandbox, State
from mlx_mcp.workflows.sandbox.trials import Trials

HANDLE_PREFIX = "x-"
MAX_WORKERS = 8
MAX_SANDBOXES = 1_024
MAX_STATE_BYTES = 2 << 30
IDLE_S = 600.0
TTL_S = 86_400.0
FULL_RETRY_S = 60.0
CLOSED = "The sandbox was closed while its program ran. Run it in another: call sandbox_run without `sandbox`."


@dataclass(frozen=True)
class SandboxInfo:
    """A snapshot of a sandbox."""

    sandbox_id: str
    name: str
    model: str
    parent_id: str
    busy: bool
    idle_s: float
    expires_in_s: float
    variables: dict[str, str]  # name → what it is, in a line
    remembered: tuple[str, ...]
    state_bytes: int
    persisted: bool
    versions: tuple[str, ...]


class Sandboxes:
    """All sandboxes of all owners. `open_runtime` is called for the first program that is run."""

    def __init__(
        self,
        open_runtime: Callable[[], Awaitable[Runtime]],
        keeping: Keeping | None = None,
        ttl_s: float = TTL_S,
        max_workers: int = MAX_WORKERS,
        max_sandboxes: int = MAX_SANDBOXES,
        max_state_bytes: int = MAX_STATE_BYTES,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
        trials: Trials | None = None,
    ) -> None:
        self.keeping, self.ttl_s, self.idle_s = keeping or Keeping(), ttl_s, idle_s
        self.places, self.max_sandboxes, self.max_state_bytes = Places(max_workers), max_sandboxes, max_state_bytes
        self._open_runtime, self._clock, self.trials = open_runtime, clock, trials or Trials()
        self._runtime: Runtime | None = None
        self._opening = asyncio.Lock()
        self._sandboxes: dict[str, Sandbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._adopting, self._adopted = asyncio.Lock(), False

    async def runtime(self) -> Runtime:
        """What starts workers.

        Raises:
            SandboxFailed: programs cannot be run here.
        """
        async with self._opening:
            if self._runtime is None:
                self._runtime = await self._open_runtime()
            return self._runtime

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self._sandboxes)

    @property
    def num_in_memory_only(self) -> int:
        """How many have a state that is not on disk."""
        return sum(not each.kept.unread and each.kept.state is not each.state for each in self._sandboxes.values())

    @property
    def num_workers(self) -> int:
        """How many have a worker."""
        return sum(each.worker is not None for each in self._sandboxes.values())

    # Made and found

    async def ready(self, service: Service) -> None:
        """Add the sandboxes that are on disk, once. Their time to live begins anew."""
        async with self._adopting:
            if self._adopted:
                return
            for adopted in adopt_all(await self.keeping.heads(), self._clock()):
                self._sandboxes[adopted.sandbox_id] = adopted
                service.limits.keep(adopted.owner, 1)
            self._adopted = True

    def all(self) -> list[Sandbox]:
        """Those of all owners, for the user whose process this is."""
        return list(self._sandboxes.values())

    async def create(
        self, service: Service, caller: Caller, name: str = "", model: str = "", temporary: bool = False
    ) -> Sandbox:
        """Make a sandbox without variables, whose programs ask a model; the default one if it has no name.

        A `temporary` one is closed by whoever makes it, and never written to disk.

        Raises:
            InvalidRequest: the name cannot be one, or is taken.
            UnknownModel: there is no such model.
            CapacityError: there are as many as there may be, or as the owner may have.
        """
        if model:
            await asyncio.to_thread(service.registry.resolve, model)
        await self.expire(service)
        [made] = self._add(service, caller.tenant, 1, (name,) if name else (), State(), model)
        made.kept.temporary = temporary
        return made

    def find(self, owner: str, sandbox: str) -> Sandbox | None:
        """The owner's sandbox of that handle or name; None if there is none."""
        found = self._sandboxes.get(sandbox)
        if found is None and sandbox:
            own = (each for each in self._sandboxes.values() if each.owner == owner)
            return next((each for each in own if each.name == sandbox), None)
        return found if found is not None and found.owner == owner else None

    def knows(self, owner: str, named: str) -> bool:
        """Whether a handle or name that could be a session's is a sandbox's: no session is named like its handles."""
        return named.startswith(HANDLE_PREFIX) or self.find(owner, named) is not None

    def of(self, owner: str) -> list[Sandbox]:
        """The owner's sandboxes."""
        return [each for each in self._sandboxes.values() if each.owner == owner]

    def get(self, owner: str, sandbox: str) -> Sandbox:
        """The owner's sandbox of that handle or name.

        Raises:
            UnknownSandbox: there is none.
        """
        found = self.find(owner, sandbox)
        if found is None:
            names = [each.name for each in self.of(owner)]
            raise UnknownSandbox(sandbox, names, self.keeping.was_damaged(owner, sandbox))
        return found

    def infos(self, owner: str) -> list[SandboxInfo]:
        """The owner's sandboxes, those used last first."""
        return [self.info(each) for each in sorted(self.of(owner), key=lambda each: each.used_at, reverse=True)]

    def info(self, sandbox: Sandbox) -> SandboxInfo:
        """A snapshot of a sandbox."""
        idle_s, state = self._clock() - sandbox.used_at, sandbox.state
        return SandboxInfo(
            sandbox.sandbox_id,
            sandbox.name,
            sandbox.model,
            sandbox.parent,
            sandbox.busy,
            idle_s,
            max(0.0, self._ttl_of(sandbox) - idle_s),
            dict(state.variables),
            tuple(state.remembered),
            state.nbytes,
            sandbox.kept.persisted,
            tuple(sorted(sandbox.kept.versions)),
        )

    async def fork(
        self, service: Service, caller: Caller, sandbox: str, count: int | None, names: Sequence[str], version: str = ""
    ) -> list[Sandbox]:
        """New sandboxes that begin where the latest finished run of another ended, and remember what it remembers.

        With a `version` they begin where the sandbox was when that was persisted.

        Raises:
            UnknownSandbox: there is none of that handle or name.
            UnknownVersion: it has no such version on disk.
            StorageError: what is on disk of it is damaged, or cannot be read.
            InvalidRequest: there are too many, or a name cannot be one, or is taken.
            CapacityError: there would be more than there may be, or than the owner may have.
            EngineDead: the engine thread has ended.
        """
        parent, num = self.get(caller.tenant, sandbox), count or len(names) or 1
        if names and len(names) != num:
            raise InvalidRequest(f"There are {len(names)} names for {num} forks; give one for each, or none.")
        if num > MAX_FORKS:
            raise InvalidRequest(f"count is {num}; it must be from 1 to {MAX_FORKS}.")
        parent.used_at = self._clock()
        await self.expire(service)
        state = await self.keeping.state_of(parent, version)
        own_state = replace(state, remembered={})  # what goes with a fork that fails must not be the parent's
        forks = self._add(service, caller.tenant, num, names, own_state, parent.model, parent.sandbox_id)
        remembered: list[dict[str, str]] = [{} for _ in forks]
        try:
            for key, session in state.remembered.items():
                with anyio.CancelScope(shield=True):  # who is cancelled meanwhile must know what to close
                    handles = await fork_all(service, caller, session, num)
                for own, handle in zip(remembered, handles, strict=True):
                    own[key] = handle
        except BaseException:
            await self._remove(service, forks)
            await close_sessions(service, caller.tenant, {each for own in remembered for each in own.values()})
            raise
        for fork, own in zip(forks, remembered, strict=True):
            fork.state = replace(state, remembered=own)
        return forks

    # Run

    async def run(
        self,
        service: Service,
        caller: Caller,
        sandbox: Sandbox,
        program: Program,
        limits: Limits,
        budget: Budget,
        report: Report,
        model: str = "",
    ) -> Ran:
        """Run a program in a sandbox, when there is a worker for it; `model` is asked in place of the sandbox's own.

        Raises:
            SandboxBusy: another run goes on with it.
            UnknownSandbox: it was closed.
            CapacityError: the states of all sandboxes take too much memory.
            GenerationFailed: it was closed meanwhile.
            MlxMcpError: programs cannot be run here, or the engine thread has ended.
        """
        runtime = await self.runtime()  # first: nothing may come between the look and the beginning
        self._check_bytes()
        if sandbox.closed:
            raise UnknownSandbox(sandbox.sandbox_id)
        if sandbox.busy:
            raise SandboxBusy(sandbox.name or sandbox.sandbox_id)
        with anyio.CancelScope() as scope:
            sandbox.running = scope
            try:
                if not self.places.are_there(caller.tenant):
                    await report([Meter(line=f"waiting: {self.places.why_not(caller.tenant)}")])
                async with self.places.one(caller.tenant):
                    await self._make_room(sandbox)
                    await self.keeping.read(sandbox)
                    asker = Asker(service, caller, budget, report, model or sandbox.model)
                    host = HostCalls(asker, sandbox.state.remembered, program.functions)
                    name = sandbox.name or f"{sandbox.sandbox_id[:8]}…"
                    with service.observer.workflow("sandbox_run", caller.tenant, name, lambda: asker.line):
                        ran = await sandbox.run(runtime, limits, program, host)
                    await self.keeping.ran(sandbox)
                    return ran
            finally:
                sandbox.running = None
                sandbox.used_at = self._clock()
                if sandbox.closed:
                    await self._remove(service, [sandbox])
                asyncio.get_running_loop().call_later(self.idle_s, self._look)
        raise GenerationFailed(CLOSED)

    # Ended

    async def close(self, service: Service, owner: str, sandboxes: Sequence[Sandbox]) -> None:
        """End sandboxes of an owner, and runs that go on in them; what they remember goes with them."""
        await self._remove(service, [each for each in sandboxes if each.owner == owner])

    async def expire(self, service: Service) -> None:
        """End the sandboxes that were not used for `ttl_s`."""
        now = self._clock()
        idle = (each for each in self._sandboxes.values() if not each.busy)
        await self._remove(service, [each for each in idle if now - each.used_at > self._ttl_of(each)])

    async def end(self) -> None:
        """End all workers, and save what has changed: the process is about to end."""
        await self.keeping.close(self.all())
        for sandbox in self._sandboxes.values():
            await sandbox.release()
        if self._runtime is not None:
            await self._runtime.close()

    # Beneath

    def _ttl_of(self, sandbox: Sandbox) -> float:
        return self.keeping.options.persisted_ttl_s if sandbox.kept.persisted else self.ttl_s

    def _add(
        self,
        service: Service,
        owner: str,
        num: int,
        names: Sequence[str],
        state: State,
        model: str,
        parent: str = "",
    ) -> list[Sandbox]:
        """Add sandboxes with one state, all or none."""
        self._check_names(service, owner, names)
        self._check_bytes()
        if self.num + num > self.max_sandboxes:
            raise CapacityError(
                f"There are {self.num} sandboxes, and may be {self.max_sandboxes}: close some (list_sessions shows "
                "them).",
                FULL_RETRY_S,
            )
        with service.limits.opening(owner, num, known_sessions(service).values()):
            service.limits.keep(owner, num)
        made = []
        for index in range(num):
            handle, name = HANDLE_PREFIX + secrets.token_urlsafe(16), names[index] if names else ""
            made.append(Sandbox(handle, owner, name, model, self._clock(), parent, state))
            self._sandboxes[handle] = made[-1]
        return made

    def _check_names(self, service: Service, owner: str, names: Sequence[str]) -> None:
        """See that new sandboxes may have these names.

        Raises:
            InvalidRequest: one of them cannot be a name, is there twice, or is taken by a sandbox or a session.
        """
        sessions = {info.name for info in list(known_sessions(service).values()) if info.tenant == owner}
        taken = sessions | {each.name for each in self.of(owner)}
        for name in names:
            if not NAME.fullmatch(name) or name.startswith((HANDLE_PREFIX, SESSION_PREFIX)):
                raise InvalidRequest(
                    f"{name[:80]!r} cannot be a sandbox's name: take 1 to 64 letters, digits, dots, dashes, "
                    f"underscores, and begin with neither {HANDLE_PREFIX} nor {SESSION_PREFIX}, as handles do."
                )
            if name in taken:
                raise InvalidRequest(
                    f"There is a sandbox or session named {name!r} already; close it, or take another name."
                )
            taken.add(name)

    def _check_bytes(self) -> None:
        """See that the states of all sandboxes take no more memory than they may; forks share theirs."""
        held = sum({id(each.state.dump): each.state.nbytes for each in self._sandboxes.values()}.values())
        if held > self.max_state_bytes:
            raise CapacityError(
                f"The variables of all sandboxes take {held / 1e6:.0f} MB, and may take "
                f"{self.max_state_bytes / 1e6:.0f} MB: close some (list_sessions shows them).",
                FULL_RETRY_S,
            )

    async def _make_room(self, sandbox: Sandbox) -> None:
        """See that one more sandbox can have a worker: the one whose latest run ended first gives its own up."""
        while sandbox.worker is None and self.num_workers >= self.places.num:
            idle = [each for each in self._sandboxes.values() if each.worker is not None and not each.busy]
            await min(idle, key=lambda each: each.used_at).release()

    def _look(self) -> None:
        """Have the workers released of sandboxes that are idle for long enough."""
        now = self._clock()
        for sandbox in self._sandboxes.values():
            if sandbox.worker is not None and not sandbox.busy and now - sandbox.used_at >= self.idle_s:
                task = asyncio.get_running_loop().create_task(sandbox.release())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _remove(self, service: Service, sandboxes: Sequence[Sandbox]) -> None:
        """Forget sandboxes at once; a run that goes on in one ends, and then does the rest."""
        for sandbox in sandboxes:
            sandbox.closed = True
            if self._sandboxes.pop(sandbox.sandbox_id, None) is not None:
                service.limits.keep(sandbox.owner, -1)
        for sandbox in sandboxes:
            if sandbox.running is not None:
                sandbox.running.cancel()
            else:
                await sandbox.release()
                await close_sessions(service, sandbox.owner, set(sandbox.state.remembered.values()))
                await self.keeping.remove(service, sandbox)


@asynccontextmanager
async def closing(sandboxes: Sandboxes) -> AsyncIterator[None]:
    """Have all workers ended at the end of the block, whoever is cancelled meanwhile."""
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await sandboxes.end()


async def no_runtime() -> Runtime:
    """What there is where nobody has said what runs programs.

    Raises:
        SandboxFailed: always.
    """
    raise SandboxFailed("This server was built without sandboxes. Give `build_server` those of the process.")
