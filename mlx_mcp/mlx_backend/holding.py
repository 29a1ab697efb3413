"""Makes the constraints of answers, out of what a call asks for and what the model's family writes; on any thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from mlx_mcp.chat.formats.format import CallSyntax, Format, Marks
from mlx_mcp.chat.formats.grammar import quoted
from mlx_mcp.chat.formats.messages import HARMONY
from mlx_mcp.chat.prompt import AUTO, NONE, REQUIRED, Grammar, GrammarKind, Holding, Prompt
from mlx_mcp.errors import CapacityError, InvalidRequest
from mlx_mcp.mlx_backend.call_grammar import GAP, CallGrammar, parameters
from mlx_mcp.mlx_backend.call_notation import MESSAGES, OFFERED, Notation, notation_of
from mlx_mcp.mlx_backend.chat_template import Chat, ChatTemplate
from mlx_mcp.mlx_backend.constraint import GrammarConstraint, Grammars
from mlx_mcp.mlx_backend.control_tokens import ControlTokens
from mlx_mcp.mlx_backend.held_answer import Calls, HeldAnswer, Thoughts, Tokens, course

# gpt-oss's thoughts are messages of a channel of their own, which another one follows.
ANALYSIS = (
    Marks("<|channel|>analysis<|message|>", "<|end|>"),
    Marks("<|start|>assistant<|channel|>analysis<|message|>", "<|end|>"),
)
FINAL, NEXT = "<|channel|>final<|message|>", "<|start|>assistant"


class Holdings:
    """Makes the constraints of one model's answers.

    `special` are the tokens that no text spells. `encode` encodes a text that follows another, and `text` has the text
    of a token.
    """

    def __init__(
        self,
        form: Format,
        grammars: Grammars,
        template: ChatTemplate,
        controls: ControlTokens,
        stop_ids: frozenset[int],
        special: frozenset[int],
        encode: Callable[[str], list[int]],
        text: Callable[[int], str],
    ) -> None:
        self._form, self._grammars, self._template, self._controls = form, grammars, template, controls
        self._special = special
        self._stop_ids, self._encode, self._text = stop_ids, cache(encode), cache(text)
        self._notation: Notation | None = None
        self._shown = False  # whether the notation was looked for
        self._refused: dict[str, InvalidRequest] = {}  # grammars that cannot be, by their sources

    def hold(
        self, prompt: Prompt, holding: Holding, vocab_size: int, gone: Callable[[], bool]
    ) -> HeldAnswer | GrammarConstraint | None:
        """The constraint of an answer to `prompt`; None if there is nothing to hold it to.

        Raises:
            InvalidRequest: a grammar is malformed or too large; or calls are required that cannot be held.
        """
        first, calls = None, None
        if holding.grammar is not None:
            first = self._grammars.compile(holding.grammar, vocab_size, gone)
            if not is_harmony(self._form) and not (holding.thinks and self._form.thoughts):
                return first
        elif holding.tools and holding.tool_choice != NONE:
            calls = self._calls(holding.tools, vocab_size, gone)
            if holding.tool_choice != AUTO:
                first = self._required(holding, vocab_size, gone)
        thoughts = self._thoughts(prompt, holding, is_call=holding.grammar is None and first is not None)
        if first is None and calls is None and holding.thinking_tokens is None:
            return None
        tokens = Tokens(vocab_size, self._stop_ids, self._text, self._encode)
        self._encode_ahead(thoughts)
        return HeldAnswer(course(tokens, thoughts, first, calls))

    @property
    def call_tokens(self) -> tuple[int, ...]:
        """See ChatTokenizer."""
        syntax = self._form.calls
        begins = (syntax.begin, *syntax.openers) if syntax is not None else ()
        return tuple(sorted({self._controls.ids[text] for text in begins if text in self._controls.ids}))

    def _thoughts(self, prompt: Prompt, holding: Holding, is_call: bool) -> Thoughts:
        budget = holding.thinking_tokens
        marks: tuple[Marks, ...]
        if is_harmony(self._form):
            marks = ANALYSIS if holding.thinks else ()
            lead, follow = ("", NEXT) if is_call else (FINAL, NEXT + FINAL)
            return Thoughts(marks, None, budget, follow, lead, again=True)
        marks = self._form.thoughts if holding.thinks else ()
        end = "".join(map(self._text, prompt.ids[-16:]))
        return Thoughts(marks, self._form.opened_thoughts(end) if prompt.reasoning else None, budget)

    def _encode_ahead(self, thoughts: Thoughts) -> None:
        """Encode all that may be forced: the engine thread does not wait for a tokenizer."""
        for text in (thoughts.lead, thoughts.follow, *(marks.begin for marks in thoughts.marks)):
            self._encode(text)
        for marks in {*thoughts.marks, *filter(None, [thoughts.opened])}:
            for written in range(len(marks.end) if thoughts.budget is not None else 0):
                self._encode(marks.end[written:] + thoughts.follow)

    def _calls(self, tools: tuple[dict[str, Any], ...], vocab_size: int, gone: Callable[[], bool]) -> Calls | None:
        """What holds calls to the tools that were offered, wherever they begin; None if nothing does."""
        notation = self._find_notation()
        if notation is None or not notation.opener:
            return None
        try:
            body = self._compile(lambda: self._grammar(notation).behind_opener(tools), vocab_size, gone)
        except (InvalidRequest, CapacityError):
            return None
        return Calls((notation.opener,), body.copy)

    def _required(self, holding: Holding, vocab_size: int, gone: Callable[[], bool]) -> GrammarConstraint:
        """What holds an answer to begin with a call.

        Raises:
            InvalidRequest: the chosen tool was not offered, or there is no grammar for the calls.
        """
        names = [tool["function"]["name"] for tool in holding.tools]
        if holding.tool_choice not in (REQUIRED, *names):
            raise InvalidRequest(
                f"There is no tool {holding.tool_choice[:80]!r}; `tool_choice` must be auto, none, required or one of: "
                f"{', '.join(names)[:400]}."
            )
        chosen = [tool for tool in holding.tools if holding.tool_choice in (REQUIRED, tool["function"]["name"])]
        gap, notation = holding.thinks and bool(self._form.thoughts), self._find_notation()
        if notation is not None:
            return self._compile(lambda: self._grammar(notation).whole(chosen, gap), vocab_size, gone)
        calls = self._form.calls
        if calls is not None and self._form.headers is None and calls.grammar(chosen) is not None:
            return self._compile(lambda: self._of_family(calls, chosen, gap), vocab_size, gone)
        raise InvalidRequest(
            "How this model writes calls is not known well enough to require one. Leave `tool_choice` at auto, or "
            "choose another model (list_models shows them)."
        )

    def _grammar(self, notation: Notation) -> CallGrammar:
        return CallGrammar(notation, self._controls, self._special)

    def _of_family(self, calls: CallSyntax, tools: Sequence[dict[str, Any]], gap: bool) -> str:
        """The grammar of a call as its family writes it, for a template that shows none.

        Raises:
            ValueError: a schema has something that would not be obeyed.
        """

        def spell(text: str) -> str:
            token_id = self._controls.ids.get(text)
            return f"<[{token_id}]>" if token_id in self._special else quoted(text)

        functions = [{"function": tool["function"] | {"parameters": parameters(tool)}} for tool in tools]
        source = calls.grammar(functions, spell) or ""
        return source.replace("start: ", f"start: {GAP}", 1) if gap else source

    def _compile(self, write: Callable[[], str], vocab_size: int, gone: Callable[[], bool]) -> GrammarConstraint:
        """A new constraint; what was refused once is not tried again.

        Raises:
            InvalidRequest: a tool's parameters have something that would not be obeyed, or are too large.
            CapacityError: as many grammars are being tried as may be at once.
        """
        try:
            source = write()
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"Calls cannot be held to the tools' parameters: {str(error).rstrip('.')}. Write them in another way, "
                "or leave `tool_choice` at auto, which does without."
            ) from error
        if source in self._refused:
            raise self._refused[source]
        try:
            return self._grammars.compile(Grammar(GrammarKind.CALLS, source), vocab_size, gone)
        except InvalidRequest as error:
            self._refused = dict(list(self._refused.items())[-15:]) | {source: error}
            raise

    def _find_notation(self) -> Notation | None:
        """How the model writes calls, as far as its template shows it."""
        if not self._shown:
            stops = [text for text, token_id in self._controls.ids.items() if token_id in self._stop_ids]
            self._notation, self._shown = notation_of(self._form, self._show(), stops), True
        return self._notation

    def _show(self) -> str:
        for tools in (OFFERED, ()):
            try:
                return self._template.render(Chat(MESSAGES, tools)).marked.text
            except InvalidRequest:
                continue
        return ""


def is_harmony(form: Format) -> bool:
    """Whether answers are gpt-oss's messages, which have their channel in a header."""
    return form.name == HARMONY.name
