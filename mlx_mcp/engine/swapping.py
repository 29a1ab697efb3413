"""Carries out what is asked about models: find, load, unload. Decides whose turn it is where there is not room for all.

Engine thread only. Loads that lack room wait in the table of calls, grouped by model; the model that has waited the
longest is first. It is loaded as soon as idle models leave it room. A model that never gets idle is closed to further
calls when the first in line has waited for `turn_s` and it has been in memory as long itself: the calls that it has
taken run to their end, and those that come meanwhile wait behind the others. So a call waits at most, for each model
before its own in the line and once more, `turn_s`, the longest answer under way and the time of one load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlx_mcp.core.ports import PreparedModel
from mlx_mcp.core.scheduler import RETRY_AFTER_S
from mlx_mcp.engine.awaited import ModelHeld, ModelLoading, ModelRoom
from mlx_mcp.engine.call import Call, Calls
from mlx_mcp.engine.messages import Failed, Find, Load, Loaded, Loading, Unload, Unloaded, Waiting
from mlx_mcp.engine.residents import Resident, Residents
from mlx_mcp.errors import CapacityError, ModelBusy
from mlx_mcp.stats import LONG_BOUNDS_S, Histogram

logger = logging.getLogger(__name__)


@dataclass
class Wanted:
    """A model in the line for room."""

    prepared: PreparedModel
    since: float
    restore: bool = False  # it was loaded because a user asked for that, and had to go for a model that then failed


class Swapping:
    """The line of models that wait for room, and the models that calls use."""

    def __init__(self, calls: Calls, models: Residents, clock: Callable[[], float], turn_s: float) -> None:
        self.calls, self.models, self.clock, self.turn_s = calls, models, clock, turn_s
        self.line: dict[str, Wanted] = {}  # by name, in the order in which they came
        self.num_loads = self.num_unloads = self.num_swaps = 0
        self.load_s = Histogram(LONG_BOUNDS_S)

    # What is asked

    def find(self, call: Call, command: Find) -> None:
        """Tell a caller whether a model is in memory and takes calls."""
        resident = self.models.by_name.get(command.name)
        if resident is None or resident.closing:
            self.calls.answer(call, Unloaded())
        else:
            self._hand_over(call, resident, command.hold)

    def load(self, call: Call, command: Load) -> None:
        """Load a model, or have the call wait until there is room for it.

        Raises:
            ModelError: there never is.
        """
        prepared = command.prepared
        name, resident = prepared.name, self.models.by_name.get(prepared.name)
        if resident is not None and not resident.closing:
            resident.asked_for |= command.asked_for
            self._hand_over(call, resident, command.hold)
            return
        if name in self.models.loads:
            self.models.loads[name].asked_for |= command.asked_for
            self.calls.wait(call, ModelLoading(name))
            return
        self.models.check_fits(prepared)
        self.line.setdefault(name, Wanted(prepared, self.clock()))
        self.calls.wait(call, ModelRoom(name))
        self.advance()
        if call.awaits == ModelRoom(name):
            self.calls.emit(call.call_id, self.waiting(name))

    def unload(self, call: Call, command: Unload) -> None:
        """Unload a model that no call uses, and that nobody waits for.

        Raises:
            ModelBusy: calls use it, or it is being loaded.
        """
        name, resident = command.name, self.models.by_name.get(command.name)
        if name in self.models.loads or name in self.line:
            raise ModelBusy(name, "it is being loaded")
        if resident is None:
            self.calls.answer(call, Unloaded())
            return
        if self._in_use(resident):
            raise ModelBusy(name, "calls run or wait for it")
        self._unload(name)
        self.calls.answer(call, Unloaded(resident.model.weights_bytes))
        self.advance()

    # What happens meanwhile

    def advance(self) -> None:
        """Let those first in line begin to load that there is room for; close models whose turn is over."""
        for resident in self.models.by_name.values():
            resident.closing = False
        self.models.limit_kv()
        while self.line:
            name, wanted = next(iter(self.line.items()))
            if name in self.models.by_name:  # it was to go, and need not any more
                del self.line[name]
                self._loaded(ModelRoom(name), self.models.by_name[name])
            elif not self.calls.num_waiting(ModelRoom(name)) and not wanted.restore:
                del self.line[name]
            elif not self._begin(wanted):
                return

    def read_slices(self) -> None:
        """Read one slice of every model that is being read, and tell those who wait for it."""
        for name, event in self.models.read_slices():
            if isinstance(event, Loading):  # it goes on even if nobody listens
                for call in self.calls.waiting_for(ModelLoading(name)):
                    self.calls.emit(call.call_id, event)
            elif isinstance(event, Loaded):
                self.num_loads += 1
                self.load_s.observe(self.clock() - self.models.by_name[name].began_at)
                self._loaded(ModelLoading(name), self.models.by_name[name])
            else:
                self._failed(name, event)

    def check_time(self, now: float) -> None:
        """Unload what nobody has used for as long as its user said."""
        for resident in list(self.models.by_name.values()):
            if self._in_use(resident):
                resident.used_at = now
            elif resident.expires_at is not None and now >= resident.expires_at:
                self._unload(resident.model.name)
        if self.models.loads:  # whoever waits behind a load waits for something that makes progress
            for name in self.line:
                for call in self.calls.waiting_for(ModelRoom(name)):
                    call.since = now

    def clear(self) -> None:
        """Unload every model, and forget the line."""
        self.line.clear()
        self.models.clear()

    def waiting(self, name: str) -> Waiting:
        """What a call is told that waits for room for a model."""
        ahead = 0
        for other in self.line:
            if other == name:
                break
            ahead += self.calls.num_waiting(ModelRoom(other))
        busy = tuple(self.models.loads) or tuple(self.models.by_name)
        return Waiting(ahead, ModelRoom(name, busy))

    def too_long(self, call: Call, now: float) -> CapacityError:
        """What a call is told that has waited for room too long."""
        assert isinstance(call.awaits, ModelRoom), f"call {call.call_id} waits for no room"
        others = ", ".join(map(repr, self.models.by_name))
        return CapacityError(
            f"The call waited {now - call.since:.0f} s for room for {call.awaits.name!r}, while calls of {others} ran. "
            "Call later, use a model that is loaded, or have the server started with a larger max_weights_bytes.",
            RETRY_AFTER_S,
        )

    def uses(self, call: Call) -> Resident | None:
        """The model that a generation runs on from its arrival to its end; None if it has to be loaded first.

        A model that is closed takes only calls whose callers hold it, which they need not any more then.
        """
        submit = call.submit
        resident, held = self.models.use(submit.model, self.clock()), self.calls.get(submit.hold)
        holds = held is not None and held.awaits == ModelHeld(submit.model)
        if resident is not None and (holds or not resident.closing):
            call.uses = resident
        if held is not None and holds:
            self.calls.end(held)
        return call.uses

    def check_integrity(self) -> None:
        """Prove that calls use models that are there, and wait in the line for models that are not."""
        for call in self.calls:
            assert call.uses is None or self.models.by_name.get(call.submit.model) is call.uses, "its model is gone"
            match call.awaits:
                case ModelHeld(name):
                    assert name in self.models.by_name, f"{name!r} is held and not there"
                case ModelRoom(name):
                    assert name in self.line, f"nobody looks for room for {name!r}"
                case ModelLoading(name):
                    assert name in self.models.loads, f"{name!r} is not being read"

    # Within

    def _begin(self, wanted: Wanted) -> bool:
        """Begin to load a model, and unload idle ones for it if need be; returns False if it has to wait."""
        residents, now, name = self.models, self.clock(), wanted.prepared.name
        lacking = residents.lacking_bytes(wanted.prepared)
        goes: list[Resident] = []
        for resident in residents.by_name.values():  # least recently used first
            if lacking > 0 and not (resident.pinned or self._in_use(resident)):
                goes.append(resident)
                lacking -= resident.model.weights_bytes
        if (lacking > 0 or goes) and not self.calls.num_waiting(ModelRoom(name)):
            del self.line[name]  # others have the room by now, and nobody calls it
            return True
        if lacking <= 0:  # there is room for the weights, if keys and values leave it too
            lacking = residents.limit_kv(wanted.prepared, goes)
        if lacking > 0:
            if now - wanted.since >= self.turn_s:
                close((r for r in residents.by_name.values() if r not in goes), lacking, now - self.turn_s)
            return False
        for resident in goes:
            self._unload(resident.model.name)
        self.num_swaps += len(goes)
        del self.line[name]
        calls = self.calls.wake(ModelRoom(name))
        asked_for = wanted.restore or any(isinstance(c.request, Load) and c.request.asked_for for c in calls)
        residents.begin_load(wanted.prepared, asked_for, [r.prepared for r in goes if r.asked_for], now)
        for call in calls:
            self.calls.wait(call, ModelLoading(name))
        return True

    def _loaded(self, awaited: ModelLoading | ModelRoom, resident: Resident) -> None:
        resident.since = resident.used_at = self.clock()
        for call in self.calls.wake(awaited):
            assert isinstance(call.request, Load), f"{call.request} waits for a load"
            self._hand_over(call, resident, call.request.hold)

    def _unload(self, name: str) -> None:
        self.models.unload(name)
        self.num_unloads += 1

    def _failed(self, name: str, event: Failed) -> None:
        """Tell those who wait for a model that it cannot be loaded, and look for room for what went for it."""
        pending = self.models.loads.pop(name)
        waiting = self.calls.wake(ModelLoading(name))
        if not waiting:
            logger.warning("a model could not be loaded: %s", event.error)
        for call in waiting:
            self.calls.answer(call, event)
        for prepared in pending.unloaded:
            self.line.setdefault(prepared.name, Wanted(prepared, self.clock())).restore = True
        self.advance()

    def _hand_over(self, call: Call, resident: Resident, hold: bool) -> None:
        if hold:  # even if nobody listens: who knows the model already only wants it to stay
            self.calls.wait(call, ModelHeld(resident.model.name))
            self.calls.emit(call.call_id, Loaded(resident.model))
        else:
            self.calls.answer(call, Loaded(resident.model))

    def _in_use(self, resident: Resident) -> bool:
        """Whether calls run on a model, have been taken for it, or are being encoded for it."""
        if resident.has_work or self.calls.num_waiting(ModelHeld(resident.model.name)):
            return True
        return any(call.uses is resident for call in self.calls)


def close(residents: Iterable[Resident], lacking: float, loaded_before: float) -> None:
    """Close models until enough room comes free: of those that had their turn, the ones loaded first."""
    for resident in sorted(residents, key=lambda each: each.since):
        if lacking > 0 and not resident.pinned and resident.since <= loaded_before:
            resident.closing = True
            lacking -= resident.model.weights_bytes
