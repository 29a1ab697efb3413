"""What the model is asked, and how much of it."""

import os
from collections.abc import Sequence as Seq
from typing import TypeVar

EFFORT = float(os.environ.get("EFFORT", "0.1"))
Item = TypeVar("Item")

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three fruits.",
    "Explain gravity to a child.",
    "Translate 'good morning' to Spanish.",
    "What is 7 plus 5?",
    "Write a haiku about rain.",
    "Which planet is the largest?",
    "Quelle est la capitale de l'Italie ?",
    "Write a Python function that adds two numbers.",
    "Name a color.\n\nAnswer with one word.",
    "Summarise: the dog ran to the park, met another dog, and they played until the sun went down.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What does an engineer do? 🛠",
    "Repeat after me: naïve café, 12,345.67 €",
    "Why is the sky blue?",
    "Make a list of five animals, numbered.",
    "Complete: once upon a time",
    "What comes after Monday?",
]


def some(items: Seq[Item], least: int) -> Seq[Item]:
    """The first of the items, as many as EFFORT says and `least`."""
    return items[: max(least, round(len(items) * min(EFFORT, 1)))]
