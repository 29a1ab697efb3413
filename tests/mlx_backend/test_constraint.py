import json
import random
import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.errors import Abandoned, CapacityError, GenerationFailed, InvalidRequest
from mlx_mcp.mlx_backend import constraint
from mlx_mcp.mlx_backend.constraint import MAX_SOURCE_BYTES, Grammars
from mlx_mcp.models.registry import EMBEDDED_FOLDER
from tests import effort
from tests.models_made import write_tokenizer

TOKENIZER = AutoTokenizer.from_pretrained(str(EMBEDDED_FOLDER))
VOCAB_SIZE = 1024
END = 1  # <|end|>
CONTROLS = {0, 1, 2, 3, 4, 5, 6, 1022, 1023}  # <|begin|> … <|tool|>, <tool_call>, </tool_call>
GRAMMARS = Grammars(TOKENIZER, frozenset({END}))


def json_schema(schema):
    return Grammar(GrammarKind.JSON_SCHEMA, schema if isinstance(schema, str) else json.dumps(schema))


def regex(source):
    return Grammar(GrammarKind.REGEX, source)


def lark(source):
    return Grammar(GrammarKind.LARK, source)


def allowed(held):
    bits = int.from_bytes(held.mask(), "little")
    return [token_id for token_id in range(bits.bit_length()) if bits >> token_id & 1]


def drawn(grammar, seed, most=300):
    """An answer drawn uniformly from the tokens allowed at each place, and whether it came to its end."""
    held, draw, ids = GRAMMARS.compile(grammar, VOCAB_SIZE), random.Random(seed), []
    while len(ids) < most:
        token_id = draw.choice(allowed(held))
        if token_id == END:
            return TOKENIZER.decode(ids), True
        assert token_id not in CONTROLS
        ids.append(token_id)
        held.accept(token_id)
    return TOKENIZER.decode(ids), False


def refusal(grammar, grammars=GRAMMARS):
    with pytest.raises(InvalidRequest) as caught:
        grammars.compile(grammar, VOCAB_SIZE)
    return str(caught.value)


def is_person(value):
    return (
        list(value) in (["name", "age", "tags"], ["name", "age", "tags", "born"])
        and re.fullmatch("[A-Z][a-z]{1,8}", value["name"])
        and (value["age"] is None or value["age"] in range(151))
        and len(value["tags"]) <= 3
        and {*value["tags"]} <= {"a", "bc", "<|end|>"}
        and re.fullmatch(r"\d{4}-\d\d-\d\d", value.get("born", "2000-01-01"))
    )


PERSON = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
        "age": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 150}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "<|end|>"]}, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
}


def is_tree(value):
    return isinstance(value, list) and len(value) <= 2 and all(map(is_tree, value))


@pytest.mark.parametrize(
    ("schema", "obeyed"),
    [
        (PERSON, is_person),
        ({"const": {"a": [1, None, "é\n\u0001😀"], "b": 1.5}}, {"a": [1, None, "é\n\u0001😀"], "b": 1.5}.__eq__),
        ({"type": ["boolean", "null"]}, (True, False, None).__contains__),
        ({"type": "string", "maxLength": 5}, lambda value: len(value) <= 5),
        ({"oneOf": [{"const": "x"}, {"type": "integer", "multipleOf": 7, "exclusiveMaximum": 50, "minimum": 1}]},
         ("x", 7, 14, 21, 28, 35, 42, 49).__contains__),
        ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False, "minItems": 2}, [1, 2].__eq__),
    ],
    ids=["person", "const", "types", "short string", "numbers", "tuple"],
)  # fmt: skip
def test_answers_drawn_at_random_end_and_obey_their_json_schema(schema, obeyed):
    for seed in range(25):
        text, ended = drawn(json_schema(schema), seed)
        assert ended
        assert obeyed(json.loads(text)), text


def test_answers_without_bounds_obey_their_json_schema_as_far_as_they_get():
    for seed in range(25):
        text, ended = drawn(json_schema(TREE), seed, most=150)
        assert is_tree(json.loads(text)) if ended else re.fullmatch(r"[\[\], ]+", text)
        text, ended = drawn(json_schema({"type": "string"}), seed, most=150)
        assert isinstance(json.loads(text), str) if ended else re.match(r'"[^"\n\t]*', text)


