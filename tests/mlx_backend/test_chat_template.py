"""What templates are given: in the form that each expects, with nothing left out and notes of what was changed."""

import json

import pytest

from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import NO_EFFORTS, NO_OFF, NO_SWITCH, Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.mlx_backend.chat_template import NO_TEMPLATE
from mlx_mcp.mlx_backend.template_variants import CALLS_AS_TEXT, FOLDED, LATER_AS_USER, RESULTS_AS_TEXT, TOLD
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from tests.mlx_backend.tokenizers_made import (
    ANSWERED,
    ASKED,
    ASSISTANT,
    HI,
    LOOK,
    QWEN,
    SYSTEM,
    decoded,
    make_tokenizer,
)
from tests.models_made import TEMPLATE, write_tokenizer

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
CALLED = [*HI, Message("assistant", tool_calls=(ToolCall("look", {"at": 'the "<b>"'}, "id1"),))]
RESULT = Message("tool", "it is open", call_id="id1", name="look")


def said(tokenizer, messages, tools=(), **asked):
    prompt = tokenizer.encode_chat(messages, tools, **asked)
    return decoded(tokenizer, prompt.ids), prompt.notes


# Where templates are


def in_folder(folder, config=None, **files):
    """A tokenizer of a folder whose templates are in these places."""
    write_tokenizer(folder, None)
    path = folder / "tokenizer_config.json"
    if config is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": config}))
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return ChatTokenizer(folder, None)


DEFAULT, USE = "d:{{ messages[0].content }}", "<tool_call>t:{{ messages[0].content }}{{ tools | tojson }}"
PLACES = {
    "a text": {"config": DEFAULT},
    "a list": {"config": [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": USE}]},
    "a list without a default": {"config": [{"name": "rag", "template": DEFAULT}]},
    "a file": {"chat_template_dot_jinja": DEFAULT},
    "a processor's file": {"chat_template_dot_json": json.dumps({"chat_template": DEFAULT})},
    "a processor's config": {"processor_config_dot_json": json.dumps({"chat_template": DEFAULT})},
    "beside more templates": {"config": DEFAULT, "additional_chat_templates__tool_use_dot_jinja": USE},
    "a file beside more": {
        "config": "no",
        "chat_template_dot_jinja": DEFAULT,
        "additional_chat_templates__tool_use_dot_jinja": USE,
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_found_wherever_folders_keep_it(tmp_path, place):
    tokenizer = in_folder(tmp_path, **PLACES[place])
    assert said(tokenizer, HI) == ("d:hi", ())
    if USE in str(PLACES[place]):
        text, _ = said(tokenizer, HI, LOOK)
        assert text.startswith("<tool_call>t:hi[{")


def test_a_folder_without_a_template_says_so(tmp_path):
    tokenizer = in_folder(tmp_path)
    assert said(tokenizer, HI) == ("hi", (NO_TEMPLATE,))
    assert tokenizer.encode_context(HI).notes == (NO_TEMPLATE,)
    assert said(tokenizer, HI, reasoning=Reasoning.OFF)[1] == (NO_SWITCH, NO_TEMPLATE)


# Nothing is left out


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages[-1].content }}", "a message of the role 'user', a message of the role 'assistant'"),
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}, this{% endfor %}", "role 'user'"),
        ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", "role 'user', a message of the role 'assistant'"),
        ("no messages, is this it?", "role 'user'"),
    ],
)
def test_a_chat_that_the_template_would_cut_is_refused(tmp_path, template, what):
    tokenizer = make_tokenizer(tmp_path, template)
    with pytest.raises(InvalidRequest, match=f"leaves out or changes .*{what}.*choose another model"):
        tokenizer.encode_chat([ASKED, ANSWERED, Message("user", "is this it?")])


def test_an_answer_may_lose_its_thoughts_and_no_more(tmp_path):
    tokenizer = make_tokenizer(tmp_path, HEAD + "{{ m.content.split('</think>')[-1] }}" + TAIL)
    text, _ = said(tokenizer, [ASKED, Message("assistant", "hm</think>yes"), *HI])
    assert "assistant\nyes<" in text
    with pytest.raises(InvalidRequest, match="role 'user'"):
        tokenizer.encode_chat([Message("user", "what does </think> mean?")])


def test_tools_that_a_template_leaves_out_are_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path, TEMPLATE + "{# <tool_call> #}")
    with pytest.raises(InvalidRequest, match="leaves out or changes the tool 'look'"):
        tokenizer.encode_chat(HI, LOOK)


# The form that a template expects

PARTS = HEAD + "{% for part in m.content %}{{ part.text if part.type == 'text' }}{% endfor %}" + TAIL
NO_SYSTEM = {
    "refuses": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE,
    "drops": TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'system'"),
}


def test_a_template_that_expects_parts_gets_parts(tmp_path):
    text, notes = said(make_tokenizer(tmp_path, PARTS), [SYSTEM, ASKED])
    assert text == f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe agent<|im_end|>\n{ASSISTANT}"
    assert notes == ()


