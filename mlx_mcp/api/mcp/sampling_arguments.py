"""The arguments that tools have of the table of sampling parameters, and which of them are options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

from mlx_mcp.api.web.sampling import with_sampling as with_fields

A = TypeVar("A", bound=BaseModel)

DAILY = ("max_tokens", "temperature")  # the others are options
OPTIONS = {
    "stop": "stop (texts)",
    "logit_bias": "logit_bias ({token id: bias})",
    "logprobs": "logprobs (how many a token)",
    "reasoning_budget": "reasoning_budget (tokens)",
}


def with_sampling(without: tuple[str, ...] = ()) -> Callable[[type[A]], type[A]]:
    """Give a tool's arguments those of the table of sampling parameters, `without` some."""
    return with_fields(without, shown)


def shown(name: str) -> dict[str, Any]:
    """How a parameter is shown: among the options, unless it is needed daily."""
    return {} if name in DAILY else {"json_schema_extra": {"option": OPTIONS.get(name, name)}}
