"""The forms in which templates expect messages and tools: which of them fits a template is found by rendering."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

LATER_AS_USER = "The model's chat template takes no system messages amid a chat, so those are in messages of the user."
FOLDED = "The model's chat template has no system role, so the system prompt is in the first message of the user."
CALLS_AS_TEXT = "The model's chat template does not take calls of tools, so they are text in the model's messages."
RESULTS_AS_TEXT = "The model's chat template does not take results of tools, so they are text in messages of the user."
TOLD = "The model's chat template does not show tools, so they are told in the system prompt."
BREAK = "\n\n"


@dataclass(frozen=True)
class Variant:
    """Messages and tools as a template gets them, and what the caller should know of that."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    notes: tuple[str, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)  # beside messages and tools


Change = Callable[[Variant], Variant]


def variants(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], names: Iterable[str], notation: Callable[[], str]
) -> Iterator[Variant]:
    """All forms that these can have, those that change least first; the first one is what most templates take.

    `names` are those of the template's variables. `notation` says how the template writes calls, if it does.
    """
    plain = Variant(messages, [filled(tool) for tool in tools] or None)
    roles = {message["role"] for message in messages}
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    # Each change with its price: what changes the meaning comes after any number of others.
    axes: list[list[tuple[float, Change | None]]] = [
        [(0, None), (5, with_calls_as_text)] if calls else [],
        [(0, None), (10, with_results_of_user)] if "tool" in roles else [],
        [(0, None), (20, lambda variant: told(variant, notation()))] if tools else [],
        [(0, None), *of_systems(messages)] if "system" in roles or tools else [],
        [(0, None), (1, without_empty_content)] if calls else [],
        [(0, None), (1, with_kimis_ids), (1, with_mistrals_ids)] if calls else [],
        [(0, None), (1, with_text_arguments)] if calls else [],
        [(0, None), (1, in_parts)],
        [(0, None), (1, typed_tools), (1, bare_tools)] if tools else [(0, None), (1, with_empty_tools)],
        [(0, None), (1, lambda variant: with_other_names(variant, names))] if tools else [],
    ]
    choices = sorted(product(*filter(None, axes)), key=lambda choice: sum(price for price, _ in choice))
    for choice in choices:
        variant = plain
        for _, change in choice:  # in parts after all that takes contents for texts
            if change is not None:
                variant = change(variant)
        yield variant


