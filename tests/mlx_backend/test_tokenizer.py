import json
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Grammar, GrammarKind, Prompt
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer, StreamDetokenizer
from mlx_mcp.models.registry import EMBEDDED_FOLDER
from tests.models_made import TEMPLATE, write_tokenizer

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
ASSISTANT = "<|im_start|>assistant\n"

# As Qwen3's: `tool_call.name` is what mlx_lm knows the notation by.
JSON_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{# <tool_call> tool_call.name #}"
THINKING = "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
QWEN = {"template": JSON_TOOLS + TEMPLATE + THINKING, "added": ["<think>", "</think>", "<tool_call>", "</tool_call>"]}
MISTRAL = {"template": TEMPLATE + "{# [TOOL_CALLS] #}", "special": ["[TOOL_CALLS]", "[ARGS]", "[INST]"]}
LFM = {"template": TEMPLATE, "special": ["<|tool_call_start|>", "<|tool_call_end|>"]}
HARMONY = {"template": TEMPLATE, "special": ["<|channel|>", "<|message|>", "<|start|>", "<|end|>"]}

# How families of models go about a chat, as far as going on with one depends on it.
FAMILIES = {
    "chatml": QWEN,
    # Tools in the user's first message; a date before all of it.
    "llama": {
        "template": "<|begin_of_text|>{% set system = messages[0].role == 'system' %}"
        "<|header|>system<|/header|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n"
        "{{ messages[0].content if system }}<|eot|>"
        "{% for m in messages[system | int:] %}<|header|>{{ m.role }}<|/header|>\n\n"
        "{% if loop.first and tools %}{{ tools | tojson }}\n\n{% endif %}{{ m.content | trim }}<|eot|>{% endfor %}"
        "<|header|>assistant<|/header|>\n\n{# <tool_call> tool_call.name #}",
        "special": ["<|begin_of_text|>", "<|header|>", "<|/header|>", "<|eot|>"],
    },
    # The system prompt in the user's first message; strict alternation; other names for roles.
    "gemma": {
        "template": "<bos>{% set system = messages[0].role == 'system' %}{% for m in messages[system | int:] %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ messages[0].content + '\n\n' if system and loop.first }}{{ m.content | trim }}<end>\n{% endfor %}"
        "{{ '<turn>model\n' }}",
        "special": ["<bos>", "<turn>", "<end>"],
    },
    # System prompt and tools with the user's last message.
    "mistral": {
        "template": "<s>{% set system = messages[0].role == 'system' %}{% for m in messages[system | int:] %}"
        "{% if m.role == 'user' %}{% if loop.last %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' if tools }}"
        "{% endif %}[INST]{{ messages[0].content + '\n\n' if system and loop.last }}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{# [TOOL_CALLS] #}",
        "special": ["<s>", "</s>", "[TOOLS]", "[/TOOLS]", "[INST]", "[/INST]"],
    },
    "none": {"template": None},
}

LOOK = ({"type": "function", "function": {"name": "look", "description": "Look there.", "parameters": {}}},)
HI = [Message("user", "hi")]
SYSTEM, ASKED, ANSWERED = Message("system", "be brief"), Message("user", "the agent"), Message("assistant", "reads")


def make_tokenizer(folder, template=TEMPLATE, added=(), special=()):
    write_tokenizer(folder, template)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(path)
    return ChatTokenizer(folder, None)


def make_sentencepiece(folder):
    """One that spells with bytes, puts a space before a text, and drops the first space when it decodes."""
    vocab = ["<unk>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    spm = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True))
    spm.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spm.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    write_tokenizer(folder, None)
    spm.save(str(folder / "tokenizer.json"))
    return ChatTokenizer(folder, None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("qwen"), **QWEN)


@pytest.fixture(scope="module")
def embedded():
    return ChatTokenizer(EMBEDDED_FOLDER, None)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("mistral"), **MISTRAL)


@pytest.fixture(scope="module")
def families(tmp_path_factory, embedded):
    made = {name: make_tokenizer(tmp_path_factory.mktemp(name), **given) for name, given in FAMILIES.items()}
    return {**made, "embedded": embedded}


def encoded(tokenizer, text):
    return tokenizer._tokenizer.encode(text, add_special_tokens=False)


def decoded(tokenizer, ids):
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


def joined(pieces):
    """Pieces end to end, one per run of a kind."""
    return [(kind.value, "".join(p.text for p in run)) for kind, run in groupby(pieces, key=lambda p: p.kind)]


def read(tokenizer, *parts, reasoning=False, tools=LOOK, plain=False):
    """What a reader makes of an answer whose parts are encoded one by one: its pieces and its calls."""
    reader = tokenizer.reader(Prompt((), reasoning), tools, plain)
    pieces = [piece for part in parts for token_id in encoded(tokenizer, part) for piece in reader.add(token_id)]
    return joined(pieces + reader.finish()), list(reader.tool_calls)


# Prompts


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
    with pytest.raises(InvalidRequest, match=r"These messages do not fit .*(no system role|str)"):
        tokenizer.encode_chat(HI)


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('user must come first') }}{% endif %}"


