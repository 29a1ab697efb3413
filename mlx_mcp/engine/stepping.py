"""Takes one step of one model: the scheduler chooses it, the runner computes it, and callers are told."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

from mlx_mcp.core.ports import StepResult
from mlx_mcp.core.sequence import FinishReason
from mlx_mcp.core.steps import Step
from mlx_mcp.engine.call import Call, Calls
from mlx_mcp.engine.messages import Prefilled, Token, Waiting
from mlx_mcp.engine.persistence import Persistence
from mlx_mcp.engine.residents import Resident
from mlx_mcp.engine.turns import Turns
from mlx_mcp.stats import BATCH_BOUNDS, WAIT_BOUNDS_S, Histogram

logger = logging.getLogger(__name__)


class Stepping:
    """Takes steps. An exception in a step fails the calls of that step and no others. Engine thread only."""

    def __init__(self, calls: Calls, turns: Turns, persistence: Persistence | None, clock: Callable[[], float]) -> None:
        self.calls, self.turns, self.persistence, self.clock = calls, turns, persistence, clock
        self.num_preemptions = self.num_computed = self.num_output = 0
        self.batch_rows, self.queue_s = Histogram(BATCH_BOUNDS), Histogram(WAIT_BOUNDS_S)

    def run(self, resident: Resident) -> bool:
        """Collect the tokens of the step in flight, or of the next one. The step after it may already run meanwhile.

        Returns whether there was anything to compute.
        """
        scheduler, runner = resident.scheduler, resident.model.runner
        step, flight = resident.step, resident.flight
        resident.step = resident.flight = None
        started = math.inf
        try:
            if step is None or flight is None:
                step = scheduler.schedule()
                self._tell_preempted(step.released)
                self._note_admitted(step)
                if not (step.rows or step.released):
                    return False
                started = self.clock()
                flight = runner.launch(step)
            if not any(runner.must_wait(call_id) for call_id in step.drawing):
                resident.step = scheduler.schedule_ahead(step)
            if resident.step is not None:
                resident.flight = runner.launch(resident.step)
            result = flight.collect()
            if started < math.inf:
                scheduler.measure(step, self.clock() - started)
            if self.persistence is not None and step.prefill and not step.decode and resident.step is None:
                self.persistence.restoring.measure_prefill(
                    sum(chunk.end - chunk.start for chunk in step.prefill), self.clock() - started
                )
        except Exception as error:  # MLX's, a model's or ours: it must not end the thread of all other rows
            self._fail(resident, step, error)
        else:
            self._commit(resident, step, result)
        return True

    def _fail(self, resident: Resident, step: Step | None, error: Exception) -> None:
        """Fail a step's sequences, drop everything computed, and have the other sequences computed again.

        Any row of the step may be the cause, and their tensors hold other rows too.
        """
        assert step is not None, "the scheduler broke"
        logger.exception("a step failed", exc_info=error)
        steps = [step] if resident.step is None else [step, resident.step]
        resident.step = resident.flight = None
        for call in self._calls(step.rows):
            self.turns.fail_row(call, repr(error))
        resident.scheduler.abandon(*steps)
        resident.model.runner.reset()

    def _tell_preempted(self, call_ids: tuple[int, ...]) -> None:
        """Tell the callers of preempted sequences that these wait."""
        self.num_preemptions += len(call_ids)
        for call in self._calls(call_ids):
            sequence, resident = call.row
            if sequence.slot is None:  # else it was admitted again already
                self.turns.tell(call, Waiting(resident.scheduler.num_ahead(sequence)))

    def _note_admitted(self, step: Step) -> None:
        """Note which calls got their rows, and how long they had waited for them."""
        for call in self._calls(admission.sequence_id for admission in step.admitted):
            if call.admitted_at is None:
                call.admitted_at = self.clock()
                self.queue_s.observe(call.admitted_at - call.arrived_at)

    def _commit(self, resident: Resident, step: Step, result: StepResult) -> None:
        cache = resident.scheduler.cache
        self.num_computed += sum(chunk.end - chunk.start for chunk in step.prefill)
        self.num_output += len(result.tokens)
        self.batch_rows.observe(len(step.rows))
        for call in self._calls(result.logits):
            if cache is not None and not call.submit.turn.context:
                cache.remember(call.row[0], result.logits[call.call_id])
        ended = self._calls(resident.scheduler.commit(step, result.tokens, result.payloads))
        for call in ended:
            self.turns.commit(call)
            resident.scheduler.remove(call.row[0])
        for call in self._calls(result.failed):
            if cache is not None:
                cache.forget_blocks(call.row[0])
            self.turns.fail_row(call, result.failed[call.call_id])
        for call in self._calls(step.prompting):
            sequence = call.row[0]
            if not sequence.num_preemptions:  # else the caller has heard it
                cached = sequence.num_cached, sequence.num_restored, sequence.miss
                self.turns.tell(call, Prefilled(sequence.num_computed, *cached, call.admitted_at))
        for call in self._calls(step.drawing):
            sequence, drawn = call.row[0], call.call_id in result.tokens and not call.submit.turn.context
            if drawn and sequence.finish_reason is not FinishReason.STOP:
                self.turns.tell(call, Token(sequence.output_ids[-1], result.logprobs.get(call.call_id)))
        for call in ended:
            if not call.ended:
                self.turns.end(call)

    def _calls(self, call_ids: Iterable[int]) -> list[Call]:
        """The calls of a step's rows that have not ended."""
        return [call for call_id in call_ids if (call := self.calls.get(call_id)) is not None]
