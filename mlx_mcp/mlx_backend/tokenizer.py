"""A model's text side: encodes chats and turns, reads answers, compiles grammars. Any thread may use it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_mcp.chat.formats.format import Format
from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import NO_SWITCH, Holding, Prompt, Reasoning
from mlx_mcp.core.ports import never
from mlx_mcp.core.sequence import Constraint
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.mlx_backend.answer_reader import AnswerReader, answer_format
from mlx_mcp.mlx_backend.chat_template import Chat, ChatTemplate, Renderer
from mlx_mcp.mlx_backend.constraint import Grammars
from mlx_mcp.mlx_backend.control_tokens import ControlTokens, MarkedText
from mlx_mcp.mlx_backend.holding import Holdings, is_harmony
from mlx_mcp.mlx_backend.text_processes import Failed, Overdue, TextProcesses

_load: Any = load_tokenizer  # which has no types


class ChatTokenizer:
    """The tokenizer of a model folder.

    A chat template is a program, and a tokenizer may be one that never ends. Where they are `isolated`, as all must be
    but this package's own, they work in other processes (see text_processes).

    Raises:
        Failed or Overdue: a process that tried to read the tokenizer could not.
        Exception: transformers cannot read it, and raises errors of every kind.
    """

    def __init__(self, folder: Path, eos_token_ids: Any, isolated: bool = True) -> None:
        self._processes = TextProcesses() if isolated else None
        if self._processes is not None and (folder / "tokenizer.json").is_file():
            self._processes.try_reading(folder / "tokenizer.json")
        self._tokenizer = _load(folder, {"trust_remote_code": False}, eos_token_ids=eos_token_ids)
        lock = threading.Lock()  # transformers changes its tokenizer's state while it encodes, on any thread
        self._grammars = Grammars(self._tokenizer, self.stop_ids)
        renderer = Renderer(self._tokenizer, self._processes, lock, folder)
        self._answers = answer_format(self._tokenizer, renderer.all_text)
        self._controls = ControlTokens(self._tokenizer)
        self._control_ids = frozenset(self._controls.texts)
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        self._digest = blake2b(vocabulary.encode(), digest_size=32).digest()
        self._letter = self._tokenizer.encode("a", add_special_tokens=False)
        self._encoder = Encoder(self._tokenizer, self._processes, lock, folder, bare=not renderer.can_render)
        form = self._answers.form
        self._template = ChatTemplate(self._tokenizer, self._controls, renderer, form, folder)
        self._holdings = Holdings(
            form,
            self._grammars,
            self._template,
            self._controls,
            self.stop_ids,
            unspelt(self._tokenizer),
            lambda text: self._encoder.encode_following([text], never),
            self.token_text,
        )

    @property
    def form(self) -> Format:
        """How the model marks the parts of its answers."""
        return self._answers.form

    @property
    def vocab_size(self) -> int:
        """The number of token ids that the tokenizer knows."""
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
        reasoning: Reasoning | None = None,
        gone: Callable[[], bool] = never,
    ) -> Prompt:
        """The prompt, generation prompt included; no text in `messages` or `tools` becomes a control token.

        Control tokens in the text ("<|im_end|>" in a document about templates) are encoded as the plain text they are,
        so that no content can end a turn or open another role's. `tools` are function definitions in OpenAI's form.
        `reasoning` sets the switch that the template has for it.

        Raises:
            InvalidRequest: the model's template refuses these messages, or knows no tools.
        """
        rendered = self._template.render(Chat(messages, tools, reasoning, gone))
        ids = rendered.ids
        if ids is None:
            ids = self._encoder.encode_rendered(rendered.marked, gone)
        return self._prompt(Prompt(tuple(ids), rendered.reasoning, rendered.notes), rendered.marked, reasoning, gone)

    def encode_context(
        self, messages: list[Message], tools: tuple[dict[str, Any], ...] = (), gone: Callable[[], bool] = never
    ) -> Prompt:
        """The ids of messages that turns continue: the last one stays open, if it is a user's or an assistant's.

        A turn's text continues an open user's message, with nothing in between. After any other role's message a
        user's is opened.

        Raises:
            InvalidRequest: the model's template refuses these messages, does not let them be continued, or knows no
                tools.
        """
        if messages[-1].role not in ("user", "assistant"):
            messages = [*messages, Message("user", "")]
        results = tuple(Message("tool", "x", call_id=c.call_id, name=c.name) for c in messages[-1].tool_calls)
        chat = Chat(messages, tools, gone=gone, turn=results or (Message("user", "x"),))
        split = self._template.split(chat)
        if split.turn.text != self._template.turn_after(messages[-1].role, chat).turn.text:
            raise InvalidRequest(
                "The model's chat template moves a part of this context (the system prompt or tools) into the turn "
                "that follows, so that turns cannot go on from it. Let the context end with a user's message, or "
                "leave that part out."
            )
        return Prompt(tuple(self._encoder.encode_rendered(split.context, gone)), notes=split.notes)

    def encode_turn(
        self,
        messages: list[Message],
        after: str,
        tools: tuple[dict[str, Any], ...] = (),
        reasoning: Reasoning | None = None,
        gone: Callable[[], bool] = never,
    ) -> Prompt:
        """The ids that a turn appends to a log, generation prompt included; control tokens in texts stay text.

        The turn is a user's message, or results of the calls that the log ends in and perhaps more messages. `after` is
        the role of the message that the log ends in, still open: "assistant" for an answer whose stop token was not
        fed, "user" for a context. `tools` are the log's; the turn does not repeat them.

        Raises:
            InvalidRequest: the model's template does not let a chat be continued, or not by such messages.
        """
        if messages[0].role not in (("user", "tool") if after == "assistant" else ("user",)):
            raise InvalidRequest(
                "The session ends in an answer: begin the turn with the user's text, or with results (role tool)."
                if after == "assistant"
                else "There is no call in this session to give a result of: give the user's text first."
            )
        split = self._template.turn_after(after, Chat([], tools, reasoning, gone, turn=tuple(messages)))
        ids = self._encoder.encode_following(split.turn.pieces(), gone)
        return self._prompt(Prompt(tuple(ids), split.reasoning, split.notes), split.turn, reasoning, gone)

    def encode_raw(self, text: str, gone: Callable[[], bool] = never) -> Prompt:
        """The ids of a prompt without a chat template, as text that a model shall go on with.

        Unlike in chats, control tokens in it are control tokens: whoever gives a raw prompt writes the template
        themselves. The token that begins a text is put in front, as the tokenizer does it, unless it is there.

        Raises:
            InvalidRequest: the tokenizer cannot encode it, or nothing is left of it.
        """
        begins = bool(self._tokenizer.bos_token) and text.startswith(self._tokenizer.bos_token)
        (ids,) = self._encoder.encode([text], gone, add_special_tokens=not begins)
        if not ids:
            raise InvalidRequest("The model's tokenizer leaves nothing of this prompt: give it some text.")
        return Prompt(tuple(ids))

    def decode(self, ids: tuple[int, ...]) -> str:
        """The text of tokens, control tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @property
    def digest(self) -> bytes:
        """See core.ports.ChatTokenizer."""
        return self._digest

    def transcript(self, ids: tuple[int, ...], begins: tuple[int, ...] = ()) -> str:
        """A log as a JSON list of texts, and between them of control tokens and of turns that begin; see ports."""
        parts: list[str | list[str | int]] = []
        run: list[int] = []
        turns = set(begins)
        for index, token_id in enumerate(ids):
            if index in turns:
                parts += [self.decode(tuple(run)), ["", index]]
                run = []
            if token_id in self._controls.texts:
                parts += [self.decode(tuple(run)), [self._controls.texts[token_id]]]
                run = []
            else:
                run.append(token_id)
        return json.dumps([*parts, self.decode(tuple(run))])

    def reader(self, prompt: Prompt, tools: tuple[dict[str, Any], ...] = (), plain: bool = False) -> AnswerReader:
        """A new reader of one answer to `prompt`; `plain` takes all text for the answer, but for gpt-oss's headers."""
        plain = plain and not is_harmony(self._answers.form)
        return AnswerReader(self._tokenizer, self._answers, prompt.reasoning, tools, plain)

    def token_text(self, token_id: int) -> str:
        """The text of a single token within a text; a part of a character is U+FFFD."""
        with_letter: str = self._tokenizer.decode([*self._letter, token_id], clean_up_tokenization_spaces=False)
        return with_letter.removeprefix("a")

    def hold(
        self, prompt: Prompt, holding: Holding, vocab_size: int, gone: Callable[[], bool] = never
    ) -> Constraint | None:
        """A new constraint of an answer to `prompt`, over a model's `vocab_size` ids; None if nothing holds it.

        Raises:
            InvalidRequest: a grammar is malformed or too large, and the message says where; or calls are required
                that cannot be held to their tools.
        """
        return self._holdings.hold(prompt, holding, vocab_size, gone)

    @property
    def knows_thoughts(self) -> bool:
        """Whether the markers of the model's thoughts are known, so that thoughts can be ended."""
        return bool(self._answers.form.thoughts) or is_harmony(self._answers.form)

    @property
    def control_ids(self) -> frozenset[int]:
        """The control tokens, which no caller's text becomes."""
        return self._control_ids

    @property
    def call_tokens(self) -> tuple[int, ...]:
        """The tokens that begin a call and nothing else."""
        return self._holdings.call_tokens

    def _prompt(
        self, prompt: Prompt, rendered: MarkedText, reasoning: Reasoning | None, gone: Callable[[], bool]
    ) -> Prompt:
        """The prompt of a rendered text; thoughts that it opens and nobody wants are closed at once.

        That is a switch of its own, so there is no note that the template has none.
        """
        marks = self._answers.form.opened_thoughts(rendered.text) if prompt.reasoning else None
        if marks is None or reasoning is not Reasoning.OFF:
            return prompt
        line = "\n" if rendered.text.endswith("\n") else ""
        closing = self._encoder.encode_following([f"{line}{marks.end}{2 * line}"], gone)
        return Prompt((*prompt.ids, *closing), notes=tuple(note for note in prompt.notes if note != NO_SWITCH))