def test_advice_to_leave_the_system_prompt_out_is_given_only_where_that_helps(tmp_path):
    refuses = make_tokenizer(tmp_path, REFUSES_SYSTEM + TEMPLATE)
    with pytest.raises(
        InvalidRequest, match=r"come first\. It takes no system prompt: leave `system` out and say it in"
    ):
        refuses.encode_chat([SYSTEM, *HI])
    (tmp_path / "other").mkdir()
    broken = make_tokenizer(tmp_path / "other", "{{ raise_exception('no dates here') }}")
    for unrelated in (
        lambda: broken.encode_chat([SYSTEM, *HI]),
        lambda: broken.encode_chat(HI),
        lambda: broken.encode_context([SYSTEM, ASKED, ANSWERED]),
        lambda: refuses.encode_chat([SYSTEM, Message("user", "half \ud83d")]),
    ):
        with pytest.raises(InvalidRequest, match="do not fit") as refused:
            unrelated()
        assert "system" not in str(refused.value)
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
    with pytest.raises(InvalidRequest, match="These messages or tools do not fit"):
        qwen.encode_chat(HI, ({"function": {"name": "look", "parameters": nested}},))


def test_a_prompt_says_whether_the_template_opened_the_reasoning(qwen):
    asked, not_asked = qwen.encode_chat(HI), qwen.encode_chat(HI, reasoning=False)
    assert decoded(qwen, asked.ids).endswith(f"{ASSISTANT}<think>\n")
    assert decoded(qwen, not_asked.ids).endswith(f"{ASSISTANT}<think>\n\n</think>\n\n")
    assert (asked.reasoning, not_asked.reasoning) == (True, False)


