"""Reads answers: splits reasoning, tool calls and text at the markers of the model's format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from mlx_mcp.chat.answer import Piece, TextKind
from mlx_mcp.chat.message import ToolCall
from mlx_mcp.mlx_backend.detokenizer import StreamDetokenizer

# mlx_lm has no types.
StateMachine: Any = TextStateMachine
make_state_machine: Any = make_text_state_machine

# The kind of text by the state of mlx_lm's machine. "tool" is handled separately; any other is a message's header.
KINDS = {"normal": TextKind.ANSWER, "reasoning": TextKind.REASONING}

# gpt-oss's channels (OpenAI's "harmony response format"), which mlx_lm does not split: ml-explore/mlx-lm#1867.
CHANNELS = [
    ("<|channel|>analysis<|message|>", "reasoning"),
    ("<|channel|>commentary<|message|>", "normal"),
    ("<|channel|>final<|message|>", "normal"),
]
HARMONY = {
    "normal": [*CHANNELS, ("<|end|>", "header")],
    "reasoning": [("<|end|>", "header")],
    "header": CHANNELS,
}


@dataclass(frozen=True)
class Format:
    """How a model marks the parts of its answers."""

    machine: Any  # mlx_lm's TextStateMachine
    initial: str  # its state where an answer begins
    hidden: frozenset[int]  # special tokens that are no part of a marker


class AnswerReader:
    """Reads one answer, which mlx_lm's state machine splits at the markers of the model's format.

    Markers are not shown, and neither are the newlines right after one, which belong to the format. A tool call is
    returned in one piece once it is complete. Text in a call's markers that is not a call of one of `tools` is shown as
    answer, markers included: it was cut off, is malformed, or calls a tool that was not offered.
    """

    def __init__(self, tokenizer: Any, form: Format, reasoning: bool, tools: tuple[dict[str, Any], ...]) -> None:
        self._tokenizer, self._hidden, self._tools = tokenizer, form.hidden, tools
        self._detokenizer = StreamDetokenizer(tokenizer)
        self._state = form.machine.make_state("reasoning" if reasoning else form.initial)
        self._after_marker = reasoning
        self._call = ""  # the text of the call that is being read
        self._calls: list[ToolCall] = []

    def add(self, token_id: int) -> list[Piece]:
        """The text that is complete with this token: never half a character, never a part of a marker."""
        # Inside a call special tokens are the parser's: Mistral's [ARGS], Kimi's <|tool_call_begin|>.
        if token_id in self._hidden and self._state[0] != "tool":
            return []
        return self._split(self._detokenizer.add(token_id))

    def finish(self) -> list[Piece]:
        """The text that was held back until the end."""
        pieces = self._split(self._detokenizer.finish())
        self._state, rest, state = StateMachine.flush(self._state)
        pieces += self._take(state, rest)
        if state == "tool":
            # Some parsers take a call that was cut off for one with fewer arguments.
            pieces.append(self._unread("") if self._tokenizer.tool_call_end else self._end_call())
        return pieces

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that are complete by now."""
        return tuple(self._calls)

    def _split(self, text: str) -> list[Piece]:
        self._state, segments = StateMachine.split(self._state, text)
        state, part = segments[0]
        pieces = self._take(state, part)
        for following, part in segments[1:]:  # each after a marker
            self._after_marker = True
            if state == "tool":
                pieces.append(self._end_call())
            state = following
            pieces += self._take(state, part)
        return pieces

    def _take(self, state: str, text: str) -> list[Piece]:
        if state == "tool":
            self._call += text
            return []
        if self._after_marker:
            text = text.lstrip("\r\n")
        if not text or state not in KINDS:
            return []
        self._after_marker = False
        return [Piece(KINDS[state], text)]

    def _end_call(self) -> Piece:
        calls = parsed_calls(self._tokenizer.tool_parser, self._call, self._tools)
        if not calls:
            return self._unread(self._tokenizer.tool_call_end)
        piece = Piece(TextKind.TOOL_CALL, self._call)
        self._call = ""
        self._calls += calls
        return piece

    def _unread(self, end: str) -> Piece:
        """The call as text of the answer."""
        piece = Piece(TextKind.ANSWER, f"{self._tokenizer.tool_call_start}{self._call}{end}")
        self._call, self._after_marker = "", False
        return piece


def formats(tokenizer: Any) -> tuple[Format, Format]:
    """The format of the model's answers, and the plain format, which has no parts."""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocab = tokenizer.get_vocab()
    if "<|channel|>" in vocab and "<|message|>" in vocab:
        machine, edges = StateMachine(HARMONY), HARMONY
    else:
        machine, edges = make_state_machine(tokenizer), tokenizer.response_transitions
    markers = [tokenizer.think_start, tokenizer.think_end, tokenizer.tool_call_start, tokenizer.tool_call_end]
    markers += [*tokenizer.structural_markers, *(marker for some in edges.values() for marker, _ in some)]
    shown = "\n".join(filter(None, markers))
    hidden = frozenset(i for i, text in special.items() if text not in shown)
    return (
        Format(machine, tokenizer.response_initial_state or "normal", hidden),
        Format(StateMachine(), "normal", frozenset(special)),
    )


def parsed_calls(parser: Any, text: str, tools: tuple[dict[str, Any], ...]) -> list[ToolCall]:
    """The calls that a model wrote in its notation; none if it is malformed, or if one is not of `tools`."""
    try:
        parsed = parser(text, list(tools))
        calls = [tool_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
    except Exception:  # models write anything, and parsers raise of every kind
        return []
    offered = [tool["function"]["name"] for tool in tools]
    return calls if all(call.name in offered for call in calls) else []


def tool_call(parsed: dict[str, Any]) -> ToolCall:
    """A call from what a parser of mlx_lm returns, if its arguments are a JSON object.

    Raises:
        ValueError or TypeError, among others: they are not.
    """
    arguments = parsed.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    # There and back: some parsers give Python's sets or bytes, and JSON may spell half a surrogate, which has no UTF-8.
    arguments = json.loads(json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode())
    if not isinstance(arguments, dict):
        raise TypeError("the arguments are no object")
    return ToolCall(parsed["name"], arguments)