@pytest.mark.parametrize("template", NO_SYSTEM)
@pytest.mark.parametrize("messages", [[ASKED], [ASKED, ANSWERED, *HI]])
def test_a_system_prompt_is_folded_into_the_first_message_where_there_is_no_role_for_it(tmp_path, template, messages):
    tokenizer = make_tokenizer(tmp_path, NO_SYSTEM[template])
    text, notes = said(tokenizer, [SYSTEM, *messages])
    assert text.startswith("<|im_start|>user\nbe brief\n\nthe agent<|im_end|>\n")
    assert notes == (FOLDED,)
    context = tokenizer.encode_context([SYSTEM])
    turn = tokenizer.encode_turn(HI, "user")
    assert decoded(tokenizer, context.ids + turn.ids) == f"<|im_start|>user\nbe brief\n\nhi<|im_end|>\n{ASSISTANT}"
    assert (context.notes, turn.notes) == ((FOLDED,), ())


ONLY_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('not at the beginning') }}"
    "{% endif %}{% if not loop.first and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('twice') }}"
    "{% endif %}{% endfor %}" + TEMPLATE
)
AMID = Message("system", "it rains")


@pytest.mark.parametrize(
    ("template", "begun"),
    [(ONLY_FIRST, "system\nbe brief<|im_end|>\n<|im_start|>user\n"), (NO_SYSTEM["drops"], "user\nbe brief\n\n")],
)
def test_a_system_message_amid_a_chat_stays_where_it_is(tmp_path, template, begun):
    (tmp_path / "all").mkdir()
    tokenizer = make_tokenizer(tmp_path, template)
    messages = [SYSTEM, ASKED, AMID]
    text, notes = said(tokenizer, messages)
    assert text == f"<|im_start|>{begun}the agent\n\nit rains<|im_end|>\n{ASSISTANT}"
    assert LATER_AS_USER in notes
    longer, _ = said(tokenizer, [*messages, ANSWERED, AMID, *HI])
    assert longer.startswith(text)
    assert "it rains\n\nhi" in longer
    plain, notes = said(make_tokenizer(tmp_path / "all", TEMPLATE), messages)
    assert plain.endswith(f"<|im_start|>system\nit rains<|im_end|>\n{ASSISTANT}")
    assert notes == ()


ARGUMENTS = {
    "{{ c.function.arguments | tojson }}": '{"at": "the \\"<b>\\""}',
    "{{ '' + c.function.arguments }}": '{"at": "the \\"<b>\\""}',
    "{{ c.function.arguments }}": '{"at": "the \\"<b>\\""}',
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}": 'at=the "<b>";',
}


@pytest.mark.parametrize("written", ARGUMENTS)
def test_arguments_of_calls_are_what_the_template_writes_as_json(tmp_path, written):
    calls = "{% for c in m.tool_calls or [] %}" + "{{ c.function.name }}:" + written + "{% endfor %}"
    text, notes = said(make_tokenizer(tmp_path, HEAD + "{{ m.content }}" + calls + TAIL), [*CALLED, RESULT])
    assert f"assistant\nlook:{ARGUMENTS[written]}<|im_end|>" in text
    assert notes == ()


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (
            "{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.arguments | tojson }}{% endfor %}",
            "functions.look:0{",
        ),
        (
            "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name }}"
            "{{ c.function.arguments | tojson }}{% endfor %}{% endif %}",
            "look{",
        ),
    ],
)
def test_calls_are_where_the_template_looks_for_them(tmp_path, template, call):
    tokenizer = make_tokenizer(tmp_path, HEAD + "{{ m.content or '' }}" + template + TAIL)
    text, notes = said(tokenizer, [*CALLED, RESULT])
    assert f"assistant\n{call}" in text
    assert notes == ()


