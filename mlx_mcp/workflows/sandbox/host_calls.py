"""What a sandbox's programs can call beside Python: questions to the models, and texts that are remembered.

What prompts have in common always comes first in them, so that it is computed once. A function that was not called
right raises an exception in the program, whose message says how it is called.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.chat.message import Message
from mlx_mcp.errors import BudgetSpent, CapacityError, EngineDead, InvalidRequest, MlxMcpError, RequestError
from mlx_mcp.service.context import BREAK, Context
from mlx_mcp.service.generate import Options
from mlx_mcp.workflows.asking import Asker, Outcome, close_sessions
from mlx_mcp.workflows.sandbox.host_arguments import How, WrongCall, as_text, expect, how_of, texts
from mlx_mcp.workflows.sandbox.runtime import HostCall

SHARED = "schema=None, system='', max_tokens=None, temperature=None"
FUNCTIONS = {
    "llm_query": f"llm_query(prompt, text='', {SHARED}, over='')",
    "llm_query_batched": f"llm_query_batched(prompts, text='', {SHARED}, over='')",
    "llm_map": f"llm_map(instruction, items, {SHARED})",
    "llm_ask": f"llm_ask(text, questions, {SHARED})",
    "remember": "remember(text, name='', system='')",
    "submit": "submit(value)",
}
SINGLE_CALLS = 4  # so many questions one after the other earn a hint
SINGLE_HINT = (
    "The program asked {} questions one after the other. llm_query_batched(prompts), llm_map(instruction, items) and "
    "llm_ask(text, questions) ask them at once and compute what they have in common once, which is many times as fast."
)
MAX_TOLD = 5  # failures that are told; the others are counted


@dataclass(frozen=True)
class HostFunction:
    """A further function of a program: how it is called, in words, and what is done then."""

    usage: str
    call: Callable[..., Awaitable[Any]]


class Refused(Exception):
    """What a host function raises in the program: an exception of a built-in type."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type, self.message = type, message


class Submitted(Exception):
    """The program gave its answer, and ends."""


@dataclass(frozen=True)
class Failure:
    """A question that has no answer: None stands in its place in the list that the program got."""

    index: int
    error: str


@dataclass
class Said:
    """What a run has to say beside what its program printed."""

    failures: list[Failure] = field(default_factory=list)  # the first ones
    num_failed: int = 0
    num_cut: int = 0  # texts that max_tokens cut off
    num_single: int = 0  # the most single questions one after the other
    submitted: bool = False
    value: Any = None  # that was submitted

    @property
    def notes(self) -> list[str]:
        """Whole sentences for whoever wrote the program."""
        notes = []
        if self.num_single >= SINGLE_CALLS:
            notes.append(SINGLE_HINT.format(self.num_single))
        if self.num_cut:
            notes.append(f"Answers that max_tokens cut off: {self.num_cut}. Give more, or ask for shorter ones.")
        return notes


