"""The training run: a curriculum of lengths, seeded, on CPU processes or on one GPU.

Every step's rows are named by (seed, step, index), and the rows are split over the workers: how many there are changes
nothing but rounding. Learning is phase-like (nothing, then copying, then binding): do not stop because a skill has sat
at chance for a thousand steps.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer

from training.data import Batch, a_batch
from training.grammar import Mix
from training.muon import Muon
from training.network import Llama, Shape

# glibc gives big buffers back to the kernel at every step unless told otherwise: 1.2k tokens/s become 12k.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Stage:
    """`num_steps` steps over dialogs of `num_tokens`; a quarter of the steps takes shorter ones."""

    num_tokens: int
    num_steps: int
    bits: float = 0.0
    echo: float = 0.0
    unknown: float = 0.2
    roster: float = 0.3
    filler: float = 0.5
    plain_rosters: bool = False
    fresh_rosters: bool = False
    tokens_per_step: int = 2048


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int
    stages: tuple[Stage, ...]
    rates: tuple[tuple[int, float], ...]  # (step, learning rate), linear in between
    shape: Shape = field(default_factory=Shape)

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    def learning_rate(self, step: int) -> float:
        """The rate of a step, by `rates`."""
        for (start, low), (end, high) in itertools.pairwise(self.rates):
            if step < end:
                return low + (high - low) * (step - start) / (end - start)
        return self.rates[-1][1]

    def stage_at(self, step: int) -> Stage:
        """The stage that `step` belongs to."""
        for stage in self.stages:
            if step < stage.num_steps:
                return stage
            step -= stage.num_steps
        raise IndexError(step)


SHIPPED = Recipe(
    seed=7,
    rates=(
        (-1, 0.0),
        (99, 3e-3),
        (5000, 3e-3),
        (10200, 3e-3 - 2.9e-3 * 5.2 / 6),
        (10200, (3e-3 - 2.9e-3 * 5.1 / 6 + 2e-3) / 2),
        (10300, 2e-3),
        (13000, 1.5e-3),
        (13600, 1.5e-3 - 1.45e-3 * 600 / 3100),
        (15800, 1e-3),
        (16600, 1e-3 - 0.97e-3 * 800 / 1750),
        (16700, 1e-3),
        (17920, 3e-5),
    ),
    stages=(
        Stage(64, 500),
        Stage(128, 700),
        Stage(256, 1600),
        Stage(512, 1200),
        Stage(256, 600, bits=0.08),
        Stage(512, 2000, bits=0.06, unknown=0.35),
        # Names in questions and copies made lists ambiguous: they stood at 0.65 until rosters were kept plain.
        Stage(512, 1000, bits=0.06, unknown=0.35, plain_rosters=True),
        Stage(1024, 2500, bits=0.05, unknown=0.35, plain_rosters=True),
        Stage(2048, 100, bits=0.04, unknown=0.35, plain_rosters=True, tokens_per_step=4096),
        # Most lists so far could be copied from the answer before: asked for afresh they were wrong (0.02).
        Stage(128, 900, bits=0.02, unknown=0.35, roster=0.8, fresh_rosters=True),
        Stage(256, 2000, bits=0.04, unknown=0.35, roster=0.7, fresh_rosters=True),
        Stage(512, 500, bits=0.06, unknown=0.35, roster=0.5, fresh_rosters=True),
        # Held out, with more filler between the names, lists stood at 0.45.
        Stage(384, 2200, bits=0.05, unknown=0.35, roster=0.75, fresh_rosters=True, filler=0.65),
        Stage(512, 600, bits=0.08, unknown=0.35, roster=0.5, fresh_rosters=True),
        Stage(1024, 200, bits=0.06, unknown=0.35, roster=0.35, fresh_rosters=True),
        # Bits that are asked for later are found by their neighbours; only an echo at once needs their positions.
        Stage(512, 300, bits=0.04, echo=0.12, unknown=0.35, roster=0.5, fresh_rosters=True),
        Stage(1024, 600, bits=0.03, echo=0.08, unknown=0.35, roster=0.35, fresh_rosters=True),
        Stage(2048, 420, bits=0.03, echo=0.06, unknown=0.35, roster=0.3, fresh_rosters=True, tokens_per_step=4096),
    ),
)
SMOKE = Recipe(
    seed=7,
    rates=((-1, 0.0), (3, 3e-3)),
    stages=(Stage(64, 12), Stage(128, 6, bits=0.2, fresh_rosters=True)),
)


def step_batch(recipe: Recipe, tokenizer: Tokenizer, step: int, worker: int, num_workers: int) -> Batch:
    """This worker's share of the step's rows."""
    stage, rng = recipe.stage_at(step), random.Random(f"step-{recipe.seed}-{step}")
    num_tokens = stage.num_tokens // rng.choice((2, 4)) if rng.random() < 0.25 else stage.num_tokens
    num_tokens = max(64, num_tokens)
    bits = stage.bits if num_tokens >= 128 else 0.0
    mix = Mix(
        bits=bits,
        echo=stage.echo,
        unknown=stage.unknown,
        roster=stage.roster,
        filler=stage.filler,
        plain_rosters=stage.plain_rosters or stage.fresh_rosters,
        fresh_rosters=stage.fresh_rosters,
        max_facts=max(2, min(24, num_tokens // 32)),
    )
    indices = range(worker, stage.tokens_per_step // num_tokens, num_workers)
    return a_batch(tokenizer, mix, (recipe.seed, step), indices, num_tokens)


class Scores:
    """Share of answers whose every token was the likeliest one, by skill, on rows not yet learned from."""

    def __init__(self) -> None:
        self.right: dict[str, list[bool]] = defaultdict(list)

    def add(self, batch: Batch, right: torch.Tensor) -> None:
        """Take in which of the batch's targets were right: [N] bool."""
        for skill, start, end in batch.answers:
            self.right[skill].append(bool(right[start:end].all()))

    def take(self) -> dict[str, float]:
        """The shares so far; begins anew."""
        shares = {skill: round(sum(r) / len(r), 3) for skill, r in sorted(self.right.items())}
        self.right.clear()
        return shares


