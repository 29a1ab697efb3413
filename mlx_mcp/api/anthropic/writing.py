"""What comes of a generation → the events of a message, and the message itself. Pure, but for random ids.

A stream and an answer in one piece are written by the same steps, so that both have the same content.
"""

from __future__ import annotations

import json
import secrets
from base64 import b64encode
from hashlib import blake2b
from typing import Any

from mlx_mcp.api.anthropic.answer_shapes import StopReason
from mlx_mcp.api.anthropic.translate import Told
from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.message import ToolCall
from mlx_mcp.service.generate import Answered
from mlx_mcp.service.values import Delta, Result

Event = dict[str, Any]

STOP_REASONS: dict[str, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Of each kind of text: the block, the field with its text, and the delta that adds to it.
KINDS = {
    TextKind.ANSWER: ("text", "text", "text_delta"),
    TextKind.REASONING: ("thinking", "thinking", "thinking_delta"),
}


class Writer:
    """Writes one message. Its events come in the order that Anthropic's API has.

    A block begins with the first text that is not blank: between thoughts, text and calls models write line breaks,
    which are no content.
    """

    def __init__(self, told: Told) -> None:
        self.started = False
        self._id = f"msg_{secrets.token_hex(12)}"
        self._told = told
        self._content: list[dict[str, Any]] = []
        self._kind: TextKind | None = None  # of the latest text
        self._open = False  # whether the last block goes on
        self._held = ""  # blank text with which no block has begun yet

    def start(self, model: str, num_prompt: int, num_cached: int) -> list[Event]:
        """Begin the message. Both numbers are 0 while they are not known, and are told at its end in any case.

        Claude Code takes what is not 0 there for a correction, and adds it all up: neither may be too large.
        """
        self.started = True
        message = self._message(model, None, None, usage(num_prompt - num_cached, num_cached, 0))
        return [{"type": "message_start", "message": message | {"content": []}}]

    def add(self, delta: Delta) -> list[Event]:
        """Take text; of a call nothing can be shown before it is whole."""
        if self._told.silent or delta.kind not in KINDS:
            return []
        events = [] if delta.kind is self._kind else self._stop()
        self._kind, text, self._held = delta.kind, self._held + delta.text, ""
        block, name, kind = KINDS[delta.kind]
        if not self._open:
            if not text.strip():
                self._held = text
                return events
            events += self._start({"type": block, name: ""} | ({"signature": ""} if block == "thinking" else {}))
        self._content[-1][name] += text
        return [*events, self._delta({"type": kind, name: text})]

    def finish(self, answered: Answered) -> list[Event]:
        """Take the end, and what is whole only now: calls, usage, why it ended."""
        result, notes = answered.result, self._notes(answered)
        calls = result.tool_calls[:1] if self._told.one_call else result.tool_calls
        events = self._stop()
        for call in () if self._told.silent else calls:
            events += self._call(call)
        delta = {"stop_reason": self._reason(result), "stop_sequence": result.stop_string or None}
        ended: Event = {"type": "message_delta", "delta": delta, "usage": self._usage(result)}
        return [*events, ended | ({"notes": notes} if notes else {}), {"type": "message_stop"}]

    def whole(self, answered: Answered) -> dict[str, Any]:
        """The message in one piece, once its end was taken."""
        result, notes = answered.result, self._notes(answered)
        reason, stop = self._reason(result), result.stop_string or None
        message = self._message(result.model, reason, stop, self._usage(result))
        return message | ({"notes": notes} if notes else {})

    def _start(self, block: dict[str, Any]) -> list[Event]:
        self._content.append(block)
        self._open = True
        begun: Event = {"type": "content_block_start", "index": len(self._content) - 1, "content_block": dict(block)}
        return [begun, {"type": "ping"}] if len(self._content) == 1 else [begun]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _stop(self) -> list[Event]:
        """End the block that goes on, if one does."""
        events: list[Event] = []
        if self._open:
            block = self._content[-1]
            if block["type"] == "thinking":
                block["signature"] = signature(block["thinking"])
                events.append(self._delta({"type": "signature_delta", "signature": block["signature"]}))
            events.append({"type": "content_block_stop", "index": len(self._content) - 1})
        self._open, self._held = False, ""
        return events

    def _call(self, call: ToolCall) -> list[Event]:
        block = {"type": "tool_use", "id": call_id(call), "name": call.name, "input": {}}
        begun = self._start(block)
        self._content[-1]["input"] = call.arguments
        arguments = {"type": "input_json_delta", "partial_json": json.dumps(call.arguments, ensure_ascii=False)}
        return [*begun, self._delta(arguments), *self._stop()]

    def _reason(self, result: Result) -> StopReason:
        if self._told.silent:
            return "max_tokens"
        return "stop_sequence" if result.stop_string else STOP_REASONS[result.finish_reason.value]

    def _usage(self, result: Result) -> dict[str, int]:
        there = result.cached_tokens + result.restored_tokens
        return usage(result.prompt_tokens - there, there, 0 if self._told.silent else result.completion_tokens)

    def _notes(self, answered: Answered) -> list[str]:
        notes = [note for note in (answered.note, *answered.result.notes) if note and note not in self._told.unasked]
        if self._told.ignored:
            notes.append(f"Ignored: {', '.join(sorted(self._told.ignored))}.")
        return notes

    def _message(self, model: str, reason: StopReason | None, stop: str | None, used: dict[str, int]) -> Event:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": used,
        }


def usage(computed: int, there: int, said: int) -> dict[str, int]:
    """The prompt's tokens that were computed and those that were there already, and the answer's."""
    return {
        "input_tokens": computed,
        "cache_read_input_tokens": there,
        "cache_creation_input_tokens": 0,
        "output_tokens": said,
    }


def signature(thoughts: str) -> str:
    """What clients send back with thoughts; the same for the same thoughts."""
    return b64encode(blake2b(thoughts.encode(), digest_size=24).digest()).decode()


def call_id(call: ToolCall) -> str:
    """An id that no other call has, with the one that the model wrote at its end; see messages.CALL_ID."""
    return f"toolu_{secrets.token_hex(8)}" + (f"_{call.call_id}" if call.call_id else "")
