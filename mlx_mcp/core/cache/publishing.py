"""Puts what rows compute into the trees: whole blocks in the step that fills them, and the rest when a row ends.

tokens of a sequence    0 ........ 64 ....... 128 ...... 192 .. 201
in the trees            [ block   ][ block   ][ block   ][ tail ]      the tail once it ends
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from mlx_mcp.core.cache.blocks import Block, BlockHash
from mlx_mcp.core.cache.prefixes import Match, PrefixCache
from mlx_mcp.core.cache.tracks import Track
from mlx_mcp.core.layout import Layout, Logits, Payload, PromptEnd
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import KvCost
from mlx_mcp.core.steps import Chunk, Cut

CHECKPOINT_TOKENS = 1024  # a model's states are copied so often while a prompt is computed, and where prompts differ


@dataclass(eq=False)
class Publication:
    """How much of a running sequence is in the trees."""

    track: Track
    origin: Block | None  # the last block that its row was restored from
    block: Block  # the newest of its whole blocks that is in the trees
    planned: int  # tokens that are in the trees, or will be when the steps under way are committed
    num_known: int  # tokens that were in the trees when it began, whether it could continue from them or not
    stopped: bool = False  # whether there was no room for a block of it


class Publishing:
    """What one model's running sequences put into the trees. It is charged to the ledger when it is planned."""

    def __init__(self, cache: PrefixCache, cost: KvCost, layout: Layout, chunk_tokens: int) -> None:
        self.cache, self.cost, self.layout, self.chunk_tokens = cache, cost, layout, chunk_tokens
        self.publications: dict[int, Publication] = {}  # by sequence id
        # Cut of a step under way → the block that it comes after, which must not be evicted until then.
        self.building: dict[Cut, Block] = {}
        # Sequence → the logits after its prompt, which will be kept with the block where the prompt ends.
        self.logits: dict[Sequence, Logits] = {}

    @property
    def booked_bytes(self) -> int:
        """The bytes on the ledger for cuts and logits that are in no block yet."""
        cuts = (self._cost(cut.start, cut.end, cut.state) for cut in self.building)
        return sum(cuts) + sum(logits.nbytes for logits in self.logits.values())

    def start(self, track: Track, match: Match) -> None:
        """Begin to publish what a sequence computes after the prefix that it begins with."""
        whole = match.num_tokens // self.cache.block_tokens
        block = match.blocks[whole - 1] if whole else track.root
        origin = match.blocks[-1] if match.blocks else None
        self.publications[track.sequence.sequence_id] = Publication(track, origin, block, block.end, match.num_whole)

    def stop(self, sequence: Sequence) -> None:
        """Stop publishing a sequence that gives up its row."""
        self.publications.pop(sequence.sequence_id, None)

    def exit(self, sequence: Sequence) -> None:
        """Forget a sequence that neither waits nor runs any more."""
        logits = self.logits.pop(sequence, None)
        if logits is not None:
            self.cache.pool.ledger.refund(logits.nbytes)

    # Blocks that steps fill

    def plan_cuts(
        self, chunks: Iterable[Chunk], decode: Iterable[tuple[int, int]], users: Counter[BlockHash]
    ) -> tuple[Cut, ...]:
        """Cuts of the blocks that a step fills. Their bytes are on the ledger from now on.

        `decode` are the decoding rows: sequence ids, and how many tokens each has computed after the step. `users`
        counts by block hash the sequences whose prompts begin with it.
        """
        cuts: list[Cut] = []
        for chunk in chunks:
            publication = self.publications[chunk.sequence_id]
            self._plan_row(publication, chunk.end, self._checkpoint(publication, chunk.end, users), cuts)
        for sequence_id, end in decode:
            self._plan_row(self.publications[sequence_id], end, state=False, cuts=cuts)
        return tuple(cuts)

    def commit(self, cuts: tuple[Cut, ...], payloads: dict[Cut, Payload]) -> None:
        """Put the payloads of a step's cuts into the trees; refund the others. Call it when its tokens were taken."""
        for cut in cuts:
            self.cache.pool.release(self.building.pop(cut))
            payload, charged = payloads.get(cut), self._cost(cut.start, cut.end, cut.state)
            publication = self.publications.get(cut.sequence_id)
            if payload is None or publication is None or not self._fits(publication, cut):
                self.cache.pool.ledger.refund(charged)
                if publication is not None:
                    publication.stopped = True
                continue
            sequence = publication.track.sequence
            tokens = sequence.tokens(cut.start, cut.end)
            publication.block = self.cache.put(publication.block, tokens, payload, charged, sequence.ephemeral)
            publication.stopped = publication.block.end != cut.end

    def _fits(self, publication: Publication, cut: Cut) -> bool:
        """Whether a cut comes right after the newest block of a sequence, and the sequence still has all its tokens."""
        block = publication.block
        follows = block.resident and block.end == cut.start
        return not publication.stopped and follows and cut.end <= publication.track.sequence.num_tokens

    def _plan_row(self, publication: Publication, end: int, state: bool, cuts: list[Cut]) -> None:
        """Add to `cuts` the blocks that a sequence has filled at token `end`; `state` has its states copied there."""
        size, sequence, pool = self.cache.block_tokens, publication.track.sequence, self.cache.pool
        while not publication.stopped and publication.planned + size <= end:
            start, until, block = publication.planned, publication.planned + size, publication.block
            cut = Cut(sequence.sequence_id, start, until, state and until == end)
            if not block.resident:
                publication.stopped = True
                return
            if block.end == start and until <= sequence.num_tokens:
                there = self._child(block, cut, sequence.tokens(start, until))
                if there is not None:
                    publication.block, publication.planned = there, until
                    continue
            pool.acquire(block)
            if not pool.ledger.charge(self._cost(start, until, cut.state)):
                pool.release(block)
                publication.stopped = True
                return
            self.building[cut] = block
            publication.planned = until
            cuts.append(cut)

    def _child(self, parent: Block, cut: Cut, tokens: tuple[int, ...]) -> Block | None:
        """The block of a cut's tokens after `parent`, if it is there with all that the cut would have."""
        there = self.cache.child(parent, self.cache.hash(parent.hash, tokens), tokens)
        return None if there is None or self._poorer(there, cut) else there

    def _poorer(self, block: Block, cut: Cut) -> bool:
        """Whether a block lacks what a cut would have."""
        assert block.payload is not None, "an evicted block in a tree"
        windows = bool(self.layout.windows) and block.payload.window_start > max(
            block.start, block.end - min(self.layout.windows)
        )
        return windows or (cut.state and not block.payload.has_state)

    def _checkpoint(self, publication: Publication, end: int, users: Counter[BlockHash]) -> bool:
        """Whether to copy states at a chunk's end: every CHECKPOINT_TOKENS, at the last one, where prompts differ."""
        if not self.layout.states or end % self.chunk_tokens:
            return False
        track, size = publication.track, self.cache.block_tokens
        num_prompt = len(track.sequence.prompt_ids)
        at, following = end // size, (end + self.chunk_tokens) // size
        if end % CHECKPOINT_TOKENS == 0 or following * size >= num_prompt:
            return end < num_prompt
        counts = [users[digest] for digest in track.hashes[at - 1 : following]]
        return counts[-1] < counts[0] or end <= publication.num_known < following * size

    # Ends

    def remember(self, sequence: Sequence, logits: Logits) -> None:
        """Keep the logits after a sequence's prompt, if there is room, for a call with the same prompt."""
        if sequence not in self.logits and self.cache.pool.ledger.charge(logits.nbytes):
            self.logits[sequence] = logits

    def finish(self, track: Track, cut: Callable[[int, int, bool], Payload], exact: bool) -> Block | None:
        """Cache the rest of a sequence that is about to give up its row, if there is room; returns its last block.

        `cut` copies tokens [start, end) out of the row, with or without its states. `exact` says whether the row ends
        where the sequence does, so that its states can be copied.
        """
        sequence, size, states = track.sequence, self.cache.block_tokens, self.layout.states
        end = sequence.num_computed
        tokens = sequence.tokens(0, end)
        block = self.cache.walk(track.root, tokens, self.cache.hashes(track.root, tokens, track.hashes))[-1]
        if states and not exact:
            return None  # no row could continue from its end
        while block.end < end or (states and not has_state(block)):
            start = block.end if block.end < end else block.start
            until = min(start + size, end)
            state = states and until == end
            parent = block if start == block.end else block.parent
            assert parent is not None, "a root has no states"
            there = self._child(parent, Cut(sequence.sequence_id, start, until, state), tokens[start:until])
            if there is not None:  # computed by another, or what this one began with
                there.private &= sequence.ephemeral
                block = there
                continue
            charged = self._cost(start, until, state)
            if not self._charge(sequence, block, charged):
                break
            try:
                payload = cut(start, until, state)
            except Exception:  # of any kind: the bytes were charged before
                self.cache.pool.ledger.refund(charged)
                raise
            block = self.cache.put(parent, tokens[start:until], payload, charged, sequence.ephemeral)
            if block.end != until:  # a hash that is another block's too
                break
        self.cache.pool.touch(block)
        self._end_prompt(sequence, block)
        return block if block.parent is not None else None

    def _charge(self, sequence: Sequence, block: Block, num_bytes: int) -> bool:
        """Charge bytes without evicting a block; the logits after the sequence's own prompt are dropped for them."""
        pool = self.cache.pool
        pool.acquire(block)
        fits = pool.ledger.charge(num_bytes)
        if not fits and sequence in self.logits:
            pool.ledger.refund(self.logits.pop(sequence).nbytes)
            fits = pool.ledger.charge(num_bytes)
        pool.release(block)
        return fits

    def _end_prompt(self, sequence: Sequence, last: Block) -> None:
        """Move the logits after a sequence's prompt to the block where the prompt ended, if that is there."""
        end = len(sequence.prompt_ids)
        if sequence not in self.logits:
            return
        for block in last.chain():
            if block.start < end <= block.end:
                self.cache.pool.end_prompt(block, PromptEnd(end, self.logits.pop(sequence)))
                return

    def forget_blocks(self, sequence: Sequence) -> None:
        """Drop the blocks of a running sequence whose logits were not numbers, unless something else refers to them.

        The blocks that it began with are dropped too: one of them may be the cause, and others would fail as well.
        """
        publication = self.publications.get(sequence.sequence_id)
        if publication is None:
            return
        for block in (publication.origin, publication.block):
            while block is not None and block.parent is not None and block.resident:
                if block.children or block.ref_count:
                    break
                self.cache.pool.drop(block)
                block = block.parent

    def _cost(self, start: int, end: int, state: bool) -> int:
        return self.cost.cut_bytes(end - start, state)

    def check_integrity(self, running: Collection[Sequence], waiting: Collection[Sequence]) -> None:
        """Prove that exactly the running sequences are published, and that logits belong to sequences that exist."""
        ids = {sequence.sequence_id for sequence in running}
        assert set(self.publications) == ids, "a sequence is published that does not run, or one is not"
        assert set(self.logits) <= {*running, *waiting}, "logits of a sequence that is gone"


def has_state(block: Block) -> bool:
    """Whether a block has the model's states after its last token."""
    return block.payload is not None and block.payload.has_state
