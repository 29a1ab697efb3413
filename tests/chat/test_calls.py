"""The law of tool calls: none is lost or changed silently, and what is no call is text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_mcp.chat.formats.detect import format_of
from mlx_mcp.chat.message import ToolCall
from tests.chat.test_reader import read
from tests.chat.written import FAMILIES, TOOLS

HERMES, QWEN, GLM = (FAMILIES[name].form for name in ("hermes", "qwen-xml", "glm"))
MISTRAL, HARMONY, LFM = (FAMILIES[name].form for name in ("mistral", "harmony", "lfm"))
LLAMA, LLAMA_4, GEMMA = (FAMILIES[name].form for name in ("llama", "llama-4", "gemma-4"))
LOOK_AT = [ToolCall("look", {"at": "x"})]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A function with these parameters."""
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def hermes(call: str) -> str:
    """The call between the markers that most families have."""
    return f"<tool_call>{call}</tool_call>"


def qwen(**values: str) -> str:
    """A call of `look` in Qwen's elements."""
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=look>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize("text", ["007", "true", "null", "1e3", '{"a": 1}', " two  spaces ", "a\nb\n", '"quoted"', ""])
def test_a_string_is_exactly_what_was_written(text):
    assert read(QWEN, [qwen(at=text)])[1] == [ToolCall("look", {"at": text})]
    pairs = f"<tool_call>look<arg_key>at</arg_key><arg_value>{text}</arg_value></tool_call>"
    assert read(GLM, [pairs])[1] == [ToolCall("look", {"at": text})]


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "integer"}, "3", 3),
        ({"type": "number"}, "-2.50", -2.5),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "array"}, '["a", 1]', ["a", 1]),
        ({"type": "object"}, '{"a": null}', {"a": None}),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, '"x"', '"x"'),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "007", "007"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", 7),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({}, "007", "007"),
        ({}, "[1]", [1]),
    ],
)
def test_a_value_has_the_type_that_the_schema_says(schema, written, value):
    found = read(QWEN, [qwen(p=written)], tools=[tool("look", p=schema)])
    assert found[1:] == ([ToolCall("look", {"p": value})], ())
    assert json.dumps(found[1][0].arguments) == json.dumps({"p": value})


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({"type": "integer"}, "three"),
        ({"type": "integer"}, "3.5"),
        ({"type": "boolean"}, "yes"),
        ({"type": "array"}, "a, b"),
        ({"type": "number"}, "NaN"),
        ({"type": "object"}, '{"a": 1, "a": 2}'),
    ],
)
def test_a_value_that_is_not_of_its_type_comes_back_as_it_was_written_with_a_note(schema, written):
    _, calls, notes = read(QWEN, [qwen(p=written)], tools=[tool("look", p=schema)])
    assert calls == [ToolCall("look", {"p": written})]
    assert notes == (f"The call of 'look' does not obey its schema: p is no {schema['type']}.",)


@pytest.mark.parametrize(
    ("arguments", "misfit"),
    [
        ('{"times": 2}', "at is missing"),
        ('{"at": "x", "where": 1}', "where is not one of its parameters"),
        ('{"at": 1}', "at is no string"),
        ('{"at": "x", "times": true}', "times is no integer"),
    ],
)
def test_a_call_that_does_not_obey_its_schema_comes_back_with_a_note(arguments, misfit):
    _, calls, notes = read(HERMES, [hermes(f'{{"name": "look", "arguments": {arguments}}}')])
    assert calls == [ToolCall("look", json.loads(arguments))]
    assert notes == (f"The call of 'look' does not obey its schema: {misfit}.",)


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "look", "parameters": {"at": "x"}}',
        '{"name": "look", "args": {"at": "x"}}',
        '{"tool_name": "look", "input": {"at": "x"}}',
        '{"function": "look", "arguments": {"at": "x"}}',
        '{"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}',
        '{"arguments": "{\\"at\\": \\"x\\"}", "name": "look"}',
        '[{"name": "look", "arguments": {"at": "x"}}]',
        '{"name": "look", "at": "x"}',
        '{"name": "functions.look", "arguments": {"at": "x"}}',
        "{'name': 'look', 'arguments': {'at': 'x'}}",
        '```json\n{"name": "look", "arguments": {"at": "x"}}\n```',
    ],
)
def test_near_misses_of_small_models_are_calls(call):
    assert read(HERMES, [hermes(call)])[1:] == (LOOK_AT, ())
    assert read(HERMES, [f"<tool_call>\n{call}\n"])[1:] == (LOOK_AT, ()), "without the end marker"