def test_calls_and_results_that_a_template_has_no_place_for_become_text(tmp_path):
    alternate = (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') or (m.role == 'user') != "
        "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    text, notes = said(make_tokenizer(tmp_path, alternate + TEMPLATE), [*CALLED, RESULT, Message("user", "so?")])
    assert notes == (CALLS_AS_TEXT, RESULTS_AS_TEXT)
    assert 'assistant\n{"name": "look", "arguments": {"at": "the \\"<b>\\""}}<|im_end|>' in text
    assert "user\nResult of look:\nit is open\n\nso?<|im_end|>" in text


def shapes(parameters):
    return ({"type": "function", "function": {"name": "look", "description": None, "parameters": parameters}},)


@pytest.mark.parametrize(
    "template",
    [
        "{% for t in tools %}{{ t.function.name + t.function.description }}{% for n, p in "
        "t.function.parameters.properties.items() %}{{ p.type | upper }}{{ p.description.strip() }}{% endfor %}"
        "{% endfor %}",
        "{% for t in tools %}{{ t['name'] + t['description'] }}{{ t['parameters'] | tojson }}{% endfor %}",
        "{{ tools | map(attribute='function') | tojson }}",
        "{% for t in tools %}{{ t | string }}{% endfor %}",
        "{% for t in xml_tools %}{{ t.function.name }}{% endfor %}",
        "{{ 'functions ' + functions }}{{ datetime + '.' }}",
    ],
)
@pytest.mark.parametrize(
    "parameters", [None, {}, {"properties": {"a": {"anyOf": [{"type": "null"}, {"type": "integer"}]}}}]
)
def test_tools_are_filled_with_what_the_template_takes_for_granted(tmp_path, template, parameters):
    tokenizer = make_tokenizer(tmp_path, template + TEMPLATE + "{# <tool_call> #}")
    text, notes = said(tokenizer, HI, shapes(parameters))
    assert "look" in text
    assert notes == ()


def test_tools_are_told_in_the_system_prompt_where_a_template_shows_calls_alone(tmp_path):
    calls = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    tokenizer = make_tokenizer(tmp_path, HEAD + "{{ m.content }}" + calls + TAIL, QWEN["added"])
    text, notes = said(tokenizer, [SYSTEM, *HI], LOOK)
    assert text.startswith("<|im_start|>system\nbe brief\n\n## Tools\nYou have access")
    assert '<tool_call>{"name": "tool_name", "arguments": {"argument": "value"}}</tool_call><|im_end|>' in text
    assert "### look\nDescription: Look there." in text
    assert notes == (TOLD,)


# The switch for reasoning

OPEN = "{{ '<think>\n' if %s else '<think></think>' }}"
SWITCHES = {
    OPEN % "enable_thinking is not defined or enable_thinking": ("off", "on", "on", NO_EFFORTS),
    OPEN % "thinking": ("off", "on", "on", NO_EFFORTS),
    OPEN % "enable_thinking is true": ("off", "on", "on", NO_EFFORTS),
    OPEN % "thinking_mode | default('adaptive') != 'disabled'": ("off", "on", "on", NO_EFFORTS),
    OPEN % "not disable_reasoning": ("off", "on", "on", NO_EFFORTS),
    "{{ thinking_budget if (thinking_budget or 0) > 0 }}" + OPEN % "thinking_budget != 0": ("off", "on", "512on", ""),
    "{{ 'effort ' + (reasoning_effort or 'medium') }}": ("effort low", "effort medium", "effort low", NO_OFF),
    "{% set effort = reasoning_effort | default('no_think') %}"
    "{% if effort not in ['high', 'low', 'no_think'] %}{{ raise_exception('no') }}{% endif %}"
    "{{ effort }}": ("no_think", "high", "low", ""),
    "{# /think #}" + OPEN % "'/no_think' not in messages[-1].content": ("off", "on", "on", NO_EFFORTS),
    "{{ keep_thinking }}{{ reasoning_content }}": ("", "", "", NO_SWITCH),
    "{{ thinking_prefix }}": ("", "", "", NO_SWITCH),
}


def end_of(tokenizer, reasoning):
    """What follows the answer's role, and the notes."""
    text, notes = said(tokenizer, HI, reasoning=reasoning)
    end = text.rpartition(ASSISTANT)[2]
    return end.replace("<think></think>", "off").replace("<think>\n", "on"), "".join(notes)


@pytest.mark.parametrize("template", SWITCHES)
def test_reasoning_reaches_the_switch_that_a_template_has(tmp_path, template):
    off, on, low, note = SWITCHES[template]
    tokenizer = make_tokenizer(tmp_path, TEMPLATE + template, QWEN["added"])
    assert end_of(tokenizer, None)[1] == ""
    assert end_of(tokenizer, Reasoning.OFF) == (off, note if note in (NO_OFF, NO_SWITCH) else "")
    assert end_of(tokenizer, Reasoning.ON) == (on, note if note == NO_SWITCH else "")
    assert end_of(tokenizer, Reasoning.LOW) == (low, note if note in (NO_EFFORTS, NO_SWITCH) else "")


def test_an_effort_that_a_template_does_not_know_becomes_the_nearest_and_says_so(tmp_path):
    knows_two = (
        "{% set effort = reasoning_effort or 'low' %}"
        "{{ effort if effort in ['high', 'low'] else raise_exception('no') }}"
    )
    tokenizer = make_tokenizer(tmp_path, TEMPLATE + knows_two)
    assert said(tokenizer, HI, reasoning=Reasoning.MEDIUM)[1] == (
        "The model's chat template knows no effort 'medium', so 'high' was asked for.",
    )


@pytest.mark.parametrize("reasoning", [Reasoning.OFF, Reasoning.ON])
def test_a_turn_of_a_session_is_asked_for_reasoning_as_a_chat_is(tmp_path, reasoning):
    tokenizer = make_tokenizer(tmp_path, TEMPLATE + OPEN % "thinking", QWEN["added"])
    turn = tokenizer.encode_turn(HI, "user", reasoning=reasoning)
    assert turn.ids == tokenizer.encode_chat(HI, reasoning=reasoning).ids[-len(turn.ids) :]
    assert turn.reasoning is (reasoning is Reasoning.ON)
