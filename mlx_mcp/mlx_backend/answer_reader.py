"""Reads answers as their tokens come: ids → text, in which the model's format has thoughts and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.answer import Piece
from mlx_mcp.chat.formats.detect import format_of
from mlx_mcp.chat.formats.families import TURNS
from mlx_mcp.chat.formats.format import PLAIN, Format
from mlx_mcp.chat.message import ToolCall
from mlx_mcp.chat.reader_of import reader_of

MAX_HELD = 16  # tokens that show nothing before they are shown as broken; a character has at most four


@dataclass(frozen=True)
class AnswerFormat:
    """How a model's answers are read."""

    form: Format
    hidden: frozenset[int]  # control tokens that say nothing
    strange: dict[int, str]  # control tokens that nobody knows, with their texts


class AnswerReader:
    """Reads one answer.

    Of control tokens, those that frame turns are not shown, unless they stand within thoughts or a call, where
    nothing is left out. A control token that nobody knows is shown, and noted once.
    """

    def __init__(
        self, tokenizer: Any, answers: AnswerFormat, reasoning: bool, tools: Sequence[dict[str, Any]], plain: bool
    ) -> None:
        """`plain` takes all text for the answer. `reasoning` says that the prompt opened thoughts."""
        self._answers, self._detokenizer = answers, StreamDetokenizer(tokenizer)
        self._strange: dict[str, None] = {}  # notes of tokens that nobody knows, each once
        self._reader = reader_of(PLAIN) if plain else reader_of(answers.form, reasoning, tools)

    def add(self, token_id: int) -> list[Piece]:
        """The text that is complete with this token: never half a character, never a part of a marker."""
        if token_id in self._answers.hidden and not self._reader.within_part:
            return []
        if token_id in self._answers.strange:
            token = self._answers.strange[token_id]
            self._strange[f"The model wrote the control token {token!r}, whose meaning is not known; it is shown."] = (
                None
            )
        return self._reader.feed(self._detokenizer.add(token_id))

    def finish(self, cut: bool = False) -> list[Piece]:
        """The text that was held back until the end; `cut` says that max_tokens ended the answer."""
        pieces = self._reader.feed(self._detokenizer.finish())
        return pieces + self._reader.finish(cut)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that are complete by now."""
        return self._reader.tool_calls

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know of how the answer was read, in whole sentences."""
        return (*self._strange, *self._reader.notes)


class StreamDetokenizer:
    """Decodes one sequence as its tokens come; its pieces together are the decoding of all tokens at once.

    It decodes from the last safe point but one, so the cost of a token does not grow with the text. (A window of the
    latest tokens was rejected: where sentencepiece spells with bytes, a run of bytes that begins within a character is
    broken to its end.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""  # the decoding of the ids before _next, which are kept for context only
        self._next = 0

    def add(self, token_id: int) -> str:
        """The text that is complete with this token; never half a character."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        incomplete = text.endswith("\ufffd") or len(text) <= len(self._shown)
        if incomplete and len(self._ids) - self._next < MAX_HELD:
            return ""  # the bytes of a character are not all here yet
        return self._advance(text)

    def finish(self) -> str:
        """The text that was held back; broken characters are U+FFFD."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._ids = self._ids[self._next :]
        self._next = len(self._ids)
        self._shown = self._decode(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def answer_format(tokenizer: Any, templates: str) -> AnswerFormat:
    """How the answers of a tokenizer's model are read, by the texts of its chat templates and its vocabulary."""
    form = format_of(templates, tokenizer.get_vocab())
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {*tokenizer.eos_token_ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    markers = "\n".join(form.markers)
    unmarked = {i: text for i, text in special.items() if text not in markers}
    hidden = frozenset(i for i, text in unmarked.items() if text in TURNS or i in ends)
    return AnswerFormat(form, hidden, {i: text for i, text in unmarked.items() if i not in hidden})
