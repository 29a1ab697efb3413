"""Has a model compute the logits of the tokens that someone reads, and of no others.

mlx-lm's models compute them for every token of their input, and of a prompt's end one is read: with a vocabulary of
150,000 the others take a small model longer than its layers do. The module that makes logits out of hidden states is
the last that a model calls, so it can be given the last tokens alone. Engine thread only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

NAMES = frozenset({"lm_head", "embed_out", "output"})  # what model files call their output layer, if it is one


@dataclass
class Asked:
    """How many tokens each row has, while the logits of the last ones alone are asked for."""

    sizes: list[int] | None = None


class Head:
    """A model, asked for the logits of its rows' last tokens.

    With `cut` its output layers, which go by NAMES or are tied to an embedding, get no more than they are asked for.
    tests/mlx_backend/test_architectures.py proves that right for the model files of `rows.ALLOWED`, and no others.
    """

    def __init__(self, model: Any, cut: bool) -> None:
        self.model, self.asked = model, Asked()
        for name, module in model.named_modules() if cut else ():
            if name.rpartition(".")[2] in NAMES or hasattr(module, "as_linear"):
                module.__class__ = narrowed(type(module), self.asked)

    def last(self, inputs: mx.array, caches: list[Any], sizes: list[int]) -> mx.array:
        """Logits [rows, vocabulary] of each row's last token.

        inputs: [rows, longest], of each row as many as `sizes` says, and whatever there is after them.
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


def narrowed(kind: type[Any], asked: Asked) -> type[Any]:
    """A class of output layers like `kind` that leave out the tokens whose logits are not asked for.

    It knows of no model: the weights would stay with it until the garbage is collected.
    """
    tied = hasattr(kind, "as_linear")
    product = kind.as_linear if tied else kind.__call__

    def of_the_last(self: Any, x: mx.array) -> Any:
        return product(self, x if asked.sizes is None else ends(x, asked.sizes))

    return type(kind.__name__, (kind,), {product.__name__: of_the_last, "__module__": kind.__module__})
