"""Decodes one sequence as its tokens come."""

from __future__ import annotations

from typing import Any

MAX_HELD = 16  # tokens that show nothing before they are shown as broken; a character has at most four


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
