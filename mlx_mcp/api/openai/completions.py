"""POST /v1/completions: prompts without a chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Literal

from starlette.responses import Response

from mlx_mcp.api.openai.collecting import collected
from mlx_mcp.api.openai.completion_shapes import Completion, CompletionRequest, TextChoice, TextLogprobs
from mlx_mcp.api.openai.counts import Thinking, usage_of
from mlx_mcp.api.openai.head import Head, head_of
from mlx_mcp.api.openai.options import sampling_of
from mlx_mcp.api.openai.shape import MARK, Template, answer, event
from mlx_mcp.api.openai.shared_shapes import Usage
from mlx_mcp.api.openai.streaming import chunk_events
from mlx_mcp.api.web.endpoint import Asked
from mlx_mcp.api.web.events import stream
from mlx_mcp.chat.answer import TextKind
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.generate import Options
from mlx_mcp.service.models import note_of
from mlx_mcp.service.several import Piece, stream_completions
from mlx_mcp.service.values import Delta, Result


async def completions(asked: Asked) -> Response:
    """Go on with prompts, whole or as a stream."""
    body: CompletionRequest = asked.body
    prompts, options = prompts_of(body), options_of(body)
    head, note = head_of(asked, "cmpl-"), note_of(asked.service, options.model)
    pieces = stream_completions(asked.service, asked.caller, prompts, body.n, options)
    made = Completions(body, head, len(prompts), note)
    if body.stream:
        return await stream(made.events(pieces))
    return answer(made.whole(*await collected(pieces, made.num)))


def prompts_of(body: CompletionRequest) -> list[str]:
    """The prompts.

    Raises:
        InvalidRequest: there is none, or they are token ids.
    """
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        raise InvalidRequest("`prompt` must be a text or a list of texts; token ids are not taken: send their text.")
    return texts


def options_of(body: CompletionRequest) -> Options:
    """How they are to be gone on with.

    Raises:
        InvalidRequest: they cannot be gone on with so.
    """
    if body.echo:
        raise InvalidRequest(
            "The prompt is not repeated in its answer: leave out `echo`, and put the prompt before it."
        )
    if body.suffix:
        raise InvalidRequest(
            "No text can be put in between here: leave out `suffix`, and put the tokens that a model has for that into "
            "the prompt."
        )
    if body.best_of not in (None, body.n):
        raise InvalidRequest("Answers are not ranked here: leave out `best_of`, and choose among n answers yourself.")
    return Options(model=body.model, sampling=sampling_of(body, body.max_tokens, body.logprobs), shorten=True)


class Completions:
    """The answers, whole or in chunks."""

    def __init__(self, body: CompletionRequest, head: Head, num_prompts: int, note: str) -> None:
        self._head, self._num_prompts, self._note = head, num_prompts, note
        self._wants_usage, self._wants_logprobs = body.stream_options.include_usage, body.logprobs is not None
        self.num = num_prompts * body.n
        self._results: dict[int, Result] = {}
        self._templates: dict[int, Template] = {}

    def whole(self, results: Sequence[Result], thinking: Sequence[Thinking]) -> Completion:
        """The answers when they are whole."""
        choices = [self._last(index, result, result.text) for index, result in enumerate(results)]
        usage = usage_of(results, thinking, self._num_prompts)
        return self._with_note(self._made(choices, results[0].model, usage), results[0])

    def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        return chunk_events(pieces, lambda: (), self._chunks, self._closing)

    def _chunks(self, piece: Piece) -> Iterator[bytes]:
        index, update = piece
        if isinstance(update, Delta) and update.kind is TextKind.ANSWER:
            template = self._templates.get(index)
            if template is None:
                choice = TextChoice(index=index, text=MARK, finish_reason=None, logprobs=None)
                template = self._templates[index] = Template(self._chunk(choice))
            yield template.event(update.text)
        elif isinstance(update, Result):
            self._results[index] = update
            yield event(self._with_note(self._chunk(self._last(index, update, "")), update))

    def _closing(self) -> Iterator[Completion]:
        if self._wants_usage:
            results = [self._results[index] for index in range(self.num)]
            yield self._made([], self._head.model, usage_of(results, [], self._num_prompts))

    def _last(self, index: int, result: Result, text: str) -> TextChoice:
        reason: Literal["stop", "length"] = "length" if result.finish_reason == "length" else "stop"
        logprobs = logprobs_of(result) if self._wants_logprobs else None
        return TextChoice(index=index, text=text, finish_reason=reason, logprobs=logprobs)

    def _chunk(self, choice: TextChoice) -> Completion:
        made = self._made([choice], self._head.model)
        if self._wants_usage:
            made.usage = None  # set, so that it is sent
        return made

    def _made(self, choices: list[TextChoice], model: str, usage: Usage | None = None) -> Completion:
        made = Completion(id=self._head.id, created=self._head.created, model=model, choices=choices)
        if usage is not None:
            made.usage = usage
        return made

    def _with_note(self, made: Completion, result: Result) -> Completion:
        notes = " ".join(dict.fromkeys(filter(None, (self._note, *result.notes))))
        if notes:
            made.note = notes
        return made


def logprobs_of(result: Result) -> TextLogprobs:
    """The log-probabilities of an answer's tokens."""
    offsets, at = [], 0
    for each in result.logprobs:
        offsets.append(at)
        at += len(each.text)
    return TextLogprobs(
        tokens=[each.text for each in result.logprobs],
        token_logprobs=[each.logprob for each in result.logprobs],
        top_logprobs=[{text: logprob for _, text, logprob in each.top} for each in result.logprobs],
        text_offset=offsets,
    )
