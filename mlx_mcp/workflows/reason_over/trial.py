"""Whether a model can write programs: tried once for each model, with a sum, and remembered."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from mlx_mcp.errors import BudgetSpent, EngineDead, MlxMcpError, RequestError
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.asking import Budget, unheard
from mlx_mcp.workflows.reason_over.free import FreeRun
from mlx_mcp.workflows.reason_over.input import fill
from mlx_mcp.workflows.reason_over.question import Purse, Question, Stopped
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

PROBE = Question(
    "What is the sum of the numbers in `context`, one on each line, that are larger than 20?",
    {"type": "integer"},
    budget=Budget(calls=8, tokens=40_000, seconds=300.0),
    turns=3,
)
PROBE_TEXT, PROBE_SUM = "17\n25\n4\n63\n20\n31\n", 119


async def writes_programs(
    service: Service,
    caller: Caller,
    sandboxes: Sandboxes,
    model: str,
    context_tokens: int,
    purse: Purse,
    again: bool = False,
) -> bool:
    """Whether a model can work by programs, the default one for ""; it is tried if that is not known, or `again`.

    What only shows that there was no time or no room is not remembered. `purse` pays for the trial.

    Raises:
        EngineDead: the engine thread has ended.
    """
    key = await asyncio.to_thread(key_of, service, model)
    known = None if again else sandboxes.trials.known(key)
    if known is not None:
        return known
    own, clock = Purse(PROBE.budget), asyncio.get_running_loop().time
    ends = clock() + PROBE.budget.seconds
    try:
        sandbox = await sandboxes.create(service, caller, model=model, temporary=True)
        try:
            await fill(service, caller, sandboxes, sandbox, {"context": PROBE_TEXT})
            probe = replace(PROBE, model=model)
            answer = await FreeRun(service, caller, sandboxes, sandbox, probe, own, context_tokens, unheard).run()
        finally:
            purse.spend(own.counts)
            await sandboxes.close(service, caller.tenant, [sandbox])
    except EngineDead:
        raise
    except MlxMcpError as error:
        # Such as that its context is too short for what a model that writes programs is told.
        if isinstance(error, RequestError) and not isinstance(error, BudgetSpent):
            sandboxes.trials.note(key, False)
        return False
    can = answer.stopped is Stopped.SUBMITTED and answer.value == PROBE_SUM
    if can or clock() < ends:
        sandboxes.trials.note(key, can)
    return can


def key_of(service: Service, model: str) -> str:
    """What trials know a model by: its name, and the size of its weights, by which another of that name is another."""
    entry = service.registry.entry(service.registry.resolve(model or None))
    return f"{entry.spec.name} {entry.weights_bytes}"
