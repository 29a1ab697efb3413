"""Requests → what the service takes. Pure.

What a model here cannot do is ignored if it is a hint, and refused only if the answer would be wrong without it. What
is ignored is told by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mcp.api.anthropic.messages import Ignored, chat_of, references
from mlx_mcp.api.anthropic.shapes import CountRequest, MessagesRequest, OutputFormat, Taken, Tool, ToolChoice
from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import AUTO, NO_SWITCH, NONE, REQUIRED, Grammar, GrammarKind, Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options
from mlx_mcp.service.values import Sampling

# Fields that are known to be hints; of others nobody should be told the names, which are a caller's.
HINTS = frozenset(
    "cache_control citations container context_management diagnostics display eager_input_streaming inference_geo "
    "input_examples mcp_servers metadata priority service_tier speed strict task_budget verbosity".split()
)
EFFORTS = {
    "low": Reasoning.LOW,
    "medium": Reasoning.MEDIUM,
    "high": Reasoning.HIGH,
    "xhigh": Reasoning.HIGH,
    "max": Reasoning.HIGH,
}
CHOICES = {"auto": AUTO, "any": REQUIRED, "none": NONE}


@dataclass(frozen=True)
class Told:
    """A request as the service takes it."""

    messages: tuple[Message, ...]
    options: Options
    ignored: frozenset[str]  # names of fields and kinds
    one_call: bool = False  # of several calls only the first is wanted
    silent: bool = False  # only the prompt is computed
    unasked: tuple[str, ...] = ()  # notes on what was not asked for

    @property
    def context(self) -> Context:
        """What the model is told."""
        return Context(messages=self.messages)


def told_by(request: CountRequest, lane: str = "") -> Told:
    """What a request says, in the service's terms; `lane` is whose turn it shares.

    Raises:
        InvalidRequest: it cannot be understood; the text says which part.
    """
    ignored = Ignored()
    messages = chat_of(request.system, request.messages, ignored)
    tools = functions(request.tools or (), references(request.messages), ignored)
    options = Options(
        model=request.model,
        tools=tools,
        grammar=grammar_of(request),
        reasoning=reasoning_of(request, ignored),
        sampling=sampling_of(request),
        tool_choice=choice_of(request.tool_choice),
        lane=lane,
        shorten=True,
    )
    note_hints(request, ignored)
    return Told(
        messages,
        options,
        frozenset(ignored.names),
        one_call=bool(request.tool_choice and request.tool_choice.disable_parallel_tool_use),
        silent=isinstance(request, MessagesRequest) and request.max_tokens == 0,
        unasked=() if request.thinking else (NO_SWITCH,),
    )


def functions(tools: Sequence[Tool], referred: set[str], ignored: Ignored) -> tuple[dict[str, Any], ...]:
    """The tools that the model is told of, as functions in OpenAI's form.

    Those that come later are left out until a result refers to them, and so is what only Anthropic's servers can run.
    """
    made = []
    for tool in tools:
        if tool.type not in (None, "custom") or tool.input_schema is None:
            ignored.names.add("tools of other types")
        elif tool.defer_loading and tool.name not in referred:
            ignored.names.add("defer_loading")
        else:
            function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            made.append({"type": "function", "function": function})
    return tuple(made)


def choice_of(choice: ToolChoice | None) -> str:
    """Which tools the model may or must call.

    Raises:
        InvalidRequest: a tool must be called, and it is not said which.
    """
    if choice is None:
        return AUTO
    if choice.type != "tool":
        return CHOICES[choice.type]
    if not choice.name:
        raise InvalidRequest('tool_choice is of the type "tool" and names none: give its name, or choose "any".')
    return choice.name


def reasoning_of(request: CountRequest, ignored: Ignored) -> Reasoning | None:
    """How long the model shall think; where nothing is said of thinking it shall not, as in Anthropic's API."""
    thinking = request.thinking
    given = request.output_config.effort if request.output_config else None
    if given is not None and given not in EFFORTS:
        ignored.names.add("effort")
    if thinking is None or thinking.type == "disabled":
        return Reasoning.OFF
    return EFFORTS.get(given or "", Reasoning.ON if thinking.type == "enabled" else None)


def grammar_of(request: CountRequest) -> Grammar | None:
    """The schema that the answer obeys.

    Raises:
        InvalidRequest: a format is asked for that is none.
    """
    config = request.output_config
    wanted: OutputFormat | None = (config.format if config else None) or request.output_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type != "json_schema" or wanted.json_schema is None:
        raise InvalidRequest(
            'The format of the output is none that is known: give {"type": "json_schema", "schema": …}.'
        )
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(wanted.json_schema))


def sampling_of(request: CountRequest) -> Sampling:
    """How the answer is drawn; what is not said is as the model's makers recommend."""
    if not isinstance(request, MessagesRequest):
        return Sampling()
    thinking = request.thinking
    return Sampling(
        max_tokens=None if request.max_tokens is None else max(1, request.max_tokens),
        reasoning_budget=thinking.budget_tokens if thinking and thinking.type == "enabled" else None,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        stop=tuple(request.stop_sequences or ()),
    )


def note_hints(part: Any, ignored: Ignored) -> None:
    """Note the fields that are not looked at, in all parts of a request."""
    if isinstance(part, Taken):
        for name in part.model_extra or ():
            ignored.names.add(name if name in HINTS else "unknown fields")
        for name in type(part).model_fields:
            note_hints(getattr(part, name), ignored)
    elif isinstance(part, list):
        for each in part:
            note_hints(each, ignored)
