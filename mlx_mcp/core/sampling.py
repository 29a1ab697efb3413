"""How an answer is drawn: one table, from which tool fields, command-line flags and engine parameters are made."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """The range of a number, or the most entries of a tuple. None means no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    max_length: int | None = None

    def hold(self, value: Any) -> bool:
        """Whether a value is inside. None always is; NaN never is, if there is a bound."""
        if value is None:
            return True
        if isinstance(value, Sized):
            return self.max_length is None or len(value) <= self.max_length
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
        )


@dataclass(frozen=True)
class Parameter:
    """One line of the table."""

    type: Any
    default: Any
    bounds: Bounds
    words: str  # what the value may be, for the error that refuses another value
    about: str  # for a model that calls a tool
    flag: str  # for people at a terminal; empty where there is no flag
    asked: Bounds  # the bounds for a tool's argument, if they are narrower than the engine's


def parameter(default: T, bounds: Bounds, words: str, about: str, flag: str = "", asked: Bounds | None = None) -> T:
    """Make a field of Sampling with its line of the table; see Parameter."""
    said = {"bounds": bounds, "words": words, "about": about, "flag": flag, "asked": asked or bounds}
    made: T = field(default=default, metadata=said)
    return made


@dataclass(frozen=True)
class Sampling:
    """The parameters with which an answer is drawn. A new parameter is one line here, and its use.

    `max_tokens` None means 512, or what the context leaves; `seed` None draws one. What is in NEUTRAL is as the model's
    makers recommend where it is None. `stop` strings end the answer, and only in the answer are they looked for: not in
    reasoning, not in tool calls. After `reasoning_budget` tokens of thoughts the family's closing marker is put in
    their way, token by token.

    `temperature` 0 is greedy. Then, in this order: `top_k` keeps the k likeliest tokens (0: all), `top_p` the smallest
    set of the likeliest of these whose probability reaches it, both with whatever is as likely as their last one, and
    `min_p` those at least that fraction as likely as the likeliest. Before all that, `repetition_penalty` divides the
    positive logits of every token of prompt and output and multiplies the negative ones (Keskar et al., arXiv
    1909.05858), `presence_penalty` and `frequency_penalty` are taken off the logits of output tokens once or once per
    occurrence (as in OpenAI's API), and `logit_bias` (token id, bias) is added to the logits of the tokens it names.
    `logprobs` reports each token's log-probability with those of that many of the likeliest tokens. The same `seed` on
    the same tokens draws the same text, whatever else is running.
    """

    # fmt: off
    max_tokens: int | None = parameter(
        None, Bounds(ge=1), "at least 1", "Longest answer, in tokens; by default 512, or what the context leaves.",
        flag="Longest answer, in tokens.", asked=Bounds(ge=1, le=131_072),
    )
    reasoning_budget: int | None = parameter(
        None, Bounds(ge=0), "0 or more", "Thoughts are ended after so many tokens.",
        flag="End thoughts after so many tokens.",
    )
    temperature: float | None = parameter(
        None, Bounds(ge=0, le=5), "from 0 (greedy) to 5",
        "0: the likeliest token each time. By default the model's own, or 0.",
        flag="0 is greedy; the model's own if left out, or 0.",
    )
    top_p: float | None = parameter(
        None, Bounds(gt=0, le=1), "above 0 and at most 1",
        "Draw only from the likeliest tokens that together reach this.",
        flag="Draw from the likeliest tokens that together reach this.",
    )
    stop: tuple[str, ...] = parameter(
        (), Bounds(), "", "Strings that end the answer; not part of it.",
        flag="A string that ends the answer; may be given again.", asked=Bounds(max_length=16),
    )
    seed: int | None = parameter(
        None, Bounds(), "", "The same seed gives the same text for the same call.",
        flag="The same seed gives the same text.", asked=Bounds(ge=0, le=2**32 - 1),
    )
    top_k: int | None = parameter(
        None, Bounds(ge=0), "0 (all tokens) or more", "Draw only from so many of the likeliest tokens; 0: all.",
    )
    min_p: float | None = parameter(
        None, Bounds(ge=0, le=1), "from 0 to 1",
        "Draw only from tokens at least this fraction as likely as the likeliest.",
    )
    repetition_penalty: float | None = parameter(
        None, Bounds(ge=0.01, le=10), "from 0.01 to 10; 1 means none",
        "Above 1: tokens of prompt and answer become less likely.",
    )
    presence_penalty: float = parameter(
        0.0, Bounds(ge=-2, le=2), "from -2 to 2", "Above 0: tokens of the answer become less likely.",
    )
    frequency_penalty: float = parameter(
        0.0, Bounds(ge=-2, le=2), "from -2 to 2",
        "Above 0: the more often a token was in the answer, the less likely.",
    )
    logit_bias: tuple[tuple[int, float], ...] = parameter(
        (), Bounds(max_length=1024), "", "Token id to what is added to its logit, from -100 (never) to 100.",
    )
    logprobs: int | None = parameter(
        None, Bounds(ge=0, le=20), "from 0 to 20",
        "Return log-probabilities, with so many alternatives a token.",
    )
    # fmt: on


# What holds where neither a call nor the model's makers say anything: the likeliest token of all.
NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def defaults_of(generation_config: dict[str, Any]) -> dict[str, float]:
    """What a model's makers recommend in its generation_config.json, by the names in NEUTRAL.

    `do_sample` false means temperature 0, and true without a temperature means 1, as in transformers. Values that
    cannot be are left out.
    """
    found = {name: generation_config.get(name) for name in NEUTRAL}
    if generation_config.get("do_sample") is False:
        found = {"temperature": 0.0, "repetition_penalty": found["repetition_penalty"]}
    elif generation_config.get("do_sample") is True and found["temperature"] is None:
        found["temperature"] = 1.0
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float) and value is not True}
    return {
        name: int(value) if name == "top_k" else float(value)
        for name, value in numbers.items()
        if value is not False and PARAMETERS[name].bounds.hold(value) and (name != "top_k" or value == int(value))
    }


TYPES = get_type_hints(Sampling)
PARAMETERS = {each.name: Parameter(TYPES[each.name], each.default, **each.metadata) for each in fields(Sampling)}
