"""Reasoning, tool calls and text of answers."""

import re
from dataclasses import replace

import pytest

from mlx_mcp.chat.message import ToolCall
from mlx_mcp.chat.prompt import Prompt
from tests.chat.test_reader import read as read_text
from tests.chat.test_reader import whole_answer
from tests.chat.written import FAMILIES, TOOLS
from tests.mlx_backend.tokenizers_made import HARMONY, LFM, encoded, make_tokenizer, read
from tests.models_made import TEMPLATE


def test_special_tokens_are_not_shown(qwen, mistral):
    assert read(qwen, "a<|im_start|>b<|endoftext|>") == ([("answer", "ab")], [])
    assert read(mistral, "a[INST]b") == ([("answer", "ab")], [])


def test_reasoning_is_told_from_the_answer_whoever_opened_it(qwen):
    expected = [("reasoning", "let me see\n"), ("answer", "It is.")], []
    assert read(qwen, "<think>\nlet me see\n</think>\n\nIt is.") == expected
    assert read(qwen, "\nlet me see\n</think>\n\nIt is.", reasoning=True) == expected


def test_a_plain_answer_is_not_split(qwen, mistral):
    text = '<think>a</think>\n<tool_call>{"name": "look"}</tool_call>'
    assert read(qwen, text, plain=True, reasoning=True) == ([("answer", text)], [])
    assert read(mistral, "[TOOL_CALLS]look[ARGS]{}", plain=True) == ([("answer", "[TOOL_CALLS]look[ARGS]{}")], [])


def test_what_only_begins_like_a_marker_is_text(qwen):
    assert read(qwen, "a < b <thin") == ([("answer", "a < b <thin")], [])


def test_calls_are_parsed_and_told_from_the_answer(qwen):
    calls = ['{"name": "look", "arguments": {"at": "é"}}', '\n{"name": "look", "arguments": "{\\"at\\": 2}"}\n']
    pieces, parsed = read(qwen, f"Let me.<tool_call>{calls[0]}</tool_call>\n<tool_call>{calls[1]}</tool_call>\nSo.")
    written = "".join(f"<tool_call>{call}</tool_call>" for call in calls)
    assert pieces == [("answer", "Let me."), ("tool_call", written), ("answer", "So.")]
    assert parsed == [ToolCall("look", {"at": "é"}), ToolCall("look", {"at": 2})]


@pytest.mark.parametrize("arguments", ["", ', "arguments": {}', ', "arguments": null', ', "arguments": ""'])
def test_a_call_may_have_no_arguments(qwen, arguments):
    text = f'<tool_call>{{"name": "look"{arguments}}}</tool_call>'
    assert read(qwen, text) == ([("tool_call", text)], [ToolCall("look", {})])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "look!",
        '{"name": "look", "arguments": {"at": ',
        '{"name": "burn", "arguments": {}}',
        '{"name": ["look"], "arguments": {}}',
        '{"arguments": {}}',
        '"look"',
        "[]",
        '[{"name": "look"}, {"name": "burn"}]',
        '{"name": "look", "arguments": [1]}',
        '{"name": "look", "arguments": "x"}',
        '{"name": "look", "arguments": {"at": NaN}}',
        '{"name": "look", "arguments": {"at": "\\ud800"}}',
        "[" * 5000,
    ],
)
def test_what_is_no_call_of_an_offered_tool_is_shown_as_it_was_written(qwen, text):
    written = f"Well.\n<tool_call>{text}</tool_call>\nYes."
    assert read(qwen, written) == ([("answer", written)], [])


def test_a_call_that_was_not_asked_for_is_text(qwen):
    written = '<tool_call>{"name": "look"}</tool_call>'
    assert read(qwen, written, tools=()) == ([("answer", written)], [])


def test_a_call_that_max_tokens_cut_off_is_shown_and_is_no_call(qwen):
    whole = '<tool_call>{"name": "look", "arguments": {}}'
    assert read(qwen, whole, cut=True) == ([("answer", whole)], [])
    assert read(qwen, f"{whole}</tool", cut=True) == ([("answer", f"{whole}</tool")], [])


