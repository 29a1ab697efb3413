"""One step of one model: what the scheduler chose, the runner computes, and callers are told."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from mlx_mcp.core.ports import StepResult
from mlx_mcp.core.sequence import FinishReason, Sequence
from mlx_mcp.core.steps import Step
from mlx_mcp.engine.call import Calls
from mlx_mcp.engine.messages import Event, Prefilled, Token, Waiting
from mlx_mcp.engine.persistence import Persistence
from mlx_mcp.engine.residents import Resident
from mlx_mcp.engine.turns import Turns

logger = logging.getLogger(__name__)


class Stepping:
    """Takes steps; a step's exception fails the calls of that step and no others. Engine thread only."""

    def __init__(self, calls: Calls, turns: Turns, persistence: Persistence | None, clock: Callable[[], float]) -> None:
        self.calls, self.turns, self.persistence, self.clock = calls, turns, persistence, clock
        self.num_preemptions = 0

    def run(self, resident: Resident) -> bool:
        """Take the tokens of the step in flight, or of the next one; meanwhile the one after may already run.

        Returns whether there was anything to compute.
        """
        scheduler, runner = resident.scheduler, resident.model.runner
        step, flight = resident.step, resident.flight
        resident.step = resident.flight = None
        started = math.inf
        try:
            if step is None or flight is None:
                step = scheduler.schedule()
                self.num_preemptions += len(step.preempted)
                for sequence in step.preempted:
                    runner.release(sequence.sequence_id)
                    if sequence.slot is None:  # else it has a place again already
                        self._tell(sequence, Waiting(scheduler.num_ahead(sequence)))
                if not step.sequences:
                    return False
                started = self.clock()
                flight = runner.launch(step)
            if not any(runner.must_wait(sequence) for sequence in step.drawing):
                resident.step = scheduler.ahead(step)
            if resident.step is not None:
                resident.flight = runner.launch(resident.step)
            result = flight.collect()
            if self.persistence is not None and step.prefill and not step.decode and resident.step is None:
                self.persistence.restoring.computed(
                    sum(chunk.end - chunk.start for chunk in step.prefill), self.clock() - started
                )
        except Exception as error:
            self._fail(resident, step, error)
        else:
            self._commit(resident, step, result)
        return True

    def _fail(self, resident: Resident, step: Step | None, error: Exception) -> None:
        """Fail a step's sequences, drop everything computed, and have the other sequences computed again.

        The fault may lie with any row of the step, and their tensors hold other rows too.
        """
        assert step is not None, "the scheduler broke"
        logger.exception("a step failed", exc_info=error)
        steps = [step] if resident.step is None else [step, resident.step]
        resident.step = resident.flight = None
        for sequence in step.sequences:
            self.turns.fail_row(sequence.sequence_id, repr(error))
        resident.scheduler.abandon(*steps)
        resident.model.runner.reset()

    def _tell(self, sequence: Sequence, event: Event) -> None:
        call = self.calls.get(sequence.sequence_id)
        if call is not None:
            self.turns.tell(call, event)

    def _commit(self, resident: Resident, step: Step, result: StepResult) -> None:
        cache = resident.scheduler.cache
        for call_id, logits in result.logits.items():
            call = self.calls.get(call_id)
            if call is not None and cache is not None and not call.submit.turn.context:
                cache.remember(call.row[0], logits)
        finished = resident.scheduler.commit(step, result.tokens, result.payloads, self.turns.keep)
        for call_id, cause in result.failed.items():
            call = self.calls.get(call_id)
            if call is not None and cache is not None:
                cache.distrust(call.row[0])
            self.turns.fail_row(call_id, cause)
        for sequence in step.prompting:
            if not sequence.num_preemptions:  # else the caller has heard it
                self._tell(
                    sequence,
                    Prefilled(sequence.num_computed, sequence.num_cached, sequence.num_restored, sequence.miss),
                )
        for sequence in step.drawing:
            call = self.calls.get(sequence.sequence_id)
            if call is None or call.submit.turn.context or sequence.sequence_id not in result.tokens:
                continue
            if sequence.finish_reason is not FinishReason.STOP:
                token = Token(sequence.output_ids[-1], result.logprobs.get(sequence.sequence_id))
                self.turns.tell(call, token)
        for sequence in finished:
            call = self.calls.get(sequence.sequence_id)
            if call is not None:
                self.turns.end(call)