@st.composite
def schemas(draw, depth=2):
    kind = draw(st.sampled_from(["enum", "integer", "boolean", "array", "object"][: 5 if depth else 3]))
    if kind == "enum":
        return {"enum": draw(st.lists(st.text(max_size=6), min_size=1, max_size=4, unique=True))}
    if kind == "integer":
        low = draw(st.integers(-(10**6), 10**6))
        return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 10**4))}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind == "array":
        low = draw(st.integers(0, 2))
        return {"type": "array", "items": draw(schemas(depth - 1)), "minItems": low, "maxItems": low + 2}
    parts = draw(st.dictionaries(st.text(max_size=6), schemas(depth - 1), max_size=3))
    required = [name for name in parts if draw(st.booleans())]
    return {"type": "object", "properties": parts, "required": required, "additionalProperties": False}


def obeys(value, schema):
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "boolean":
        return isinstance(value, bool)
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "array":
        bounded = schema["minItems"] <= len(value) <= schema["maxItems"]
        return bounded and all(obeys(item, schema["items"]) for item in value)
    parts = schema["properties"]
    return {*schema["required"]} <= {*value} <= {*parts} and all(obeys(value[name], parts[name]) for name in value)


@settings(max_examples=effort.drawn(100, least=15), deadline=None)
@given(schemas(), st.integers(0, 2**32))
def test_any_bounded_json_schema_is_obeyed(schema, seed):
    text, ended = drawn(json_schema(schema), seed, most=5000)
    assert ended
    assert obeys(json.loads(text), schema), text


def test_json_has_at_most_one_space_after_a_comma_or_a_colon():
    schema = {"properties": {"a": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 4}, "b": {"const": {}}}}
    schema |= {"type": "object", "required": ["a", "b"], "additionalProperties": False}
    texts = {drawn(json_schema(schema), seed)[0] for seed in range(40)}
    assert all(re.fullmatch(r'\{"a": ?\[([01](, ?[01])*)?\], ?"b": ?\{\}\}', text) for text in texts)
    assert any('": ' in text for text in texts)
    assert any('":{' in text for text in texts)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "(yes|no)",
        "[a-z]{3}-[0-9]{2,4}",
        "^(/[a-z]{1,4}){2}$",
        "(ab|c)*d",
        r"a\\",
        "é{2}|😀",
        r'"[^"\\]{0,4}"',
        "a\nb",
    ],
)
def test_answers_drawn_at_random_match_their_regular_expression(pattern):
    for seed in range(20):
        text, ended = drawn(regex(pattern), seed)
        assert ended
        assert re.fullmatch(pattern, text), text


def test_answers_drawn_at_random_are_derived_by_their_lark_grammar():
    nested = lark('start: "x" | "(" start ")" | %json {"enum": [1, true]}')
    for seed in range(20):
        text, ended = drawn(nested, seed)
        depth = text.count("(")
        assert ended
        assert text.replace("(", "").replace(")", "") in ("x", "1", "true")
        assert text.startswith("(" * depth)
        assert text.endswith(")" * depth)


@pytest.mark.parametrize(
    "grammar",
    [
        lark("start: ANY\nANY: ~/abc/"),
        lark('%llguidance {"allow_invalid_utf8": true}\nstart: /(?s-u:.)*/'),
        regex("(?s:.*)"),
        json_schema({"type": "string"}),
    ],
    ids=["complement", "bytes", "anything", "string"],
)
def test_control_tokens_are_never_text(grammar):
    held = GRAMMARS.compile(grammar, VOCAB_SIZE + 9)
    for _ in range(2):
        assert CONTROLS.isdisjoint(set(allowed(held)) - {END})
        assert max(allowed(held)) < VOCAB_SIZE
        held.accept(TOKENIZER.convert_tokens_to_ids('"'))


@pytest.mark.parametrize("text", ["<|end|>", "a<tool_call>b</tool_call>", "<|user|>é"])
def test_text_that_reads_like_a_control_token_is_spelt_out(text):
    assert drawn(regex(re.escape(text)), 0) == (text, True)
    assert drawn(json_schema({"const": text}), 0) == (json.dumps(text, ensure_ascii=False), True)


