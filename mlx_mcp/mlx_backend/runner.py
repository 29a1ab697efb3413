"""Computes steps: prompts in chunks, their ends together; decoding rows as one batch. Knows no queues and no text.

Engine thread only: MLX streams belong to the thread that made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mcp.core.layout import Layout, Logits, Payload
from mlx_mcp.core.ports import StepResult, StoredBlock
from mlx_mcp.core.sequence import Constraint, SamplingParams, TokenLogprobs
from mlx_mcp.core.slots import KvCost
from mlx_mcp.core.steps import Admission, Chunk, Cut, Step
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.cache_tree import leaves
from mlx_mcp.mlx_backend.cpu.memory import keep_freed_memory
from mlx_mcp.mlx_backend.cpu.rope import Angles, share_angles
from mlx_mcp.mlx_backend.decode_cache import DecodeCache
from mlx_mcp.mlx_backend.device import SPARE_BYTES
from mlx_mcp.mlx_backend.head import Head
from mlx_mcp.mlx_backend.make_rows import make_rows
from mlx_mcp.mlx_backend.sampler import Choice, Drawn, Row, draw, on_host
from mlx_mcp.mlx_backend.slotted_rows import SlottedRows

async_eval: Any = mx.async_eval  # which has no types
CLEAR_CACHE_STEPS = 512  # attention's temporaries grow with the rows, and MLX keeps a buffer of every size


@dataclass(frozen=True)
class RowLogits:
    """See core.layout.Logits: one row's, as float32."""

    data: bytes

    @property
    def nbytes(self) -> int:
        """See core.layout.Logits."""
        return len(self.data)


@dataclass(eq=False)
class LiveRow:
    """A row from its admission on, without its keys and values."""

    sequence_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    output_ids: list[int]  # drawn and read; in a step that runs ahead one is missing
    constraint: Constraint | None

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids [start, end) of prompt and output, concatenated."""
        split = len(self.prompt_ids)
        return (*self.prompt_ids[start:end], *self.output_ids[max(0, start - split) : max(0, end - split)])


@dataclass
class Flight:
    """A step that is being computed: for each forward pass the rows and the tokens drawn for them."""

    drawn: list[tuple[list[LiveRow], Drawn]] = field(default_factory=list)
    read: set[int] = field(default_factory=set)  # the sequences whose prompts were read to the end
    failed: dict[int, str] = field(default_factory=dict)
    payloads: dict[Cut, Payload] = field(default_factory=dict)

    def collect(self) -> StepResult:
        """Wait for the tokens. Only a row whose logits are not numbers has failed; its payloads are dropped."""
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        logits: dict[int, Logits] = {}
        failed = dict(self.failed)
        for rows, drawn in self.drawn:
            for i, (row, choice) in enumerate(zip(rows, drawn.read(), strict=True)):
                sequence_id = row.sequence_id
                if sequence_id in failed:
                    continue
                try:
                    choice = held(row, drawn, i) or choice
                except Exception as error:  # as in _draw
                    failed[sequence_id] = f"its grammar failed, write it with smaller repetitions: {error}"
                    continue
                if choice.token_id is None:
                    failed[sequence_id] = "the model's logits are not numbers, or its constraint allows none of them"
                    continue
                if row.constraint is not None and choice.token_id not in row.stop_ids:
                    try:
                        row.constraint.accept(choice.token_id)
                    except Exception as error:  # as in _draw: it must not take the other rows with it
                        failed[sequence_id] = f"its grammar failed, write it with smaller repetitions: {error}"
                        continue
                row.output_ids.append(choice.token_id)
                tokens[sequence_id] = choice.token_id
                if choice.logprobs is not None:
                    logprobs[sequence_id] = choice.logprobs
                if sequence_id in self.read:
                    logits[sequence_id] = RowLogits(drawn.numbers(i).tobytes())
        payloads = {cut: payload for cut, payload in self.payloads.items() if cut.sequence_id not in failed}
        self.payloads = {}  # a flight stays until the next one, and they may go before
        return StepResult(tokens, logprobs, failed, payloads, logits)


def held(row: LiveRow, drawn: Drawn, i: int) -> Choice | None:
    """The choice of row i by its constraint, if that has awoken since the row was drawn for; else None.

    A step that was run ahead drew while the constraint slept. Nothing has run ahead of that step: see must_wait.
    """
    if row.constraint is None or not row.constraint.awake or drawn.rows[i].mask is not None:
        return None
    again = replace(drawn.rows[i], mask=row.constraint.mask())
    return draw(drawn.logits[i : i + 1], [again]).read()[0]


def offsets_of(caches: list[Any]) -> mx.array | None:
    """The rows' offsets, which all decoding caches of FULL layers have from one placement; None if there are none."""
    return next((cache.offset for cache in leaves(caches) if isinstance(cache, DecodeCache)), None)


