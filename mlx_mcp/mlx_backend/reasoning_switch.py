"""Finds the switch that a template has for reasoning: a variable, or words in a message.

Makers name it as they like, so all variables that may be one are tried: one that changes nothing is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_mcp.chat.prompt import NO_EFFORTS, NO_OFF, NO_SWITCH, Reasoning

MAY_SWITCH = re.compile(r"think|reason|effort|thought|cot$", re.IGNORECASE)
# Such words are of variables about earlier thoughts, or about how they are shown.
OTHERWISE = re.compile(r"keep|drop|preserve|clear|truncate|include|past|hist|content|text|part|token|render|add_|raw")
FIRST = ("enable_thinking", "thinking", "thinking_mode", "reasoning_effort", "reasoning", "thinking_budget")
OFF_WORDS = ("off", "disabled", "disable", "no_think", "no_thinking", "none", "no", "false", "minimal")
ON_WORDS = ("on", "enabled", "enable", "think", "thinking", "yes", "true", "high")
INVERTED = re.compile(r"disable|skip|without|^no_")
GRADED = re.compile(r"effort|strength|budget|level|intensity", re.IGNORECASE)
EFFORTS = (Reasoning.LOW, Reasoning.MEDIUM, Reasoning.HIGH)
BUDGETS = {Reasoning.LOW: 512, Reasoning.MEDIUM: 2048, Reasoning.HIGH: 8192}  # tokens, as Seed-OSS was trained for
# Which effort stands for one that a template does not know.
NEAREST = {
    Reasoning.LOW: (Reasoning.LOW, Reasoning.MEDIUM, Reasoning.HIGH),
    Reasoning.MEDIUM: (Reasoning.MEDIUM, Reasoning.HIGH, Reasoning.LOW),
    Reasoning.HIGH: (Reasoning.HIGH, Reasoning.MEDIUM, Reasoning.LOW),
}
# Words that a template takes out of a message, with what they switch.
WORDS = {Reasoning.OFF: "/no_think", Reasoning.ON: "/think"}


@dataclass(frozen=True)
class Setting:
    """What asks a template for one kind of reasoning: variables, and words after the user's message."""

    given: dict[str, Any] = field(default_factory=dict)
    words: str = ""
    notes: tuple[str, ...] = ()


# What a template makes of the same short chat with a setting; None where it refuses that.
Render = Callable[[Setting], str | None]


def find_settings(template: str, variables: dict[str, list[Any]], render: Render) -> dict[Reasoning, Setting]:
    """How each kind of reasoning is asked for; what a template has no switch for has a note that says so."""
    names = sorted(filter(may_switch, variables), key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    toggle = find_toggle(names, variables, render) or find_words(template, render)
    on = toggle[Reasoning.ON] if toggle else Setting()
    efforts = find_efforts([name for name in names if is_graded(name, variables[name])], on, render)
    if not toggle and not efforts:
        return dict.fromkeys(Reasoning, Setting(notes=(NO_SWITCH,)))
    off = toggle[Reasoning.OFF] if toggle else replace(efforts[Reasoning.LOW], notes=(NO_OFF,))
    without_efforts = dict.fromkeys(EFFORTS, replace(on, notes=(NO_EFFORTS,)))
    return {Reasoning.OFF: off, Reasoning.ON: on} | (efforts or without_efforts)


def may_switch(name: str) -> bool:
    """Whether a variable's name is that of a switch."""
    return bool(MAY_SWITCH.search(name)) and not OTHERWISE.search(name)


def is_graded(name: str, constants: list[Any]) -> bool:
    """Whether a variable may have more values than two."""
    return bool(GRADED.search(name)) or bool({"low", "high"} & set(map(str, constants)))


def find_toggle(names: list[str], variables: dict[str, list[Any]], render: Render) -> dict[Reasoning, Setting] | None:
    """The first variable that switches reasoning off and on, and how."""
    for name in names:
        for off, on in pairs(name, variables[name]):
            settings = Setting({name: off}), Setting({} if on is None else {name: on})
            without, with_ = (render(setting) for setting in settings)
            if without is None or with_ is None or with_ == without:
                continue
            shown = isinstance(on, bool) and with_.replace(str(on), str(off)) == without  # the value and nothing else
            if not shown:
                return dict(zip((Reasoning.OFF, Reasoning.ON), settings, strict=True))
    return None


def pairs(name: str, constants: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The values of a variable that may switch reasoning off and on; None leaves it unset."""
    words = [word for word in constants if isinstance(word, str)]
    off = next((word for word in OFF_WORDS if word in words), None)
    if off is not None:
        yield off, next((word for word in ON_WORDS if word in words), None)
    if "budget" in name:
        yield 0, -1
    yield (True, False) if INVERTED.search(name) else (False, True)


def find_words(template: str, render: Render) -> dict[Reasoning, Setting] | None:
    """The words that switch reasoning off and on, if the template takes them out of a message."""
    plain, settings = render(Setting()), {kind: Setting(words=words) for kind, words in WORDS.items()}
    off = render(settings[Reasoning.OFF]) if WORDS[Reasoning.OFF] in template else None
    if off is None or plain is None or off.replace(WORDS[Reasoning.OFF], "").split() == plain.split():
        return None
    return settings if WORDS[Reasoning.ON] in template else settings | {Reasoning.ON: Setting()}


def find_efforts(names: list[str], on: Setting, render: Render) -> dict[Reasoning, Setting]:
    """How low, medium and high effort is asked for with reasoning `on`; empty where no variable grades it."""
    for name in names:
        values: dict[Reasoning, Any] = BUDGETS if "budget" in name else {effort: effort.value for effort in EFFORTS}
        settings = {effort: replace(on, given=on.given | {name: values[effort]}) for effort in EFFORTS}
        texts = {effort: render(setting) for effort, setting in settings.items()}
        known = [effort for effort in EFFORTS if texts[effort] is not None]
        if known and len({texts[effort] for effort in known} | {render(on)}) > 1:
            return {effort: nearest_known(effort, known, settings) for effort in EFFORTS}
    return {}


def nearest_known(effort: Reasoning, known: list[Reasoning], settings: dict[Reasoning, Setting]) -> Setting:
    """What asks for an effort, or for the nearest one that a template knows."""
    nearest = next(each for each in NEAREST[effort] if each in known)
    if nearest is effort:
        return settings[effort]
    note = f"The model's chat template knows no effort {effort.value!r}, so {nearest.value!r} was asked for."
    return replace(settings[nearest], notes=(note,))