def test_a_complete_grammar_allows_what_may_still_come_and_every_stop_token(tmp_path):
    write_tokenizer(tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    stop_ids = sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    held = Grammars(tokenizer, frozenset(stop_ids)).compile(regex("the(!+)?"), len(tokenizer))
    assert not set(stop_ids) & set(allowed(held))
    for piece in tokenizer.tokenize("the"):
        held.accept(tokenizer.convert_tokens_to_ids(piece))
    bang = tokenizer.convert_tokens_to_ids("!")
    assert allowed(held) == sorted([*stop_ids, bang])
    held.accept(bang)
    assert allowed(held) == sorted([*stop_ids, bang])


def test_a_finished_grammar_allows_only_the_end_of_the_turn():
    held = GRAMMARS.compile(regex("a"), VOCAB_SIZE)
    held.accept(TOKENIZER.convert_tokens_to_ids("a"))
    assert allowed(held) == [END]
    assert allowed(held) == [END]


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE + 176, VOCAB_SIZE - 24])
def test_a_vocabulary_padded_or_cut_by_the_model_is_masked_as_wide_as_its_logits(vocab_size):
    held = GRAMMARS.compile(regex("[^q]*"), vocab_size)
    assert len(held.mask()) == (vocab_size + 7) // 8
    text = [i for i in allowed(held) if "q" not in TOKENIZER.decode([i])]
    assert text == allowed(held)
    assert len(text) > 900
    assert text[-1] < min(vocab_size, VOCAB_SIZE)


SCHEMA_REFUSALS = {
    "": "Expecting value: line 1 column 1",
    '{"type": }': "Expecting value: line 1 column 10",
    "[" * 100_000: "recursion",
    "true": 'it must be a JSON object, such as {"type": "object"}.',
    '["string"]': "it must be a JSON object",
    '{"type": "text"}': "Invalid type: text",
    '{"properties": []}': "properties must be an object",
    '{"properties": {"a": {"items": {"not": {}}}}}': "not supported: #/properties/a/items/not",
    '{"type": "string", "maxlength": 3}': "not supported: #/maxlength",
    '{"anyOf": [{}, {"nullable": true, "uniqueItems": true}]}': "#/anyOf/1/nullable, #/anyOf/1/uniqueItems",
    '{"x-guidance": {"lenient": true}}': "not supported: #/x-guidance",
    '{"type": "string", "format": "color"}': "Unknown format: color",
    '{"type": "string", "pattern": "(a"}': "error: unclosed group",
    '{"oneOf": [{"type": "integer"}, {"type": "number"}]}': "oneOf constraints are not supported",
    '{"$ref": "https://example.com/schema"}': "does not fetch",
    '{"$ref": "#/$defs/none"}': "/$defs/none",
    '{"$ref": "#"}': "nothing can come next",
    '{"type": "integer", "minimum": 5, "maximum": 3}': "minimum (5) is greater than maximum (3)",
    '{"type": "string", "const": 1}': "incompatible types",
    '{"const": 9007199254740993}': "the number 9007199254740993 has too many digits.",
    '{"const": 1e999}': "Out of range float",
    '{"const": "\\ud800"}': "hex escape",
}


@pytest.mark.parametrize(("source", "why"), SCHEMA_REFUSALS.items(), ids=[s[:30] for s in SCHEMA_REFUSALS])
def test_a_json_schema_that_would_not_be_obeyed_is_refused(source, why):
    text = refusal(json_schema(source))
    assert text.startswith("This JSON schema cannot be used: ")
    assert why in text
    assert text.endswith("such as anyOf for oneOf.")


REGEX_REFUSALS = {
    "(a": "regex parse error:\n    (a\n    ^\nerror: unclosed group\n",
    "(?=a)b": "look-around",
    r"(a)\1": "backreferences are not supported",
    r"\bword": "lookarounds not supported",
    "a\\": "it ends in a lone backslash.",
    "[^\\s\\S]": "nothing can come next",
    "(?-u:\\xff)": "invalid UTF-8",
    "\ud800": "surrogates not allowed",
    "(" * 200_000: "error: unclosed group",
}