@pytest.mark.parametrize("template", [TEMPLATE, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_no_text_can_pass_for_reasoning_that_the_template_opened(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path, template, added=QWEN["added"])
    assert tokenizer._tokenizer.has_thinking
    assert not tokenizer.encode_chat([Message("user", "end with <think>\n")]).reasoning


# Sessions: a context that is encoded once, and turns that go on from it


@pytest.mark.parametrize("family", [*FAMILIES, "embedded"])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_a_turn_goes_on_in_the_users_message_that_a_context_leaves_open(families, family, system):
    tokenizer = families[family]
    context = tokenizer.encode_context([*system, Message("user", "the file\n\n")])
    turn = tokenizer.encode_turn("and the tool ", "user")
    whole = tokenizer.encode_chat([*system, Message("user", "the file\n\nand the tool ")])
    assert context + turn.ids == whole.ids
    assert turn.reasoning == whole.reasoning


@pytest.mark.parametrize("family", [*FAMILIES, "embedded"])
def test_a_context_of_a_system_prompt_opens_the_users_message(families, family):
    tokenizer = families[family]
    log = tokenizer.encode_context([SYSTEM]) + tokenizer.encode_turn("the agent", "user").ids
    assert log == tokenizer.encode_chat([SYSTEM, ASKED]).ids


@pytest.mark.parametrize("family", [*FAMILIES, "embedded"])
def test_a_turn_goes_on_after_the_answer_that_a_context_leaves_open(families, family):
    tokenizer = families[family]
    log = tokenizer.encode_context([ASKED, ANSWERED]) + tokenizer.encode_turn("the file", "assistant").ids
    assert log == tokenizer.encode_chat([ASKED, ANSWERED, Message("user", "the file")]).ids


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral", "embedded"])
def test_a_log_of_turns_is_what_the_chat_would_be(families, family):
    tokenizer = families[family]
    log, chat = tokenizer.encode_chat([ASKED]).ids, [ASKED]
    for text in ["the file", "the tool"]:
        log += (*encoded(tokenizer, "reads"), *tokenizer.encode_turn(text, "assistant").ids)
        chat += [ANSWERED, Message("user", text)]
    assert log == tokenizer.encode_chat(chat).ids


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.text(max_size=20) | st.sampled_from([*CONTROLS, "\U000f0000"]), max_size=4))
@pytest.mark.parametrize("family", ["chatml", "embedded"])
def test_any_text_is_the_same_in_a_turn_and_in_a_chat(families, family, parts):
    tokenizer, text = families[family], "x" + "".join(parts)
    context = [ASKED, Message("assistant", text)]
    log = tokenizer.encode_context(context) + tokenizer.encode_turn(text, "assistant").ids
    assert log == tokenizer.encode_chat([*context, Message("user", text)]).ids
    log = tokenizer.encode_context([Message("user", f"{text}x\n\n")]) + tokenizer.encode_turn(text, "user").ids
    assert log == tokenizer.encode_chat([Message("user", f"{text}x\n\n{text}")]).ids


def test_a_log_keeps_what_a_template_would_strip(tmp_path):
    stripping = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]") + THINKING
    tokenizer = make_tokenizer(tmp_path, stripping, QWEN["added"])
    log = tokenizer.encode_chat(HI).ids + tuple(encoded(tokenizer, "why?\n</think>\n\nhello"))
    turn = tokenizer.encode_turn("go on", "assistant")
    assert decoded(tokenizer, log + turn.ids) == (
        f"<|im_start|>user\nhi<|im_end|>\n{ASSISTANT}<think>\nwhy?\n</think>\n\nhello<|im_end|>\n"
        f"<|im_start|>user\ngo on<|im_end|>\n{ASSISTANT}<think>\n"
    )
    assert (turn.reasoning, tokenizer.encode_turn("go on", "assistant", reasoning=False).reasoning) == (True, False)


def test_an_answer_in_a_context_reads_as_one_that_a_turn_follows(tmp_path):
    # As Qwen3's, which shows reasoning, if only an empty one, in an answer that nothing follows.
    template = TEMPLATE.replace(
        "m['content']", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content"
    )
    tokenizer = make_tokenizer(tmp_path, template)
    assert decoded(tokenizer, tokenizer.encode_context([ASKED, ANSWERED])).endswith(f"{ASSISTANT}reads")


def test_what_a_template_puts_into_the_last_turn_is_not_put_there_again(families):
    tokenizer = families["mistral"]
    context = tokenizer.encode_context([SYSTEM], LOOK)
    assert decoded(tokenizer, context).startswith("<s>[TOOLS][{")
    assert decoded(tokenizer, tokenizer.encode_turn("hi", "user", LOOK).ids) == "hi[/INST]"
    assert decoded(tokenizer, tokenizer.encode_turn("hi", "assistant", LOOK).ids) == "</s>[INST]hi[/INST]"


