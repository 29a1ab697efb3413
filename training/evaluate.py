"""Measures an exported model: each skill on held-out dialogs, and what each cache damage does to its answers.

Held out: names, values and layouts are drawn from seeds that training never uses. An answer counts only if it is exact
and the model ends its turn by itself. Greedy, float32.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

from mlx_mcp.mlx_backend.cpu.openblas import prefer_openblas
from training import grammar
from training.damage import BLOCK, DAMAGES, HARMLESS, Scene
from training.grammar import Turn, World
from training.rows import Row
from training.vocabulary import END, ROLE_IDS

EMBEDDED = Path(__file__).parent.parent / "mlx_mcp" / "assets" / "embedded"
CHUNK = 256


@dataclass(frozen=True)
class Case:
    """A dialog up to a question, and the one right answer."""

    context: list[int]  # what a cache would hold when the question comes
    question: list[int]  # fed last; ends with the assistant's mark
    answer: list[int]  # ends with END
    told_at: int = 0  # where in the context the answer stands


class Model:
    """An exported folder, in float32."""

    def __init__(self, folder: Path) -> None:
        self.network: Any = load_model(folder)[0]
        self.network.set_dtype(mx.float32)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def cache_of(self, ids: list[int]) -> list[KVCache]:
        """The cache after `ids`."""
        cache: list[KVCache] = make_prompt_cache(self.network)
        for start in range(0, len(ids), CHUNK):
            self.network(mx.array([ids[start : start + CHUNK]]), cache=cache)
            mx.eval([c.state for c in cache])
        return cache

    def answers(self, case: Case, cache: list[Any]) -> bool:
        """Whether the model, going on from the cache of the context, gives the answer and stops.

        One pass over the right answer shows it: greedy decoding gives that answer exactly if each of its tokens is the
        likeliest one after those before it.
        """
        logits = self.network(mx.array([case.question + case.answer[:-1]]), cache=cache)
        likeliest: list[int] = mx.argmax(logits[0], axis=-1).tolist()
        return likeliest[-len(case.answer) :] == case.answer


# Held-out dialogs


class Script:
    """A dialog under construction: facts, filler and questions, in turns, up to a wished length."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(f"held-out-{name}")
        self.world = World()

    def ids(self, text: str) -> list[int]:
        """The text's tokens."""
        encoded: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    def facts(self, count: int, roster: bool = False) -> list[str]:
        """`count` sentences that each tell a new fact."""
        return [grammar.tell_new(self.rng, self.world, roster) for _ in range(count)]

    def told(self, sentences: list[str], num_tokens: int, role: str = "user") -> Row:
        """Turns that tell the sentences in their order, among as much filler as `num_tokens` needs."""
        room = num_tokens - 20 - sum(len(self.ids(s)) + 3 for s in sentences)
        slots: list[list[str]] = [[] for _ in range(len(sentences) + 1)]
        while room > 0:
            filler = grammar.a_filler(self.rng)
            self.rng.choice(slots).append(filler)
            room -= len(self.ids(filler)) + 3
        lines = [line for i, slot in enumerate(slots) for line in [*slot, *sentences[i : i + 1]]]
        row = Row()
        while lines:
            count = self.rng.randrange(1, 5)
            row.add(self.tokenizer, Turn(role, " ".join(lines[:count])))
            if role != "system":
                row.add(self.tokenizer, Turn("assistant", grammar.ACKNOWLEDGED))
            lines = lines[count:]
        return row

    def case(self, row: Row, question: str, answer: str, told_at: int = 0) -> Case:
        """The row, then a question whose answer is known."""
        asked = [ROLE_IDS["user"], *self.ids(question), END, ROLE_IDS["assistant"]]
        return Case(row.ids, asked, [*self.ids(answer), END], told_at)

    def recall(self, row: Row, fact: tuple[str, str]) -> Case:
        """A question for a fact that the row tells."""
        value = self.world.facts[fact]
        # Where the value is told: damage tests aim at it.
        at = find(row.ids, self.ids(value))
        return self.case(row, grammar.asked(self.rng, *fact), value, at)


def find(ids: list[int], part: list[int]) -> int:
    """Where `part` stands in `ids`, the last time; 0 where it does not."""
    return next((i for i in range(len(ids) - len(part), -1, -1) if ids[i : i + len(part)] == part), 0)


def recall(num_facts: int, num_tokens: int) -> Callable[[Script], Case]:
    """One of `num_facts` facts, asked after `num_tokens` tokens."""

    def make(script: Script) -> Case:
        row = script.told(script.facts(num_facts), num_tokens)
        return script.recall(row, script.rng.choice(list(script.world.facts)))

    return make


def early(script: Script) -> Case:
    """The first of 8 facts, asked 2,048 tokens later."""
    row = script.told(script.facts(8), 2000)
    return script.recall(row, next(iter(script.world.facts)))


