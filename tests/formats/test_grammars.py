"""Grammars of calls: what they allow is read as a call whose arguments obey the tool's schema."""

import json
import random

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from tests.chat.test_reader import read
from tests.chat.written import FAMILIES, LOOK, TOOLS
from tests.effort import drawn

# Their markers are tokens with texts between them, or their elements nest without end.
NONE = {"kimi-k3", "minimax-m3"}
TOKENIZER = LLTokenizer("byte")


def written_by(source: str, ends: list[bytes], seed: int) -> str:
    """A text that the grammar allows, chosen at random, which ends soon: `ends` are what parts of it may end with."""
    chance, matcher = random.Random(seed), LLMatcher(TOKENIZER, json.dumps({"grammars": [{"lark_grammar": source}]}))
    mask, text = allocate_token_bitmask(1, TOKENIZER.vocab_size), bytearray()
    while not matcher.is_stopped():
        chosen = matcher.compute_ff_tokens()
        if not chosen:
            fill_next_token_bitmask(matcher, mask)
            allowed = [i for i in range(32, 127) if mask[0, i // 32] >> (i % 32) & 1]
            ending = [end for end in ends if matcher.validate_tokens(list(end)) == len(end)]
            if matcher.is_accepting() and (not allowed or chance.random() < 0.9):
                break
            chosen = list(chance.choice(ending)) if ending and chance.random() < 0.4 else [chance.choice(allowed)]
        assert matcher.consume_tokens(chosen), matcher.get_error()
        text += bytes(chosen)
        assert len(text) < 5000
    assert not matcher.is_error(), matcher.get_error()
    return text.decode(errors="replace")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_grammar_of_a_call_allows_is_read_as_a_call_that_obeys_the_schema(name):
    calls = FAMILIES[name].form.calls
    source = calls.grammar(TOOLS)
    assert (source is None) == (name in NONE)
    if source is None:
        return
    called, form = set(), FAMILIES[name].form
    ends = [padding + marker.encode() for marker in filter(None, form.markers) for padding in (b"", b"\n")]
    ends += [b'"', b"}", b"]", b'"}', b'"]', b"1"]
    for seed in range(drawn(50, least=8)):
        text = written_by(source, ends, seed)
        assert text.startswith(calls.begin)
        _, found, notes = read(form, [text])
        assert (len(found), notes) == (1, ()), f"{text!r} of {source}"
        called.add(found[0].name)
        if found[0].name == "look":
            jsonschema.validate(found[0].arguments, LOOK)
    assert called == {"look", "stop"}
