"""Encodes texts as tokens, in another process where the tokenizer is not this package's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_mcp.errors import InvalidRequest
from mlx_mcp.mlx_backend.control_tokens import MarkedText
from mlx_mcp.mlx_backend.text_processes import Failed, Overdue, TextProcesses


class Encoder:
    """Encodes with one tokenizer; any thread may use it.

    `processes` do the work, unless they are None. `lock` is held while transformers encodes by itself, since that
    changes its tokenizer's state.
    """

    def __init__(
        self, tokenizer: Any, processes: TextProcesses | None, lock: threading.Lock, folder: Path, bare: bool
    ) -> None:
        """`bare` says that logs begin with bare texts, which no template has put special tokens around."""
        self._tokenizer, self._processes, self._lock, self._folder = tokenizer, processes, lock, folder
        self._bare = bare
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._newline = tokenizer.encode("\n", add_special_tokens=False)
        if processes is not None and self._backend is not None:
            processes.use(self._backend.to_str().encode())

    def encode_rendered(self, rendered: MarkedText, gone: Callable[[], bool]) -> list[int]:
        """Encode a text that a log begins with.

        Raises:
            InvalidRequest: see `encode`.
        """
        first, *rest = rendered.pieces()
        (ids,) = self.encode([first], gone, add_special_tokens=self._bare)
        return ids + self.encode_following(rest, gone)

    def encode_following(self, texts: list[str], gone: Callable[[], bool]) -> list[int]:
        """Encode texts that follow other text: without the space that sentencepiece puts before a text.

        Raises:
            InvalidRequest: see `encode`.
        """
        texts, num_newline = list(filter(None, texts)), len(self._newline)
        encoded = self.encode([f"\n{text}" for text in texts], gone)
        # Where the newline and what follows it became one token, the text is encoded without it.
        joined = [text for text, ids in zip(texts, encoded, strict=True) if ids[:num_newline] != self._newline]
        others = iter(self.encode(joined, gone))
        parts = (ids[num_newline:] if ids[:num_newline] == self._newline else next(others) for ids in encoded)
        return [token_id for ids in parts for token_id in ids]

    def encode(self, texts: list[str], gone: Callable[[], bool], add_special_tokens: bool = False) -> list[list[int]]:
        """Encode texts as they are; megabytes take seconds, and must not delay another call's few words.

        Raises:
            InvalidRequest: the tokenizer cannot encode them, or not in time.
        """
        if not texts:
            return []
        if self._backend is None:
            with self._lock:
                return [list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens)) for text in texts]
        if self._processes is None:  # in a batch, unlike alone, it lets other threads run; "fast" is without offsets
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [list(encoding.ids) for encoding in encodings]
        try:
            return self._processes.encode(texts, add_special_tokens, gone)
        except (Overdue, Failed) as error:
            raise InvalidRequest(
                f"The model's tokenizer ({self._folder}) cannot encode this text: {error}. Change or shorten it, or "
                "choose another model (list_models shows them)."
            ) from error