@pytest.mark.parametrize(("system", "tools"), [([SYSTEM], ()), ([], LOOK)])
def test_a_context_that_would_lose_what_belongs_to_the_next_turn_is_refused(families, system, tools):
    with pytest.raises(InvalidRequest, match="Let the context end with a user's message"):
        families["mistral"].encode_context([*system, ASKED, ANSWERED], tools)
    assert families["mistral"].encode_context([*system, ASKED, ANSWERED, ASKED], tools)


@pytest.mark.parametrize("family", ["chatml", "llama", "embedded"])
@pytest.mark.parametrize("context", [[SYSTEM], [SYSTEM, ASKED, ANSWERED]])
def test_tools_are_told_in_the_context_and_nowhere_else(families, family, context):
    tokenizer, after = families[family], "assistant" if context[-1] is ANSWERED else "user"
    turn = tokenizer.encode_turn("hi", after, LOOK)
    assert turn == tokenizer.encode_turn("hi", after)
    said = decoded(tokenizer, tokenizer.encode_context(context, LOOK) + turn.ids)
    assert said == decoded(tokenizer, tokenizer.encode_chat([*context, *HI], LOOK).ids)
    assert said.count("look") == 1


def test_a_template_that_cannot_do_without_tools_gets_them(tmp_path):
    tokenizer = make_tokenizer(tmp_path, JSON_TOOLS.replace("tools or []", "tools") + TEMPLATE, QWEN["added"])
    log = tokenizer.encode_context([ASKED], LOOK) + tokenizer.encode_turn(" reads", "user", LOOK).ids
    assert decoded(tokenizer, log).endswith(f"}}\n<|im_start|>user\nthe agent reads<|im_end|>\n{ASSISTANT}")
    with pytest.raises(InvalidRequest, match="do not fit"):
        tokenizer.encode_turn("hi", "user")


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_context_with_tools_that_a_model_cannot_call_is_refused(tmp_path, template):
    with pytest.raises(InvalidRequest, match="leave `tools` out"):
        make_tokenizer(tmp_path, template).encode_context(HI, LOOK)


def test_a_model_that_takes_no_answers_has_contexts_and_no_second_turns(tmp_path):
    refusing = "{% for m in messages if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endfor %}"
    tokenizer = make_tokenizer(tmp_path, refusing + TEMPLATE)
    assert tokenizer.encode_context(HI) + tokenizer.encode_turn("!", "user").ids
    with pytest.raises(InvalidRequest, match=r"no answers\..*there are no sessions with it: call without one"):
        tokenizer.encode_turn("hi", "assistant")


@pytest.mark.parametrize("content", ["m.content[:2]", "m.content + m.content", "m.content | tojson | urlencode"])
def test_a_template_that_changes_texts_has_no_sessions(tmp_path, content):
    tokenizer = make_tokenizer(tmp_path, TEMPLATE.replace("m['content']", content))
    for refused in [
        lambda: tokenizer.encode_context([Message("user", "some text")]),
        lambda: tokenizer.encode_context([ASKED, ANSWERED]),
    ]:
        with pytest.raises(InvalidRequest, match="there are no sessions with this model"):
            refused()


@pytest.mark.parametrize("after", ["user", "assistant"])
def test_a_turn_that_is_no_text_is_refused(tokenizer, after):
    with pytest.raises(InvalidRequest, match="surrogates not allowed"):
        tokenizer.encode_turn("half \ud83d", after)


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_amid_one(tmp_path):
    tokenizer = make_sentencepiece(tmp_path)
    log = tokenizer.encode_context([Message("user", "one\n\n")]) + tokenizer.encode_turn("two <|im_end|>", "user").ids
    assert log == tokenizer.encode_chat([Message("user", "one\n\ntwo <|im_end|>")]).ids
    assert tokenizer.decode(log) == "one\n\ntwo <|im_end|>"


