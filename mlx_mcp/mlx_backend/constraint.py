"""Holds answers to grammars: JSON schemas, regular expressions, Lark. llguidance does the work; knows nothing of MLX.

Two guards stand around llguidance. Within its own limits, a grammar of one kilobyte can compile for hours, and one of
40 overflow the stack, which ends the process: so another process tries each new grammar first. And some grammars reach
control tokens: so every mask is cut down to tokens that are text, and the end of the turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.core.ports import never
from mlx_mcp.errors import Abandoned, CapacityError, GenerationFailed, InvalidRequest
from mlx_mcp.mlx_backend.memory_watch import MemoryWatch

MAX_SOURCE_BYTES = 256 * 1024
NOTHING_NEXT = "nothing can come next"
NUM_KEPT = 16  # compiled grammars per model
TRIAL_TIMEOUT_S = 10
MAX_TRIALS = 4  # of one model's grammars at once
WAIT_S = 60.0  # for a place among them
LOOK_S = 0.05  # how often to look whether anybody still waits
TRIAL_BYTES = 1 << 30
TRIAL_STACK_BYTES = 2 << 20  # a quarter of a thread's: what passes the trial has room to spare

# A lexer state takes 1 to 2 kB. The limits per step are llguidance's: the worst masks take tens of milliseconds.
LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)

# At most one space after "," and ":", as models write it, and none elsewhere: no model can idle in whitespace.
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

# A token named by its id, or a text in quotes, in which there are none.
NAMED_ID = re.compile(r'<\[(\d+)\]>|"(?:[^"\\]|\\.)*"')

# Keywords that are obeyed or say nothing, by what they hold. llguidance silently skips what is not in JSON Schema.
HOLD_NAMED_SCHEMAS = frozenset("properties patternProperties $defs definitions".split())
HOLD_SCHEMAS = frozenset("anyOf oneOf allOf items prefixItems additionalItems additionalProperties".split())
HOLD_VALUES = frozenset(
    "$ref const enum type minItems maxItems required minProperties maxProperties minLength maxLength pattern format "
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf $anchor $schema $id id $comment title description "
    "default examples example readOnly writeOnly deprecated discriminator contentMediaType contentEncoding".split()
)

# What each kind is called, and what helps.
KINDS = {
    GrammarKind.JSON_SCHEMA: (
        "JSON schema",
        "Leave it out and say it in the prompt, or write it in another way, such as anyOf for oneOf.",
    ),
    GrammarKind.REGEX: (
        "regular expression",
        "Write it as Rust's regex crate has it, without look-around and back-references; it matches whole answers.",
    ),
    GrammarKind.LARK: (
        "Lark grammar",
        "Write it in llguidance's variant of Lark, with a rule named start; it describes text, not tokens.",
    ),
    GrammarKind.CALLS: (
        "list of tools",
        "Write the tools' parameters in another way, or leave `tool_choice` at auto, which needs no grammar.",
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens as llguidance sees them; sets of tokens are integers with bit i for token i."""

    tokens: LLTokenizer
    text: int  # neither control tokens nor stop tokens nor padding
    stops: int
    size: int


