"""A model's text side: chat template, encoding, reading answers. May be used from any thread."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.utils import load_tokenizer

from mlx_mcp.core.ports import Grammar, Message, Piece, Prompt, TextKind, ToolCall, never
from mlx_mcp.core.sequence import Constraint
from mlx_mcp.errors import InvalidRequest, MlxMcpError
from mlx_mcp.mlx_backend.constraint import Grammars
from mlx_mcp.mlx_backend.text_processes import Failed, Overdue, TextProcesses

# mlx_lm has no types.
_load: Any = load_tokenizer
_StateMachine: Any = TextStateMachine
_tokenizer_utils: Any = tokenizer_utils
_make_state_machine: Any = make_text_state_machine

# While the template is rendered, one of these stands for each control token in the callers' text, and one where a turn
# begins.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)

# What is told where a template takes a chat once all messages of this role are left out.
_LEAVE_OUT = {
    "system": " It takes no system prompt: leave `system` out and say it in `prompt`.",
    "assistant": " It takes no answers, so there are no sessions with it: call without one.",
}

_MAX_HELD = 16  # tokens that show nothing before they pass for broken; a character has at most four

# What the text is in the states of mlx_lm's machine; "tool" is dealt with apart, any other is a message's header.
_KINDS = {"normal": TextKind.ANSWER, "reasoning": TextKind.REASONING}

# gpt-oss's channels (OpenAI's "harmony response format"), which mlx_lm does not split: ml-explore/mlx-lm#1867.
_CHANNELS = [
    ("<|channel|>analysis<|message|>", "reasoning"),
    ("<|channel|>commentary<|message|>", "normal"),
    ("<|channel|>final<|message|>", "normal"),
]
_HARMONY = {
    "normal": [*_CHANNELS, ("<|end|>", "header")],
    "reasoning": [("<|end|>", "header")],
    "header": _CHANNELS,
}


class StreamDetokenizer:
    """Decodes one sequence as its tokens come; the text of all pieces is the decoding of all tokens at once.

    Decodes from the last safe point but one, so the cost of a token does not grow with the text. (Any window of the
    latest tokens would not do: where sentencepiece spells with bytes, a run of them that begins amid a character is
    broken to its end.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""  # the decoding of the ids before _next, which are kept for context only
        self._next = 0

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; never half a character."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        incomplete = text.endswith("\ufffd") or len(text) <= len(self._shown)
        if incomplete and len(self._ids) - self._next < _MAX_HELD:
            return ""  # the bytes of a character are not all here yet
        return self._advance(text)

    def finish(self) -> str:
        """What was held back; broken characters show as U+FFFD."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._ids = self._ids[self._next :]
        self._next = len(self._ids)
        self._shown = self._decode(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


@dataclass(frozen=True)
class Format:
    """How a model marks the parts of its answers."""

    machine: Any  # mlx_lm's TextStateMachine
    initial: str  # its state where an answer begins
    hidden: frozenset[int]  # special tokens that are no part of a marker


class AnswerReader:
    """Reads one answer, which mlx_lm's state machine splits at the markers of the model's format.

    Markers are not shown, and neither are the newlines right after one, which belong to the format. A call is passed on
    in one piece when it is whole. What stands in a call's markers and is no call of one of `tools` is shown as answer,
    markers included: it is cut off, malformed, or calls what was not offered.
    """

    def __init__(self, tokenizer: Any, form: Format, reasoning: bool, tools: tuple[dict[str, Any], ...]) -> None:
        self._tokenizer, self._hidden, self._tools = tokenizer, form.hidden, tools
        self._detokenizer = StreamDetokenizer(tokenizer)
        self._state = form.machine.make_state("reasoning" if reasoning else form.initial)
        self._after_marker = reasoning
        self._call = ""  # the text of the call that is being read
        self._calls: list[ToolCall] = []

    def add(self, token_id: int) -> list[Piece]:
        """The text that became certain with this token: never half a character, never a part of a marker."""
        # Inside a call special tokens are the parser's: Mistral's [ARGS], Kimi's <|tool_call_begin|>.
        if token_id in self._hidden and self._state[0] != "tool":
            return []
        return self._split(self._detokenizer.add(token_id))

    def finish(self) -> list[Piece]:
        """What was held back."""
        pieces = self._split(self._detokenizer.finish())
        self._state, rest, state = _StateMachine.flush(self._state)
        pieces += self._take(state, rest)
        if state == "tool":
            # Some parsers take a call that was cut off for one with fewer arguments.
            pieces.append(self._unread("") if self._tokenizer.tool_call_end else self._end_call())
        return pieces

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that are whole by now."""
        return tuple(self._calls)

    def _split(self, text: str) -> list[Piece]:
        self._state, segments = _StateMachine.split(self._state, text)
        state, part = segments[0]
        pieces = self._take(state, part)
        for following, part in segments[1:]:  # each after a marker
            self._after_marker = True
            if state == "tool":
                pieces.append(self._end_call())
            state = following
            pieces += self._take(state, part)
        return pieces

    def _take(self, state: str, text: str) -> list[Piece]:
        if state == "tool":
            self._call += text
            return []
        if self._after_marker:
            text = text.lstrip("\r\n")
        if not text or state not in _KINDS:
            return []
        self._after_marker = False
        return [Piece(_KINDS[state], text)]

    def _end_call(self) -> Piece:
        calls = parsed_calls(self._tokenizer.tool_parser, self._call, self._tools)
        if not calls:
            return self._unread(self._tokenizer.tool_call_end)
        piece = Piece(TextKind.TOOL_CALL, self._call)
        self._call = ""
        self._calls += calls
        return piece

    def _unread(self, end: str) -> Piece:
        """The call as text of the answer."""
        piece = Piece(TextKind.ANSWER, f"{self._tokenizer.tool_call_start}{self._call}{end}")
        self._call, self._after_marker = "", False
        return piece


class ChatTokenizer:
    """The tokenizer of a model folder.

    A chat template is a program, and a tokenizer may be one that never ends: those that are `foreign`, and not this
    package's own, are at work in processes of their own (see text_processes).

    Raises:
        Failed or Overdue: a process that tried to read it could not.
        Exception: transformers cannot read it, and raises errors of every kind.
    """

    def __init__(self, folder: Path, eos_token_ids: Any, foreign: bool = True) -> None:
        self._folder = folder
        self._apart = TextProcesses() if foreign else None
        if self._apart is not None and (folder / "tokenizer.json").is_file():
            self._apart.try_reading(folder / "tokenizer.json")
        self._tokenizer = _load(folder, {"trust_remote_code": False}, eos_token_ids=eos_token_ids)
        # transformers changes its tokenizer's state while it encodes on its own, on any thread.
        self._lock = threading.Lock()
        self._grammars = Grammars(self._tokenizer, self.stop_ids)
        self._format, self._plain = formats(self._tokenizer)
        added = self._tokenizer.get_added_vocab()
        special = set(self._tokenizer.all_special_tokens)
        controls = [t for t in added if len(t) > 1 and (t in special or (t[0] in "<[" and t[-1] in ">]"))]
        self._controls = sorted(controls, key=len, reverse=True)  # a control may hold a shorter one
        self._control_ids = {added[text]: text for text in controls}
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        self._digest = blake2b(vocabulary.encode(), digest_size=32).digest()
        self._control = re.compile("|".join(map(re.escape, self._controls)) or r"(?!)")
        self._letter = self._tokenizer.encode("a", add_special_tokens=False)
        self._newline = self._tokenizer.encode("\n", add_special_tokens=False)
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._apart is not None and self._backend is not None:
            self._apart.use(self._backend.to_str().encode())

    @property
    def vocab_size(self) -> int:
        """How many token ids the tokenizer knows."""
        return len(self._tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end the model's turn."""
        return frozenset(self._tokenizer.eos_token_ids)

    @property
    def max_tokens(self) -> int | None:
        """The context that the tokenizer's config claims; None where it claims none."""
        claimed = self._tokenizer.model_max_length
        return int(claimed) if claimed and claimed < 10**9 else None

    def encode_chat(
        self,
        messages: list[Message],
        tools: tuple[dict[str, Any], ...] = (),
        reasoning: bool = True,
        gone: Callable[[], bool] = never,
    ) -> Prompt:
        """The prompt, generation prompt included; no text in `messages` or `tools` becomes a control token.

        Control tokens in the text ("<|im_end|>" in a document about templates) are encoded as the plain text they are,
        so that no content can end a turn or open another role's. `tools` are function definitions in OpenAI's form;
        `reasoning` False asks the template for none.

        Raises:
            InvalidRequest: the model's template refuses these messages, or knows no tools.
        """
        rendered, _, marks, ids = self._render(messages, tools, reasoning, gone)
        if ids is None:
            ids = self._encode(rendered, marks, gone, begins=True)
        return Prompt(tuple(ids), self._opens_reasoning(rendered))

    def encode_context(
        self, messages: list[Message], tools: tuple[dict[str, Any], ...] = (), gone: Callable[[], bool] = never
    ) -> tuple[int, ...]:
        """The ids of messages that turns go on from: the last one, if it is a user's or an assistant's, stays open.

        A turn's text goes on in an open user's message, with nothing put between. After any other role's message a
        user's is opened.

        Raises:
            InvalidRequest: the model's template refuses these messages, does not let them be gone on from, or knows no
                tools.
        """
        if messages[-1].role not in ("user", "assistant"):
            messages = [*messages, Message("user", "")]
        context, turn, marks = self._cut(messages, "x", tools, True, gone)
        if turn != self._turn("x", messages[-1].role, tools, True, gone)[0]:
            raise InvalidRequest(
                "The model's chat template moves a part of this context (the system prompt or tools) into the turn "
                "that follows, so that turns cannot go on from it. Let the context end with a user's message, or "
                "leave that part out."
            )
        return tuple(self._encode(context, marks, gone, begins=True))

    def encode_turn(
        self,
        text: str,
        after: str,
        tools: tuple[dict[str, Any], ...] = (),
        reasoning: bool = True,
        gone: Callable[[], bool] = never,
    ) -> Prompt:
        """The ids that a user's turn appends to a log, generation prompt included; control tokens stay text.

        `after` is the role of the message that the log ends in, still open: "assistant" for an answer whose stop token
        was not fed, "user" for a context. `tools` are the log's; they are not told again.

        Raises:
            InvalidRequest: the model's template does not let a chat be gone on from.
        """
        turn, marks = self._turn(text, after, tools, reasoning, gone)
        return Prompt(tuple(self._encode(turn, marks, gone, begins=False)), self._opens_reasoning(turn))

    def decode(self, ids: tuple[int, ...]) -> str:
        """How tokens read, control tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @property
    def digest(self) -> bytes:
        """See core.ports.ChatTokenizer."""
        return self._digest

    def transcript(self, ids: tuple[int, ...]) -> str:
        """A log as a JSON list of control tokens, each in a list of its own, and the texts between them."""
        parts: list[str | list[str]] = []
        run: list[int] = []
        for token_id in ids:
            if token_id in self._control_ids:
                parts += [self.decode(tuple(run)), [self._control_ids[token_id]]]
                run = []
            else:
                run.append(token_id)
        return json.dumps([*parts, self.decode(tuple(run))])

    def reader(self, prompt: Prompt, tools: tuple[dict[str, Any], ...] = (), plain: bool = False) -> AnswerReader:
        """A fresh one, for one answer to `prompt`; `plain` takes all text for the answer."""
        if plain:
            return AnswerReader(self._tokenizer, self._plain, False, ())
        return AnswerReader(self._tokenizer, self._format, prompt.reasoning, tools)

    def token_text(self, token_id: int) -> str:
        """How a single token reads in the midst of a text; a part of a character reads U+FFFD."""
        with_letter: str = self._tokenizer.decode([*self._letter, token_id], clean_up_tokenization_spaces=False)
        return with_letter.removeprefix("a")

    def compile(self, grammar: Grammar, vocab_size: int, gone: Callable[[], bool] = never) -> Constraint:
        """A fresh constraint over a model's `vocab_size` token ids; may take long for a large grammar.

        Raises:
            InvalidRequest: the grammar is malformed, or too large; with the place.
        """
        return self._grammars.compile(grammar, vocab_size, gone)

    def _opens_reasoning(self, rendered: str) -> bool:
        # Only the template can have written the marker: in the callers' text it would be a mark.
        return bool(self._tokenizer.has_thinking and rendered.rstrip().endswith(self._tokenizer.think_start))

    def _turn(
        self, text: str, after: str, tools: tuple[dict[str, Any], ...], reasoning: bool, gone: Callable[[], bool]
    ) -> tuple[str, dict[str, str]]:
        """A turn's text after any log that ends in a message of the role `after`; and the marks of control tokens."""
        log = ending_in(after)
        try:  # Mistral's templates put tools before the last user's message: without any, so as not to tell them again
            _, turn, marks = self._cut(log, text, (), reasoning, gone)
        except InvalidRequest:  # but Hermes's cannot do without
            if not tools:
                raise
            _, turn, marks = self._cut(log, text, tools, reasoning, gone)
        return turn, marks

    def _cut(
        self,
        messages: list[Message],
        text: str,
        tools: tuple[dict[str, Any], ...],
        reasoning: bool,
        gone: Callable[[], bool],
    ) -> tuple[str, str, dict[str, str]]:
        """Render `messages` and a user's turn that goes on from them with `text`, and cut where the turn begins.

        Returns what is before and what is after, and the marks of control tokens.
        """
        rendered, mark, marks, _ = self._render(messages, tools, reasoning, gone, text)
        context, found, turn = rendered.partition(mark)
        if not found or mark in turn:
            raise InvalidRequest(
                "The model's chat template drops or repeats what messages end with, so there are no sessions with this "
                "model. Call without one, with all that the model shall know in `prompt`."
            )
        return context, turn, marks

    def _render(
        self,
        messages: list[Message],
        tools: tuple[dict[str, Any], ...],
        reasoning: bool,
        gone: Callable[[], bool],
        turn: str | None = None,
    ) -> tuple[str, str, dict[str, str], list[int] | None]:
        """The chat's text, with a private-use character where `turn` begins, and one for each of the callers' controls.

        Returns the text, the former character, and the latter ones by control token; and the ids of the text, where
        they came along.
        """
        if tools and not (self._tokenizer.has_chat_template and self._tokenizer.tool_parser):
            raise InvalidRequest(
                "This model cannot be given tools: how it would call them is not known. Choose another model "
                "(list_models shows them), or leave `tools` out and describe in `prompt` what to answer."
            )
        chat = {"messages": [{"role": m.role, "content": m.content} for m in messages], "tools": list(tools)}
        try:
            text = json.dumps([chat, turn], ensure_ascii=False)
            text.encode()  # refuses half surrogates, for which there are no tokens
            used = set(text)
            unused = (c for c in map(chr, _PRIVATE_USE) if c not in used)
            mark, marks = next(unused), dict(zip(self._controls, unused, strict=False))
            if turn is not None:
                chat["messages"] = continued(chat["messages"], mark, turn)
            marked = self._marked(chat, marks)
            whole = turn is None and marked == chat
            rendered, ids = self._apply_template(marked, reasoning, len(text), whole, gone)
            return rendered, mark, marks, ids
        except Overdue as error:
            raise InvalidRequest(
                f"The model's chat template or tokenizer ({self._folder}) cannot be used with these messages: {error}. "
                "Change them, choose another model (list_models shows them), or have the template mended."
            ) from error
        except MlxMcpError:
            raise
        except Exception as error:  # a template is foreign code, and what it does not expect breaks it in any way
            raise InvalidRequest(
                f"These messages{' or tools' if tools else ''} do not fit the model's chat template: "
                f"{str(error).rstrip('.')}.{self._advice(messages, tools, reasoning, gone, turn)}"
            ) from error

    def _advice(
        self,
        messages: list[Message],
        tools: tuple[dict[str, Any], ...],
        reasoning: bool,
        gone: Callable[[], bool],
        turn: str | None,
    ) -> str:
        """What to leave out of messages that the template refused; nothing unless it takes the others."""
        for role, words in _LEAVE_OUT.items():
            rest = [message for message in messages if message.role != role]
            if 0 < len(rest) < len(messages):
                with suppress(InvalidRequest):
                    self._render(rest, tools, reasoning, gone, turn)
                    return words
        return ""

    def _apply_template(
        self, chat: dict[str, Any], reasoning: bool, num_chars: int, whole: bool, gone: Callable[[], bool]
    ) -> tuple[str, list[int] | None]:
        """Render; `whole` says that the text will have no marks, so that its ids may come along."""
        if not self._tokenizer.has_chat_template:
            return "\n\n".join(message["content"] for message in chat["messages"]), None
        messages, tools = chat["messages"], chat["tools"] or None
        thinking = bool(reasoning and self._tokenizer.has_thinking)
        if self._apart is None or has_own_renderer(self._tokenizer):
            options = {} if reasoning else {"enable_thinking": False}
            with self._lock:
                rendered: str = self._tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=True, **options
                )
            return rendered, None
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
        given |= {**self._tokenizer.special_tokens_map, "enable_thinking": thinking}
        template, encode = self._tokenizer.get_chat_template(tools=tools), whole and self._backend is not None
        return self._apart.render(template, given, num_chars, encode, gone)

    def _marked(self, value: Any, marks: dict[str, str]) -> Any:
        """The value with each control token in its strings replaced by its mark."""
        match value:
            case str():
                return self._control.sub(lambda found: marks[found[0]], value)
            case dict():
                return {self._marked(key, marks): self._marked(part, marks) for key, part in value.items()}
            case list() | tuple():
                return [self._marked(part, marks) for part in value]
            case _:
                return value

    def _encode(self, text: str, marks: dict[str, str], gone: Callable[[], bool], begins: bool) -> list[int]:
        """Encode rendered text, with each mark as the plain text of its control token, cut so that it stays text.

        `begins` says whether a log begins with it, or it goes on from other text.
        """
        pieces, start = [], 0
        controls = {mark: control for control, mark in marks.items()}
        for found in re.finditer(f"[{''.join(controls)}]" if controls else r"(?!)", text):
            control = controls[found[0]]
            pieces += [text[start : found.start()], control[:1], control[1:]]
            start = found.end()
        pieces.append(text[start:])
        ids: list[int] = []
        if begins:
            (ids,) = self._ids([pieces.pop(0)], gone, add_special_tokens=not self._tokenizer.has_chat_template)
        return ids + self._encode_amid(list(filter(None, pieces)), gone)

    def _encode_amid(self, texts: list[str], gone: Callable[[], bool]) -> list[int]:
        """Encode texts that go on from other text: without the space that sentencepiece puts before a text."""
        num_newline = len(self._newline)
        encoded = self._ids([f"\n{text}" for text in texts], gone)
        apart = [text for text, ids in zip(texts, encoded, strict=True) if ids[:num_newline] != self._newline]
        others = iter(self._ids(apart, gone))
        parts = (ids[num_newline:] if ids[:num_newline] == self._newline else next(others) for ids in encoded)
        return [token_id for ids in parts for token_id in ids]

    def _ids(self, texts: list[str], gone: Callable[[], bool], add_special_tokens: bool = False) -> list[list[int]]:
        """Encode texts as they stand; megabytes take seconds, and must not hold up another call's few words.

        Raises:
            InvalidRequest: the tokenizer cannot, or not in time.
        """
        if not texts:
            return []
        if self._backend is None:
            with self._lock:
                return [list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens)) for text in texts]
        if self._apart is None:  # in a batch, other than alone, it lets other threads run; "fast" is without offsets
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [list(encoding.ids) for encoding in encodings]
        try:
            return self._apart.encode(texts, add_special_tokens, gone)
        except (Overdue, Failed) as error:
            raise InvalidRequest(
                f"The model's tokenizer ({self._folder}) cannot encode this text: {error}. Change or shorten it, or "
                "choose another model (list_models shows them)."
            ) from error


