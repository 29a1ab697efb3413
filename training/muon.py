"""Muon: momentum whose update is orthogonalised, for the matrices of a small network.

After Keller Jordan (https://kellerjordan.github.io/posts/muon/); the update's RMS is matched to AdamW's as in
Moonlight (arXiv 2502.16982), so that one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict

import torch


def orthogonalised(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to each of g [N, rows, cols], by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(1, 2)
        x = a * x + (b * s + c * s @ s) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix; matrices of one shape go through in one batch."""

    def __init__(
        self, params: list[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix by one update."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                moves = orthogonalised(torch.stack(updates)) * (0.2 * max(shape) ** 0.5)
                for p, move in zip(params, moves, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-group["lr"])