class Grammars:
    """Compiles grammars over one tokenizer, on any thread.

    `tokenizer` is a fast tokenizer of transformers. Its form for llguidance, seconds of work for a large vocabulary, is
    made at first use.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[tuple[Grammar, int], tuple[LLMatcher, Vocabulary]] = OrderedDict()
        self._lock = threading.Lock()  # of _kept
        self._making = threading.Lock()  # of what is made in this process, once its trial has shown that it ends soon
        self._compiling: set[tuple[Grammar, int]] = set()
        self._compiled = threading.Condition()  # of _compiling

    def compile(self, grammar: Grammar, vocab_size: int, gone: Callable[[], bool] = never) -> GrammarConstraint:
        """A fresh constraint over `vocab_size` token ids: 0.1 s or more if the grammar is new, microseconds if not.

        Constraints of one grammar share llguidance's lexer: what it has learnt, and its limits.

        Raises:
            InvalidRequest: the grammar is malformed, unsupported, too large or too complex, or allows no answer.
            CapacityError: as many others are being tried as may be at once.
            Abandoned: nobody waits for it any more.
        """
        key = (grammar, vocab_size)
        found = self._recall(key)
        if found is None:
            with self._turn(key, gone):
                found = self._recall(key) or self._compile(key, gone)
        return GrammarConstraint(found[0].deep_copy(), found[1], lambda: self._forget(key), named_ids(grammar))

    @contextlib.contextmanager
    def _turn(self, key: tuple[Grammar, int], gone: Callable[[], bool]) -> Iterator[None]:
        """Compile this grammar in one thread alone, whose result the others find, and few grammars at once."""
        began = time.monotonic()
        with self._compiled:
            while key in self._compiling or len(self._compiling) >= MAX_TRIALS:
                if gone():
                    raise Abandoned
                if time.monotonic() - began > WAIT_S:
                    raise CapacityError("Many grammars that take long are being tried.", TRIAL_TIMEOUT_S)
                self._compiled.wait(LOOK_S)
            self._compiling.add(key)
        try:
            yield
        finally:
            with self._compiled:
                self._compiling.discard(key)
                self._compiled.notify_all()

    def _compile(self, key: tuple[Grammar, int], gone: Callable[[], bool]) -> tuple[LLMatcher, Vocabulary]:
        grammar, vocab_size = key
        try:
            source = translate(grammar)
            try_in_process(without_ids(grammar, source), gone)
            with self._making:
                if self._vocabulary is None or self._vocabulary.size != vocab_size:
                    self._vocabulary = make_vocabulary(self._tokenizer, self._stop_ids, vocab_size)
                made = LLMatcher(self._vocabulary.tokens, source, log_level=0, limits=LIMITS), self._vocabulary
                begin(GrammarConstraint(made[0].deep_copy(), made[1], lambda: None, named_ids(grammar)))
        except (ValueError, RecursionError, GenerationFailed) as error:
            name, next_step = KINDS[grammar.kind]
            why = shortened(str(error), grammar.kind)
            raise InvalidRequest(f"This {name} cannot be used: {why}\n{next_step}") from error
        with self._lock:
            self._kept[key] = made
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
        return made

    def _recall(self, key: tuple[Grammar, int]) -> tuple[LLMatcher, Vocabulary] | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _forget(self, key: tuple[Grammar, int]) -> None:
        with self._lock:
            self._kept.pop(key, None)


class GrammarConstraint:
    """The place of one answer in its grammar. Used by one thread at a time."""

    awake = True  # see core.sequence.Constraint

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, forget: Callable[[], None], controls: frozenset[int]
    ) -> None:
        """`controls` are the control tokens that the grammar names."""
        self._matcher, self._vocabulary, self._forget, self._controls = matcher, vocabulary, forget, controls
        self._allowed = vocabulary.text | sum(1 << token_id for token_id in controls)

    def copy(self) -> GrammarConstraint:
        """Another one at the same place."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, self._forget, self._controls)

    @property
    def complete(self) -> bool:
        """Whether the text so far is all of what the grammar describes; more may be allowed."""
        return bool(self._matcher.is_accepting())

    def feed(self, text: str) -> bool:
        """Advance past a text; returns whether the grammar allows it, and is of no use any more if not."""
        token_ids = self._vocabulary.tokens.tokenize_str(text) if text else []
        return bool(self._matcher.try_consume_tokens(token_ids) == len(token_ids))

    def mask(self) -> bytes:
        """The tokens that may come next, as the port has it; a complete grammar allows every stop token.

        Raises:
            GenerationFailed: nothing can come next, or the grammar is too complex to tell.
        """
        bits = int.from_bytes(self._matcher.compute_bitmask(), "little") & self._allowed
        if self._matcher.is_accepting():
            bits |= self._vocabulary.stops
        elif not bits:
            # Forced text that reads like a control token is encoded as one: spell it out.
            forced = self._matcher.compute_ff_bytes().decode(errors="ignore")
            spelt = self._vocabulary.tokens.greedy_tokenize(forced)[:1]
            bits = sum(1 << token_id for token_id in spelt) & self._allowed
        if not bits:
            self._fail()
        return bits.to_bytes((self._vocabulary.size + 7) // 8, "little")

    def accept(self, token_id: int) -> None:
        """Advance past a token of text that the mask allowed.

        Raises:
            GenerationFailed: the grammar did not allow it, or is too complex to tell.
        """
        if not self._matcher.consume_token(token_id):
            self._fail()

    def _fail(self) -> None:
        self._forget()  # the shared lexer may be full
        why = shortened(self._matcher.get_error())
        why = NOTHING_NEXT if why in ("", "NoExtensionBias") else why
        raise GenerationFailed(
            f"No answer can be held to the grammar from here on: {why}. Write the grammar in another "
            "way, or leave it out."
        )


def make_vocabulary(tokenizer: Any, stop_ids: frozenset[int], vocab_size: int) -> Vocabulary:
    """A tokenizer's vocabulary, as wide as a model's logits.

    Raises:
        InvalidRequest: llguidance cannot work with this tokenizer.
    """
    try:
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        num_tokens = backend.get_vocab_size()
        if max(backend.get_vocab().values()) >= num_tokens:
            raise ValueError("its token ids have gaps")
        stops = sorted(i for i in stop_ids if i < min(num_tokens, vocab_size))
        if not stops:
            raise ValueError("it has no token that ends a turn")
        tokens = LLTokenizer(backend.to_str(), n_vocab=max(num_tokens, vocab_size), eos_token=stops)
    except (AttributeError, ValueError) as error:
        raise InvalidRequest(
            f"This model's answers cannot be held to a grammar, because of its tokenizer: {shortened(str(error))}. "
            "Choose another model (list_models shows them), or leave the grammar out."
        ) from error
    added = backend.get_added_tokens_decoder().items()
    controls = {i for i, token in added if re.fullmatch(r"[<\[].*[>\]]", token.content)} | set(stops)
    is_text = (i not in controls and not tokens.is_special_token(i) for i in reversed(range(vocab_size)))
    text = int("".join("01"[bit] for bit in is_text), 2)
    return Vocabulary(tokens, text, sum(1 << i for i in stops), vocab_size)


def translate(grammar: Grammar) -> str:
    """The grammar in llguidance's own form.

    Raises:
        ValueError: it is too large, or not what it is said to be.
    """
    size = len(grammar.source.encode(errors="surrogatepass"))
    if size > MAX_SOURCE_BYTES:
        raise ValueError(f"it has {size} bytes, more than {MAX_SOURCE_BYTES}.")
    if grammar.kind in (GrammarKind.LARK, GrammarKind.CALLS):
        return json.dumps({"grammars": [{"lark_grammar": grammar.source}]})
    if grammar.kind is GrammarKind.REGEX:
        if re.search(r"(?<!\\)(\\\\)*\\\Z", grammar.source):  # llguidance takes it for nothing
            raise ValueError("it ends in a lone backslash.")
        return LLMatcher.grammar_from_regex(grammar.source)
    schema = checked(json.loads(grammar.source, parse_int=exact))
    return json.dumps({"grammars": [{"json_schema": schema}]}, allow_nan=False)


def checked(schema: Any) -> dict[str, Any]:
    """A JSON schema as llguidance takes it.

    Raises:
        ValueError: it is none, or has something that would not be obeyed.
    """
    if not isinstance(schema, dict):
        raise ValueError('it must be a JSON object, such as {"type": "object"}.')
    if isinstance(schema.get("json_schema", schema.get("schema")), dict):
        raise ValueError("it is a wrapper as in OpenAI's response_format: give the schema inside it by itself.")
    if schema.keys() - {"x-guidance"} and not schema.keys() & (HOLD_NAMED_SCHEMAS | HOLD_SCHEMAS | HOLD_VALUES):
        raise ValueError('it has no keyword of JSON Schema; write {"type": "object", "properties": {…}}.')
    if places := list(unsupported(schema)):
        raise ValueError(f"not supported: {', '.join(places[:5])}")
    # An older draft would have llguidance skip newer keywords.
    return {key: value for key, value in schema.items() if key != "$schema"} | {"x-guidance": JSON_OPTIONS}


def named_ids(grammar: Grammar) -> frozenset[int]:
    """The tokens that a grammar of calls names."""
    if grammar.kind is not GrammarKind.CALLS:
        return frozenset()
    return frozenset(int(found[1]) for found in NAMED_ID.finditer(grammar.source) if found[1])


def without_ids(grammar: Grammar, source: str) -> str:
    """A translated grammar that can be tried without the tokens that it names, with letters in their places."""
    if grammar.kind is not GrammarKind.CALLS:
        return source
    return translate(
        replace(grammar, source=NAMED_ID.sub(lambda found: '"x"' if found[1] else found[0], grammar.source))
    )


def begin(constraint: GrammarConstraint) -> None:
    """Take a first token: a grammar may allow no answer, or show only then that it is too complex.

    Raises:
        GenerationFailed: it does.
    """
    allowed = int.from_bytes(constraint.mask(), "little") & constraint._vocabulary.text
    if allowed:
        try:
            constraint.accept(allowed.bit_length() - 1)
            constraint.mask()
        except GenerationFailed as error:
            if NOTHING_NEXT not in str(error):  # another token may lead further
                raise


def unsupported(schema: Any, place: str = "#") -> Iterator[str]:
    """Where a schema has keywords that llguidance would skip or refuse."""
    if isinstance(schema, list):
        for index, part in enumerate(schema):
            yield from unsupported(part, f"{place}/{index}")
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in HOLD_NAMED_SCHEMAS and isinstance(value, dict):
                for name, part in value.items():
                    yield from unsupported(part, f"{place}/{key}/{name}")
            elif key in HOLD_SCHEMAS:
                yield from unsupported(value, f"{place}/{key}")
            elif key not in HOLD_VALUES | HOLD_NAMED_SCHEMAS and (key == "x-guidance" or not key.startswith("x-")):
                yield f"{place}/{key}"


def exact(digits: str) -> int:
    """The integer; refused where llguidance, which counts in doubles, would take it for another."""
    if float(digits) != int(digits):
        raise ValueError(f"the number {digits[:40]} has too many digits.")
    return int(digits)


def try_in_process(source: str, gone: Callable[[], bool] = never) -> None:
    """Compile a translated grammar in another process, within bounds of time, memory and stack.

    Raises:
        ValueError: it does not compile, or not within the bounds.
        Abandoned: nobody waits for it any more.
    """
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            close_fds=False,  # so that Python spawns and need not fork a process that holds a model; no fd is inherited
        )
    except OSError as error:
        raise CapacityError(f"The grammar could not be tried: {error}.", 5) from error
    ended, memory = threading.Event(), MemoryWatch(child.pid, TRIAL_BYTES)

    def watch() -> None:
        while not ended.wait(LOOK_S):
            if gone() or memory.look():
                child.kill()

    threading.Thread(target=watch, daemon=True).start()
    with child:
        try:
            out, errors = child.communicate(source, timeout=TRIAL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            raise ValueError(f"it takes more than {TRIAL_TIMEOUT_S} s to compile.") from None
        finally:
            ended.set()
    if gone():
        raise Abandoned
    assert child.returncode <= 0, f"a grammar could not be tried: {errors}"
    if child.returncode < 0 or not out:
        raise ValueError("it is too deeply nested, or takes too much memory to compile.")
    if message := json.loads(out):
        raise ValueError(message)


def trial() -> None:
    """Print what is wrong with the grammar on stdin, as JSON; may hang or crash instead."""
    import resource

    for limit, most in ((resource.RLIMIT_AS, TRIAL_BYTES), (resource.RLIMIT_CPU, TRIAL_TIMEOUT_S)):
        with contextlib.suppress(ValueError, OSError):  # macOS knows no RLIMIT_AS
            resource.setrlimit(limit, (most, most))
    source = sys.stdin.read()
    _, messages = LLMatcher.validate_grammar_with_warnings(source, limits=LIMITS)
    if any(message.startswith("no tokenizer") for message in messages):
        messages = ["it names a token, such as <think> or <[7]>; to mean the text, write it in quotes."]
    matcher = LLMatcher(LLTokenizer("byte"), source, log_level=0, limits=LIMITS)
    print(json.dumps(messages[0] if messages else matcher.get_error()))


def shortened(message: str, kind: GrammarKind | None = None) -> str:
    """The message without the state that llguidance adds, in a few lines of bounded length."""
    if kind is GrammarKind.REGEX:  # which llguidance shows inside a Lark grammar of its own
        message = message.split(" (in regex): ")[-1].split("\n   1 | ")[0]
    lines = [line[:160] for line in takewhile(lambda line: not line.startswith("<"), message.splitlines())]
    return "\n".join(lines if len(lines) <= 8 else [*lines[:4], "…", *lines[-3:]]).rstrip()


if __name__ == "__main__":
    threading.stack_size(TRIAL_STACK_BYTES)
    threading.Thread(target=trial).start()
