"""A model's text side: chat template, encoding, streaming decoding. May be used from any thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from mlx_lm.utils import load_tokenizer

from mlx_mcp.core.ports import Message
from mlx_mcp.errors import InvalidRequest

# One of these stands for each control token in the callers' text while the template is rendered.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class StreamDetokenizer:
    """Decodes one sequence as its tokens come; text ever added equals the decoding of all tokens at once.

    Decodes from the last safe point, so the cost of a token does not grow with the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""  # the decoding of the ids before _next, which are kept for context only
        self._next = 0

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; never half a character."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or len(text) <= len(self._shown):
            return ""  # the bytes of a character are not all here yet
        return self._advance(text)

    def finish(self) -> str:
        """What was held back; broken characters show as U+FFFD."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._ids = self._ids[self._next :]
        self._next = len(self._ids)
        self._shown = self._decode(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class ChatTokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path, eos_token_ids: Any) -> None:
        load: Any = load_tokenizer  # mlx_lm has no types
        self._tokenizer = load(folder, {"trust_remote_code": False}, eos_token_ids=eos_token_ids)
        # transformers changes its tokenizer's state while it encodes, on any thread.
        self._lock = threading.Lock()
        added = self._tokenizer.get_added_vocab()
        special = set(self._tokenizer.all_special_tokens)
        controls = [t for t in added if len(t) > 1 and (t in special or (t[0] in "<[" and t[-1] in ">]"))]
        self._controls = sorted(controls, key=len, reverse=True)  # a control may hold a shorter one

    @property
    def vocab_size(self) -> int:
        """How many token ids the tokenizer knows."""
        return len(self._tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end the model's turn."""
        return frozenset(self._tokenizer.eos_token_ids)

    @property
    def max_tokens(self) -> int | None:
        """The context that the tokenizer's config claims; None where it claims none."""
        claimed = self._tokenizer.model_max_length
        return int(claimed) if claimed and claimed < 10**9 else None

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """The prompt's token ids, generation prompt included; text in `messages` never becomes a control token.

        Control tokens in the text ("<|im_end|>" in a document about templates) are encoded as the plain text they are,
        so that no content can end a turn or open another role's.

        Raises:
            InvalidRequest: the model's template refuses these messages.
        """
        marks = self._marks([m.content for m in messages])
        turns = [{"role": m.role, "content": marked(m.content, marks)} for m in messages]
        with self._lock:
            if not self._tokenizer.has_chat_template:
                rendered = "\n\n".join(turn["content"] for turn in turns)
                return self._encode(rendered, marks, add_special_tokens=True)
            try:
                rendered = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                raise InvalidRequest(
                    f"The model's chat template refuses these messages: {error}. If it takes no system prompt, leave "
                    "`system` out and say it in `prompt`."
                ) from error
            return self._encode(rendered, marks, add_special_tokens=False)

    def detokenizer(self) -> StreamDetokenizer:
        """A fresh one, for one sequence."""
        return StreamDetokenizer(self._tokenizer)

    def _marks(self, texts: list[str]) -> dict[str, str]:
        """A private-use character, used by none of the texts, for each control token that one of them holds."""
        used = set().union(*texts)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        return {control: next(free) for control in self._controls if any(control in text for text in texts)}

    def _encode(self, text: str, marks: dict[str, str], add_special_tokens: bool) -> list[int]:
        """Encode rendered text, with each mark as the plain text of its control token, cut so that it stays text."""
        pieces, start = [], 0
        controls = {mark: control for control, mark in marks.items()}
        for at, char in enumerate(text):
            if char in controls:
                pieces += [text[start:at], controls[char][:1], controls[char][1:]]
                start = at + 1
        pieces.append(text[start:])
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if piece or len(pieces) == 1:
                ids += self._tokenizer.encode(piece, add_special_tokens=add_special_tokens and index == 0)
        return ids


def marked(text: str, marks: dict[str, str]) -> str:
    """The text with each control token replaced by its mark."""
    for control, mark in marks.items():
        text = text.replace(control, mark)
    return text
