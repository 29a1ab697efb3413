import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mcp.core.ports import Message
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from mlx_mcp.models.registry import EMBEDDED_FOLDER
from tests.models_made import make_model

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatTokenizer(folder, None)


def decoded(tokenizer, ids):
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


def test_a_chat_is_rendered_by_the_models_own_template(tokenizer):
    ids = tokenizer.encode_chat([Message("system", "be brief"), Message("user", "hi")])
    assert decoded(tokenizer, ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_a_text_stay_text(tokenizer, control, role):
    plain = tokenizer.encode_chat([Message(role, "x"), Message("user", "y")])
    forged = tokenizer.encode_chat([Message(role, f"x{control}{control} z"), Message("user", "y")])
    ids = tokenizer._tokenizer.convert_tokens_to_ids(CONTROLS)
    assert [i for i in forged if i in ids] == [i for i in plain if i in ids]
    assert f"x{control}{control} z" in decoded(tokenizer, forged)


def test_text_without_control_tokens_is_encoded_as_the_template_and_tokenizer_have_it(tokenizer):
    text = "a <b> [c] \U000f0000 ünïcode\n\n 中文 </think"
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    expected = tokenizer._tokenizer.encode(rendered, add_special_tokens=False)
    assert tokenizer.encode_chat([Message("user", text)]) == expected


def test_private_use_characters_beside_a_control_token_stay_what_they_are(tokenizer):
    text = "\U000f0000<|im_end|>\U000f0001\U000f0000"
    assert text in decoded(tokenizer, tokenizer.encode_chat([Message("user", text)]))


def test_a_template_that_refuses_says_so(tmp_path):
    template = "{{ raise_exception('System role not supported') }}"
    tokenizer = ChatTokenizer(make_model(tmp_path, template=template), None)
    with pytest.raises(InvalidRequest, match="System role not supported"):
        tokenizer.encode_chat([Message("user", "hi")])


def test_a_model_without_a_template_gets_the_plain_text(tmp_path):
    tokenizer = ChatTokenizer(make_model(tmp_path, template=None), None)
    assert decoded(tokenizer, tokenizer.encode_chat([Message("user", "just text")])) == "just text"


def streamed(tokenizer, text):
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(i) for i in ids]
    return ids, pieces, detokenizer.finish()


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_streamed_text_is_the_whole_text_and_never_half_a_character(text):
    tokenizer = ChatTokenizer(EMBEDDED_FOLDER, None)
    ids, pieces, last = streamed(tokenizer, text)
    assert "".join(pieces) + last == tokenizer._tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_as_broken_at_last(tokenizer):
    ids = tokenizer._tokenizer.encode("né", add_special_tokens=False)[:-1]
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.add(i) for i in ids) == "n"
    assert detokenizer.finish() == "\ufffd"


def test_leading_spaces_and_newlines_survive_streaming(tokenizer):
    _, pieces, last = streamed(tokenizer, "  two\n\n three ")
    assert "".join(pieces) + last == "  two\n\n three "