def has_own_renderer(tokenizer: Any) -> bool:
    """Whether mlx_lm or transformers renders its chats with code of theirs rather than with the model's template."""
    inner: Any = tokenizer._tokenizer
    return tokenizer._chat_template is not None or (
        type(inner).apply_chat_template is not _tokenizer_utils.PreTrainedTokenizerBase.apply_chat_template
    )


def ending_in(role: str) -> list[Message]:
    """The shortest chat whose last message is of that role."""
    return [Message("user", "x"), Message("assistant", "")] if role == "assistant" else [Message("user", "")]


def continued(messages: list[dict[str, str]], mark: str, turn: str) -> list[dict[str, str]]:
    """The messages with the user's `turn` after the last one, or in it if it is the user's; `mark` is where it ends."""
    *before, last = messages
    if last["role"] == "assistant":
        return [*before, last | {"content": last["content"] + mark}, {"role": "user", "content": turn}]
    return [*before, last | {"content": last["content"] + mark + turn}]


def formats(tokenizer: Any) -> tuple[Format, Format]:
    """How the model marks the parts of its answers; and the format in which there are none."""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocab = tokenizer.get_vocab()
    if "<|channel|>" in vocab and "<|message|>" in vocab:
        machine, edges = _StateMachine(_HARMONY), _HARMONY
    else:
        machine, edges = _make_state_machine(tokenizer), tokenizer.response_transitions
    markers = [tokenizer.think_start, tokenizer.think_end, tokenizer.tool_call_start, tokenizer.tool_call_end]
    markers += [*tokenizer.structural_markers, *(marker for some in edges.values() for marker, _ in some)]
    shown = "\n".join(filter(None, markers))
    hidden = frozenset(i for i, text in special.items() if text not in shown)
    return (
        Format(machine, tokenizer.response_initial_state or "normal", hidden),
        Format(_StateMachine(), "normal", frozenset(special)),
    )


def parsed_calls(parser: Any, text: str, tools: tuple[dict[str, Any], ...]) -> list[ToolCall]:
    """The calls that a model wrote in its notation; none if it is malformed, or not all are of `tools`."""
    try:
        parsed = parser(text, list(tools))
        calls = [tool_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
    except Exception:  # models write anything, and parsers raise of every kind
        return []
    offered = [tool["function"]["name"] for tool in tools]
    return calls if all(call.name in offered for call in calls) else []


def tool_call(parsed: dict[str, Any]) -> ToolCall:
    """A call from what a parser of mlx_lm returns, if its arguments are a JSON object.

    Raises:
        ValueError or TypeError, among others: they are not.
    """
    arguments = parsed.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    # There and back: some parsers give Python's sets or bytes, and JSON may spell half a surrogate, which has no UTF-8.
    arguments = json.loads(json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode())
    if not isinstance(arguments, dict):
        raise TypeError("the arguments are no object")
    return ToolCall(parsed["name"], arguments)
