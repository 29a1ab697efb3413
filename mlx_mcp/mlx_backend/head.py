"""Computes, at the end of a prompt, only the logits of its last token.

mlx-lm's models compute logits for every token of their input, of which those of a prompt's last token alone are read.
With a vocabulary of 150,000 the others take a small model longer than its layers do. The modules that a model calls
last compute each token by itself, so they can be given the last tokens alone. Engine thread only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

NAMES = frozenset({"lm_head", "embed_out", "output"})  # what model files call their output layer
LAST = frozenset({"mlp", "feed_forward", "block_sparse_moe"})  # and what a layer ends with, each token for itself


@dataclass
class Asked:
    """How many tokens each row has, while the logits of the last ones alone are asked for."""

    sizes: list[int] | None = None


class Head:
    """A model that is asked for the logits of its rows' last tokens.

    With `cut`, no other tokens go through its output layer, which has one of NAMES or is tied to an embedding, or
    through the end of its last layer; what that adds to the other tokens is wrong, and nobody reads it.
    tests/mlx_backend/test_architectures.py proves it right for the model files of `architectures.ALLOWED` alone.
    """

    def __init__(self, model: Any, cut: bool) -> None:
        self.model, self.asked = model, Asked()
        if not cut:
            return
        parts = [module for name, module in model.named_modules() if name.rpartition(".")[2] in NAMES or tied(module)]
        if len(make_prompt_cache(model)) <= len(model.layers):  # with more, layers are gone through again
            shared = {id(part) for layer in model.layers[:-1] for part in layer.values()}
            parts += [part for name, part in model.layers[-1].items() if name in LAST and id(part) not in shared]
        for part in parts:
            part.__class__ = narrowed(type(part), self.asked)

    def last(self, inputs: mx.array, caches: list[Any], sizes: list[int]) -> mx.array:
        """Logits [rows, vocabulary] of each row's last token.

        inputs: [rows, longest]; each row has as many tokens as `sizes` says, and anything after them.
        """
        self.asked.sizes = sizes
        try:
            logits: mx.array = self.model(inputs, cache=caches)
        finally:
            self.asked.sizes = None
        return (logits if logits.shape[1] == 1 else ends(logits, sizes))[:, 0]


def ends(x: mx.array, sizes: list[int]) -> mx.array:
    """Each row's last token: [rows, 1, …] of [rows, longest, …]."""
    if min(sizes) == max(sizes):
        return x[:, -1:]
    return x[mx.arange(len(sizes)), mx.array(sizes) - 1][:, None]


def tied(module: Any) -> bool:
    """Whether it is an embedding that can be an output layer too."""
    return hasattr(module, "as_linear")


def narrowed(kind: type[Any], asked: Asked) -> type[Any]:
    """A class of modules like `kind` that compute only the tokens whose logits are asked for.

    It refers to no model, whose weights would otherwise be kept until the garbage is collected.
    """
    call = kind.as_linear if tied(kind) else kind.__call__

    def of_the_last(self: Any, x: mx.array, *rest: Any) -> Any:
        return call(self, x if asked.sizes is None else ends(x, asked.sizes), *rest)

    return type(kind.__name__, (kind,), {call.__name__: of_the_last, "__module__": kind.__module__})