class HostCalls:
    """The functions of one run, and `more`. `remembered` are the sessions of the texts that the sandbox has, by key."""

    def __init__(
        self, asker: Asker, remembered: Mapping[str, str], more: Mapping[str, HostFunction] | None = None
    ) -> None:
        self.asker, self.said = asker, Said()
        self.remembered = dict(remembered)
        self.opened: set[str] = set()  # the sessions of the texts that were remembered in this run
        self._num_in_a_row = 0
        self._functions: dict[str, Callable[..., Awaitable[Any]]] = {
            name: getattr(self, f"_{name}") for name in FUNCTIONS
        }
        self._usages = dict(FUNCTIONS)
        for name, function in (more or {}).items():
            self._functions[name], self._usages[name] = function.call, function.usage

    async def answer(self, call: HostCall) -> Any:
        """The value of a host call.

        Raises:
            Refused: what the program is to be told instead.
            Submitted: the program is to end.
            EngineDead: the engine thread has ended.
        """
        function = self._functions.get(call.name)
        if function is None:
            raise Refused("NameError", f"There is no function {call.name!r}; there are {', '.join(self._usages)}.")
        self._num_in_a_row = self._num_in_a_row + 1 if call.name == "llm_query" else 0
        self.said.num_single = max(self.said.num_single, self._num_in_a_row)
        try:
            check_call(function, call)
            return await function(*call.args, **call.kwargs)
        except WrongCall as error:
            raise Refused("TypeError", f"{call.name}: {error}. Call it so: {self._usages[call.name]}.") from error
        except EngineDead:
            raise
        except MlxMcpError as error:
            raise refusal(error) from error

    async def _llm_query(
        self,
        prompt: str,
        text: str = "",
        schema: Any = None,
        system: str = "",
        max_tokens: Any = None,
        temperature: Any = None,
        over: str = "",
    ) -> Any:
        """The answer to one prompt, after the text."""
        how = how_of(schema, system, max_tokens, temperature)
        [answer] = await self._answers([expect("prompt", prompt, str)], text, over, how)
        return answer

    async def _llm_query_batched(
        self,
        prompts: list[str],
        text: str = "",
        schema: Any = None,
        system: str = "",
        max_tokens: Any = None,
        temperature: Any = None,
        over: str = "",
    ) -> list[Any]:
        """The answers to prompts, after the text that all of them are about."""
        how = how_of(schema, system, max_tokens, temperature)
        return await self._answers(texts("prompts", prompts), text, over, how)

    async def _llm_map(
        self,
        instruction: str,
        items: list[Any],
        schema: Any = None,
        system: str = "",
        max_tokens: Any = None,
        temperature: Any = None,
    ) -> list[Any]:
        """What the instruction gives for each item."""
        first, each = expect("instruction", instruction, str), expect("items", items, list, tuple)
        how = how_of(schema, system, max_tokens, temperature)
        return await self._answers([first + BREAK + as_text(item) for item in each], "", "", how)

    async def _llm_ask(
        self,
        text: str,
        questions: list[str],
        schema: Any = None,
        system: str = "",
        max_tokens: Any = None,
        temperature: Any = None,
    ) -> list[Any]:
        """The answers to questions about one text."""
        how = how_of(schema, system, max_tokens, temperature)
        return await self._answers(texts("questions", questions), text, "", how)

    async def _remember(self, text: str, name: str = "", system: str = "") -> str:
        """Have a text computed once and for all; returns what `over` takes."""
        key = expect("name", name, str) or f"text{len(self.remembered) + 1}"
        session = await self._opened(expect("text", text, str), expect("system", system, str))
        self.opened.add(session)
        self.remembered[key] = session
        return key

    async def _submit(self, value: Any) -> None:
        """Give the run's value, and end it."""
        self.said.submitted, self.said.value = True, value
        raise Submitted

    async def _opened(self, text: str, system: str) -> str:
        """The handle of a new session with a text in it."""
        context = Context(system, messages=(Message("user", text),))
        return (await self.asker.open(context, f"run-{secrets.token_hex(8)}")).session_id

    async def _answers(self, prompts: Sequence[str], text: str, over: str, how: How) -> list[Any]:
        """The answers to prompts about one text, or about one that is remembered."""
        text, session = expect("text", text, str), self._session(expect("over", over, str), how)
        self.asker.check(len(prompts))
        temporary = ""
        if text and not session and len(prompts) > 1:
            # Without a session of its own it is computed once too, but encoded anew for every prompt.
            with suppress(CapacityError):
                temporary = await self._opened(text, how.system)
        try:
            before = text + BREAK if text and not temporary else ""
            system = Message("system", how.system)
            said = [Message("user", before + prompt) for prompt in prompts]
            chats = [(system, each) if how.system and not temporary else (each,) for each in said]
            options = Options(session=session or temporary, keep=False, grammar=how.grammar, sampling=how.sampling)
            return self._values(await self.asker.ask(chats, options), how)
        finally:
            if temporary:
                await close_sessions(self.asker.service, self.asker.caller.tenant, {temporary})

    def _session(self, over: str, how: How) -> str:
        """The session of a text that is remembered.

        Raises:
            InvalidRequest: nothing is remembered under that key.
        """
        if not over:
            return ""
        if how.system:
            raise WrongCall("system comes before the text that is remembered: give it to remember, not here")
        if over not in self.remembered:
            known = ", ".join(map(repr, self.remembered)) or "nothing"
            raise InvalidRequest(f"{over[:80]!r} is not remembered, but {known}. Call remember(text, name) first.")
        return self.remembered[over]

    def _values(self, outcomes: Sequence[Outcome], how: How) -> list[Any]:
        """What the program gets: an answer that failed is None, unless all did.

        Raises:
            MlxMcpError: all of them failed; the error of the first.
        """
        values: list[Any] = []
        errors: list[tuple[int, MlxMcpError]] = []
        for index, outcome in enumerate(outcomes):
            try:
                value, cut = how.value(outcome)
            except MlxMcpError as error:
                errors.append((index, error))
                value, cut = None, False
            values.append(value)
            self.said.num_cut += cut
        if errors and len(errors) == len(outcomes):
            raise errors[0][1]
        self.said.num_failed += len(errors)
        room = MAX_TOLD - len(self.said.failures)
        self.said.failures += [Failure(index, str(error)) for index, error in errors[:room]]
        return values


def check_call(function: Callable[..., Any], call: HostCall) -> None:
    """See that a function can be called like this.

    Raises:
        WrongCall: it cannot.
    """
    try:
        inspect.signature(function).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise WrongCall(str(error)) from error


def refusal(error: MlxMcpError) -> Refused:
    """What the program is told of an error: a ValueError where it asked for something that cannot be."""
    asked_wrong = isinstance(error, RequestError) and not isinstance(error, BudgetSpent)
    return Refused("ValueError" if asked_wrong else "RuntimeError", str(error))
