"""A model that writes programs until it has the answer.

Guarantees:
    - All turns are one session's: a turn computes what is new in it, and nothing of the turns before.
    - A run ends: with a valid answer, after so many programs or errors in a row, at a program that came before, or with
      its budget. Then the model is asked once for its best answer.
    - The sessions of a run are closed when it has ended, however it did.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import anyio

from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.errors import BudgetSpent, MlxMcpError, PromptTooLong, RequestTooLarge
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.service.sessions import fork_session
from mlx_mcp.service.values import Result, Sampling
from mlx_mcp.workflows.asking import Asker, Budget, close_sessions, unheard
from mlx_mcp.workflows.reason_over import replies
from mlx_mcp.workflows.reason_over.question import Answer, Purse, Question, Step, Stopped, Strategy, fault_of
from mlx_mcp.workflows.sandbox.host_calls import FUNCTIONS, HostFunction
from mlx_mcp.workflows.sandbox.runtime import Limits
from mlx_mcp.workflows.sandbox.sandbox import Program, Ran, Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

MAX_ERRORS = 3  # in a row
REPLY_TOKENS = 1_536
ANSWER_TOKENS = 1_024
LAST_S = 60.0  # what the last question for an answer may take where the time is used up

RunProgram = Callable[[Program, Budget, Report], Awaitable[Ran]]


@dataclass(frozen=True)
class Room:
    """How long replies may be, and texts for the models that programs ask."""

    reply_tokens: int
    chunk_chars: int


def room_of(context_tokens: int, prompt_tokens: int = 0) -> Room:
    """What a model's context allows: a third of what a prompt leaves for a reply, and three quarters for a text.

    A token counts as one character, which it is in the worst case: so there is room for a question beside the text.
    """
    left = max(0, context_tokens - prompt_tokens)
    return Room(max(64, min(REPLY_TOKENS, left // 3)), max(500, min(24_000, 3 * context_tokens // 4)))


class Stop(Exception):
    """A run has to end; the text says why, and goes on from "It was stopped:"."""


@dataclass(eq=False)
class FreeRun:
    """One run of a model over one sandbox."""

    service: Service
    caller: Caller
    sandboxes: Sandboxes
    sandbox: Sandbox
    question: Question
    purse: Purse
    context_tokens: int
    report: Report
    functions: Mapping[str, HostFunction] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    _prefix: str = field(default_factory=lambda: f"reason-{secrets.token_hex(8)}")
    _names: set[str] = field(default_factory=set)  # of the sessions
    _root: str = ""  # the session that every conversation begins after
    _session: str = ""  # the conversation
    _room: Room = field(init=False)

    async def run(self) -> Answer:
        """The answer; see the guarantees.

        Raises:
            MlxMcpError: the model cannot be asked at all, or the engine has ended.
        """
        try:
            await self._begin()
            try:
                value = await self._work()
            except Stop as stop:
                return await self._extracted(str(stop))
            return Answer(value, Stopped.SUBMITTED, Strategy.FREE, tuple(self.steps))
        finally:
            await self._close()

    async def _work(self) -> object:
        """Have programs written until one submits an answer that can be taken.

        Raises:
            Stop: it has to end before.
        """
        seen: set[str] = set()
        errors, latest = 0, replies.BEGIN
        for number in range(1, self.question.turns + 1):
            result = await self._turn(latest, number)
            reply = replies.read(result.text)
            if reply is None:
                latest = replies.CUT_OFF if result.finish_reason.value == "length" else replies.NO_CODE
                self.steps.append(Step(0, 0, "no program"))
                failed = True
            else:
                if reply.key in seen:
                    raise Stop("the model wrote the same program twice")
                seen.add(reply.key)
                before = self.sandbox.state.variables
                ran = await self._run(reply.code, number)
                fault = fault_of(ran.ended.value, self.question.schema) if ran.said.submitted else ""
                if ran.said.submitted and not fault and ran.ended.error is None:
                    return ran.ended.value
                turn = f"Program {number} of {self.question.turns}."
                latest = replies.told(ran, before, self.sandbox.state.variables, fault, turn)
                failed = ran.ended.error is not None or bool(fault)
            errors = errors + 1 if failed else 0
            if errors == MAX_ERRORS:
                raise Stop(f"{MAX_ERRORS} programs in a row failed")
        raise Stop(f"{self.question.turns} programs were run, as many as there may be")

    async def _run(self, code: str, number: int) -> Ran:
        async def report(meters: object) -> None:
            await self._tell(number, "its program runs")

        program = Program(code, functions=self.functions)
        if self.functions:  # it may wait for other programs
            async with self.sandboxes.places.nesting:
                ran = await self._run_in(program, report)
        else:
            ran = await self._run_in(program, report)
        self.purse.spend(ran.counts)
        error = "" if ran.ended.error is None else ran.ended.error.type
        self.steps.append(Step(ran.counts.calls, len(ran.output), error))
        return ran

    async def _run_in(self, program: Program, report: Report) -> Ran:
        return await self.sandboxes.run(
            self.service,
            self.caller,
            self.sandbox,
            program,
            Limits(),
            self.purse.left,
            report,
            self.question.model,
        )

    # The conversation

    async def _begin(self) -> None:
        """Compute what every turn comes after, in a session that stays as it is."""
        room = room_of(self.context_tokens)
        usages = (*FUNCTIONS.values(), *(function.usage for function in self.functions.values()))
        messages = (Message("user", replies.asked(self.question, self.sandbox.state.variables)),)
        context = Context(replies.rules(usages, room.chunk_chars), messages=messages)
        asker = Asker(self.service, self.caller, self.purse.left, self.report, self.question.model)
        info = await asker.open(context, self._name())
        self.purse.spend(asker.counts)
        self._root = info.session_id
        self._room = room_of(self.context_tokens, info.num_tokens)
        await self._fork()

    async def _fork(self) -> SessionInfo:
        """Begin a conversation after what all of them come after."""
        [info] = await fork_session(self.service, self.caller, self._root, None, (self._name(),), "")
        self._session = info.session_id
        return info

    async def _turn(self, prompt: str, number: int) -> Result:
        """The model's next reply; where there is no more room, in a new conversation that has the variables.

        Raises:
            Stop: the budget is used up.
            MlxMcpError: the model cannot be asked.
        """
        await self._tell(number, "the model writes its program")
        sampling = Sampling(max_tokens=self._room.reply_tokens)
        try:
            try:
                return await self._say(prompt, replies.REPLY, sampling, True, self.purse.left)
            except (PromptTooLong, RequestTooLarge):
                await self._fork()
                prompt = replies.compacted(self.sandbox.state.variables, len(self.steps), prompt)
                return await self._say(prompt, replies.REPLY, sampling, True, self.purse.left)
        except BudgetSpent as error:
            raise Stop(f"its budget is used up ({error})") from error

    async def _say(
        self, prompt: str, grammar: Grammar | None, sampling: Sampling, keep: bool, budget: Budget
    ) -> Result:
        """The model's answer to the next turn, which the conversation goes on with if it is to `keep` it."""
        asker = Asker(self.service, self.caller, budget, unheard)
        options = Options(session=self._session, keep=keep, grammar=grammar, sampling=sampling)
        [outcome] = await asker.ask([(Message("user", prompt),)], options)
        self.purse.spend(asker.counts)
        if isinstance(outcome, MlxMcpError):
            raise outcome
        return outcome

    async def _extracted(self, why: str) -> Answer:
        """The best answer that the model has without running more; none where it gives none."""
        schema, steps = self.question.schema, tuple(self.steps)
        grammar = None if schema is None else Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
        prompt, sampling = replies.EXTRACT.format(self.question.text), Sampling(max_tokens=ANSWER_TOKENS)
        left = self.purse.left
        budget = Budget(1, max(left.tokens, self.context_tokens), max(left.seconds, LAST_S))
        try:
            try:
                result = await self._say(prompt, grammar, sampling, False, budget)
            except (PromptTooLong, RequestTooLarge):
                await self._fork()
                prompt = replies.compacted(self.sandbox.state.variables, len(steps), prompt)
                sampling = Sampling(max_tokens=self._room.reply_tokens)
                result = await self._say(prompt, grammar, sampling, False, budget)
            value = result.text if schema is None else json.loads(result.text)
        except (MlxMcpError, ValueError) as error:
            return Answer(None, Stopped.LIMIT, Strategy.FREE, steps, f"{why}; nor was there an answer then ({error})")
        return Answer(value, Stopped.EXTRACTED, Strategy.FREE, steps, why)

    async def _tell(self, number: int, does: str) -> None:
        meter = Meter(done=number, line=f"program {number} of {self.question.turns}: {does}")
        await self.report([meter])

    def _name(self) -> str:
        """The name of the next session: by it the session can be closed even if its handle was never heard."""
        name = f"{self._prefix}-{len(self._names)}"
        self._names.add(name)
        return name

    async def _close(self) -> None:
        infos = [each for each in known_sessions(self.service).values() if each.tenant == self.caller.tenant]
        mine = [each.session_id for each in infos if each.name in self._names]
        with anyio.CancelScope(shield=True):
            await close_sessions(self.service, self.caller.tenant, mine)