def test_a_call_whose_end_marker_the_model_forgot_is_a_call(qwen):
    whole = '<tool_call>{"name": "look", "arguments": {}}'
    assert read(qwen, whole) == ([("tool_call", whole)], [ToolCall("look", {})])


def test_special_tokens_mark_calls_and_stand_in_them(mistral):
    call = '[TOOL_CALLS][{"name": "look", "arguments": {"at": 1}}]'
    assert read(mistral, f"So{call}") == ([("answer", "So"), ("tool_call", call)], [ToolCall("look", {"at": 1})])
    assert read(mistral, 'look: [TOOL_CALLS]look[ARGS]{"at": 1}[TOOL_CALLS]look[ARGS]{}')[1] == [
        ToolCall("look", {"at": 1}),
        ToolCall("look", {}),
    ]


def test_control_tokens_that_frame_turns_are_left_out_of_the_answer_alone(qwen):
    call = '<tool_call>{"name": "look", "arguments": {"at": "<|im_start|>"}}</tool_call>'
    assert read(qwen, f"a<|im_start|>b{call}")[1] == [ToolCall("look", {"at": "<|im_start|>"})]
    assert read(qwen, "<think>a <|im_start|> b</think>c<|im_start|>") == (
        [("reasoning", "a <|im_start|> b"), ("answer", "c")],
        [],
    )


def test_a_control_token_that_nobody_knows_is_shown_and_noted_once(tmp_path):
    strange = make_tokenizer(tmp_path, special=["<|ponder|>", "<|/ponder|>"])
    assert read(strange, "<|ponder|>a<|ponder|>b<|/ponder|>c") == (
        [("answer", "<|ponder|>a<|ponder|>b<|/ponder|>c")],
        [],
    )
    reader = strange.reader(Prompt(()))
    for token_id in encoded(strange, "x<|ponder|>a<|ponder|>b"):
        reader.add(token_id)
    reader.finish()
    assert reader.notes == ("The model wrote the control token '<|ponder|>', whose meaning is not known; it is shown.",)


def test_a_call_without_an_end_marker_that_was_cut_off_is_shown(mistral):
    written = 'So[TOOL_CALLS]look[ARGS]{"at": '
    assert read(mistral, written) == ([("answer", written)], [])


def test_arguments_that_json_cannot_hold_are_no_call(tmp_path):
    lfm = make_tokenizer(tmp_path, **LFM)
    assert read(lfm, "<|tool_call_start|>[look(at=(1, 2))]<|tool_call_end|>")[1] == [ToolCall("look", {"at": [1, 2]})]
    written = "<|tool_call_start|>[look(at={1, 2})]<|tool_call_end|>"
    assert read(lfm, written) == ([("answer", written)], [])


def test_the_channels_of_gpt_oss_are_told_apart(tmp_path):
    harmony = make_tokenizer(tmp_path, **HARMONY)
    written = (
        "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant<|channel|>final<|message|>It is."
    )
    assert read(harmony, written) == ([("reasoning", "Let me see."), ("answer", "I look.\n\nIt is.")], [])


def test_the_embedded_models_calls_are_read(embedded):
    call = '{"name": "look", "arguments": {"at": "the door"}}'
    assert read(embedded, f"<tool_call>{call}</tool_call>")[1] == [ToolCall("look", {"at": "the door"})]


# Where markers are ordinary text, a few families show what there is to see.
USUAL = ("hermes", "glm", "mistral", "kimi-k3", "harmony")
AS_TEXT = [pytest.param(name, False, marks=() if name in USUAL else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize(("name", "special"), [*((name, True) for name in FAMILIES), *AS_TEXT])
def test_every_family_is_read_token_by_token_whatever_its_markers_are(tmp_path, name, special):
    family = FAMILIES[name]
    markers = [text for text in sorted(family.form.markers) if re.fullmatch(r"<[^<>\s=]+>|\[[A-Z_/]+\]", text)]
    template = TEMPLATE + "{# " + " ".join(family.signs) + " #}"
    tokenizer = make_tokenizer(tmp_path, template, special=markers if special else ())
    text = whole_answer(family)
    pieces, calls = read(tokenizer, text, tools=TOOLS)
    expected = read_text(family.form, [text])
    assert (pieces, [replace(call, call_id="") for call in calls]) == expected[:2]
