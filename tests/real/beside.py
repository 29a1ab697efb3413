"""What mlx_lm itself makes of a prompt, and how far an answer is from that.

An answer at temperature 0 is compared token by token: mlx_lm's logits are computed over prompt and answer, and no token
of the answer may lie more than a bound below the likeliest. Where the bound is not used up at all, the text is the very
one that mlx_lm generates; where two tokens are closer than that, either may be taken, and the rest of the text is still
compared. Products of float32 round differently in batches of different size, which is all that the bounds leave room
for.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import batch_generate, load
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

BOUND = 1e-3  # in logits; those of mlx_lm, read in chunks of other sizes, were measured to differ by 2e-5
CHUNK_TOKENS = 512


class Reference:
    """A model folder as mlx_lm loads it; `kv_bits` keeps keys and values quantized, in groups of `group_size`."""

    def __init__(self, folder: Path, kv_bits: int | None = None, group_size: int = 64) -> None:
        loaded: Any = load(str(folder))
        self.model, self.tokenizer = loaded
        if mx.default_device() == mx.cpu:
            self.model.set_dtype(mx.float32)
        cache: Any = make_prompt_cache(self.model)
        self.cache = [layer.to_quantized(group_size, kv_bits) for layer in cache] if kv_bits else cache
        self.cached: list[int] = []  # the tokens whose keys and values are there
        (self.end,) = self.tokenizer.eos_token_ids

    def prompt(self, *messages: tuple[str, str]) -> list[int]:
        """The ids of a chat of (role, text), up to where the answer begins."""
        chat = [{"role": role, "content": text} for role, text in messages]
        ids: list[int] = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        return ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text that goes on from a prompt."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """mlx_lm's own texts at temperature 0."""
        texts: list[str] = batch_generate(self.model, self.tokenizer, prompts, max_tokens=max_tokens).texts
        return texts

    def logits(self, prompt: list[int], answer: list[int]) -> np.ndarray[Any, Any]:
        """[answer, vocabulary]: those that each token of the answer was chosen from."""
        ids, read = [*prompt, *answer[:-1]], len(prompt) - 1
        same = (mine == other for mine, other in zip(ids[:read], self.cached, strict=False))
        num_same = sum(takewhile(bool, same))
        trim_prompt_cache(self.cache, len(self.cached) - num_same)
        for start in range(num_same, read, CHUNK_TOKENS):
            self.model.model(mx.array([ids[start : min(start + CHUNK_TOKENS, read)]]), cache=self.cache)
            mx.eval([layer.state for layer in self.cache])
        logits = np.array(self.model(mx.array([ids[read:]]), cache=self.cache)[0])
        self.cached = ids
        return logits

    def gap(self, prompt: list[int], answer: dict[str, Any]) -> float:
        """How many logits below the likeliest a token of a greedy answer lies, at most.

        answer: a result of `generate`. Its end counts too, if the model ended it.
        """
        end = [self.end] if answer["finish_reason"] == "stop" else []
        text = answer["text"]
        ids = [*self.encode(text), *end]
        while True:
            logits = self.logits(prompt, ids)
            gaps = behind(logits, ids)
            wrong = int(np.argmax(gaps > BOUND))
            likeliest = int(logits[wrong].argmax())
            spelled = self.tokenizer.decode(likeliest)
            rest = self.tokenizer.decode(ids[wrong : len(ids) - len(end)])
            if gaps[wrong] <= BOUND or likeliest == self.end or not rest.startswith(spelled):
                return float(gaps.max())
            # The model spelled the text otherwise than the tokenizer does.
            ids = [*ids[:wrong], likeliest, *self.encode(rest[len(spelled) :]), *end]

    def ids(self, choices: list[dict[str, Any]]) -> list[int]:
        """The tokens of an answer that came with `logprobs`; each must be the only one that reads so."""
        by_text = defaultdict(list)
        for token_id in range(len(self.tokenizer)):
            by_text[self.tokenizer.decode([token_id])].append(token_id)
        ids = [by_text[choice["token"]] for choice in choices]
        assert all(len(same) == 1 for same in ids), choices
        return [token_id for (token_id,) in ids]


def behind(logits: np.ndarray[Any, Any], ids: list[int]) -> np.ndarray[Any, Any]:
    """[tokens]: how far each one's logit is below the likeliest."""
    gaps: np.ndarray[Any, Any] = logits.max(axis=-1) - logits[np.arange(len(ids)), ids]
    return gaps


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64."""
    x: np.ndarray[Any, Any] = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x
