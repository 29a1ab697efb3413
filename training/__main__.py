"""Command line of the training recipe: `train` makes the embedded model, `evaluate` measures it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

EMBEDDED = Path(__file__).parent.parent / "mlx_mcp" / "assets" / "embedded"


def train(args: argparse.Namespace) -> None:
    """Train the tokenizer and the weights, and export them."""
    from tokenizers import Tokenizer

    from training.export import export
    from training.train import SHIPPED, SMOKE, train
    from training.vocabulary import train_tokenizer

    recipe = SMOKE if args.smoke else SHIPPED
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(recipe.seed, num_dialogs=400 if args.smoke else 4000).save(str(path), pretty=False)
    weights = train(recipe, args.work, args.workers)
    export(weights, Tokenizer.from_file(str(path)), recipe.shape, args.out)
    print(f"exported to {args.out}")


def evaluate(args: argparse.Namespace) -> None:
    """Print both tables as Markdown; fail if a skill misses its goal."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers share the cores
    from training.evaluate import tables

    missed = []
    for line, kept in tables(args.model, args.cases, args.damage_cases, args.workers):
        print(line, flush=True)
        if not kept:
            missed.append(line)
    if missed and not args.no_goals:
        raise SystemExit("goals missed:\n" + "\n".join(missed))


def main() -> None:
    """Read the arguments and run one command."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train the embedded model and export it")
    command.add_argument("--out", type=Path, default=EMBEDDED, help="the folder that mlx_lm loads")
    command.add_argument(
        "--work", type=Path, default=Path("build/training"), help="checkpoints; a run goes on from here"
    )
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, where there is no GPU")
    command.add_argument("--smoke", action="store_true", help="a few steps, to prove that the recipe runs")
    command.set_defaults(run=train)
    command = commands.add_parser("evaluate", help="measure an exported model: skills and cache damage")
    command.add_argument("--model", type=Path, default=EMBEDDED, help="the folder to measure")
    command.add_argument("--cases", type=int, default=200, help="held-out dialogs per skill")
    command.add_argument("--damage-cases", type=int, default=48, help="dialogs per damage and probe")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    command.add_argument("--no-goals", action="store_true", help="measure only; do not fail below a goal")
    command.set_defaults(run=evaluate)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
