"""System prompt and messages → what a model is told. Pure.

    user       [tool_result, tool_result, text, text]   → a message for each result, then one of the user's
    assistant  [thinking, text, tool_use, tool_use]     → one message with reasoning, text and calls
    system     between these                            → a message of its own, where it is

Turns of one role that follow each other are one turn, as Anthropic's API has it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from mlx_mcp.api.anthropic.shapes import Block, InputMessage, Source
from mlx_mcp.chat.message import Image, Message, Text, ToolCall
from mlx_mcp.errors import InvalidRequest

BREAK = "\n\n"  # between the texts of a user or a system prompt; those of an answer are one text
BILLING = "x-anthropic-billing-header:"  # a line of Claude Code's, which is another one in each conversation
OTHER_BLOCKS = "blocks of other types"
# A call's id as callers see it, which has to be another one for each call, and after it the id that the model wrote.
CALL_ID = re.compile(r"toolu_[0-9a-f]{16}(?:_(.+))?", re.DOTALL)


@dataclass
class Ignored:
    """What of a request is ignored, in words of ours: what callers call it may be anything."""

    names: set[str] = field(default_factory=set)


@dataclass
class Chat:
    """Messages as they are put together."""

    ignored: Ignored
    messages: list[Message] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # a call's id, as callers see it → the tool's name
    order: dict[str, int] = field(default_factory=dict)  # the same → its place among all calls

    def add(self, message: InputMessage) -> None:
        """Add a turn.

        Raises:
            InvalidRequest: it cannot be understood, such as a result of a call that is nowhere.
        """
        blocks = [Block(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        if message.role == "assistant":
            self._add_answer(blocks)
            return
        results = [block for block in blocks if block.type == "tool_result"]
        for result in sorted(results, key=lambda block: self.order.get(block.tool_use_id or "", 0)):
            self.messages.append(self._result(result))
        content = self._content([block for block in blocks if block.type != "tool_result"])
        if content:
            self._put(Message(message.role, content))

    def _add_answer(self, blocks: list[Block]) -> None:
        thoughts, texts, calls = [], [], []
        for block in blocks:
            match block:
                case Block(type="thinking"):
                    thoughts.append(block.thinking or "")
                case Block(type="text"):
                    texts.append(block.text or "")
                case Block(type="tool_use"):
                    calls.append(self._call(block))
                case _:
                    self.ignored.names.add(OTHER_BLOCKS)
        if thoughts or texts or calls:
            self._put(Message("assistant", "".join(texts), "\n".join(filter(None, thoughts)), tuple(calls)))

    def _call(self, block: Block) -> ToolCall:
        if not block.name or not block.id:
            raise InvalidRequest("A tool_use block has no name or no id: send it as it came, with id, name and input.")
        self.names[block.id] = block.name
        self.order[block.id] = len(self.order)
        return ToolCall(block.name, block.input or {}, own_id(block.id))

    def _result(self, block: Block) -> Message:
        given = block.tool_use_id or ""
        if given not in self.names:
            raise InvalidRequest(
                f"A tool_result is for the tool_use {given[:80]!r}, and no message before it has a tool_use block of "
                "that id: send the assistant's message with that block too."
            )
        content = self._content(parts(block))
        if block.is_error:
            content = "Error: " + content if isinstance(content, str) else (Text("Error: "), *content)
        return Message("tool", content, call_id=own_id(given), name=self.names[given])

    def _put(self, message: Message) -> None:
        """Add a message, or to the last one if that is of the same role."""
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != message.role or message.role == "system":
            self.messages.append(message)
        elif message.role == "assistant":
            thoughts = "\n".join(filter(None, (last.reasoning, message.reasoning)))
            calls = (*last.tool_calls, *message.tool_calls)
            self.messages[-1] = Message("assistant", last.text + message.text, thoughts, calls)
        else:
            self.messages[-1] = replace(last, content=joined([last.content, message.content]))

    def _content(self, blocks: Iterable[Block]) -> str | tuple[Text | Image, ...]:
        """Texts in one, in parts only if there are pictures among them."""
        return joined([made for block in blocks if (made := self._part(block))])

    def _part(self, block: Block) -> str | tuple[Image]:
        match block:
            case Block(type="text"):
                return block.text or ""
            case Block(type="image"):
                return (picture(block),)
            case Block(type="document"):
                return document(block, self)
            case Block(type="search_result"):
                return "\n".join(filter(None, [block.title, plain(parts(block))]))
            case Block(type="tool_reference"):
                return f"The tool {block.tool_name or ''} can be called now."
        self.ignored.names.add(OTHER_BLOCKS)
        return ""


def chat_of(
    system: str | list[Block] | None, messages: Sequence[InputMessage], ignored: Ignored
) -> tuple[Message, ...]:
    """The messages of a request, its system prompt first.

    Raises:
        InvalidRequest: one cannot be understood, or there is nothing to answer.
    """
    chat = Chat(ignored)
    prompt = system_text(system)
    if prompt:
        chat.messages.append(Message("system", prompt))
    for message in messages:
        chat.add(message)
    if chat.messages and chat.messages[-1].role == "assistant":
        raise InvalidRequest(
            "The last message is the assistant's, and an answer cannot be begun for the model: let the messages end "
            "with the user's, and say there how the answer shall begin."
        )
    return tuple(chat.messages)


def system_text(system: str | list[Block] | None) -> str:
    """The system prompt without Claude Code's billing line: with it no two conversations would begin alike."""
    blocks = [Block(type="text", text=system)] if isinstance(system, str) else system or ()
    return BREAK.join(filter(None, (without_billing(block.text or "") for block in blocks if block.type == "text")))