def test_an_id_that_the_model_gave_a_call_is_kept():
    from mlx_mcp.chat.reader_of import reader_of

    reader = reader_of(MISTRAL, tools=TOOLS)
    reader.feed('[TOOL_CALLS]look[CALL_ID]abc123def[ARGS]{"at": "x"}')
    reader.finish()
    assert reader.tool_calls == (ToolCall("look", {"at": "x"}, "abc123def"),)


@pytest.mark.parametrize(
    "call",
    [
        "look!",
        '{"name": "look", "arguments": {"at": "x"',
        '{"name": "look", "arguments": {"at": "x"}, "at": "y"}',
        '{"name": "look", "arguments": {"at": "x"}, "parameters": {"at": "y"}}',
        '{"name": "look", "arguments": {"at": "x", "at": "y"}}',
        '{"name": "look", "arguments": {"at": NaN}}',
        '{"name": "look", "arguments": {"at": 1e999}}',
        '{"name": "look", "arguments": {"at": "\\ud800"}}',
        '{"name": "look", "arguments": [1]}',
        '{"name": "look", "arguments": "x"}',
        '{"arguments": {"at": "x"}}',
        '"look"',
        "[" * 5000,
    ],
)
def test_what_cannot_be_read_is_text_with_a_note_and_what_follows_is_read(call):
    bad, good = hermes(call), hermes('{"name": "look", "arguments": {"at": "x"}}')
    pieces, calls, notes = read(HERMES, [f"Well.{bad}{good}"])
    assert (pieces, calls) == ([("answer", f"Well.{bad}"), ("tool_call", good)], LOOK_AT)
    assert len(notes) == 1


def test_a_call_of_a_tool_that_was_not_offered_is_text_with_a_note():
    written = hermes('{"name": "burn", "arguments": {}}')
    pieces, calls, notes = read(HERMES, [written])
    assert (pieces, calls) == ([("answer", written)], [])
    assert notes == ("What the model wrote as a tool call names 'burn', which was not offered; it is text.",)
    assert read(HERMES, [written], tools=())[0] == [("answer", written)]


def test_a_section_of_a_call_that_was_not_offered_is_text_to_its_end():
    for name in ("kimi-k2", "deepseek", "qwen-xml", "dsml"):
        family = FAMILIES[name]
        written = f"So. {family.calls}"
        assert read(family.form, written, tools=[tool("burn")])[:2] == ([("answer", written)], []), name


def test_markers_and_calls_within_arguments_end_nothing():
    inner = "See <tool_call>{}</tool_call> and </tool_call>."
    call = json.dumps({"name": "look", "arguments": {"at": inner}})
    assert read(HERMES, hermes(call))[1] == [ToolCall("look", {"at": inner})]
    for inner in (
        f"An example:\n{qwen(at='y')}\nand so on",
        "Close with </parameter> and </function>.",
        "Close with </parameter></function> then.",
        "Open with <parameter=at> alone.",
    ):
        assert read(QWEN, qwen(at=inner, times="2"))[1] == [ToolCall("look", {"at": inner, "times": 2})], inner


def test_an_end_marker_of_a_value_may_be_missing_where_that_can_mean_one_thing_only():
    written = qwen(at="x", times="2").replace("\nx\n</parameter>", "\nx")
    assert read(QWEN, written)[1] == [ToolCall("look", {"at": "x", "times": 2})]
    pairs = "<tool_call>look<arg_key>at</arg_key><arg_value>x</tool_call>"
    assert read(GLM, pairs)[1] == LOOK_AT
    times = "<arg_key>times</arg_key><arg_value>2</arg_value></tool_call>"
    assert read(GLM, pairs.replace("</tool_call>", times))[1] == [ToolCall("look", {"at": "x", "times": 2})]
    unknown = times.replace("times", "often")
    for doubtful in (f"{pairs}\n{pairs}", pairs.replace("</tool_call>", unknown)):
        pieces, calls, notes = read(GLM, doubtful)
        assert (pieces, calls, len(notes)) == ([("answer", doubtful)], [], 1)
    doubtful = written.replace("times", "often")
    assert read(QWEN, doubtful)[:2] == ([("answer", doubtful)], [])


def test_markers_in_the_strings_of_an_array_end_nothing():
    tags = '["</parameter>\\n</function>", "b"]'
    assert read(QWEN, qwen(at="x", tags=tags))[1] == [ToolCall("look", {"at": "x", "tags": json.loads(tags)})]
    assert read(QWEN, qwen(at="x", tags="[a"))[1] == [ToolCall("look", {"at": "x", "tags": "[a"})]


def test_a_call_without_its_section_and_a_section_that_was_not_opened_are_read():
    bare = qwen(at="x").removeprefix("<tool_call>\n")
    assert read(QWEN, [bare]) == ([("tool_call", bare.removesuffix("\n</tool_call>"))], LOOK_AT, ())
    assert read(QWEN, [bare.removesuffix("\n</tool_call>")])[1] == LOOK_AT


