"""Text as its tokens come."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mcp.chat.prompt import Prompt
from mlx_mcp.mlx_backend.answer_reader import StreamDetokenizer
from tests.mlx_backend.tokenizers_made import cut, decoded, encoded, make_sentencepiece, read


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