class Worker:
    """One of `num_workers` equal trainers: the same weights, its share of every step's rows."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, rank: int, num_workers: int) -> None:
        self.recipe, self.tokenizer, self.rank, self.num_workers = recipe, tokenizer, rank, num_workers
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(recipe.seed)
        self.model = Llama(recipe.shape).to(self.device)
        params = list(self.model.parameters())
        matrices = [p for p in self.model.layers.parameters() if p.ndim == 2]
        others = [p for p in params if p.ndim == 1] + [self.model.embed_tokens.weight]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=recipe.rates[0][1]),
            torch.optim.AdamW(others, lr=recipe.rates[0][1], betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.params, self.scores = params, Scores()

    def learn(self, step: int) -> float:
        """One optimizer step; the mean loss over every worker's answers."""
        batch = step_batch(self.recipe, self.tokenizer, step, self.rank, self.num_workers)
        logits = self.model(batch.ids.to(self.device), batch.at.to(self.device))
        targets = batch.targets.to(self.device)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        self.scores.add(batch, logits.detach().argmax(-1) == targets)
        mean = self.share_gradients(float(loss.detach()), len(batch.targets))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return mean

    def share_gradients(self, loss: float, num_targets: int) -> float:
        """Give every worker the gradient of the mean loss over all targets, clipped to a norm of one."""
        flat = torch.cat(
            [p.grad.flatten() for p in self.params] + [torch.tensor([loss, num_targets], device=self.device)]
        )
        if self.num_workers > 1:
            dist.all_reduce(flat)
        grads, (loss, count) = flat[:-2], flat[-2:].tolist()
        grads = grads / count
        grads *= min(1.0, 1.0 / (float(grads.norm()) + 1e-6))
        for p, grad in zip(self.params, grads.split([p.numel() for p in self.params]), strict=True):
            p.grad = grad.view_as(p)
        return loss / count

    def save(self, path: Path, step: int) -> None:
        """Write everything that going on from `step` needs; the old file stays whole until the new one is."""
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "recipe": asdict(self.recipe),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> int:
        """Go on from a checkpoint; returns its step."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return int(state["step"])


def work(rank: int, num_workers: int, recipe: Recipe, folder: Path, port: int) -> None:
    """The life of one worker process; worker 0 writes the log and the checkpoints."""
    torch.set_num_threads(1)
    if num_workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    worker, checkpoint = Worker(recipe, tokenizer, rank, num_workers), folder / "checkpoint.pt"
    first = worker.load(checkpoint) if checkpoint.exists() else 0
    if num_workers > 1:
        dist.barrier()  # all have read the checkpoint before one writes the next
    began, losses, parent = time.monotonic(), [], os.getppid()
    for step in range(first, recipe.num_steps):
        if os.getppid() != parent:
            raise SystemExit("the training run was killed; start it again to go on from its checkpoint")
        losses.append(worker.learn(step))
        last = step + 1 == recipe.num_steps
        if rank == 0 and ((step + 1) % 100 == 0 or last):
            line = {
                "step": step + 1,
                "tokens": recipe.stage_at(step).num_tokens,
                "loss": round(sum(losses) / len(losses), 4),
                "seconds": round(time.monotonic() - began),
                "right": worker.scores.take(),
            }
            print(json.dumps(line), flush=True)
            with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            losses.clear()
            worker.save(checkpoint, step + 1)
    if num_workers > 1:
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def train(recipe: Recipe, folder: Path, num_workers: int) -> dict[str, torch.Tensor]:
    """Train in `folder` (which holds tokenizer.json), going on from its checkpoint; returns the weights."""
    if torch.cuda.is_available() or num_workers == 1:
        work(0, 1, recipe, folder, 0)
    else:
        os.environ.update(MALLOC | {"OMP_NUM_THREADS": "1"})  # read by the workers when they start
        context = torch.multiprocessing.get_context("spawn")
        port = free_port()
        args = [(rank, num_workers, recipe, folder, port) for rank in range(num_workers)]
        workers = [context.Process(target=work, args=a, daemon=True) for a in args]
        for process in workers:
            process.start()
        for process in workers:
            process.join()
        if any(process.exitcode for process in workers):
            raise RuntimeError(f"a training worker failed: {[process.exitcode for process in workers]}")
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    weights: dict[str, torch.Tensor] = state["model"]
    return weights
