"""Grammars of calls, by what templates show, in the ways in which families write them."""

import json
import math
import random
import re

import jsonschema
import pytest

from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Holding, Prompt
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.mlx_backend.call_grammar import CallGrammar
from mlx_mcp.mlx_backend.call_notation import HARMONY_CALLS
from mlx_mcp.mlx_backend.chat_template import Chat
from tests.effort import drawn
from tests.mlx_backend.tokenizers_made import make_tokenizer


def written(call):
    """A template that writes each call so."""
    return (
        "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + call + "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def elements(key, value, close, before=""):
    each = f"{{% for k, v in f.arguments | items %}}{key}{{{{ k }}}}{value}"
    return before + each + "{{ v if v is string else v | tojson }}" + close + "{% endfor %}"


GLM = ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
JSON = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
# What a template writes for a call, tokens that no text spells, and others.
FAMILIES = {
    "hermes": (f"<tool_call>\n{JSON}\n</tool_call>", [], ["<tool_call>", "</tool_call>"]),
    "hermes, as texts": (f"<tool_call>{JSON}</tool_call>", [], []),
    "a list": (f"<tool_calls>[{JSON}]</tool_calls>", ["<tool_calls>", "</tool_calls>"], []),
    "mistral": ("[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}", ["[TOOL_CALLS]", "[ARGS]"], []),
    "mistral, with ids": (
        "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ c.id }}[ARGS]{{ f.arguments | tojson }}",
        ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
        [],
    ),
    "qwen3-coder": (
        elements("\n<parameter=", ">\n", "\n</parameter>", "<tool_call>\n<function={{ f.name }}>")
        + "\n</function>\n</tool_call>",
        [],
        ["<tool_call>", "</tool_call>"],
    ),
    "glm": (
        elements("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "<tool_call>{{ f.name }}")
        + "\n</tool_call>",
        GLM,
        [],
    ),
    "glm, as texts": (
        elements("<arg_key>", "</arg_key><arg_value>", "</arg_value>", "<tool_call>{{ f.name }}") + "</tool_call>",
        [],
        GLM,
    ),
}


def tool(name, required, **properties):
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = (
    tool("lookup", ["key"], key={"type": "string"}, n={"type": "integer", "minimum": 0, "maximum": 99}),
    tool("weather", ["city", "day"], city={"enum": ["Paris", "Oslo"]}, day={"enum": [1, 2]}, sure={"type": "boolean"}),
    tool("now", []),
)
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
RIGHT = [
    ToolCall("lookup", {"key": 'a <b> "q" </p\nand </arg or more'}, "abcdefgh1"),
    ToolCall("lookup", {"key": "", "n": 5}, "abcdefgh1"),
    ToolCall("weather", {"city": "Oslo", "day": 2}, "abcdefgh1"),
    ToolCall("now", {}, "abcdefgh1"),
]
WRONG = [
    ToolCall("weather", {"city": "Bonn", "day": 2}, "abcdefgh1"),
    ToolCall("weather", {"city": "Oslo", "day": 3}, "abcdefgh1"),
    ToolCall("weather", {"city": "Oslo"}, "abcdefgh1"),
    ToolCall("lookup", {"key": "x", "n": "5x"}, "abcdefgh1"),
    ToolCall("find", {}, "abcdefgh1"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    call, special, added = FAMILIES[request.param]
    return make_tokenizer(tmp_path_factory.mktemp("family"), written(call), added, special)


def required(tokenizer, tools=TOOLS):
    """What holds an answer to begin with a call."""
    held = tokenizer.hold(Prompt(()), Holding(thinks=False, tools=tools, tool_choice="required"), tokenizer.vocab_size)
    assert held is not None
    return held


def lets_begin(held, ids):
    """Whether a constraint lets an answer begin with these tokens."""
    for token_id in ids:
        mask = held.mask()
        if mask is not None and not int.from_bytes(mask, "little") >> token_id & 1:
            return False
        held.accept(token_id)
    return True


def allows(held, ids):
    """Whether a constraint lets an answer begin with these tokens, and asks for no more."""
    return lets_begin(held, ids) and not held.awake


def shown(tokenizer, call):
    """The tokens of a call as the template shows it."""
    messages = [Message("user", "x"), Message("assistant", tool_calls=(call,))]
    marked = tokenizer._template.render(Chat(messages, TOOLS)).marked
    ids = tokenizer._encoder.encode_following(marked.pieces(), lambda: False)
    start = tokenizer._encoder.encode_following(["<|im_start|>assistant\n"], lambda: False)
    stop = max(tokenizer.stop_ids)
    first = max(i for i in range(len(ids)) if ids[i : i + len(start)] == start and ids[i + len(start) :])
    answer = ids[first + len(start) :]
    return answer[: answer.index(stop)]


@pytest.mark.parametrize("call", RIGHT, ids=str)
def test_a_call_can_be_written_as_the_template_shows_it(family, call):
    assert allows(required(family), shown(family, call))


@pytest.mark.parametrize("call", WRONG, ids=str)
def test_a_call_that_does_not_obey_cannot_be_written(family, call):
    assert not allows(required(family), shown(family, call))


@pytest.mark.parametrize("seed", range(drawn(20)))
def test_whatever_can_be_written_is_read_as_a_call_that_obeys(family, seed):
    draw, held = random.Random(seed), required(family)
    reader = family.reader(Prompt(()), TOOLS)
    closers, ids = set(map(ord, '"<}]\\n')) if seed % 2 else set(), []
    for _ in range(2000):
        if not held.awake:
            break
        bits = int.from_bytes(held.mask(), "little")
        allowed = [i for i in range(family.vocab_size) if bits >> i & 1]
        likely = [i for i in allowed if ord(family.token_text(i)[:1] or "x") in closers or len(allowed) < 40]
        token_id = draw.choice(likely if likely and draw.random() < 0.6 else allowed)
        held.accept(token_id)
        reader.add(token_id)
        ids.append(token_id)
    if held.awake:  # texts have no bounds here
        return
    reader.finish()
    if any("is too large" in note for note in reader.notes):  # JSON's grammar has such, and nobody can hold them
        written = "".join(map(family.token_text, ids))
        assert any(math.isinf(float(number)) for number in re.findall(r"\d+[eE]\+?\d+", written))
        return
    assert reader.notes == ()
    for call in reader.tool_calls:
        jsonschema.validate(call.arguments, SCHEMAS[call.name])
    assert reader.tool_calls


def test_several_calls_of_one_list_are_allowed(tmp_path):
    call, special, added = FAMILIES["a list"]
    tokenizer = make_tokenizer(tmp_path, written(call), added, special)
    one, two = ({"name": "lookup", "arguments": {"key": key}} for key in "ab")
    text = f"<tool_calls>{json.dumps([one, two])}</tool_calls>"
    assert allows(required(tokenizer), tokenizer._encoder.encode_following([text], lambda: False))


def test_calls_are_held_from_their_marker_on_where_none_is_required(family):
    held = family.hold(Prompt(()), Holding(tools=TOOLS), family.vocab_size)
    for token_id in family._encoder.encode_following(["Let me see. "], lambda: False):
        assert not held.awake
        held.accept(token_id)
    for call in RIGHT:
        assert allows(held, shown(family, call))
    assert not allows(held, shown(family, WRONG[0]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"type": "string", "maxLength": 3}, "not supported where arguments are not JSON: maxLength"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "are not JSON: a parameter without a type"),
    ],
)
def test_what_arguments_that_are_not_json_cannot_be_held_to_is_named(tmp_path, given, words):
    call, special, added = FAMILIES["qwen3-coder"]
    tokenizer = make_tokenizer(tmp_path, written(call), added, special)
    with pytest.raises(InvalidRequest, match=words):
        required(tokenizer, (tool("f", ["x"], x=given),))


def test_where_a_notation_names_types_only_texts_and_numbers_can_be_held(tmp_path):
    close, kind = "<|close|>argument<|sep|>", "{{ 'string' if v is string else 'number' }}"
    each = elements(
        '<|open|>argument key="', f'" type="{kind}"<|sep|>', close, '<|open|>call tool="{{ f.name }}"<|sep|>'
    )
    call = f"<|open|>tools<|sep|>{each}<|close|>call<|sep|><|close|>tools<|sep|>"
    tokenizer = make_tokenizer(tmp_path, written(call), special=["<|open|>", "<|close|>", "<|sep|>"])
    required(tokenizer, (tool("f", ["x", "n"], x={"type": "string"}, n={"type": "number"}),))
    told = "not supported in this model's notation: arguments that are neither texts nor numbers"
    with pytest.raises(InvalidRequest, match=told):
        required(tokenizer, (tool("f", ["x"], x={"type": "boolean"}),))


def test_what_has_no_grammar_is_refused_where_a_call_is_required_and_free_where_not(family):
    tools = (tool("f", [], x={"type": "integer", "not": {"const": 3}}),)
    for _ in range(2):
        with pytest.raises(
            InvalidRequest,
            match=r"Calls cannot be held to the tools' parameters: not supported.*Write them in another way",
        ):
            required(family, tools)
        assert family.hold(Prompt(()), Holding(tools=tools), family.vocab_size) is None


PYTHONIC = "<|tool_call_start|>[{{ f.name }}({% for k, v in f.arguments | items %}{{ k }}={{ v }}, {% endfor %})]"


def test_where_a_template_shows_no_call_its_family_says_how_calls_are_written(tmp_path):
    special = ["<|tool_call_start|>", "<|tool_call_end|>"]
    tokenizer = make_tokenizer(tmp_path, written(PYTHONIC + "<|tool_call_end|>"), special=special)
    right = '<|tool_call_start|>[weather(city="Oslo", day=2)]<|tool_call_end|>'
    for text in (right, right.replace("2", "3"), right.replace("Oslo", "Bonn"), right.replace("weather", "find")):
        ids = tokenizer._encoder.encode_following([text], lambda: False)
        assert lets_begin(required(tokenizer), ids) == (text == right)
    assert tokenizer.hold(Prompt(()), Holding(tools=TOOLS), tokenizer.vocab_size) is None


def test_a_call_cannot_be_required_where_nobody_knows_how_calls_are_written(tmp_path):
    special = ["]<]minimax[>["]
    tokenizer = make_tokenizer(tmp_path, written("]<]minimax[>["), special=special)
    with pytest.raises(InvalidRequest, match="How this model writes calls is not known well enough"):
        required(tokenizer)
    assert tokenizer.hold(Prompt(()), Holding(tools=TOOLS), tokenizer.vocab_size) is None


def test_a_call_of_gpt_oss_is_a_message_for_a_function(tmp_path):
    special = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>"]
    tokenizer = make_tokenizer(tmp_path, written("{# <|channel|> <|message|> #}"), special=special)
    assert tokenizer._holdings._find_notation() == HARMONY_CALLS
    text = '<|channel|>commentary to=functions.lookup <|constrain|>json<|message|>{"key": "a"}'
    ids = tokenizer._encoder.encode_following([text], lambda: False)
    assert allows(required(tokenizer), ids)
    reader = tokenizer.reader(Prompt(()), TOOLS)
    for token_id in ids:
        reader.add(token_id)
    reader.finish()
    assert reader.tool_calls == (ToolCall("lookup", {"key": "a"}),)


def test_texts_that_look_like_ids_are_free_in_a_grammar(tmp_path):
    grammar = CallGrammar(HARMONY_CALLS, make_tokenizer(tmp_path)._controls, frozenset())
    assert grammar.literal("a000000001b:0<10") == '"a" /[a-zA-Z0-9]{9}/ "b:" /[0-9]{1,3}/ "<10"'
