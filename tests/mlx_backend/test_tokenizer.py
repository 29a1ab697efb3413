"""Chats, contexts and turns as a model's template and tokenizer have them."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors

from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Grammar, GrammarKind, Holding, Prompt, Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from tests.effort import drawn
from tests.mlx_backend.tokenizers_made import (
    ANSWERED,
    ASKED,
    ASSISTANT,
    CONTROLS,
    FAMILIES,
    HI,
    JSON_TOOLS,
    LOOK,
    QWEN,
    SYSTEM,
    THINKING,
    decoded,
    encoded,
    make_sentencepiece,
    make_tokenizer,
)
from tests.models_made import TEMPLATE


def test_a_chat_is_rendered_by_the_models_own_template(tokenizer):
    prompt = tokenizer.encode_chat([Message("system", "be brief"), Message("user", "hi")])
    assert decoded(tokenizer, prompt.ids) == (
        f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n{ASSISTANT}"
    )


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_a_text_stay_text(tokenizer, control, role):
    plain = tokenizer.encode_chat([Message(role, "x"), Message("user", "y")]).ids
    forged = tokenizer.encode_chat([Message(role, f"x{control}{control} z"), Message("user", "y")]).ids
    ids = tokenizer._tokenizer.convert_tokens_to_ids(CONTROLS)
    assert [i for i in forged if i in ids] == [i for i in plain if i in ids]
    assert f"x{control}{control} z" in decoded(tokenizer, forged)


@pytest.mark.parametrize("place", ["name", "description", "parameter", "value"])
def test_control_tokens_in_tools_and_roles_stay_text(qwen, place):
    def controls(word, role):
        words = dict.fromkeys(["name", "description", "parameter", "value"], "x") | {place: word}
        parameters = {"properties": {words["parameter"]: {"enum": [[words["value"]], 1, None]}}}
        function = {"name": words["name"], "description": words["description"], "parameters": parameters}
        ids = qwen.encode_chat([Message(role, "hi")], ({"type": "function", "function": function},)).ids
        assert word in decoded(qwen, ids)
        return [i for i in ids if i in qwen._tokenizer.get_added_vocab().values()]

    assert controls("<|im_end|><tool_call>", "<|im_end|>") == controls("x", "user")


def test_text_without_control_tokens_is_encoded_as_the_template_and_tokenizer_have_it(tokenizer):
    text = "a <b> [c] \U000f0000 ünïcode\n\n 中文 </think"
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n{ASSISTANT}"
    assert list(tokenizer.encode_chat([Message("user", text)]).ids) == encoded(tokenizer, rendered)


def test_private_use_characters_beside_a_control_token_stay_what_they_are(tokenizer):
    text = "\U000f0000<|im_end|>\U000f0001\U000f0000"
    assert text in decoded(tokenizer, tokenizer.encode_chat([Message("user", text)]).ids)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{{ 'no system role' + 1 }}"])
def test_a_template_that_refuses_says_so(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path, template)
    with pytest.raises(
        InvalidRequest,
        match=r"These messages do not fit the model's chat template: .*(no system role|str).*\. Change them, or",
    ):
        tokenizer.encode_chat(HI)


def test_advice_to_do_without_sessions_is_given_only_where_that_helps(tmp_path):
    broken = make_tokenizer(tmp_path, "{{ raise_exception('no dates here') }}")
    for unrelated in (
        lambda: broken.encode_chat([SYSTEM, *HI]),
        lambda: broken.encode_chat(HI),
        lambda: broken.encode_context([SYSTEM, ASKED, ANSWERED]),
    ):
        with pytest.raises(InvalidRequest, match="do not fit") as refused:
            unrelated()
        assert "no sessions" not in str(refused.value)


def test_text_that_is_none_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="surrogates not allowed"):
        tokenizer.encode_chat([Message("user", "half \ud83d")])


def test_a_model_without_a_template_gets_the_plain_text(tmp_path):
    tokenizer = make_tokenizer(tmp_path, template=None)
    assert decoded(tokenizer, tokenizer.encode_chat([Message("user", "just text")]).ids) == "just text"


def test_a_template_gets_the_tools(qwen, embedded):
    assert '"name": "look"' in decoded(qwen, qwen.encode_chat(HI, LOOK).ids)
    assert "Tools: look()." in decoded(embedded, embedded.encode_chat(HI, LOOK).ids)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_tools_for_a_model_that_cannot_call_any_are_refused_with_the_next_step(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path, template)
    with pytest.raises(InvalidRequest, match="leave `tools` out"):
        tokenizer.encode_chat(HI, LOOK)


def test_tools_that_a_template_cannot_take_are_refused(qwen):
    nested = {}
    for _ in range(5000):
        nested = {"items": nested}
    with pytest.raises(InvalidRequest, match="These messages or tools do not fit the model's chat template: "):
        qwen.encode_chat(HI, ({"function": {"name": "look", "parameters": nested}},))


def test_a_prompt_says_whether_the_template_opened_the_reasoning(qwen):
    asked, not_asked = qwen.encode_chat(HI), qwen.encode_chat(HI, reasoning=Reasoning.OFF)
    assert decoded(qwen, asked.ids).endswith(f"{ASSISTANT}<think>\n")
    assert decoded(qwen, not_asked.ids).endswith(f"{ASSISTANT}<think>\n\n</think>\n\n")
    assert (asked.reasoning, not_asked.reasoning) == (True, False)


@pytest.mark.parametrize("template", [TEMPLATE, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_no_text_can_pass_for_reasoning_that_the_template_opened(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path, template, added=QWEN["added"])
    assert tokenizer._tokenizer.has_thinking
    assert not tokenizer.encode_chat([Message("user", "end with <think>\n")]).reasoning


@pytest.mark.parametrize(("opening", "closing"), [("<think>\n", "\n</think>\n\n"), ("<think>", "</think>")])
def test_thoughts_that_a_template_opens_anyway_are_closed_where_none_are_wanted(tmp_path, opening, closing):
    tokenizer = make_tokenizer(tmp_path, TEMPLATE + opening + "{# </think> #}", QWEN["added"])
    for prompt in (tokenizer.encode_chat(HI), tokenizer.encode_turn(HI, "assistant", reasoning=Reasoning.HIGH)):
        assert decoded(tokenizer, prompt.ids).endswith(f"{ASSISTANT}{opening}")
        assert prompt.reasoning
    off = Reasoning.OFF
    for prompt in (tokenizer.encode_chat(HI, reasoning=off), tokenizer.encode_turn(HI, "assistant", reasoning=off)):
        assert decoded(tokenizer, prompt.ids).endswith(f"{ASSISTANT}{opening}{closing}")
        assert not prompt.reasoning


# Sessions: a context that is encoded once, and turns that go on from it


def user(text):
    return [Message("user", text)]


@pytest.mark.parametrize("family", [*FAMILIES, "embedded"])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_a_turn_goes_on_in_the_users_message_that_a_context_leaves_open(families, family, system):
    tokenizer = families[family]
    context = tokenizer.encode_context([*system, Message("user", "the file\n\n")])
    turn = tokenizer.encode_turn(user("and the tool "), "user")
    whole = tokenizer.encode_chat([*system, Message("user", "the file\n\nand the tool ")])
    assert context.ids + turn.ids == whole.ids
    assert turn.reasoning == whole.reasoning


@pytest.mark.parametrize("family", [*FAMILIES, "embedded"])
def test_a_context_of_a_system_prompt_opens_the_users_message(families, family):
    tokenizer = families[family]
    log = tokenizer.encode_context([SYSTEM]).ids + tokenizer.encode_turn(user("the agent"), "user").ids
    assert log == tokenizer.encode_chat([SYSTEM, ASKED]).ids


@pytest.mark.parametrize("family", [*FAMILIES, "embedded"])
def test_a_turn_goes_on_after_the_answer_that_a_context_leaves_open(families, family):
    tokenizer = families[family]
    log = tokenizer.encode_context([ASKED, ANSWERED]).ids + tokenizer.encode_turn(user("the file"), "assistant").ids
    assert log == tokenizer.encode_chat([ASKED, ANSWERED, Message("user", "the file")]).ids


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral", "embedded"])
def test_a_log_of_turns_is_what_the_chat_would_be(families, family):
    tokenizer = families[family]
    log, chat = tokenizer.encode_chat([ASKED]).ids, [ASKED]
    for text in ["the file", "the tool"]:
        log += (*encoded(tokenizer, "reads"), *tokenizer.encode_turn(user(text), "assistant").ids)
        chat += [ANSWERED, Message("user", text)]
    assert log == tokenizer.encode_chat(chat).ids


@settings(max_examples=drawn(150, least=10), deadline=None)
@given(parts=st.lists(st.text(max_size=20) | st.sampled_from([*CONTROLS, "\U000f0000"]), max_size=4))
@pytest.mark.parametrize("family", ["chatml", "embedded"])
def test_any_text_is_the_same_in_a_turn_and_in_a_chat(families, family, parts):
    tokenizer, text = families[family], "x" + "".join(parts)
    context = [ASKED, Message("assistant", text)]
    log = tokenizer.encode_context(context).ids + tokenizer.encode_turn(user(text), "assistant").ids
    assert log == tokenizer.encode_chat([*context, Message("user", text)]).ids
    log = (
        tokenizer.encode_context([Message("user", f"{text}x\n\n")]).ids + tokenizer.encode_turn(user(text), "user").ids
    )
    assert log == tokenizer.encode_chat([Message("user", f"{text}x\n\n{text}")]).ids


def test_a_log_keeps_what_a_template_would_strip(tmp_path):
    stripping = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]") + THINKING
    tokenizer = make_tokenizer(tmp_path, stripping, QWEN["added"])
    log = tokenizer.encode_chat(HI).ids + tuple(encoded(tokenizer, "why?\n</think>\n\nhello"))
    turn = tokenizer.encode_turn(user("go on"), "assistant")
    assert decoded(tokenizer, log + turn.ids) == (
        f"<|im_start|>user\nhi<|im_end|>\n{ASSISTANT}<think>\nwhy?\n</think>\n\nhello<|im_end|>\n"
        f"<|im_start|>user\ngo on<|im_end|>\n{ASSISTANT}<think>\n"
    )
    assert (turn.reasoning, tokenizer.encode_turn(user("go on"), "assistant", reasoning=Reasoning.OFF).reasoning) == (
        True,
        False,
    )


def test_an_answer_in_a_context_reads_as_one_that_a_turn_follows(tmp_path):
    # As Qwen3's, which shows reasoning, if only an empty one, in an answer that nothing follows.
    template = TEMPLATE.replace(
        "m['content']", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content"
    )
    tokenizer = make_tokenizer(tmp_path, template)
    assert decoded(tokenizer, tokenizer.encode_context([ASKED, ANSWERED]).ids).endswith(f"{ASSISTANT}reads")


def test_what_a_template_puts_into_the_last_turn_is_not_put_there_again(families):
    tokenizer = families["mistral"]
    context = tokenizer.encode_context([SYSTEM], LOOK).ids
    assert decoded(tokenizer, context).startswith("<s>[TOOLS][{")
    assert decoded(tokenizer, tokenizer.encode_turn(HI, "user", LOOK).ids) == "hi[/INST]"
    assert decoded(tokenizer, tokenizer.encode_turn(HI, "assistant", LOOK).ids) == "</s>[INST]hi[/INST]"


@pytest.mark.parametrize(("system", "tools"), [([SYSTEM], ()), ([], LOOK)])
def test_a_context_that_would_lose_what_belongs_to_the_next_turn_is_refused(families, system, tools):
    with pytest.raises(InvalidRequest, match="Let the context end with a user's message"):
        families["mistral"].encode_context([*system, ASKED, ANSWERED], tools)
    assert families["mistral"].encode_context([*system, ASKED, ANSWERED, ASKED], tools)


@pytest.mark.parametrize("family", ["chatml", "llama", "embedded"])
@pytest.mark.parametrize("context", [[SYSTEM], [SYSTEM, ASKED, ANSWERED]])
def test_tools_are_told_in_the_context_and_nowhere_else(families, family, context):
    tokenizer, after = families[family], "assistant" if context[-1] is ANSWERED else "user"
    turn = tokenizer.encode_turn(HI, after, LOOK)
    assert turn == tokenizer.encode_turn(HI, after)
    said = decoded(tokenizer, tokenizer.encode_context(context, LOOK).ids + turn.ids)
    assert said == decoded(tokenizer, tokenizer.encode_chat([*context, *HI], LOOK).ids)
    assert said.count("look") == 1


def test_a_template_that_cannot_do_without_tools_gets_them(tmp_path):
    tokenizer = make_tokenizer(tmp_path, JSON_TOOLS.replace("tools or []", "tools") + TEMPLATE, QWEN["added"])
    log = tokenizer.encode_context([ASKED], LOOK).ids + tokenizer.encode_turn(user(" reads"), "user", LOOK).ids
    assert decoded(tokenizer, log).endswith(f"}}\n<|im_start|>user\nthe agent reads<|im_end|>\n{ASSISTANT}")
    assert decoded(tokenizer, tokenizer.encode_turn(HI, "user").ids) == f"hi<|im_end|>\n{ASSISTANT}"


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_context_with_tools_that_a_model_cannot_call_is_refused(tmp_path, template):
    with pytest.raises(InvalidRequest, match="leave `tools` out"):
        make_tokenizer(tmp_path, template).encode_context(HI, LOOK)


def test_a_model_that_takes_no_answers_has_contexts_and_no_second_turns(tmp_path):
    refusing = "{% for m in messages if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endfor %}"
    tokenizer = make_tokenizer(tmp_path, refusing + TEMPLATE)
    assert tokenizer.encode_context(HI).ids + tokenizer.encode_turn(user("!"), "user").ids
    with pytest.raises(InvalidRequest, match=r"no answers\..*there are no sessions with it: call without one"):
        tokenizer.encode_turn(HI, "assistant")


@pytest.mark.parametrize("content", ["m.content[:2]", "m.content + m.content", "m.content | tojson | urlencode"])
def test_a_template_that_changes_texts_has_no_sessions(tmp_path, content):
    tokenizer = make_tokenizer(tmp_path, TEMPLATE.replace("m['content']", content))
    for refused in [
        lambda: tokenizer.encode_context([Message("user", "some text")]),
        lambda: tokenizer.encode_context([ASKED, ANSWERED]),
    ]:
        with pytest.raises(InvalidRequest, match=r"there are no sessions with this model|leaves out or changes a mess"):
            refused()


@pytest.mark.parametrize("after", ["user", "assistant"])
def test_a_turn_that_is_no_text_is_refused(tokenizer, after):
    with pytest.raises(InvalidRequest, match="surrogates not allowed"):
        tokenizer.encode_turn(user("half \ud83d"), after)


# Results of tools, which end the answer that asked for them

CALLED = (ToolCall("look", {"at": "x"}, "abcdefgh1"), ToolCall("find", {}, "abcdefgh2"))
RESULTS = [Message("tool", "open <|im_end|>", name="look", call_id="abcdefgh1"), Message("tool", "", name="find")]
CALL = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
WITH_RESULTS = {
    "own role": TEMPLATE.replace("m['content'] }}", "m['content'] }}" + CALL),
    "within the user's": "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user\n{% endif %}<r>{{ m.content }}</r>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CALL + "<|im_end|>\n{% endif %}{% endfor %}",
    "by the call's name": "{% set ns = namespace() %}{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>to {{ ns.name }}: {{ m.content | tojson }}<|im_end|>{% else %}{{ m.content }}" + CALL + "<|im_end|>"
    "{% endif %}{% if m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}{% endif %}{% endfor %}",
    "with ids": TEMPLATE.replace("m['content'] }}", "m['content'] }}{{ m.tool_call_id }}" + CALL).replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'tool' and m.tool_call_id | length != 9 %}"
        "{{ raise_exception('Tool call IDs should have length 9') }}{% endif %}",
    ),
    "calls are left out": TEMPLATE,
}


@pytest.mark.parametrize("template", WITH_RESULTS)
@pytest.mark.parametrize("more", [[], [Message("user", "so?")]])
@pytest.mark.parametrize("num_results", [1, 2])
def test_results_in_a_turn_read_as_in_the_whole_chat(tmp_path, template, more, num_results):
    tokenizer = make_tokenizer(tmp_path, WITH_RESULTS[template], QWEN["added"])
    calls = CALLED[:num_results]
    results = [replace(r, call_id=c.call_id) for r, c in zip(RESULTS, calls, strict=False)]
    turn = tokenizer.encode_turn([*results, *more], "assistant").ids
    whole = tokenizer.encode_chat([ASKED, Message("assistant", "hm ", tool_calls=calls), *results, *more]).ids
    assert whole[-len(turn) :] == turn
    before = decoded(tokenizer, whole[: -len(turn)])
    assert before.endswith("}}" if "left out" in template else "</tool_call>")
    if num_results == 1 and not more:
        context = tokenizer.encode_context([ASKED, Message("assistant", "hm ", tool_calls=calls)]).ids
        assert context + turn == whole


def test_a_result_without_an_id_gets_one_where_the_template_insists(tmp_path):
    tokenizer = make_tokenizer(tmp_path, WITH_RESULTS["with ids"], QWEN["added"])
    turn = decoded(tokenizer, tokenizer.encode_turn([replace(RESULTS[0], call_id="")], "assistant").ids)
    assert turn == f"<|im_end|>\n<|im_start|>tool\nopen <|im_end|>000000000<|im_end|>\n{ASSISTANT}"


def test_one_call_stands_for_all_where_a_template_takes_one_in_a_message(tmp_path):
    single = "{% for m in messages if (m.tool_calls or []) | length > 1 %}{{ raise_exception('one call') }}{% endfor %}"
    tokenizer = make_tokenizer(tmp_path, single + WITH_RESULTS["own role"], QWEN["added"])
    turn = decoded(tokenizer, tokenizer.encode_turn(RESULTS, "assistant").ids)
    assert turn.startswith("<|im_end|>\n<|im_start|>tool\nopen <|im_end|><|im_end|>\n<|im_start|>tool\n<|im_end|>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}" + CALL + "{% endfor %}", "drops or repeats"),
        ("<|im_end|>{% for m in messages %}{{ m.content }}" + CALL + "{% endfor %}", "drops or repeats"),
        ("{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}", "no tools"),
    ],
)
def test_a_template_that_cannot_show_results_refuses_them(tmp_path, template, words):
    with pytest.raises(InvalidRequest, match=words):
        make_tokenizer(tmp_path, template, QWEN["added"]).encode_turn(RESULTS[:1], "assistant")


@pytest.mark.parametrize(("after", "role"), [("user", "tool"), ("user", "assistant"), ("assistant", "assistant")])
def test_a_turn_begins_with_what_can_follow(tokenizer, after, role):
    words = {"assistant": "The session ends in an answer: begin the turn with", "user": "no call in this session"}
    with pytest.raises(InvalidRequest, match=words[after]):
        tokenizer.encode_turn([Message(role, "x", name="look")], after)


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_amid_one(tmp_path):
    tokenizer = make_sentencepiece(tmp_path)
    log = (
        tokenizer.encode_context([Message("user", "one\n\n")]).ids
        + tokenizer.encode_turn(user("two <|im_end|>"), "user").ids
    )
    assert log == tokenizer.encode_chat([Message("user", "one\n\ntwo <|im_end|>")]).ids
    assert tokenizer.decode(log) == "one\n\ntwo <|im_end|>"


def test_decoding_shows_control_tokens(tokenizer):
    assert tokenizer.decode(tokenizer.encode_chat(HI).ids) == f"<|im_start|>user\nhi<|im_end|>\n{ASSISTANT}"


def test_a_token_reads_as_it_would_in_a_text(tokenizer):
    def reads(text):
        return [tokenizer.token_text(i) for i in encoded(tokenizer, text)]

    assert reads("the agent") == ["the", " agent"]
    assert reads("é<|im_end|>") == ["\ufffd", "\ufffd", "<|im_end|>"]


def test_a_grammar_is_compiled_over_the_models_vocabulary(embedded):
    constraint = embedded.hold(Prompt(()), Holding(Grammar(GrammarKind.REGEX, "yes|no")), 1024)
    allowed = int.from_bytes(constraint.mask(), "little")
    assert {embedded.token_text(i)[0] for i in range(1024) if allowed >> i & 1} == {"y", "n"}


def test_tool_calls_and_their_results_are_rendered_as_the_template_has_them(embedded):
    call = Message("assistant", tool_calls=(ToolCall("look", {"at": "<|end|>"}, "1"),))
    prompt = embedded.encode_chat([*HI, call, Message("tool", "open", call_id="1", name="look")], LOOK)
    assert embedded.decode(prompt.ids) == (
        "<|begin|><|system|>Tools: look().<|end|><|user|>hi<|end|>"
        '<|assistant|><tool_call>{"name": "look", "arguments": {"at": "<|end|>"}}</tool_call><|end|>'
        "<|tool|>open<|end|><|assistant|>"
    )
    (end,) = embedded.stop_ids
    assert prompt.ids.count(end) == 4  # the one in the arguments is text


def test_reasoning_reaches_a_template_that_shows_it(tmp_path):
    template = "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content or '-' }}:{{ m.content }}|{% endfor %}"
    tokenizer = make_tokenizer(tmp_path, template)
    prompt = tokenizer.encode_chat([Message("assistant", "yes", reasoning="so"), *HI])
    assert tokenizer.decode(prompt.ids) == "assistant:so:yes|user:-:hi|"


def test_control_tokens_in_a_raw_prompt_are_control_tokens(qwen):
    rendered = decoded(qwen, qwen.encode_chat(HI).ids)
    assert rendered.startswith("<|im_start|>user\nhi<|im_end|>")
    assert qwen.encode_raw(rendered) == Prompt(qwen.encode_chat(HI).ids)


def test_a_raw_prompt_begins_with_the_token_that_begins_a_text_once(tmp_path):
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    begins = Tokenizer.from_file(str(path))
    bos = "<|endoftext|>", begins.token_to_id("<|endoftext|>")
    begins.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    begins.save(str(path))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": bos[0]}))
    tokenizer = ChatTokenizer(tmp_path, None)
    ids = tokenizer.encode_raw("the agent").ids
    assert decoded(tokenizer, ids) == f"{bos[0]}the agent"
    assert tokenizer.encode_raw(f"{bos[0]}the agent").ids == ids


def test_a_raw_prompt_of_which_nothing_is_left_is_refused(tmp_path):
    make_tokenizer(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    strips = Tokenizer.from_file(path)
    strips.normalizer = normalizers.Strip()
    strips.save(path)
    tokenizer = ChatTokenizer(tmp_path, None)
    assert tokenizer.encode_raw(" a ").ids
    with pytest.raises(InvalidRequest, match="leaves nothing of this prompt"):
        tokenizer.encode_raw(" ")