class Runner:
    """A model and the keys and values of its live rows."""

    def __init__(self, model: Any, kv_bits: int | None = None, chunk_tokens: int = 128) -> None:
        self.angles: Angles | None = None
        if device.on_cpu():
            keep_freed_memory(SPARE_BYTES)
            self.angles = share_angles(model)
        self.model = model
        self.rows = make_rows(model, kv_bits, chunk_tokens)
        self.head = Head(model, cut=isinstance(self.rows, SlottedRows))
        self.live: dict[int, LiveRow] = {}  # by sequence id
        self.constraints: dict[int, Constraint] = {}  # which outlive the rows of sequences that are preempted
        self.latest = Flight()
        self.num_launched = 0

    @property
    def cost(self) -> KvCost:
        """See ModelRunner.cost."""
        return self.rows.cost

    @property
    def num_rows(self) -> int:
        """See ModelRunner.num_rows."""
        return len(self.rows.lengths)

    @property
    def kv_bytes(self) -> int:
        """See ModelRunner.kv_bytes."""
        return self.rows.nbytes

    @property
    def layout(self) -> Layout:
        """See ModelRunner.layout."""
        return self.rows.codec.layout

    def constrain(self, sequence_id: int, constraint: Constraint) -> None:
        """See ModelRunner.constrain."""
        self.constraints[sequence_id] = constraint

    def must_wait(self, sequence_id: int) -> bool:
        """See ModelRunner.must_wait; a row that is gone draws nothing."""
        row, layout = self.live.get(sequence_id), self.layout
        if row is None:
            return False
        awake = row.constraint is not None and row.constraint.awake
        return awake or on_host(row.params) or bool(layout.windows) or layout.states

    def cut(self, sequence_id: int, start: int, end: int, state: bool) -> Payload:
        """Copy tokens [start, end) out of a row between steps."""
        return self.rows.cut(sequence_id, start, end, state)

    def unpack(self, stored: StoredBlock) -> Callable[[], Payload]:
        """See Codec.unpack."""
        return self.rows.codec.unpack(stored)

    def launch(self, step: Step) -> Flight:
        """Start computing a step; returns while the device is still at it.

        Decoding rows go first. A chunk writes into tensors that they read, which costs no copy once they are done.
        """
        flight = Flight()
        for sequence_id in step.released:
            self._free(sequence_id)
        for admission in step.admitted:
            self._admit(admission)
        for move in step.moves:
            self.rows.move(move)
        for restore in step.restores:
            if restore.num_tokens:
                self.rows.restore(restore)
        repeats: list[Any] = [r for r in step.restores if r.logits is not None]
        if repeats:
            logits = np.stack([np.frombuffer(restore.logits.data, np.float32) for restore in repeats])
            self._draw(flight, [restore.sequence_id for restore in repeats], mx.array(logits))
        given = {each.sequence_id: each.token for each in step.decode}
        for sequence_ids, caches in self.rows.batches(list(given)):
            inputs = self._inputs([given[i] for i in sequence_ids], sequence_ids)
            if self.angles is not None and (offsets := offsets_of(caches)) is not None:
                self.angles.begin(offsets)
            logits = self.model(inputs, cache=caches)[:, -1]
            ahead = given[sequence_ids[0]] is None
            self._draw(flight, sequence_ids, logits, inputs[:, 0] if ahead else None)
        self._cut(flight, [cut for cut in step.cuts if cut.sequence_id in given])
        for chunks in self.rows.passes(step.prefill):
            self._read(flight, chunks)
            for chunk in chunks:
                own = (cut for cut in step.cuts if cut.sequence_id == chunk.sequence_id)
                self._cut(flight, [cut for cut in own if chunk.start < cut.end <= chunk.end])
        if self.angles is not None:
            self.angles.begin()  # what is kept of a pass has no use in another
        assert len(flight.payloads) == len(step.cuts), "a cut of tokens that the step does not compute"
        self.latest = flight
        self.num_launched += 1
        if self.num_launched % CLEAR_CACHE_STEPS == 0:
            mx.clear_cache()
        return flight

    def release(self, sequence_id: int) -> None:
        """Free the row of a sequence that has ended."""
        self.constraints.pop(sequence_id, None)
        self._free(sequence_id)

    def reset(self) -> None:
        """Free every row."""
        for sequence_id in list(self.live):
            self._free(sequence_id)

    def _admit(self, admission: Admission) -> None:
        """Add a row that begins."""
        sequence_id = admission.sequence_id
        assert sequence_id not in self.live, f"row {sequence_id} is there already"
        self.live[sequence_id] = LiveRow(
            sequence_id,
            admission.prompt_ids,
            admission.params,
            admission.stop_ids,
            list(admission.output_ids),
            self.constraints.get(sequence_id),
        )
        self.rows.admit(admission)

    def _free(self, sequence_id: int) -> None:
        """Forget a row, its keys and values."""
        self.live.pop(sequence_id, None)
        if self.rows.release(sequence_id) and not self.rows.lengths:
            self.latest = Flight()
            # Memory that the system has to map anew takes a row longer than to fill it.
            if mx.get_cache_memory() > SPARE_BYTES:
                mx.clear_cache()

    def _read(self, flight: Flight, chunks: list[Chunk]) -> None:
        """Compute a chunk, or several of different rows, in one pass: all are the last of their prompts, or none."""
        sequence_ids, sizes = [chunk.sequence_id for chunk in chunks], [chunk.end - chunk.start for chunk in chunks]
        tokens = (self.live[chunk.sequence_id].tokens(chunk.start, chunk.end) for chunk in chunks)
        padded = [(*ids, *[0] * (max(sizes) - len(ids))) for ids in tokens]
        caches = self.rows.together(chunks)
        flight.read |= {c.sequence_id for c in chunks if c.last and not self.live[c.sequence_id].output_ids}
        if chunks[0].last:
            self._draw(flight, sequence_ids, self.head.last(mx.array(padded), caches, sizes))
        else:
            # The keys and values alone: nobody reads these logits, so the vocabulary product is never computed.
            self.model(mx.array(padded), cache=caches)
            async_eval(self.rows.arrays(sequence_ids))

    def _cut(self, flight: Flight, cuts: list[Cut]) -> None:
        """Make cuts now, before more tokens of their rows are computed."""
        for cut in cuts:
            flight.payloads[cut] = self.rows.cut(cut.sequence_id, cut.start, cut.end, cut.state)

    def _inputs(self, tokens: list[int | None], sequence_ids: list[int]) -> mx.array:
        """The token each row is fed: [rows, 1]. Those of a step that is run ahead are still on the device."""
        if None not in tokens:
            return mx.array([[token] for token in tokens])
        assert set(tokens) == {None}, "a step that runs ahead with a part of its rows"
        order = [row.sequence_id for rows, _ in self.latest.drawn for row in rows]
        latest = mx.concatenate([drawn.tokens for _, drawn in self.latest.drawn])
        if order != sequence_ids:
            latest = latest[mx.array([order.index(sequence_id) for sequence_id in sequence_ids])]
        return latest[:, None]

    def _draw(self, flight: Flight, sequence_ids: list[int], logits: mx.array, latest: mx.array | None = None) -> None:
        """Draw each row's next token from logits [rows, vocab], and have all of it evaluated.

        `latest` [rows] are the tokens that were fed to a step that runs ahead, which nobody has read yet.
        """
        live = [self.live[sequence_id] for sequence_id in sequence_ids]
        if any(row.constraint is not None and row.constraint.awake for row in live):
            async_eval(logits)  # masks are made meanwhile
        rows = []
        for row in live:
            mask = None
            if row.constraint is not None and row.constraint.awake:
                try:
                    mask = row.constraint.mask()
                except Exception as error:  # a grammar that breaks at run time must not take the other rows with it
                    flight.failed[row.sequence_id] = f"its grammar failed, write it with smaller repetitions: {error}"
            length = self.rows.lengths.get(row.sequence_id)  # None where nothing was restored: the row ends now
            index = len(row.output_ids) if length is None else length - len(row.prompt_ids)
            rows.append(Row(row.params, index, row.prompt_ids, row.output_ids, mask))
        drawn = draw(logits, rows, latest, [i for i, row in enumerate(live) if row.sequence_id in flight.read])
        flight.drawn.append((live, drawn))
        async_eval(drawn.arrays(), self.rows.arrays(sequence_ids))