def filled(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with all that templates take for granted: a description, and the parameters of an object."""
    function = dict(tool["function"])
    parameters = {"type": "object", "properties": {}} | (function.get("parameters") or {})
    parameters["properties"] = {
        name: {key: value for key, value in schema.items() if key != "description" or value is not None}
        if isinstance(schema, dict)
        else schema
        for name, schema in (parameters.get("properties") or {}).items()
    }
    named = {"name": function.pop("name"), "description": function.pop("description", None) or ""}
    return {"type": "function"} | tool | {"function": named | function | {"parameters": parameters}}


def typed_tools(variant: Variant) -> Variant:
    """For templates that look at the one type of every parameter."""
    return replace(variant, tools=[with_parameters(tool, typed) for tool in variant.tools or ()])


def with_parameters(tool: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A tool with other parameters."""
    function = tool["function"]
    return tool | {"function": function | {"parameters": change(function["parameters"])}}


def typed(schema: Any) -> Any:
    """A schema in which everything has one type and a description, as far as can be told."""
    if not isinstance(schema, dict):
        return {"type": "string", "description": ""}
    made = dict(schema)
    options = [option for option in made.get("anyOf") or made.get("oneOf") or () if isinstance(option, dict)]
    kinds = made.get("type") or [option.get("type") for option in options]
    kinds = kinds if isinstance(kinds, list) else [kinds]
    made["type"] = next((kind for kind in kinds if isinstance(kind, str) and kind != "null"), "string")
    made["description"] = made.get("description") or ""
    if made["type"] == "object":
        made["properties"] = {name: typed(each) for name, each in (made.get("properties") or {}).items()}
        made["required"] = made.get("required") or []
    if made["type"] == "array":
        made["items"] = typed(made.get("items"))
    return made


def bare_tools(variant: Variant) -> Variant:
    """For templates that expect functions without the wrapping of OpenAI's form."""
    return replace(variant, tools=[tool["function"] for tool in variant.tools or ()])


def with_empty_tools(variant: Variant) -> Variant:
    """For templates that go through the tools without asking whether there are any."""
    return replace(variant, tools=[])


def with_other_names(variant: Variant, names: Iterable[str]) -> Variant:
    """For templates that have tools in a variable of another name."""
    others = [name for name in names if "tools" in name and name != "tools"]
    return replace(variant, given=variant.given | dict.fromkeys(others, variant.tools))


def told(variant: Variant, notation: str) -> Variant:
    """For templates that show calls, but not which tools there are: with the tools in the system prompt.

    The words are those of DeepSeek V3.1's model card, whose template is such a one.
    """
    if not notation:
        return variant
    functions = [tool.get("function", tool) for tool in variant.tools or ()]
    each = [
        f"### {function['name']}\nDescription: {function['description']}\n\n"
        f"Parameters: {json.dumps(function['parameters'], ensure_ascii=False)}"
        for function in functions
    ]
    text = BREAK.join(["## Tools\nYou have access to the following tools:", *each])
    text += f"\n\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n{notation}"
    first, *rest = variant.messages
    if first["role"] == "system" and isinstance(first["content"], str):
        first = first | {"content": BREAK.join([first["content"], text])}
    else:
        first, rest = {"role": "system", "content": text}, variant.messages
    return replace(variant, messages=[first, *rest], tools=None, notes=(*variant.notes, TOLD))


def in_parts(variant: Variant) -> Variant:
    """For templates that expect the content of a message as a list of parts."""
    messages = [
        message | {"content": [{"type": "text", "text": message["content"]}]} if message["content"] else message
        for message in variant.messages
    ]
    return replace(variant, messages=messages)


def with_calls(variant: Variant, change: Callable[[dict[str, Any], int], dict[str, Any]]) -> Variant:
    """With each call changed, which are counted over all messages."""
    messages, index = [], 0
    for message in variant.messages:
        calls = message.get("tool_calls", ())
        made = [change(call, index + i) for i, call in enumerate(calls)]
        messages.append(message | {"tool_calls": made} if calls else message)
        index += len(calls)
    return replace(variant, messages=messages)


def with_text_arguments(variant: Variant) -> Variant:
    """For templates that expect arguments as JSON text, which is what OpenAI's API has."""

    def as_text(call: dict[str, Any], _: int) -> dict[str, Any]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return call | {"function": function | {"arguments": text}}

    return with_calls(variant, as_text)


def with_kimis_ids(variant: Variant) -> Variant:
    """For templates that show a call's id in place of its name."""
    return with_ids(variant, lambda name, index: f"functions.{name}:{index}")


def with_mistrals_ids(variant: Variant) -> Variant:
    """For templates that want ids of nine letters or digits."""
    return with_ids(variant, lambda _, index: f"{index:09}")


def with_ids(variant: Variant, make: Callable[[str, int], str]) -> Variant:
    """With other ids of calls; each result gets that of the call that had its id, or the next one in order."""
    made: list[str] = []
    by_id: dict[str, str] = {}

    def change(call: dict[str, Any], index: int) -> dict[str, Any]:
        made.append(make(call["function"]["name"], index))
        by_id[call.get("id", "")] = made[-1]
        return call | {"id": made[-1]}

    variant = with_calls(variant, change)
    in_order = iter(made)
    messages = []
    for message in variant.messages:
        if message["role"] == "tool":
            following = next(in_order, "")
            given = message.get("tool_call_id", "")
            message = message | {"tool_call_id": by_id.get(given, following) if given else following}
        messages.append(message)
    return replace(variant, messages=messages)


def without_empty_content(variant: Variant) -> Variant:
    """For templates that tell an answer with calls from others by its content, which is None."""
    messages = [
        message | {"content": None} if message.get("tool_calls") and not message["content"] else message
        for message in variant.messages
    ]
    return replace(variant, messages=messages)


def of_systems(messages: list[dict[str, Any]]) -> list[tuple[float, Change | None]]:
    """What can be done with system messages, with its price; those amid a chat stay where they are."""
    if not any(message["role"] == "system" for message in messages[1:]):
        return [(2.5, with_folded_system)]
    return [(2, with_later_systems_of_user), (2.5, lambda each: with_folded_system(with_later_systems_of_user(each)))]


def with_later_systems_of_user(variant: Variant) -> Variant:
    """For templates that take a system message at the beginning only: later ones join the user's message beside them.

    It is the one before, if there is one, so that a chat that goes on begins as it did.
    """
    messages: list[dict[str, Any]] = []
    turned = False  # whether the last of these was a system message
    for i, message in enumerate(variant.messages):
        later = i > 0 and message["role"] == "system"
        if later:
            message = {"role": "user", "content": message["content"]}
        if (later or turned) and messages and message["role"] == messages[-1]["role"] == "user":
            joined = BREAK.join([messages[-1]["content"], message["content"]])
            messages[-1] = messages[-1] | {"content": joined}
        else:
            messages.append(message)
        turned = later or (turned and message["role"] == "user")
    return replace(variant, messages=messages, notes=(*variant.notes, LATER_AS_USER))


def with_folded_system(variant: Variant) -> Variant:
    """For templates without a system role."""
    systems = [message["content"] for message in variant.messages if message["role"] == "system"]
    if not systems:
        return variant
    rest = [message for message in variant.messages if message["role"] != "system"]
    if not rest or rest[0]["role"] != "user":
        rest = [{"role": "user", "content": ""}, *rest]
    first = rest[0] | {"content": BREAK.join([*systems, rest[0]["content"]])}
    return replace(variant, messages=[first, *rest[1:]], notes=(*variant.notes, FOLDED))


def with_calls_as_text(variant: Variant) -> Variant:
    """For templates that leave calls out: they follow the content of their message, in JSON."""
    messages = []
    for message in variant.messages:
        if "tool_calls" in message:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
            content = "\n".join(filter(None, [message["content"], *calls]))
            message = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
        messages.append(message)
    return replace(variant, messages=messages, notes=(*variant.notes, CALLS_AS_TEXT))


def with_results_of_user(variant: Variant) -> Variant:
    """For templates without a role for results. They share a message with what the user says next."""
    messages: list[dict[str, Any]] = []
    for message in variant.messages:
        if message["role"] == "tool":
            name = message.get("name", "")
            message = {"role": "user", "content": f"Result{' of ' if name else ''}{name}:\n{message['content']}"}
        if messages and message["role"] == messages[-1]["role"] == "user":
            joined = BREAK.join([messages[-1]["content"], message["content"]])
            messages[-1] = messages[-1] | {"content": joined}
        else:
            messages.append(message)
    return replace(variant, messages=messages, notes=(*variant.notes, RESULTS_AS_TEXT))