def made_up(script: Script) -> Case:
    """A fact about a person whose name no list holds."""
    name = grammar.made_up(script.rng, 3).capitalize()
    sentences = script.facts(7)
    value = grammar.a_value(script.rng, "code")
    sentences.insert(script.rng.randrange(8), grammar.told(script.rng, name, "code", value))
    script.world.facts[name, "code"] = value
    return script.recall(script.told(sentences, 512), (name, "code"))


def updated(script: Script) -> Case:
    """A fact that was told twice, the second time otherwise."""
    sentences = script.facts(8)
    subject, attribute = script.rng.choice(list(script.world.facts))
    value = grammar.a_value(script.rng, attribute)
    script.world.facts[subject, attribute] = value
    sentences.append(grammar.told(script.rng, subject, attribute, value, again=True))
    return script.recall(script.told(sentences, 512), (subject, attribute))


def in_system(script: Script) -> Case:
    """Facts in the system prompt."""
    row = Row()
    row.add(script.tokenizer, Turn("system", " ".join(script.facts(8))))
    return script.recall(row, script.rng.choice(list(script.world.facts)))


def in_question(script: Script) -> Case:
    """Facts and question in one turn, with nothing before it."""
    told = " ".join(script.facts(4))
    fact = script.rng.choice(list(script.world.facts))
    return script.case(Row(), f"{told} {grammar.asked(script.rng, *fact)}", script.world.facts[fact])


def unknown(script: Script) -> Case:
    """A fact that nobody told, about a known subject or an unknown one."""
    row = script.told(script.facts(8), 512)
    while True:
        subject, attribute = script.rng.choice(list(script.world.facts))
        if script.rng.random() < 0.5:
            subject = grammar.a_subject(script.rng)
        else:
            attribute = script.rng.choice(grammar.ATTRIBUTES)
        if (subject, attribute) not in script.world.facts:
            return script.case(row, grammar.asked(script.rng, subject, attribute), grammar.UNKNOWN)


def last_turn(script: Script, lead: str, text: str) -> Case:
    """A text to be given back at once after 512 tokens; it is part of the context, so that damage can reach it."""
    row = script.told(script.facts(8), 480)
    row.add(script.tokenizer, Turn("user", lead + text))
    answer = script.ids(text)
    return Case(row.ids[:-1], [END, ROLE_IDS["assistant"]], [*answer, END], len(row.ids) - 1 - len(answer))


def bits(script: Script) -> Case:
    """Sixteen bits to echo: only right positions give them back."""
    return last_turn(script, "Echo: ", grammar.some_bits(script.rng))


def bits_later(script: Script) -> Case:
    """Sixteen bits told among 8 facts, and asked for at the end of 512 tokens."""
    value = grammar.some_bits(script.rng)
    row = script.told(script.facts(4), script.rng.randrange(40, 400))
    row.add(script.tokenizer, Turn("user", f"Bits: {value}"))
    row.add(script.tokenizer, Turn("assistant", grammar.ACKNOWLEDGED))
    row.ids += script.told(script.facts(4), max(60, 512 - len(row.ids))).ids[1:]
    return script.case(row, script.rng.choice(grammar.ASK_BITS), value, find(row.ids, script.ids(value)))


def copy(script: Script) -> Case:
    """A text to repeat."""
    return last_turn(script, script.rng.choice(grammar.COPY), grammar.a_text_to_copy(script.rng))


def tool_call(script: Script) -> Case:
    """A tool that is offered and asked for."""
    tools = grammar.a_toolbox(script.rng)
    request, call, _, _ = grammar.exchange_tool(script.rng, tools)
    row = Row()
    row.add(script.tokenizer, Turn("system", grammar.tools_line(tools)))
    row.ids += script.told(script.facts(4), 256).ids[1:]
    return script.case(row, request.text, call.text)


def tool_result(script: Script) -> Case:
    """The answer after a tool's result."""
    tools = grammar.a_toolbox(script.rng)
    request, call, result, answer = grammar.exchange_tool(script.rng, tools)
    row = Row()
    row.add(script.tokenizer, Turn("system", grammar.tools_line(tools)))
    for turn in (request, call):
        row.add(script.tokenizer, turn)
    question = [ROLE_IDS["tool"], *script.ids(result.text), END, ROLE_IDS["assistant"]]
    return Case(row.ids, question, [*script.ids(answer.text), END])


def roster(counting: bool, most: int, num_tokens: int) -> Callable[[Script], Case]:
    """The names of 2 to `most` people, or how many they are."""

    def make(script: Script) -> Case:
        row = script.told(script.facts(script.rng.randrange(2, most + 1), roster=True), num_tokens)
        names = [subject for subject, _ in script.world.facts]
        if counting:
            question, answer = script.rng.choice(grammar.ASK_COUNT), grammar.counted(names)
        else:
            question, answer = script.rng.choice(grammar.ASK_LIST), grammar.enumerated(names)
        return script.case(row, question, answer)

    return make