def test_decoding_shows_control_tokens(tokenizer):
    assert tokenizer.decode(tokenizer.encode_chat(HI).ids) == f"<|im_start|>user\nhi<|im_end|>\n{ASSISTANT}"


# Streaming


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_streamed_text_is_the_whole_text_and_never_half_a_character(embedded, text, cuts):
    ids = [i for part in cut(text, cuts) for i in encoded(embedded, part)]
    reader = embedded.reader(Prompt(()), plain=True)
    pieces = [piece.text for i in ids for piece in reader.add(i)]
    last = "".join(piece.text for piece in reader.finish())
    assert "".join(pieces) + last == embedded._tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def cut(text, cuts):
    ends = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 1023), max_size=60))
def test_any_tokens_read_as_they_do_all_at_once(embedded, ids):
    detokenizer = StreamDetokenizer(embedded._tokenizer)
    pieces = [detokenizer.add(i) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == decoded(embedded, ids)


def test_text_of_a_tokenizer_that_spells_with_bytes_and_marks_words_by_spaces_survives_streaming(tmp_path):
    tokenizer = make_sentencepiece(tmp_path)
    text = "one two  three é 中文 🙂🙂🙂🙂🙂🙂 " * 3
    assert read(tokenizer, text) == ([("answer", text)], [])
    assert [tokenizer.token_text(i) for i in encoded(tokenizer, "a b")] == [" ", "a", " ", "b"]


def test_a_tokens_cost_does_not_grow_with_the_text(tokenizer):
    class Counting:
        def decode(self, ids, **options):
            sizes.append(len(ids))
            return tokenizer._tokenizer.decode(ids, **options)

    sizes = []
    detokenizer = StreamDetokenizer(Counting())
    half = encoded(tokenizer, "é")[0]
    for token_id in [half] * 200 + encoded(tokenizer, "the agent reads the file " * 20):
        detokenizer.add(token_id)
    assert max(sizes) <= 32


def test_a_character_that_never_ends_is_shown_as_broken_at_last(tokenizer):
    detokenizer = StreamDetokenizer(tokenizer._tokenizer)
    assert "".join(detokenizer.add(i) for i in encoded(tokenizer, "né")[:-1]) == "n"
    assert detokenizer.finish() == "\ufffd"


def test_leading_spaces_and_newlines_survive_streaming(tokenizer):
    assert read(tokenizer, "\n  two\n\n three ") == ([("answer", "\n  two\n\n three ")], [])


def test_special_tokens_are_not_shown(qwen, mistral):
    assert read(qwen, "a<|im_start|>b<|endoftext|>") == ([("answer", "ab")], [])
    assert read(mistral, "a[INST]b") == ([("answer", "ab")], [])


def test_a_token_reads_as_it_would_in_a_text(tokenizer):
    def reads(text):
        return [tokenizer.token_text(i) for i in encoded(tokenizer, text)]

    assert reads("the agent") == ["the", " agent"]
    assert reads("é<|im_end|>") == ["\ufffd", "\ufffd", "<|im_end|>"]


# Reasoning and tool calls


def test_reasoning_is_told_from_the_answer_whoever_opened_it(qwen):
    expected = [("reasoning", "let me see\n"), ("answer", "It is.")], []
    assert read(qwen, "<think>\nlet me see\n</think>\n\nIt is.") == expected
    assert read(qwen, "\nlet me see\n</think>\n\nIt is.", reasoning=True) == expected


def test_a_plain_answer_is_not_split(qwen, mistral):
    text = '<think>a</think>\n<tool_call>{"name": "look"}</tool_call>'
    assert read(qwen, text, plain=True, reasoning=True) == ([("answer", text)], [])
    assert read(mistral, "[TOOL_CALLS]look[ARGS]{}", plain=True) == ([("answer", "look{}")], [])


def test_what_only_begins_like_a_marker_is_text(qwen):
    assert read(qwen, "a < b <thin") == ([("answer", "a < b <thin")], [])


def test_calls_are_parsed_and_told_from_the_answer(qwen):
    calls = ['{"name": "look", "arguments": {"at": "é"}}', '\n{"name": "look", "arguments": "{\\"at\\": 2}"}\n']
    pieces, parsed = read(qwen, f"Let me.<tool_call>{calls[0]}</tool_call>\n<tool_call>{calls[1]}</tool_call>\nSo.")
    assert pieces == [("answer", "Let me."), ("tool_call", "".join(calls)), ("answer", "So.")]
    assert parsed == [ToolCall("look", {"at": "é"}), ToolCall("look", {"at": 2})]


@pytest.mark.parametrize("arguments", ["", ', "arguments": {}', ', "arguments": null', ', "arguments": ""'])
def test_a_call_may_have_no_arguments(qwen, arguments):
    text = f'{{"name": "look"{arguments}}}'
    assert read(qwen, f"<tool_call>{text}</tool_call>") == ([("tool_call", text)], [ToolCall("look", {})])


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


def test_a_call_that_was_cut_off_is_shown_and_is_no_call(qwen):
    whole = '<tool_call>{"name": "look", "arguments": {}}'
    assert read(qwen, whole) == ([("answer", whole)], [])
    assert read(qwen, f"{whole}</tool") == ([("answer", f"{whole}</tool")], [])


def test_special_tokens_mark_calls_and_stand_in_them(mistral):
    call = '[{"name": "look", "arguments": {"at": 1}}]'
    assert read(mistral, f"So[TOOL_CALLS]{call}") == (
        [("answer", "So"), ("tool_call", call)],
        [ToolCall("look", {"at": 1})],
    )
    assert read(mistral, 'look: [TOOL_CALLS]look[ARGS]{"at": 1}[TOOL_CALLS]look[ARGS]{}')[1] == [
        ToolCall("look", {"at": 1}),
        ToolCall("look", {}),
    ]


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
    assert read(harmony, written) == ([("reasoning", "Let me see."), ("answer", "I look.It is.")], [])


def test_the_embedded_models_calls_are_read(embedded):
    call = '{"name": "look", "arguments": {"at": "the door"}}'
    assert read(embedded, f"<tool_call>{call}</tool_call>")[1] == [ToolCall("look", {"at": "the door"})]


TEXTS = st.text(alphabet="a<>/é中\n ", max_size=12)  # parts of markers, and none whole


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from(["reasoning", "answer", "call", "no call"]), TEXTS), max_size=5),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
def test_however_an_answer_is_cut_into_tokens_its_pieces_are_the_same(qwen, parts, cuts):
    written, expected, calls, after_marker = "", [], [], False
    for kind, text in parts:
        call = json.dumps({"name": "look", "arguments": {"at": text}}, ensure_ascii=False)
        written += {
            "reasoning": f"<think>{text}</think>",
            "answer": text,
            "call": f"<tool_call>{call}</tool_call>",
            "no call": f"<tool_call>{text}</tool_call>",
        }[kind]
        match kind:
            case "reasoning":
                expected.append((kind, text.lstrip("\n")))
            case "answer":
                expected.append((kind, text.lstrip("\n") if after_marker else text))
            case "call":
                expected.append(("tool_call", call))
                calls.append(ToolCall("look", {"at": text}))
            case "no call":
                expected.append(("answer", f"<tool_call>{text}</tool_call>"))
        after_marker = kind in ("reasoning", "call") or (after_marker and kind == "answer" and not expected[-1][1])
    runs = groupby((part for part in expected if part[1]), key=lambda part: part[0])
    assert read(qwen, *cut(written, cuts)) == ([(kind, "".join(text for _, text in run)) for kind, run in runs], calls)


def test_a_grammar_is_compiled_over_the_models_vocabulary(embedded):
    constraint = embedded.compile(Grammar(GrammarKind.REGEX, "yes|no"), 1024)
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
