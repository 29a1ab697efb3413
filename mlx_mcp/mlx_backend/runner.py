"""Computes steps: prompts in chunks, their ends together; decoding rows as one batch. Knows no queues and no text.

Engine thread only: MLX streams belong to the thread that made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mcp.core.layout import Layout, Logits, Payload
from mlx_mcp.core.ports import StepResult, StoredBlock
from mlx_mcp.core.sequence import Sequence, TokenLogprobs
from mlx_mcp.core.slots import KvCost
from mlx_mcp.core.steps import Chunk, Cut, Step
from mlx_mcp.mlx_backend.cpu.memory import keep_freed_memory
from mlx_mcp.mlx_backend.device import SPARE_BYTES, on_cpu
from mlx_mcp.mlx_backend.head import Head
from mlx_mcp.mlx_backend.rows import SlottedRows, make_rows
from mlx_mcp.mlx_backend.sampler import Drawn, Row, draw, on_host

async_eval: Any = mx.async_eval  # which has no types
CLEAR_CACHE_STEPS = 512  # attention's temporaries grow with the rows, and MLX keeps a buffer of every size


@dataclass
class Flight:
    """A step that is being computed: for each forward pass the sequences and the tokens drawn for them."""

    drawn: list[tuple[list[Sequence], Drawn]] = field(default_factory=list)
    read: set[int] = field(default_factory=set)  # the sequences whose prompts were read to the end
    failed: dict[int, str] = field(default_factory=dict)
    payloads: dict[Cut, Payload] = field(default_factory=dict)

    def collect(self) -> StepResult:
        """Wait for the tokens; a row whose logits are no numbers has failed, and no other. Of it nothing is kept."""
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        logits: dict[int, Logits] = {}
        failed = dict(self.failed)
        for sequences, drawn in self.drawn:
            for i, (sequence, choice) in enumerate(zip(sequences, drawn.read(), strict=True)):
                if sequence.sequence_id in failed:
                    continue
                if choice.token_id is None:
                    failed[sequence.sequence_id] = (
                        "the model's logits are not numbers, or its constraint allows none of them"
                    )
                    continue
                if sequence.constraint is not None and choice.token_id not in sequence.stop_ids:
                    try:
                        sequence.constraint.accept(choice.token_id)
                    except Exception as error:  # as in _draw: it must not take the other rows with it
                        failed[sequence.sequence_id] = f"its grammar failed, write it with smaller repetitions: {error}"
                        continue
                tokens[sequence.sequence_id] = choice.token_id
                if choice.logprobs is not None:
                    logprobs[sequence.sequence_id] = choice.logprobs
                if sequence.sequence_id in self.read:
                    logits[sequence.sequence_id] = np.array(np.asarray(drawn.logits)[i])  # a copy of this row alone
        payloads = {cut: payload for cut, payload in self.payloads.items() if cut.sequence.sequence_id not in failed}
        self.payloads = {}  # a flight stays until the next one, and they may go before
        return StepResult(tokens, logprobs, failed, payloads, logits)


class Runner:
    """A model and the keys and values of its live rows."""

    def __init__(self, model: Any, kv_bits: int | None = None, chunk_tokens: int = 128) -> None:
        if on_cpu():
            keep_freed_memory(SPARE_BYTES)
        self.model = model
        self.rows = make_rows(model, kv_bits, chunk_tokens)
        self.head = Head(model, cut=isinstance(self.rows, SlottedRows))
        self.latest = Flight()
        self.num_launched = 0

    @property
    def cost(self) -> KvCost:
        """What a row costs."""
        return self.rows.cost

    @property
    def num_rows(self) -> int:
        """Rows that hold keys and values now."""
        return len(self.rows.lengths)

    @property
    def kv_bytes(self) -> int:
        """What the rows' keys and values take now."""
        return self.rows.nbytes

    @property
    def layout(self) -> Layout:
        """How its rows can be cut and put back."""
        return self.rows.codec.layout

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether drawing this row's next token needs its last one on the host, or its windows and states would go."""
        layout = self.layout
        return sequence.constraint is not None or on_host(sequence.params) or bool(layout.windows) or layout.states

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
        for move in step.moves:
            self.rows.move(move)
        for restore in step.restores:
            self.rows.restore(restore)
        repeats: list[Any] = [r for r in step.restores if r.logits is not None]
        if repeats:
            logits = mx.array(np.stack([restore.logits for restore in repeats]))
            self._draw(flight, [restore.sequence for restore in repeats], logits)
        for sequences, caches in self.rows.batches(list(step.decode)):
            logits = self.model(self._inputs(sequences), cache=caches)[:, -1]
            self._draw(flight, sequences, logits)
        self._cut(flight, [cut for cut in step.cuts if cut.sequence in step.decode])
        for chunks in self.rows.passes(step.prefill):
            self._read(flight, chunks)
            for chunk in chunks:
                own = (cut for cut in step.cuts if cut.sequence is chunk.sequence)
                self._cut(flight, [cut for cut in own if chunk.start < cut.end <= chunk.end])
        assert len(flight.payloads) == len(step.cuts), "a cut of tokens that the step does not compute"
        self.latest = flight
        self.num_launched += 1
        if self.num_launched % CLEAR_CACHE_STEPS == 0:
            mx.clear_cache()
        return flight

    def release(self, sequence_id: int) -> None:
        """Free a row's keys and values."""
        if self.rows.release(sequence_id) and not self.rows.lengths:
            self.latest = Flight()
            # Memory that the system has to map anew takes a row longer than to fill it.
            if mx.get_cache_memory() > SPARE_BYTES:
                mx.clear_cache()

    def reset(self) -> None:
        """Drop every row."""
        for sequence_id in list(self.rows.lengths):
            self.release(sequence_id)

    def _read(self, flight: Flight, chunks: list[Chunk]) -> None:
        """Compute a chunk, or several of different rows that are the last of their prompts, in one pass."""
        sequences, sizes = [chunk.sequence for chunk in chunks], [chunk.end - chunk.start for chunk in chunks]
        tokens = (chunk.sequence.tokens(chunk.start, chunk.end) for chunk in chunks)
        padded = [(*ids, *[0] * (max(sizes) - len(ids))) for ids in tokens]
        caches = self.rows.together(chunks)
        flight.read |= {c.sequence.sequence_id for c in chunks if c.last and not c.sequence.output_ids}
        if chunks[0].last:
            self._draw(flight, sequences, self.head.last(mx.array(padded), caches, sizes))
        else:
            # The keys and values alone: nobody reads these logits, so the vocabulary product is never computed.
            self.model(mx.array(padded), cache=caches)
            async_eval(self.rows.arrays(sequences))

    def _cut(self, flight: Flight, cuts: list[Cut]) -> None:
        """Take cuts now, before their rows go on."""
        for cut in cuts:
            flight.payloads[cut] = self.rows.cut(cut.sequence.sequence_id, cut.start, cut.end, cut.state)

    def _inputs(self, sequences: list[Sequence]) -> mx.array:
        """The token each row is fed: [rows, 1]. In a step that is run ahead they are still on the device."""
        positions = [self.rows.lengths[s.sequence_id] - 1 for s in sequences]
        if all(at < s.num_tokens for at, s in zip(positions, sequences, strict=True)):
            return mx.array([s.tokens(at, at + 1) for at, s in zip(positions, sequences, strict=True)])
        order = [s.sequence_id for some, _ in self.latest.drawn for s in some]
        tokens = mx.concatenate([drawn.tokens for _, drawn in self.latest.drawn])
        if order != [s.sequence_id for s in sequences]:
            tokens = tokens[mx.array([order.index(s.sequence_id) for s in sequences])]
        return tokens[:, None]

    def _draw(self, flight: Flight, sequences: list[Sequence], logits: mx.array) -> None:
        """Draw each row's next token from logits [rows, vocab], and have all of it evaluated."""
        waits = [s for s in sequences if s.constraint is not None]
        if waits:
            async_eval(logits)  # masks are made meanwhile
        rows = []
        for sequence in sequences:
            sequence_id = sequence.sequence_id
            mask = None
            if sequence.constraint is not None:
                try:
                    mask = sequence.constraint.mask()
                except Exception as error:  # a grammar that breaks at run time must not take the other rows with it
                    flight.failed[sequence_id] = f"its grammar failed, write it with smaller repetitions: {error}"
            index = self.rows.lengths[sequence_id] - len(sequence.prompt_ids)
            rows.append(Row(sequence.params, index, sequence.prompt_ids, sequence.output_ids, mask))
        drawn = draw(logits, rows)
        flight.drawn.append((sequences, drawn))
        async_eval(drawn.arrays(), self.rows.arrays(sequences))