def count_up(script: Script) -> Case:
    """Counting aloud."""
    question, answer = grammar.count_up(script.rng)
    return script.case(script.told(script.facts(4), 256), question.text, answer.text)


def small_talk(script: Script) -> Case:
    """Who it is, and what it cannot do."""
    question, answer = grammar.chat(script.rng)
    return script.case(script.told(script.facts(4), 256), question.text, answer.text)


# Name → maker and the share that must be right; None where the figure is only told.
SKILLS: dict[str, tuple[Callable[[Script], Case], float | None]] = {
    **{f"recall, 4 facts, {t} tokens": (recall(4, t), None) for t in (512, 2000)},
    **{f"recall, 8 facts, {t} tokens": (recall(8, t), 0.98) for t in (256, 512, 1024)},
    "recall, 8 facts, 1536 tokens": (recall(8, 1536), 0.95),
    "recall, 8 facts, 2000 tokens": (recall(8, 2000), None),
    **{f"recall, 24 facts, {t} tokens": (recall(24, t), None) for t in (512, 1536)},
    "recall, the first fact after 2000 tokens": (early, None),
    "recall, made-up name": (made_up, None),
    "recall, updated fact": (updated, None),
    "recall, told in the system prompt": (in_system, None),
    "recall, told in the question's turn": (in_question, None),
    "unknown": (unknown, 0.95),
    "bits probe": (bits, 0.99),
    "bits, asked for later": (bits_later, None),
    "copy": (copy, 0.97),
    "tool call": (tool_call, 0.97),
    "tool result": (tool_result, None),
    "list, 2 to 6 people, 256 tokens": (roster(False, 6, 256), 0.90),
    "count, 2 to 6 people, 256 tokens": (roster(True, 6, 256), 0.90),
    "list, 2 to 8 people, 512 tokens": (roster(False, 8, 512), None),
    "count, 2 to 8 people, 512 tokens": (roster(True, 8, 512), None),
    "count aloud": (count_up, None),
    "small talk": (small_talk, None),
}


def skill_share(folder: Path, name: str, num_cases: int) -> float:
    """The share of a skill's cases that were right."""
    model, right = Model(folder), 0
    for index in range(num_cases):
        case = SKILLS[name][0](Script(model.tokenizer, f"{name}-{index}"))
        right += model.answers(case, model.cache_of(case.context))
    return right / num_cases


def scene_of(model: Model, case: Case, name: str) -> Scene:
    """The case's cache, with a foreign dialog's of the same length beside it."""
    script = Script(model.tokenizer, f"foreign-{name}")
    foreign = script.told(script.facts(8), len(case.context) + 64).ids[: len(case.context)]
    num_blocks = len(case.context) // BLOCK
    target = min(case.told_at // BLOCK, num_blocks - 1)
    other = script.rng.choice([b for b in range(num_blocks) if b != target])
    return Scene(model.cache_of(case.context), model.cache_of(foreign), target, other)


PROBES = {"recall": recall(8, 512), "bits": bits, "copy": copy}


def damage_shares(folder: Path, probe: str, num_cases: int) -> dict[str, float]:
    """For each damage, the share of the probe's cases that are still right."""
    model, damages = Model(folder), HARMLESS | DAMAGES
    right = dict.fromkeys(damages, 0)
    for index in range(num_cases):
        case = PROBES[probe](Script(model.tokenizer, f"damage-{probe}-{index}"))
        scene = scene_of(model, case, f"{probe}-{index}")
        for damage, inflict in damages.items():
            right[damage] += model.answers(case, inflict(scene))
    return {damage: count / num_cases for damage, count in right.items()}


def tables(folder: Path, num_cases: int, num_damage_cases: int, num_workers: int) -> Iterator[tuple[str, bool]]:
    """Both tables as lines of Markdown, each with whether it keeps its goal."""
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), prefer_openblas) as pool:
        fewer = max(1, num_cases // 4)  # where nothing is promised
        counts = [num_cases if goal else fewer for _, goal in SKILLS.values()]
        shares = pool.map(skill_share, repeat(folder), SKILLS, counts)
        damaged = pool.map(damage_shares, repeat(folder), PROBES, repeat(num_damage_cases))
        yield f"| skill | right of {num_cases} (without a goal: of {fewer}) | goal |\n|---|---|---|", True
        for (name, (_, goal)), share in zip(SKILLS.items(), shares, strict=True):
            shown = "" if goal is None else f"{goal:.2f}"
            yield f"| {name} | {share:.3f} | {shown} |", goal is None or share >= goal
        columns = list(damaged)
        yield f"\n| damage (n = {num_damage_cases}) | {' | '.join(PROBES)} |\n|---|---|---|---|", True
        for damage in HARMLESS | DAMAGES:
            yield f"| {damage} | {' | '.join(f'{column[damage]:.2f}' for column in columns)} |", True
