"""Tasks over long input that are made here, so that their answers are known: a needle, a count by meaning, pairs.

They are like S-NIAH, OOLONG and OOLONG-Pairs (arXiv 2512.24601): one line matters, every line does, every two do. What
a line is about is not written in it, so that a model has to read; who wrote it is, so that a program can count.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

CHARS_PER_TOKEN = 4  # as in English text with the tokenizers of today
USERS = [f"user-{number:02}" for number in range(1, 13)]
ABOUT = {
    "weather": "It rained from noon until dark|The fog lay on the valley all morning|A cold wind came up after lunch|"
    "Hail broke two of our windows|We had not one cloud this week|The snow was gone by Tuesday",
    "food": "The soup needed more salt|She baked two loaves of rye|We fried the trout in butter|"
    "The pears were not ripe|He burned the onions again|They ordered dumplings for six",
    "travel": "Our train left an hour late|The ferry was full of cyclists|We missed the turn to the coast|"
    "My suitcase came a day after me|The hostel had no beds left|They crossed the border on foot",
    "money": "The rent went up in May|I paid the fine at the counter|Her savings lost a tenth|"
    "We split the bill in four|The bank closed my account|He owes me for the tickets",
}
SENTENCES = [(about, sentence) for about, texts in ABOUT.items() for sentence in texts.split("|")]
WORDS = (
    "amber birch cedar delta ember flint grove haven iris jade karst lotus maple north ochre pearl quartz raven".split()
)


@dataclass(frozen=True)
class Task:
    """One question over one text. `program` is what a host would write for it, and `score` from 0 to 1."""

    name: str
    text: str
    question: str
    schema: dict[str, Any]
    program: str
    score: Callable[[Any], float]


def needle(tokens: int, seed: int) -> Task:
    """One line says what is asked for."""
    chance = random.Random(f"needle {tokens} {seed}")
    lines, word = log(chance, tokens), "-".join(chance.sample(WORDS, 3))
    lines.insert(chance.randrange(len(lines)), f"2031-07-01 user-99: The pass phrase of the north gate is {word}.")
    return Task(
        "needle",
        "\n".join(lines),
        "What is the pass phrase of the north gate?",
        object_of(phrase={"type": "string", "maxLength": 60}),
        NEEDLE,
        lambda answer: float(value_of(answer, "phrase") == word),
    )


def count(tokens: int, seed: int) -> Task:
    """Every line of one user has to be read for what it is about."""
    chance = random.Random(f"count {tokens} {seed}")
    user, about = chance.choice(USERS), chance.choice(list(ABOUT))
    lines = log(chance, tokens)
    right = sum(user in line and about_of(line) == about for line in lines)

    def score(answer: Any) -> float:
        """0.75 to the power of how far off it is, as OOLONG scores numbers."""
        given = value_of(answer, "count")
        return 0.75 ** abs(given - right) if isinstance(given, int) else 0.0

    return Task(
        "count",
        "\n".join(lines),
        f"How many of the lines that {user} wrote are about {about}? Each line is about one of: {', '.join(ABOUT)}.",
        object_of(count={"type": "integer", "minimum": 0}),
        COUNT.format(user=user, about=about, kinds=list(ABOUT)),
        score,
    )


def pairs(tokens: int, seed: int) -> Task:
    """Every two users have to be compared by what their lines are about."""
    chance = random.Random(f"pairs {tokens} {seed}")
    first, second = chance.sample(list(ABOUT), 2)
    lines = log(chance, tokens, few=chance.sample(USERS, 6))
    of = {user: {about_of(line) for line in lines if user in line} for user in USERS}
    both = [user for user in USERS if {first, second} <= of[user]]
    right = {frozenset(pair) for pair in combinations(both, 2)}

    def score(answer: Any) -> float:
        """F1 of the pairs."""
        given = value_of(answer, "pairs")
        found = {frozenset(map(str, pair)) for pair in given} if isinstance(given, list) else set()
        hits = len(found & right)
        return 1.0 if found == right else 2 * hits / (len(found) + len(right)) if hits else 0.0

    pair = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}
    return Task(
        "pairs",
        "\n".join(lines),
        f"Name all pairs of users who both wrote at least one line about {first} and one about {second}. Each line is "
        f"about one of: {', '.join(ABOUT)}.",
        object_of(pairs={"type": "array", "items": pair}),
        PAIRS.format(first=first, second=second, kinds=list(ABOUT)),
        score,
    )


TASKS = {"needle": needle, "count": count, "pairs": pairs}


def log(chance: random.Random, tokens: int, few: list[str] | None = None) -> list[str]:
    """Lines of about so many tokens; those of the `few` users are about two things only."""
    lines: list[str] = []
    size, day = 0, 0
    while size < tokens * CHARS_PER_TOKEN:
        user = chance.choice(USERS)
        allowed = SENTENCES[:12] if user in (few or ()) else SENTENCES
        day += chance.random() < 0.2
        line = f"2031-{1 + day // 28 % 12:02}-{1 + day % 28:02} {user}: {chance.choice(allowed)[1]}."
        lines.append(line)
        size += len(line) + 1
    return lines


def about_of(line: str) -> str:
    """What a line is about."""
    said = line.partition(": ")[2].rstrip(".")
    return next((about for about, sentence in SENTENCES if sentence == said), "")


def value_of(answer: Any, name: str) -> Any:
    """A member of an answer, if it has that."""
    return answer.get(name) if isinstance(answer, dict) else None


def object_of(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has these members."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


NEEDLE = """
found = [line for line in context.split("\\n") if "pass phrase of the north gate" in line]
submit({"phrase": found[0].rpartition(" ")[2].strip(".")} if found else {"phrase": ""})
"""
LABELS = """
kinds = {kinds}
said = sorted(set(line.partition(": ")[2] for line in context.split("\\n")))
form = {{"type": "object", "properties": {{"about": {{"enum": kinds}}}}, "required": ["about"]}}
labels = llm_map("What is this sentence about? One of: " + ", ".join(kinds), said, schema=form)
about = {{text: label["about"] for text, label in zip(said, labels) if label}}
lines = [(line.split(" ")[1].strip(":"), about.get(line.partition(": ")[2])) for line in context.split("\\n")]
"""
COUNT = LABELS + 'submit({{"count": sum(1 for user, label in lines if user == "{user}" and label == "{about}")}})\n'
PAIRS = (
    LABELS
    + """
of = {{}}
for user, label in lines:
    of[user] = of.get(user, set()) | {{label}}
both = sorted(user for user in of if "{first}" in of[user] and "{second}" in of[user])
submit({{"pairs": [[a, b] for i, a in enumerate(both) for b in both[i + 1:]]}})
"""
)
