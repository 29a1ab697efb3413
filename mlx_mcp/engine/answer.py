"""Puts one sequence's tokens together to an answer: text, reasoning, tool calls, and where a stop string ends it."""

from __future__ import annotations

from typing import Any

from mlx_mcp.chat.answer import Piece, TextKind
from mlx_mcp.chat.prompt import Prompt, Reasoning
from mlx_mcp.core.ports import LoadedModel
from mlx_mcp.core.sequence import FinishReason
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.core.stop_strings import StopStrings
from mlx_mcp.engine.messages import Prefilled, Token
from mlx_mcp.engine.requests import CacheMiss, Delta, GenerateRequest, Result, TokenChoice

ONLY_THOUGHTS = (
    "max_tokens cut the model off while it was thinking, so there is no answer: raise max_tokens, or ask for less with "
    '`reasoning` "low" or "off".'
)


class Answer:
    """What has come of one sequence so far."""

    def __init__(
        self,
        model: LoadedModel,
        prompt: Prompt,
        num_before: int,
        request: GenerateRequest,
        tools: tuple[dict[str, Any], ...],
    ) -> None:
        """`prompt` comes after `num_before` tokens of a session, which has these `tools`."""
        self._model = model
        # What a grammar holds is no call, and has no thoughts before it unless they were asked for.
        is_held = request.grammar is not None and request.reasoning in (None, Reasoning.OFF)
        self._reader = model.tokenizer.reader(prompt, tools, plain=is_held or request.raw is not None)
        self._stop = StopStrings(request.sampling.stop)
        self._deltas: list[Delta] = []
        self._choices: list[TokenChoice] = []
        self._prefilled: Prefilled | None = None
        self._notes = prompt.notes
        self.num_prompt = num_before + len(prompt.ids)
        self.ids: list[int] = []

    @property
    def num_tokens(self) -> int:
        """The number of its tokens."""
        return len(self.ids)

    @property
    def num_cached(self) -> int | None:
        """How many tokens of the prompt were there already; None before that is known."""
        return None if self._prefilled is None else self._prefilled.num_cached

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stop.met

    def add(self, token: Token) -> list[Delta]:
        """Take the next token; returns what it lets be shown."""
        self.ids.append(token.token_id)
        if token.logprobs is not None:
            read = self._model.tokenizer.token_text
            top = tuple((token_id, read(token_id), logprob) for token_id, logprob in token.logprobs.top)
            self._choices.append(TokenChoice(token.token_id, read(token.token_id), token.logprobs.logprob, top))
        return self._show(self._reader.add(token.token_id))

    def prefilled(self, event: Prefilled) -> None:
        """Take how far the prompt was read, and how much of it had been before."""
        self._prefilled = event
        self.num_prompt = max(self.num_prompt, event.num_tokens)  # the session went on before it was its turn

    def finish(self, reason: FinishReason) -> list[Delta]:
        """Take the end of the sequence, and why it ended; returns what was held back."""
        # A context ends at a length too, but has no answer that it could be cut off from.
        cut = reason is FinishReason.LENGTH and self.num_tokens > 0
        shown = self._show(self._reader.finish(cut))
        held = Delta(self._stop.finish(), self.num_tokens)
        self._deltas.append(held)
        return [*shown, held] if held.text else shown

    def result(self, reason: FinishReason, session: SessionInfo | None = None) -> Result:
        """All of it; `reason` is why the sequence ended, and `session` the one that it is kept in."""
        prefilled = self._prefilled or Prefilled(0)
        calls, text = self._reader.tool_calls, self._text(TextKind.ANSWER)
        thoughts = self._text(TextKind.REASONING)
        cut = not self.stopped and reason is FinishReason.LENGTH and bool(thoughts) and not text
        if self.stopped:
            reason = FinishReason.STOP
        elif reason is FinishReason.STOP and calls:
            reason = FinishReason.TOOL_CALLS
        return Result(
            text=text,
            finish_reason=reason,
            model=self._model.name,
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_tokens,
            reasoning=thoughts,
            tool_calls=calls,
            logprobs=tuple(self._choices),
            cached_tokens=prefilled.num_cached - prefilled.num_restored,
            restored_tokens=prefilled.num_restored,
            miss=self._miss(),
            session=session,
            notes=(*self._notes, *self._reader.notes, *((ONLY_THOUGHTS,) if cut else ())),
            stop_string=self._stop.found,
        )

    def _miss(self) -> CacheMiss | None:
        read = self._model.tokenizer.decode
        miss = None if self._prefilled is None else self._prefilled.miss
        if miss is None:
            return None
        return CacheMiss(miss.reason, miss.index, read(miss.before), read(miss.after), read(miss.earlier), miss.detail)

    def _show(self, pieces: list[Piece]) -> list[Delta]:
        deltas = []
        for piece in pieces:
            if self.stopped:
                break
            text = self._stop.feed(piece.text) if piece.kind is TextKind.ANSWER else piece.text
            if text:
                deltas.append(Delta(text, self.num_tokens, piece.kind))
        self._deltas += deltas
        return deltas

    def _text(self, kind: TextKind) -> str:
        return "".join(delta.text for delta in self._deltas if delta.kind is kind)
