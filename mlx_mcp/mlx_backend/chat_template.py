"""Renders chats by a model's chat template, and cuts turns out of what it renders."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils

from mlx_mcp.chat.formats.format import Format
from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import Reasoning
from mlx_mcp.core.ports import never
from mlx_mcp.errors import InvalidRequest, MlxMcpError
from mlx_mcp.mlx_backend.control_tokens import ControlTokens, MarkedText, unused_characters
from mlx_mcp.mlx_backend.text_processes import Overdue, TextProcesses

_tokenizer_utils: Any = tokenizer_utils  # which has no types

# The advice where a template takes a chat once all messages of this role are left out.
LEAVE_OUT = {
    "system": " It takes no system prompt: leave `system` out and say it in `prompt`.",
    "assistant": " It takes no answers, so there are no sessions with it: call without one.",
}


@dataclass(frozen=True)
class Chat:
    """What is rendered: messages, and a user's turn that follows them, if there is one."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()  # function definitions in OpenAI's form
    reasoning: Reasoning | None = None
    gone: Callable[[], bool] = never  # whether nobody waits for it any more
    turn: str | None = None


@dataclass(frozen=True)
class Rendered:
    """A rendered chat, generation prompt included."""

    marked: MarkedText
    turn_mark: str  # the character that stands where the turn begins
    ids: list[int] | None  # where the process that rendered the text encoded it too


class ChatTemplate:
    """The chat template of one tokenizer; any thread may use it.

    `processes` render, unless they are None. `lock` is held while transformers renders by itself.
    """

    def __init__(
        self,
        tokenizer: Any,
        form: Format,
        controls: ControlTokens,
        processes: TextProcesses | None,
        lock: threading.Lock,
        folder: Path,
    ) -> None:
        self._tokenizer, self._form, self._controls, self._folder = tokenizer, form, controls, folder
        self._processes, self._lock = processes, lock
        self._can_encode = getattr(tokenizer, "backend_tokenizer", None) is not None  # where it renders

    def opens_reasoning(self, rendered: str) -> bool:
        """Whether the rendered text ends with the marker that reasoning begins with.

        Only the template can have written the marker: in the callers' text it would be a mark.
        """
        return self._form.opened_thoughts(rendered) is not None

    def turn_after(self, role: str, chat: Chat) -> MarkedText:
        """The text of `chat.turn` after any log that ends in a message of this role; its messages do not matter.

        Raises:
            InvalidRequest: see `split`.
        """
        chat = replace(chat, messages=ending_in(role))
        try:  # without tools first: Mistral's templates would put them before the last user's message once more
            return self.split(replace(chat, tools=()))[1]
        except InvalidRequest:  # Hermes's templates cannot do without tools
            if not chat.tools:
                raise
            return self.split(chat)[1]

    def split(self, chat: Chat) -> tuple[MarkedText, MarkedText]:
        """Render a chat, and split it where its turn begins.

        Raises:
            InvalidRequest: the template refuses the messages, knows no tools, or does not let a chat be continued.
        """
        rendered = self.render(chat)
        context, found, turn = rendered.marked.text.partition(rendered.turn_mark)
        if not found or rendered.turn_mark in turn:
            raise InvalidRequest(
                "The model's chat template drops or repeats what messages end with, so there are no sessions with this "
                "model. Call without one, with all that the model shall know in `prompt`."
            )
        return MarkedText(context, rendered.marked.marks), MarkedText(turn, rendered.marked.marks)

    def render(self, chat: Chat) -> Rendered:
        """Render a chat, with marks for the control tokens in the callers' text, and one where the turn begins.

        Raises:
            InvalidRequest: the template refuses the messages, or knows no tools.
        """
        if chat.tools and not (self._tokenizer.has_chat_template and self._form.calls):
            raise InvalidRequest(
                "This model cannot be given tools: how it would call them is not known. Choose another model "
                "(list_models shows them), or leave `tools` out and describe in `prompt` what to answer."
            )
        try:
            return self._render(chat)
        except Overdue as error:
            raise InvalidRequest(
                f"The model's chat template or tokenizer ({self._folder}) cannot be used with these messages: {error}. "
                "Change them, choose another model (list_models shows them), or have the template mended."
            ) from error
        except MlxMcpError:
            raise
        except Exception as error:  # a template may fail in any way on what it does not expect
            raise InvalidRequest(
                f"These messages{' or tools' if chat.tools else ''} do not fit the model's chat template: "
                f"{str(error).rstrip('.')}.{self._advice(chat)}"
            ) from error

    def _render(self, chat: Chat) -> Rendered:
        messages = [message.to_template() for message in chat.messages]
        plain = {"messages": messages, "tools": list(chat.tools)}
        text = json.dumps([plain, chat.turn], ensure_ascii=False)
        text.encode()  # refuses half surrogates, for which there are no tokens
        unused = unused_characters(text)
        turn_mark, marks = next(unused), self._controls.marks(unused)
        if chat.turn is not None:
            plain["messages"] = continued(messages, turn_mark, chat.turn)
        marked = self._controls.marked(plain, marks)
        unmarked = chat.turn is None and marked == plain
        rendered, ids = self._apply(marked, chat, len(text), unmarked)
        return Rendered(MarkedText(rendered, marks), turn_mark, ids)

    def _apply(
        self, marked: dict[str, Any], chat: Chat, num_chars: int, unmarked: bool
    ) -> tuple[str, list[int] | None]:
        """Apply the template; `unmarked` says that the text will have no marks, so that it may be encoded too."""
        if not self._tokenizer.has_chat_template:
            return "\n\n".join(message["content"] for message in marked["messages"]), None
        messages, tools = marked["messages"], marked["tools"] or None
        if self._processes is None or has_own_renderer(self._tokenizer):
            options = {"enable_thinking": False} if chat.reasoning is Reasoning.OFF else {}
            with self._lock:
                rendered: str = self._tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=True, **options
                )
            return rendered, None
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
        thinking = bool(chat.reasoning is not Reasoning.OFF and self._tokenizer.has_thinking)
        given |= {**self._tokenizer.special_tokens_map, "enable_thinking": thinking}
        template = self._tokenizer.get_chat_template(tools=tools)
        return self._processes.render(template, given, num_chars, unmarked and self._can_encode, chat.gone)

    def _advice(self, chat: Chat) -> str:
        """What to leave out of messages that the template refused; empty unless it takes the others."""
        for role, words in LEAVE_OUT.items():
            rest = [message for message in chat.messages if message.role != role]
            if 0 < len(rest) < len(chat.messages):
                with suppress(InvalidRequest):
                    self.render(replace(chat, messages=rest))
                    return words
        return ""


def has_own_renderer(tokenizer: Any) -> bool:
    """Whether mlx_lm or transformers renders its chats with code of theirs rather than with the model's template."""
    inner: Any = tokenizer._tokenizer
    return tokenizer._chat_template is not None or (
        type(inner).apply_chat_template is not _tokenizer_utils.PreTrainedTokenizerBase.apply_chat_template
    )


def ending_in(role: str) -> list[Message]:
    """The shortest chat whose last message is of that role."""
    return [Message("user", "x"), Message("assistant", "")] if role == "assistant" else [Message("user", "")]


def continued(messages: list[dict[str, Any]], mark: str, turn: str) -> list[dict[str, Any]]:
    """The messages with `mark` and the user's `turn` after the last one, or in it if that is the user's."""
    *before, last = messages
    if last["role"] == "assistant":
        return [*before, last | {"content": last["content"] + mark}, {"role": "user", "content": turn}]
    return [*before, last | {"content": last["content"] + mark + turn}]
