"""Who hears of which call, where there is no thread that knows it."""

import itertools
from collections.abc import Callable

from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.messages import Event
from mlx_mcp.engine.worker import Sink


class Listeners:
    """Takes an engine's events, and hands each to the sink of its call."""

    def __init__(self) -> None:
        self.sinks: dict[int, Sink] = {}
        self.ids = itertools.count(1_000_000)  # beyond those that tests count themselves

    def __call__(self, call_id: int, event: Event) -> bool:
        sink = self.sinks.get(call_id)
        return sink is None or sink(event)


def hear(engine: Engine, sink: Callable[[Event], bool], call_id: int | None = None) -> int:
    """Have a call's events go to a sink; returns its id, a new one if none is given."""
    listeners = engine.calls.emit
    if not isinstance(listeners, Listeners):
        listeners = Listeners()
        engine.tell(listeners)
    if call_id is None:
        call_id = next(listeners.ids)
    listeners.sinks[call_id] = sink
    return call_id
