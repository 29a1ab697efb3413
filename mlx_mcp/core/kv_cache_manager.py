"""The one door to a model's cached keys and values: what a sequence begins with, and what is kept of it.

While a sequence runs, every block that it fills is cut out of its row in the step that fills it, so that others can
begin with it at once; when it ends, what is left becomes a tail. A row is restored by copying: no row holds on to
blocks, and all of them may be evicted while rows run.

    tokens of a sequence    0 ........ 64 ....... 128 ...... 192 .. 201
    in the trees            [ block   ][ block   ][ block   ][ tail ]      the tail once it ends
    shared prefix           [ one copy for all rows]                        if enough sequences begin with it
    in its slot                                     [ the rest      ]

Knows no queues and no arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mlx_mcp.core.block_pool import Block, BlockHash, BlockPool
from mlx_mcp.core.layout import Layout, Logits, Payload, PromptEnd
from mlx_mcp.core.miss import Miss, MissReason, Recent
from mlx_mcp.core.ports import StoredBlock, TierEntry
from mlx_mcp.core.prefix_cache import Match, PrefixCache, block_key, identity_of
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import SharedPrefix, SlotPool
from mlx_mcp.core.steps import Chunk, Cut, Restore

CHECKPOINT_TOKENS = 1024  # a model's states are kept so often while a prompt is computed, and where prompts part


@dataclass(frozen=True)
class Sharing:
    """When rows share one copy of a prefix: if so many sequences begin with so many tokens.

    0 rows is never, None what was measured for the backend.
    """

    min_rows: int | None = None
    min_tokens: int = 512


@dataclass(frozen=True)
class Wanted:
    """Tokens [start, end) of a sequence, which a tier has under a key."""

    key: bytes
    start: int
    end: int
    entry: TierEntry


@dataclass(eq=False)
class Track:
    """What the cache knows of a live sequence."""

    root: Block
    hashes: list[BlockHash] = field(default_factory=list)  # of its whole blocks, as far as they were needed
    num_prompt_blocks: int = 0
    origin: Block | None = None  # the last that it was restored from
    block: Block | None = None  # the newest of its blocks that is in the tree; None while it waits
    planned: int = 0  # tokens that are in the tree, or will be when the steps under way are committed
    publishing: bool = False  # until a block of it found no room
    known: int = 0  # tokens that are in the tree, whether it could go on from them or not
    leader: Sequence | None = None  # who computes its next tokens
    until: int = 0  # how far
    fetching: bool = False  # blocks of it are on their way from a tier
    fetched: tuple[int, int] = (0, 0)  # tokens [from, to) that came from there
    logits: Logits | None = None  # after its prompt, which it has computed; their bytes are on the ledger
    passed_over: bool = False  # a tier has more of it, which is sooner computed than read


class KvCacheManager:
    """What one model's sequences share."""

    def __init__(
        self,
        cache: PrefixCache,
        slots: SlotPool,
        layout: Layout,
        fingerprint: bytes,
        chunk_tokens: int,
        sharing: Sharing | None = None,
    ) -> None:
        assert chunk_tokens % cache.block_tokens == 0, "a chunk must end where a block does"
        self.cache, self.slots, self.layout = cache, slots, layout
        self.fingerprint, self.chunk_tokens, self.sharing = fingerprint, chunk_tokens, sharing or Sharing()
        self.tracks: dict[Sequence, Track] = {}
        # Block hash → how many live sequences' prompts begin with it.
        self.users: Counter[BlockHash] = Counter()
        # Block hash → the running sequence that computes it. Others that need it wait.
        self.builders: dict[BlockHash, Sequence] = {}
        self.prefixes: dict[Block, SharedPrefix] = {}  # by their last block: hashes could collide
        self.recent: dict[Block, Recent] = {}
        # Blocks that must stay until a step has been computed: what rows are restored from, what is built on.
        self.restoring: list[Block] = []
        self.building: dict[Cut, Block] = {}
        self.num_prefixes = 0

    @property
    def pool(self) -> BlockPool:
        """The blocks."""
        return self.cache.pool

    @property
    def references(self) -> list[Block]:
        """The blocks that are referred to here, each as often as it is."""
        return [*self.restoring, *self.building.values()]

    @property
    def booked_bytes(self) -> int:
        """What is on the ledger beside blocks and slots: shared prefixes, cuts and logits on their way to blocks."""
        cost = self.slots.cost
        shared = (
            prefix.num_tokens * cost.token_bytes + prefix.num_rows * cost.window_bytes(prefix.num_tokens)
            for prefix in self.prefixes.values()
        )
        cuts = (cost.cut_bytes(cut.end - cut.start, cut.state) for cut in self.building)
        logits = (track.logits.nbytes for track in self.tracks.values() if track.logits is not None)
        return sum(shared) + sum(cuts) + sum(logits)

    def root(self, tenant: str) -> Block:
        """Where a tenant's prefixes of this model begin."""
        identity = identity_of(self.fingerprint, self.cache.block_tokens, self.chunk_tokens, tenant)
        return self.pool.root(identity, self.cache.hash(BlockHash(identity), ()), block_key(identity, ()))

    # Sequences come and go

    def enter(self, sequence: Sequence) -> None:
        """Count in a sequence that waits."""
        track = self.tracks[sequence] = Track(self.root(sequence.tenant))
        self.cache.hashes(track.root, sequence.prompt_ids, track.hashes)
        track.num_prompt_blocks = len(track.hashes)
        self.users.update(track.hashes)

    def leave(self, sequence: Sequence) -> None:
        """Take back what a running sequence holds; it may be admitted again. Its slot is its own affair."""
        track = self.tracks[sequence]
        for digest in track.hashes[: track.num_prompt_blocks]:
            if self.builders.get(digest) is sequence:
                del self.builders[digest]
        self._unshare(sequence)
        track.block, track.publishing = None, False

    def exit(self, sequence: Sequence) -> None:
        """Count out a sequence that neither waits nor runs any more."""
        track = self.tracks.pop(sequence)
        self._forget(track)
        self.users.subtract(track.hashes[: track.num_prompt_blocks])
        for digest in track.hashes[: track.num_prompt_blocks]:
            if not self.users[digest]:
                del self.users[digest]

    def follows(self, sequence: Sequence) -> bool:
        """Whether the sequence or the tier that this one was seen to wait for is still at it."""
        track, leader = self.tracks[sequence], self.tracks[sequence].leader
        return track.fetching or (leader is not None and leader.slot is not None and leader.num_computed < track.until)

    def held(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute what this one needs next, or a tier to bring it."""
        track = self.tracks[sequence]
        if self.follows(sequence):
            return True
        track.leader = None
        size = self.cache.block_tokens
        prompt = track.hashes[: (len(sequence.prompt_ids) - 1) // size]
        at = len(self.cache.walk(track.root, sequence.prompt_ids, prompt)) - 1
        leader = self.builders.get(prompt[at]) if at < len(prompt) else None
        if leader is None or leader.num_computed >= (at + 1) * size:
            return False
        while at < len(prompt) and self.builders.get(prompt[at]) is leader:
            at += 1
        track.leader, track.until = leader, at * size
        return True

    def admit(self, sequence: Sequence, num_tokens: int) -> Restore | None:
        """Give a sequence a slot with room for `num_tokens`, and what is cached of it; None if there is no memory."""
        track = self.tracks[sequence]
        match = self._match(sequence)
        if not self._place(sequence, match, num_tokens):
            # What is cached of it may be what takes the room.
            match = Match((), 0, 0)
            if not self._place(sequence, match, num_tokens):
                return None
            match = self._match(sequence)
            self._keep(match)
        size, tokens = self.cache.block_tokens, sequence.num_tokens
        whole, track.origin = match.num_tokens // size, match.blocks[-1] if match.blocks else None
        track.block = match.blocks[whole - 1] if whole else track.root
        track.planned, track.publishing, track.known = track.block.end, True, match.num_whole
        sequence.num_computed = match.num_tokens
        if match.blocks:
            self.pool.touch(match.blocks[-1])
            match.blocks[-1].num_hits += 1
        if not sequence.ephemeral:
            for block in match.blocks:
                block.private = False
        for digest in track.hashes[whole : track.num_prompt_blocks]:
            self.builders.setdefault(digest, sequence)
        if not sequence.num_preemptions:
            sequence.num_cached, sequence.miss = match.num_tokens, self._explain(sequence, match)
            start, end = track.fetched
            sequence.num_restored = max(0, min(end, match.num_tokens) - start)
        assert match.num_tokens < tokens or match.logits is not None, "nothing is left to compute"
        return Restore(sequence, match.parts, match.num_tokens, match.logits)

    # What tiers have

    def wanted(self, sequence: Sequence, find: Callable[[bytes], TierEntry | None]) -> list[Wanted]:
        """The blocks of a waiting sequence that a tier has and memory has not, in order, from which rows can go on.

        The whole blocks of its tokens, then the tail that its session ended with.
        """
        track, size, limit = self.tracks[sequence], self.cache.block_tokens, sequence.num_tokens - 1
        tokens = sequence.tokens(0, sequence.num_tokens)
        hashes = self.cache.hashes(track.root, tokens, track.hashes)
        block = self.cache.walk(track.root, tokens, hashes[: limit // size])[-1]
        found: list[Wanted] = []
        key, start = block.key, block.end
        while start < limit and not (found and found[-1].end - found[-1].start < size):
            ends = [end for end in (start + size, sequence.num_kept) if start < end <= min(limit, start + size)]
            keys = ((block_key(key, tokens[start:end]), end) for end in ends)
            there = next(((k, end, entry) for k, end in keys if (entry := find(k)) is not None), None)
            if there is None:
                break
            key, end, entry = there
            found.append(Wanted(key, start, end, entry))
            start = end
        while found and self.layout.states and not found[-1].entry.has_state:
            found.pop()
        # What is in memory may reach further, into a tail.
        return found if found and found[-1].end > self._match(sequence).num_tokens else []

    def pass_over(self, sequence: Sequence) -> None:
        """Note that a sequence computes what a tier has, since that is sooner done."""
        self.tracks[sequence].passed_over = True

    def fetch(self, sequence: Sequence) -> None:
        """Have a waiting sequence wait for blocks from a tier, until they have `arrived`."""
        self.tracks[sequence].fetching = True

    def arrived(self, sequence: Sequence, blocks: list[tuple[StoredBlock, Payload]]) -> None:
        """Put blocks from a tier into the trees as far as there is room, and have the sequence wait no more.

        The sequence may be gone by now; others may want them all the same.
        """
        start = end = blocks[0][0].start if blocks else 0
        root, before = self.root(sequence.tenant), sequence.tokens(0, start)
        block = self.cache.walk(root, before, self.cache.hashes(root, before, []))[-1]
        for stored, payload in blocks:
            same = (stored.start, stored.parent) == (block.end, block.key)
            if not same or stored.tokens != sequence.tokens(end, end + len(stored.tokens)):
                break
            self.pool.acquire(block)
            fits = self.pool.ledger.charge(payload.nbytes)
            self.pool.release(block)
            if not fits:
                break
            block = self._put(block, stored.tokens, payload, payload.nbytes, sequence.ephemeral)
            if block.end != end + len(stored.tokens):
                break
            end = block.end
        track = self.tracks.get(sequence)
        if track is not None:
            track.fetching, track.fetched = False, (start, end)

    # What is kept

    def plan(
        self, chunks: Iterable[Chunk], decode: Iterable[Sequence], computing: Iterable[Sequence] = ()
    ) -> tuple[Cut, ...]:
        """The blocks that a step fills; their bytes are on the ledger from now on.

        Of the decoding sequences those of `computing` are one token further by then than they know.
        """
        cuts: list[Cut] = []
        for chunk in chunks:
            self._plan(chunk.sequence, chunk.end, self._checkpoint(chunk), cuts)
        for sequence in decode:
            self._plan(sequence, sequence.num_computed + 1 + (sequence in computing), False, cuts)
        return tuple(cuts)

    def commit(self, cuts: tuple[Cut, ...], payloads: dict[Cut, Payload]) -> None:
        """Put what a step has cut into the trees; what cannot be is refunded. Call it when tokens are taken."""
        self.launched()
        for cut in cuts:
            self.pool.release(self.building.pop(cut))
            sequence, payload, charged = cut.sequence, payloads.get(cut), self._cost(cut.start, cut.end, cut.state)
            track = self.tracks.get(sequence)
            block = track.block if track is not None and track.publishing else None
            known = block is not None and block.resident and block.end == cut.start and cut.end <= sequence.num_tokens
            if payload is None or not known or track is None or block is None:
                self.pool.ledger.refund(charged)
                if track is not None:
                    track.publishing = False
                continue
            tokens = sequence.tokens(cut.start, cut.end)
            track.block = self._put(block, tokens, payload, charged, sequence.ephemeral)
            track.publishing = track.block.end == cut.end

    def abandon(self, *steps: tuple[Cut, ...]) -> None:
        """Take back what was planned for steps that came to nothing."""
        for cuts in steps:
            self.commit(cuts, {})

    def launched(self) -> None:
        """Let go of what rows were restored from: the step has it."""
        for block in self.restoring:
            self.pool.release(block)
        self.restoring.clear()

    def remember(self, sequence: Sequence, logits: Logits) -> None:
        """Keep the logits after a sequence's prompt, if there is room, for whoever asks the same again once it ends."""
        track = self.tracks[sequence]
        if track.logits is None and self.pool.ledger.charge(logits.nbytes):
            track.logits = logits

    def finish(self, sequence: Sequence, cut: Callable[[int, int, bool], Payload], exact: bool = True) -> Block | None:
        """Keep the rest of a sequence that is about to give up its row; returns its last block, if there is room.

        `cut` copies tokens [start, end) out of the row, with or without its states; `exact` is whether the row ends
        where the sequence does, so that its states can be kept.
        """
        size, end, track = self.cache.block_tokens, sequence.num_computed, self.tracks[sequence]
        tokens = sequence.tokens(0, end)
        hashes = self.cache.hashes(track.root, tokens, track.hashes)
        block = self.cache.walk(track.root, tokens, hashes)[-1]
        states = self.layout.states
        if states and not exact:
            return None  # nothing could go on from its end
        while block.end < end or (states and not self._has_state(block)):
            start = block.end if block.end < end else block.start
            until = min(start + size, end)
            state = states and until == end
            charged = self._cost(start, until, state)
            self.pool.acquire(block)
            fits = self.pool.ledger.charge(charged)
            if not fits and track.logits is not None:
                self._forget(track)
                fits = self.pool.ledger.charge(charged)
            self.pool.release(block)
            if not fits:
                break
            parent = block if start == block.end else block.parent
            assert parent is not None, "a root has no states"
            try:
                payload = cut(start, until, state)
            except Exception:
                self.pool.ledger.refund(charged)
                raise
            block = self._put(parent, tokens[start:until], payload, charged, sequence.ephemeral)
            if block.end != until:  # a hash that is another block's too
                break
        self.pool.touch(block)
        self._end_prompt(sequence, block)
        return block if block.parent is not None else None

    def distrust(self, sequence: Sequence) -> None:
        """Forget the blocks of a sequence whose logits were no numbers, as far as nothing else needs them.

        Those that it began with too: if one of them is to blame, nobody shall fail by it again.
        """
        track = self.tracks[sequence]
        for block in (track.origin, track.block):
            while block is not None and block.parent is not None and block.resident:
                if block.children or block.ref_count:
                    break
                self.pool.drop(block)
                block = block.parent

    def check_integrity(self, running: list[Sequence], waiting: list[Sequence]) -> None:
        """Prove that trees, references, users and shared prefixes agree with the sequences there are."""
        assert set(self.tracks) == {*running, *waiting}, "tracks of sequences that are gone, or none of one that lives"
        users: Counter[BlockHash] = Counter()
        for track in self.tracks.values():
            users.update(track.hashes[: track.num_prompt_blocks])
        assert users == self.users, "users are miscounted"
        assert set(self.builders.values()) <= set(running), "a block is built by nobody"
        rows = Counter(s.prefix for s in running if s.prefix is not None)
        assert {p: p.num_rows for p in self.prefixes.values()} == dict(rows), "rows of shared prefixes are miscounted"
        assert all(s.prefix is None for s in waiting), "a waiting sequence shares a prefix"

    # Within

    def _match(self, sequence: Sequence) -> Match:
        track, tokens = self.tracks[sequence], sequence.tokens(0, sequence.num_tokens)
        return self.cache.match(track.root, tokens, self.cache.hashes(track.root, tokens, track.hashes), self.layout)

    def _forget(self, track: Track) -> None:
        """Let go of the logits after a prompt."""
        if track.logits is not None:
            self.pool.ledger.refund(track.logits.nbytes)
            track.logits = None

    def _end_prompt(self, sequence: Sequence, last: Block) -> None:
        """Leave the logits after a sequence's prompt with the block where it ended, if that is there."""
        track, end = self.tracks[sequence], len(sequence.prompt_ids)
        if track.logits is None:
            return
        for block in last.chain():
            if block.start < end <= block.end:
                self.pool.end_prompt(block, PromptEnd(end, track.logits))
                track.logits = None
                return

    def _keep(self, match: Match) -> None:
        if match.blocks:
            self.pool.acquire(match.blocks[-1])
            self.restoring.append(match.blocks[-1])

    def _place(self, sequence: Sequence, match: Match, num_tokens: int) -> bool:
        """Take a slot while everything matched is kept."""
        self._keep(match)
        self._share(sequence, match)
        sequence.slot = self.slots.take(num_tokens - sequence.num_shared)
        if sequence.slot is None:
            self._unshare(sequence)
            if match.blocks:
                self.pool.release(self.restoring.pop())
        return sequence.slot is not None

    def _share(self, sequence: Sequence, match: Match) -> None:
        """Let a sequence share the longest prefix that enough others begin with, if there is one."""
        min_rows = self.layout.sharing_rows if self.sharing.min_rows is None else self.sharing.min_rows
        if not (min_rows and self.layout.sharing):
            return
        size, hashes, cost = self.cache.block_tokens, self.tracks[sequence].hashes, self.slots.cost
        most = min(match.num_tokens, sequence.num_tokens - 1)  # a row has something for itself
        for n in range(most // size, 0, -1):
            block, tokens = match.blocks[n - 1], n * size
            prefix = self.prefixes.get(block)
            if prefix is None and (self.users[hashes[n - 1]] < min_rows or tokens < self.sharing.min_tokens):
                continue
            copy_bytes = tokens * cost.token_bytes if prefix is None else 0
            if not self.pool.ledger.charge(copy_bytes + cost.window_bytes(tokens)):
                return
            if prefix is None:
                self.num_prefixes += 1
                prefix = self.prefixes[block] = SharedPrefix(self.num_prefixes, tokens)
            prefix.num_rows += 1
            sequence.prefix = prefix
            return

    def _unshare(self, sequence: Sequence) -> None:
        prefix, sequence.prefix = sequence.prefix, None
        if prefix is not None:
            prefix.num_rows -= 1
            self.pool.ledger.refund(self.slots.cost.window_bytes(prefix.num_tokens))
            if not prefix.num_rows:
                self.prefixes = {block: p for block, p in self.prefixes.items() if p is not prefix}
                self.pool.ledger.refund(prefix.num_tokens * self.slots.cost.token_bytes)

    def _cost(self, start: int, end: int, state: bool) -> int:
        return self.slots.cost.cut_bytes(end - start, state)

    def _plan(self, sequence: Sequence, end: int, state: bool, cuts: list[Cut]) -> None:
        track, size = self.tracks[sequence], self.cache.block_tokens
        while track.publishing and track.planned + size <= end:
            start, until = track.planned, track.planned + size
            cut = Cut(sequence, start, until, state and until == end)
            block = track.block
            if block is None or not block.resident:
                track.publishing = False
                return
            if block.end == start and until <= sequence.num_tokens:
                tokens = sequence.tokens(start, until)
                there = self.cache.child(block, self.cache.hash(block.hash, tokens), tokens)
                if there is not None and not self._poorer(there, cut):
                    track.block, track.planned = there, until
                    continue
            self.pool.acquire(block)
            if not self.pool.ledger.charge(self._cost(start, until, cut.state)):
                self.pool.release(block)
                track.publishing = False
                return
            self.building[cut] = block
            track.planned = until
            cuts.append(cut)

    def _put(self, parent: Block, tokens: tuple[int, ...], payload: Payload, charged: int, private: bool) -> Block:
        """The block of a payload after `parent`, or the one that is there; `parent` itself if it cannot be."""
        assert payload.nbytes <= charged, f"a payload of {payload.nbytes} bytes, {charged} charged"
        self.pool.ledger.refund(charged - payload.nbytes)
        there = self.cache.child(parent, self.cache.hash(parent.hash, tokens), tokens)
        if there is None:
            block = self.cache.insert(parent, tokens, payload)
            if block is None:
                self.pool.ledger.refund(payload.nbytes)
                return parent
            block.private = private
            return block
        there.private &= private
        if richer(payload, there):
            self.pool.replace(there, payload)
        else:
            self.pool.ledger.refund(payload.nbytes)
        return there

    def _poorer(self, block: Block, cut: Cut) -> bool:
        """Whether a block lacks what a cut would have."""
        assert block.payload is not None, "an evicted block in a tree"
        windows = bool(self.layout.windows) and block.payload.window_start > max(
            block.start, block.end - min(self.layout.windows)
        )
        return windows or (cut.state and not block.payload.has_state)

    def _has_state(self, block: Block) -> bool:
        return block.payload is not None and block.payload.has_state

    def _checkpoint(self, chunk: Chunk) -> bool:
        """Whether to keep the states at a chunk's end: every so often, at the prompt's last, and where prompts part."""
        if not self.layout.states or chunk.end % self.chunk_tokens:
            return False
        sequence, track, size = chunk.sequence, self.tracks[chunk.sequence], self.cache.block_tokens
        at, following = chunk.end // size, (chunk.end + self.chunk_tokens) // size
        if chunk.end % CHECKPOINT_TOKENS == 0 or following * size >= len(sequence.prompt_ids):
            return chunk.end < len(sequence.prompt_ids)
        users = [self.users[digest] for digest in track.hashes[at - 1 : following]]
        return users[-1] < users[0] or chunk.end <= track.known < following * size

    def _explain(self, sequence: Sequence, match: Match) -> Miss | None:
        """Why a sequence computes tokens that were computed before; None if it does not, as far as is known."""
        track, prompt = self.tracks[sequence], sequence.prompt_ids
        recent = self.recent.setdefault(track.root, Recent())
        got, most = match.num_tokens, len(prompt) - 1
        kept = min(sequence.num_kept, most)
        if not sequence.num_kept and got + self.cache.block_tokens <= most:
            kept = min(recent.known(prompt), most) // self.cache.block_tokens * self.cache.block_tokens
        if sequence.estranged and got < kept:
            return Miss(MissReason.OTHER_MODEL, got)
        if track.passed_over and got < kept:
            return Miss(MissReason.RECOMPUTED, got)
        if got < kept:
            return Miss(MissReason.NO_CHECKPOINT if match.num_whole > got else MissReason.EVICTED, got)
        miss = None
        if not sequence.num_kept and got + self.cache.block_tokens <= most:
            miss = recent.diverged(prompt)
        if not sequence.num_kept:
            recent.remember(prompt)
        return miss


def richer(payload: Payload, block: Block) -> bool:
    """Whether a payload has something that a block of the same tokens has not."""
    old = block.payload
    assert old is not None, "an evicted block in a tree"
    return (payload.has_state and not old.has_state) or (
        payload.window_start < old.window_start and payload.has_state >= old.has_state
    )