@pytest.mark.parametrize(("source", "why"), REGEX_REFUSALS.items(), ids=[ascii(s[:9]) for s in REGEX_REFUSALS])
def test_a_regular_expression_that_cannot_be_followed_is_refused(source, why):
    text = refusal(regex(source))
    assert text.startswith("This regular expression cannot be used: ")
    assert why in text
    assert len(text) < 1000
    assert "start: /" not in text


LARK_REFUSALS = {
    "": "no start rule found",
    'stat: "a"': "no start rule found",
    "start: word": 'at 1(8): unknown name: "word"',
    'start: ("a"': "1(12): Expected token ')'",
    'start: "a" <|end|>': "it names a token",
    "start: <[5]>": "it names a token",
    "start: <[*]>": "it names a token",
    'start: %json {"not": {}}': 'Unimplemented keys: ["not"]',
    'start: %json {"not": {}, "type": "null", "x-guidance": {"lenient": true}}': 'Unimplemented keys: ["not"]',
    '{"grammars": [{"json_schema": {}}]}': "expecting rule, token or statement",
    "start: start": "nothing can come next",
}


@pytest.mark.parametrize(("source", "why"), LARK_REFUSALS.items(), ids=[s[:30] for s in LARK_REFUSALS])
def test_a_lark_grammar_that_cannot_be_followed_is_refused(source, why):
    text = refusal(lark(source))
    assert text.startswith("This Lark grammar cannot be used: ")
    assert why in text
    assert text.endswith("it describes text, not tokens.")


def test_a_source_is_bounded():
    assert f"it has {MAX_SOURCE_BYTES + 1} bytes, more than {MAX_SOURCE_BYTES}." in refusal(regex("é" * 131072 + "x"))


def test_a_grammar_that_overflows_the_stack_ends_nothing_but_its_trial():
    rules = "\n".join(f'r{i}: "a" r{i + 1}' for i in range(9000))
    assert "it is too deeply nested" in refusal(lark(f'start: r0\n{rules}\nr9000: "b"'))


def test_a_grammar_that_compiles_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr(constraint, "TRIAL_TIMEOUT_S", 0.5)
    patterns = [{"type": "string", "pattern": f"a.*b{i}.*c"} for i in range(40)]
    assert "it takes more than 0.5 s to compile." in refusal(json_schema({"allOf": patterns}))


def endless(number):
    patterns = [{"type": "string", "pattern": f"a.*b{i}.*c{number}"} for i in range(40)]
    return json_schema({"allOf": patterns})