def without_billing(text: str) -> str:
    """A text without its first line, if that is Claude Code's billing line."""
    return text.partition("\n")[2].lstrip("\n") if text.startswith(BILLING) else text


def references(messages: Iterable[InputMessage]) -> set[str]:
    """The names of the tools that results refer to: from then on the model may call them."""
    blocks = [block for message in messages if not isinstance(message.content, str) for block in message.content]
    inner = [part for block in blocks if block.type == "tool_result" for part in parts(block)]
    return {part.tool_name for part in (*blocks, *inner) if part.type == "tool_reference" and part.tool_name}


def own_id(call_id: str) -> str:
    """The id that the model wrote for a call, if this server gave it another one in place of it; see `CALL_ID`."""
    found = CALL_ID.fullmatch(call_id)
    return call_id if found is None else found[1] or ""


def parts(block: Block) -> list[Block]:
    """The content of a block as a list."""
    if isinstance(block.content, str):
        return [Block(type="text", text=block.content)]
    return block.content or []


def plain(blocks: Iterable[Block]) -> str:
    """The texts of blocks."""
    return BREAK.join(block.text for block in blocks if block.type == "text" and block.text)


def joined(contents: Sequence[str | tuple[Text | Image, ...]]) -> str | tuple[Text | Image, ...]:
    """Contents in one: a text if all of them are, else parts."""
    texts = [each for each in contents if isinstance(each, str)]
    if len(texts) == len(contents):
        return BREAK.join(texts)
    return tuple(part for each in contents for part in ((Text(each),) if isinstance(each, str) else each))


def picture(block: Block) -> Image:
    """A picture whose bytes are in the request.

    Raises:
        InvalidRequest: they are not.
    """
    source = block.source
    if isinstance(source, Source) and source.type == "base64":
        try:
            return Image(base64.b64decode(source.data or "", validate=True), source.media_type or "")
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(
                f"The data of an image is not base64: {error}. Send the bytes of its file so."
            ) from error
    raise InvalidRequest("An image is not in the request, and nothing is fetched here: send its bytes as base64.")


def document(block: Block, chat: Chat) -> str:
    """The text of a document, with its title.

    Raises:
        InvalidRequest: it is no text.
    """
    source = block.source
    if not isinstance(source, Source) or source.type not in ("text", "content"):
        raise InvalidRequest(
            'A document is no text, and only texts can be read: send its text as a source of type "text".'
        )
    if source.type == "text":
        text = source.data or ""
    else:
        text = source.content if isinstance(source.content, str) else plain(source.content or ())
    return "\n".join(filter(None, [block.title, block.context, text]))