class Encoder:
    """Encodes with one tokenizer; any thread may use it.

    `processes` do the work, unless they are None. `lock` is held while transformers encodes by itself, since that
    changes its tokenizer's state.
    """

    def __init__(
        self, tokenizer: Any, processes: TextProcesses | None, lock: threading.Lock, folder: Path, bare: bool
    ) -> None:
        """`bare` says that logs begin with bare texts, which no template has put special tokens around."""
        self._tokenizer, self._processes, self._lock, self._folder = tokenizer, processes, lock, folder
        self._bare = bare
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._newline = tokenizer.encode("\n", add_special_tokens=False)
        if processes is not None and self._backend is not None:
            processes.use(self._backend.to_str().encode())

    def encode_rendered(self, rendered: MarkedText, gone: Callable[[], bool]) -> list[int]:
        """Encode a text that a log begins with.

        Raises:
            InvalidRequest: see `encode`.
        """
        first, *rest = rendered.pieces()
        (ids,) = self.encode([first], gone, add_special_tokens=self._bare)
        return ids + self.encode_following(rest, gone) if rest else ids

    def encode_following(self, texts: list[str], gone: Callable[[], bool]) -> list[int]:
        """Encode texts that follow other text: without the space that sentencepiece puts before a text.

        Raises:
            InvalidRequest: see `encode`.
        """
        texts, num_newline = list(filter(None, texts)), len(self._newline)
        encoded = self.encode([f"\n{text}" for text in texts], gone)
        # Where the newline and what follows it became one token, the text is encoded without it.
        joined = [text for text, ids in zip(texts, encoded, strict=True) if ids[:num_newline] != self._newline]
        others = iter(self.encode(joined, gone))
        parts = (ids[num_newline:] if ids[:num_newline] == self._newline else next(others) for ids in encoded)
        return [token_id for ids in parts for token_id in ids]

    def encode(self, texts: list[str], gone: Callable[[], bool], add_special_tokens: bool = False) -> list[list[int]]:
        """Encode texts as they are; megabytes take seconds, and must not delay another call's few words.

        Raises:
            InvalidRequest: the tokenizer cannot encode them, or not in time.
        """
        if not texts:
            return []
        if self._backend is None:
            with self._lock:
                return [list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens)) for text in texts]
        if self._processes is None:  # in a batch, unlike alone, it lets other threads run; "fast" is without offsets
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [list(encoding.ids) for encoding in encodings]
        try:
            return self._processes.encode(texts, add_special_tokens, gone)
        except (Overdue, Failed) as error:
            raise InvalidRequest(
                f"The model's tokenizer ({self._folder}) cannot encode this text: {error}. Change or shorten it, or "
                "choose another model (list_models shows them)."
            ) from error


def unspelt(tokenizer: Any) -> frozenset[int]:
    """The tokens that no text of a grammar spells: special ones, and for llguidance all others in angle brackets."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, token in added if token.special or re.fullmatch("<.*>", token.content))