def test_the_trial_of_a_grammar_ends_when_nobody_waits_for_it_any_more():
    grammars, gone, outcomes = Grammars(TOKENIZER, frozenset({END})), threading.Event(), []

    def compile(number):
        try:
            grammars.compile(endless(number), VOCAB_SIZE, gone.is_set)
        except Abandoned as error:
            outcomes.append(error)

    threads = [threading.Thread(target=compile, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    while len(grammars._compiling) < constraint.MAX_TRIALS:
        time.sleep(0.001)
    gone.set()
    for thread in threads:
        thread.join(8)  # less than a trial may take
    assert len(outcomes) == 12
    assert grammars.compile(regex("yes"), VOCAB_SIZE).mask()


def test_a_grammar_that_cannot_be_tried_now_is_told_with_when_to_try_again(monkeypatch):
    grammars = Grammars(TOKENIZER, frozenset({END}))
    with monkeypatch.context() as patched:
        patched.setattr(constraint, "MAX_TRIALS", 0)
        patched.setattr(constraint, "WAIT_S", 0)
        with pytest.raises(CapacityError, match=r"Many grammars that take long are being tried\. Retry in 10 s"):
            grammars.compile(regex("yes"), VOCAB_SIZE)

    def refuse(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(constraint.subprocess, "Popen", refuse)
        with pytest.raises(CapacityError, match=r"The grammar could not be tried: .*unavailable\. Retry in 5 s"):
            grammars.compile(regex("yes"), VOCAB_SIZE)
    assert grammars.compile(regex("yes"), VOCAB_SIZE).mask()


def test_a_grammar_that_is_tried_for_long_holds_up_no_other():
    grammars, gone = Grammars(TOKENIZER, frozenset({END})), threading.Event()

    def compile():
        with pytest.raises(Abandoned):
            grammars.compile(endless(0), VOCAB_SIZE, gone.is_set)

    long = threading.Thread(target=compile)
    long.start()
    while not grammars._compiling:
        time.sleep(0.001)
    assert grammars.compile(regex("yes"), VOCAB_SIZE).mask()
    assert long.is_alive()
    gone.set()
    long.join(8)
    assert not long.is_alive()


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (object(), "has no attribute 'backend_tokenizer'"),
        (Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "can't determine decoder type"),
        (Tokenizer(models.BPE({"a": 0, "b": 9}, [])), "its token ids have gaps"),
        (Tokenizer(models.BPE({"a": 0}, [])), "it has no token that ends a turn"),
    ],
)
def test_a_tokenizer_that_llguidance_cannot_read_is_refused(tokenizer, why):
    if isinstance(tokenizer, Tokenizer):
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = refusal(regex("a"), Grammars(tokenizer, frozenset({1})))
    assert why in text
    assert "cannot be held to a grammar, because of its tokenizer: " in text
    assert "Choose another model (list_models shows them), or leave the grammar out" in text


def test_a_grammar_that_leads_nowhere_fails_its_answer_and_is_forgotten():
    grammars = Grammars(TOKENIZER, frozenset({END}))
    dead_end = lark(r'start: "a" | "b" /[^\s\S]/')
    held = grammars.compile(dead_end, VOCAB_SIZE)
    held.accept(TOKENIZER.convert_tokens_to_ids("b"))
    with pytest.raises(GenerationFailed, match="held to the grammar from here on: nothing can come next"):
        held.mask()
    assert list(grammars._kept) == []
    assert allowed(grammars.compile(dead_end, VOCAB_SIZE))


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (lark('start: "a" start'), "Too many items"),
        (regex("(a{1000}){1000}"), "too many expressions"),
    ],
)
def test_a_grammar_that_shows_at_its_first_token_that_it_is_too_complex_is_refused(grammar, why):
    with pytest.raises(InvalidRequest, match=why):
        GRAMMARS.compile(grammar, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"name": "x", "strict": True, "schema": {"type": "object"}}, "give the schema inside it by itself"),
        ({"type": "json_schema", "json_schema": {"type": "object"}}, "give the schema inside it by itself"),
        ({"name": "string", "age": "number"}, 'no keyword of JSON Schema; write {"type": "object"'),
    ],
)
def test_what_is_no_schema_but_holds_or_resembles_one_is_told_so(schema, why):
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.compile(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), VOCAB_SIZE)
    assert why in str(caught.value)


def test_a_token_that_the_mask_does_not_allow_is_not_accepted():
    held = GRAMMARS.compile(regex("a"), VOCAB_SIZE)
    with pytest.raises(GenerationFailed):
        held.accept(TOKENIZER.convert_tokens_to_ids("b"))


def test_constraints_of_one_grammar_do_not_move_each_other():
    first, second = (GRAMMARS.compile(regex("ab"), VOCAB_SIZE) for _ in range(2))
    before = second.mask()
    first.accept(TOKENIZER.convert_tokens_to_ids("a"))
    assert second.mask() == before != first.mask()


def test_the_grammars_used_last_are_kept_compiled(monkeypatch):
    monkeypatch.setattr(constraint, "NUM_KEPT", 2)
    grammars = Grammars(TOKENIZER, frozenset({END}))
    for source in ["a", "b", "a", "c"]:
        grammars.compile(regex(source), VOCAB_SIZE)
    assert [grammar.source for grammar, _ in grammars._kept] == ["a", "c"]


def test_grammars_are_compiled_on_any_thread_and_once_for_all_who_ask_together():
    grammars = Grammars(TOKENIZER, frozenset({END}))
    barrier, masks = threading.Barrier(8), []

    def compile_and_mask(source):
        barrier.wait(10)
        masks.append((source, grammars.compile(regex(source), VOCAB_SIZE).mask()))

    threads = [threading.Thread(target=compile_and_mask, args=("ab"[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(masks) == 8
    assert len(set(masks)) == 2
    assert len(grammars._kept) == 2
