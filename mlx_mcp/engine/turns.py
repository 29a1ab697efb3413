"""Generations, from their arrival to their end, and the turns that sessions take. Engine thread only.

A generation is begun from the beginning each time that what it waited for is there: its session's tokens, another turn
of the session, or its prompt, encoded again. In a session the first that came has the first turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from weakref import WeakValueDictionary

from mlx_mcp.core.cache.misses import Miss, MissReason
from mlx_mcp.core.ports import LoadedModel
from mlx_mcp.core.scheduler import RETRY_AFTER_S
from mlx_mcp.core.sequence import FinishReason, Sequence
from mlx_mcp.core.session import Session, SessionStore
from mlx_mcp.engine.awaited import Encoding, Reloading, TurnOf
from mlx_mcp.engine.call import Call, Calls
from mlx_mcp.engine.messages import EncodeAgain, Encoded, Event, Failed, Finished, Submit, Waiting
from mlx_mcp.engine.persistence import Persistence
from mlx_mcp.engine.residents import Resident
from mlx_mcp.engine.swapping import Swapping
from mlx_mcp.errors import (
    CapacityError,
    GenerationFailed,
    InvalidRequest,
    MlxMcpError,
    OtherTokenizer,
    PromptTooLong,
    RequestTooLarge,
    SessionBusy,
    UnknownSession,
)

logger = logging.getLogger(__name__)

MAX_QUEUE = 64  # turns that wait for one session


class Turns:
    """Begins generations, and ends them with everything that they hold."""

    def __init__(
        self,
        calls: Calls,
        sessions: SessionStore,
        swapping: Swapping,
        persistence: Persistence | None,
        clock: Callable[[], float],
        share_prefixes: bool,
    ) -> None:
        self.calls, self.sessions, self.swapping = calls, sessions, swapping
        self.persistence, self.clock, self.share_prefixes = persistence, clock, share_prefixes
        # Call id of a session's latest turn that ended → the session: its caller may want it shorter yet.
        self.latest: WeakValueDictionary[int, Session] = WeakValueDictionary()
        self.num_prompt = self.num_cached = self.num_restored = 0

    def begin(self, call: Call) -> None:
        """Give a generation to the scheduler, or have it wait for what it lacks.

        Raises:
            MlxMcpError: it cannot be carried out; the call is still there.
        """
        command = call.submit
        resident = self.swapping.uses(call)
        if resident is None:
            self._encode_again(call, loaded=False)
            return
        check_ids(command, resident.model)
        if not command.turn.session:
            self._add_row(call, resident, command, None, command.prompt_ids, 0)
            return
        session = self.sessions.get(command.turn.tenant, command.turn.session)
        if not self._wait_for_session(call, session, resident.model):
            prompt = session.log + command.prompt_ids
            command = self._fitted(command, len(prompt), resident.model.context_tokens)
            self._add_row(call, resident, command, session, prompt, session.num_kept)

    def begin_or_fail(self, call: Call) -> None:
        """Begin a generation; if it cannot be carried out, its caller is told why."""
        try:
            self.begin(call)
        except MlxMcpError as error:
            self.fail(call, error)

    def encoded(self, command: Encoded) -> None:
        """Go on with a call whose prompt was encoded again."""
        for call in self.calls.wake(Encoding(command.call_id)) + self.calls.wake(Reloading(command.call_id)):
            call.request = replace(
                call.submit,
                prompt_ids=command.prompt_ids,
                params=command.params,
                constraint=command.constraint,
                turn=replace(call.submit.turn, after=command.after),
                hold=command.hold,
            )
            self.begin_or_fail(call)

    def finish(self, call_id: int, num_output: int) -> None:
        """End a generation after its first tokens; the step that may be under way computes its row once for nothing."""
        call = self.calls.get(call_id)
        if call is None:  # it ended on its own before its caller had read so far
            session = self.latest.get(call_id)
            if session is not None and session.turn is None and self.sessions.is_open(session):
                end = session.latest[1] + num_output
                if session.latest[0] == call_id and end < len(session.log):
                    self.sessions.shorten(session, end)
            return
        if call.sequence is None:
            return
        sequence, resident = call.row
        known = sequence.num_computed
        del sequence.output_ids[num_output:]
        sequence.num_computed, sequence.finish_reason = min(known, sequence.num_tokens), FinishReason.STOP
        self.commit(call, exact=sequence.num_computed == known)
        resident.scheduler.remove(sequence)
        self.end(call)

    def commit(self, call: Call, exact: bool = True) -> None:
        """Have the cache, and its session, keep what has come of a generation that is about to give up its row.

        `exact` is whether the row ends where the sequence does.
        """
        (sequence, resident), turn, session, leaf = call.row, call.submit.turn, call.session, None
        cache = resident.scheduler.cache
        if turn.context:
            sequence.output_ids.clear()
        if cache is not None and sequence.slot is not None:
            cut = partial(resident.model.runner.cut, sequence.sequence_id)
            try:
                leaf = cache.finish(sequence, cut, exact)
            except Exception:  # what is not cached is computed again
                logger.exception("the end of a sequence could not be cached")
        if session is not None:
            log, after = sequence.tokens(0, sequence.num_tokens), turn.context or "assistant"
            self.sessions.finish(session, log, leaf, after, turn.origin)
            self.latest.pop(session.latest[0], None)
            self.latest[call.call_id] = session
            session.latest = call.call_id, len(sequence.prompt_ids)
            session.fingerprint = resident.model.fingerprint
            session.tokenizer = resident.model.tokenizer

    def end(self, call: Call) -> None:
        """Free a finished generation's row, and tell its caller; the next turn of its session begins."""
        (sequence, resident), session = call.row, call.session
        self.calls.end(call)
        resident.model.runner.release(call.call_id)
        self.num_prompt += len(sequence.prompt_ids)
        self.num_cached += sequence.num_cached
        self.num_restored += sequence.num_restored
        assert sequence.finish_reason is not None, "it has not finished"
        self.calls.emit(call.call_id, Finished(sequence.finish_reason, None if session is None else session.info))
        if session is not None:
            self._next_turn(session)

    def drop(self, call: Call) -> None:
        """End a call of any kind without a word, and give back what it holds; its session stays as it was."""
        self.calls.end(call)
        if call.sequence is not None:
            sequence, resident = call.row
            resident.scheduler.remove(sequence)
            resident.model.runner.release(call.call_id)
        if call.session is not None and self.sessions.is_open(call.session):
            self.sessions.abandon(call.session)
            self._next_turn(call.session)

    def fail(self, call: Call, error: MlxMcpError) -> None:
        """End a call of any kind with an error, and give back what it holds."""
        self.drop(call)
        self.calls.emit(call.call_id, Failed(error))

    def fail_row(self, call: Call, cause: str) -> None:
        """End a generation whose row could not be computed."""
        self.fail(call, GenerationFailed(f"The generation failed: {cause.rstrip('.')}. Try again."))

    def tell(self, call: Call, event: Event) -> None:
        """Tell a generation's caller; if nobody listens any more, it ends."""
        if not self.calls.emit(call.call_id, event):
            self.drop(call)

    def close(self, session: Session) -> None:
        """End a session and its turns."""
        self.sessions.close(session)
        calls = self.calls.wake(TurnOf(session.session_id))
        turn = None if session.turn is None else self.calls.get(session.turn)
        if turn is not None:
            calls.append(turn)
        for call in calls:
            self.fail(call, UnknownSession(session.session_id))

    # Within

    def _encode_again(self, call: Call, loaded: bool) -> None:
        self.calls.wait(call, Encoding(call.call_id) if loaded else Reloading(call.call_id))
        self.tell(call, EncodeAgain(loaded))

    def _wait_for_session(self, call: Call, session: Session, model: LoadedModel) -> bool:
        """Have a turn wait if it cannot begin now; returns whether it waits.

        Raises:
            SessionBusy: another turn goes on with the session.
            CapacityError: too many turns wait for it.
            InvalidRequest: the session is another model's.
        """
        command, turn = call.submit, call.submit.turn
        if self._wait_for_tokens(call, session, model):
            return True
        if session.model != command.model:
            raise InvalidRequest(f"The session belongs to the model {session.model!r}; leave `model` out.")
        if session.turn not in (None, call.call_id) and (turn.keep or not session.log):
            if not turn.queue:
                raise SessionBusy(turn.session, first=not session.log)
            awaited = TurnOf(session.session_id)
            if self.calls.num_waiting(awaited) >= MAX_QUEUE:
                raise CapacityError(f"{MAX_QUEUE} turns wait for this session already.", RETRY_AFTER_S)
            self.calls.wait(call, awaited)
            self.tell(call, Waiting(self.calls.num_waiting(awaited), awaited))
            return True
        if session.after != turn.after:
            if turn.keep and session.turn is None:  # nobody overtakes it meanwhile
                self.sessions.begin(session, call.call_id)
                call.session = session
            self._encode_again(call, loaded=True)
            return True
        return False

    def _wait_for_tokens(self, call: Call, session: Session, model: LoadedModel) -> bool:
        """Have a call wait if its session's tokens are not in memory; returns whether it waits.

        Raises:
            OtherTokenizer: they are not what the model's tokenizer would read.
        """
        if self.persistence is None:
            return False
        if session.on_disk_only:
            self.calls.wait(call, self.persistence.read(session))
            return True
        unverified = session.unverified
        if unverified is None:
            return False
        if model.fingerprint != unverified.fingerprint and model.tokenizer.digest != unverified.tokenizer:
            raise OtherTokenizer(session.session_id, model.name)
        if max(session.log, default=0) >= model.vocab_size:  # an import may say any: MLX reads foreign memory for them
            raise OtherTokenizer(session.session_id, model.name)
        session.unverified = None
        return False

    def _fitted(self, command: Submit, num_prompt: int, context_tokens: int) -> Submit:
        """A turn with as many tokens as its session leaves in the model's context.

        Raises:
            PromptTooLong: it leaves too few.
        """
        room, shorten = context_tokens - num_prompt, command.turn.shorten
        if shorten and 0 < room < command.params.max_tokens:
            return replace(command, params=replace(command.params, max_tokens=room))
        if command.params.max_tokens > room:
            raise PromptTooLong(num_prompt, None if shorten else command.params.max_tokens, context_tokens)
        return command

    def _add_row(
        self,
        call: Call,
        resident: Resident,
        command: Submit,
        session: Session | None,
        prompt: tuple[int, ...],
        num_kept: int,
    ) -> None:
        """Put a sequence in the queue of its model."""
        turn, scheduler = command.turn, resident.scheduler
        lane = command.lane or (session.session_id if session is not None and turn.keep else f"\0{call.call_id}")
        sequence = Sequence(
            call.call_id,
            prompt,
            command.params,
            resident.model.stop_ids,
            lane,
            "" if self.share_prefixes else turn.tenant,
            num_kept,
            group=command.group,
            principal=turn.tenant,
        )
        if scheduler.cache is None and (session is not None or turn.opens is not None):
            sequence.miss = Miss(MissReason.NOT_REUSABLE, 0, detail=resident.model.runner.layout.refused)
        if session is not None:
            sequence.ephemeral = session.options.ephemeral
            if session.fingerprint not in (b"", resident.model.fingerprint):
                sequence.other_model, sequence.num_kept = True, len(session.log)
        if turn.opens is not None:
            sequence.ephemeral = turn.opens.ephemeral
            call.session = self.sessions.open(turn.tenant, command.model, turn.opens, turn.tools, call.call_id)
        try:
            scheduler.add(sequence)
        except RequestTooLarge as error:
            if not turn.shorten or error.max_tokens <= 0:
                raise
            sequence.params = replace(command.params, max_tokens=error.max_tokens)
            scheduler.add(sequence)
        call.sequence, call.resident, call.since = sequence, resident, self.clock()
        if command.constraint is not None:
            resident.model.runner.constrain(call.call_id, command.constraint)
        if session is not None and turn.keep:
            self.sessions.begin(session, call.call_id)
            call.session = session
        elif session is not None:
            self.sessions.use(session)
        if self.persistence is not None:
            self.persistence.restoring.begin(call)
        self.tell(call, Waiting(scheduler.num_ahead(sequence)))

    def _next_turn(self, session: Session) -> None:
        """Let the first turn begin that waits for this one's end."""
        awaited = TurnOf(session.session_id)
        while session.turn is None and (call := self.calls.wake_first(awaited)) is not None:
            self.begin_or_fail(call)


def check_ids(command: Submit, model: LoadedModel) -> None:
    """Refuse tokens that the model does not have: MLX reads foreign memory for them, or dies.

    Raises:
        InvalidRequest: there are none at all, or the model's own tokenizer or logit_bias gave such ids.
    """
    if not command.prompt_ids:
        raise InvalidRequest("The prompt has no tokens. Say in `prompt` what the model should do.")
    last = model.vocab_size - 1
    beyond = next((i for i in command.prompt_ids if not 0 <= i <= last), None)
    if beyond is not None:
        raise InvalidRequest(
            f"The tokenizer of {model.name!r} gives the token id {beyond}, and the model's ids go up to {last}: its "
            "files do not belong together. Convert or download it again, or choose another model (list_models)."
        )
    biased = next((i for i, _ in command.params.logit_bias if not 0 <= i <= last), None)
    if biased is not None:
        raise InvalidRequest(f"logit_bias has token id {biased}; the ids of {model.name!r} go up to {last}.")