def test_what_the_model_says_between_and_behind_calls_is_kept_in_order():
    call = hermes('{"name": "look", "arguments": {"at": "x"}}')
    pieces, calls, _ = read(HERMES, [f"One. {call} Two. {call}\nThree."])
    assert [text for kind, text in pieces if kind == "answer"] == ["One. ", " Two. ", "Three."]
    assert calls == LOOK_AT * 2


def test_an_answer_that_ends_right_where_a_call_begins_says_so():
    for form, marker in ((HERMES, "<tool_call>"), (QWEN, "<tool_call>"), (MISTRAL, "[TOOL_CALLS]")):
        for cut in (True, False):
            found = read(form, [f"So.{marker}"], cut=cut)
            assert found == ([("answer", "So.")], [], ("The answer ended where a tool call would have begun.",))


@pytest.mark.parametrize(
    "answer", ['{"capital": "Paris"}', "[1, 2]", "[a link](there)", '{"name": "Bob"}', "{", "[look"]
)
def test_an_answer_in_json_or_in_brackets_is_no_call_where_calls_have_no_markers(answer):
    for form in (LLAMA, LLAMA_4):
        assert read(form, [answer]) == ([("answer", answer)], [], ())


def test_calls_without_markers_are_read_where_an_answer_begins():
    call = '{"name": "look", "parameters": {"at": "x"}}'
    assert read(LLAMA, [call])[1] == LOOK_AT
    assert read(LLAMA, [f"{call}; {call}"])[1] == LOOK_AT * 2
    assert read(LLAMA, [f"{call}\n{call}"])[1] == LOOK_AT * 2
    assert read(LLAMA_4, ["[look(at='x'), look(at=\"x\")]"])[1] == LOOK_AT * 2
    assert read(LLAMA, [f"One writes {call}."])[1] == []
    assert read(LLAMA, ['<|python_tag|>look.call(at="x")'])[1] == LOOK_AT


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("'a\\'b'", "a'b"),
        ("'a\nb'", "a\nb"),
        (r"'C:\data'", r"C:\data"),
        ("-2", -2),
        ("(1, 2)", [1, 2]),
        ("{'a': [true, None]}", {"a": [True, None]}),
        ('"""a"b"""', 'a"b'),
    ],
)
def test_values_in_pythons_notation(source, value):
    written = f"<|tool_call_start|>[look(at={source})]<|tool_call_end|>"
    assert read(LFM, written, tools=[tool("look")])[1] == [ToolCall("look", {"at": value})]


@pytest.mark.parametrize(
    "source",
    ["{1, 2}", "b'a'", "1j", "x", "f'{x}'", "{1: 2}", "{'a': 1, 'a': 2}", "...", "'\\ud800'", "'a' 'b'", "r'a'"],
)
def test_a_value_that_json_cannot_hold_makes_the_call_text(source):
    written = f"<|tool_call_start|>[look(at={source})]<|tool_call_end|>"
    assert read(LFM, written)[:2] == ([("answer", written)], [])


def test_gemmas_values_nest_and_their_keys_may_have_spaces():
    written = '<|tool_call>call:look{at:{a b:[1,{c:<|"|>x}]<|"|>}],d:null}}<tool_call|>'
    assert read(GEMMA, written, tools=[tool("look")])[1] == [
        ToolCall("look", {"at": {"a b": [1, {"c": "x}]"}], "d": None}})
    ]


def test_a_made_up_notation_is_text_with_a_note():
    unknown = format_of("no format that anyone knows", ())
    for written in ('<call tool="look">at=x</call>', "CALL look(at=x)", '@@look {"at": "x"}@@'):
        pieces, calls, notes = read(unknown, written)
        assert (pieces, calls) == ([("answer", written)], [])
    written = '<call tool="look">at=x</call>'
    for form in (unknown, HERMES, MISTRAL, HARMONY):
        pieces, calls, notes = read(form, written)
        assert (pieces, calls) == ([("answer", written)], [])
        assert notes == ("The text may call 'look' in a notation that is not known for this model.",)


def test_a_made_up_marker_of_thoughts_is_text_with_a_note():
    for form in (format_of(None, ()), HERMES, MISTRAL):
        for written in ("<musing>hm</musing>So.", "<|muse|>hm<|/muse|>So.", "[MUSE]hm[/MUSE]So."):
            pieces, _, notes = read(form, written)
            assert pieces == [("answer", written)]
            assert [note for note in notes if "begins with a marker that is not known" in note]
        for written in ("<div>hm</div>So.", "[1] So.", "a < b > c", "<b>So</b>"):
            assert read(form, written) == ([("answer", written)], [], ())
