"""Rows put back from what was cut out of rows, against rows that were never cut.

Each row is computed to its end beside another one while its blocks are cut out of it. Then rows begin with the first n
tokens out of these payloads, and every logit from there on is compared, bit by bit.
"""

from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mcp.core.layout import Layout, Part
from mlx_mcp.core.scheduler import admission
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.core.slots import Ledger, SharedPrefix, SlotPool
from mlx_mcp.core.steps import Chunk, Cut, Decode, Move, Restore, Step
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend import rows as rows_module
from mlx_mcp.mlx_backend import runner as runner_module
from mlx_mcp.mlx_backend.layers import joined
from mlx_mcp.mlx_backend.runner import Runner
from tests.effort import rare_ones_slow
from tests.mlx_backend.test_architectures import CASES, FEWEST, build
from tests.models_made import ARCHITECTURES, make_model

pytestmark = pytest.mark.usefixtures("kernels")
BLOCK, CHUNK = 16, 64
PROMPT, OUTPUT, LATER = 150, 66, 8  # tokens of the prompt, and of the output before and after the last cut
# name → architecture, kv_bits, arrays of a payload, bound on logits of a row restored within its first two chunks, and
# after. A ring that had turned lies otherwise in memory when it was put back, gear's always do in a batch; and
# deepseek_v3 attends to the single token after 149 by another product than to a chunk. All are summed up in another
# order then. The largest differences seen are a tenth of these.
KINDS = {
    "llama": ("llama", None, 1, 0.0, 0.0),
    "llama, 8 bits": ("llama", 8, 2, 0.0, 0.0),
    "llama, 4 bits": ("llama", 4, 2, 0.0, 0.0),
    "gemma3": ("gemma3", None, 2, 0.0, 1e-4),
    "qwen3_next": ("qwen3_next", None, 3, 0.0, 0.0),
    "mamba2": ("mamba2", None, 2, 0.0, 0.0),
    "deepseek_v3, padded": ("deepseek_v3", None, 2, 0.0, 1e-4),
    "gear, padded": ("gear", None, 3, 1e-4, 1e-4),
    "gemma2, row by row": ("gemma2", None, 1, 0.0, 0.0),
}
REFUSED = {
    "llama4": "cannot be cut (ChunkedKVCache)",
    "deepseek_v41": "cannot be cut (LayerCache)",
    "longcat_flash_ngram": "states grow",
    "llama with dynamic rope": "how long the prompt is",
    "internlm3 with dynamic rope": "how long the prompt is",
}


# One of each way of keeping keys and values; the others are slow.
USUAL = ("llama", "llama, 8 bits", "gemma3", "qwen3_next", "deepseek_v3, padded")


@pytest.fixture(scope="module", params=rare_ones_slow(KINDS, USUAL))
def kind(request, tmp_path_factory):
    architecture, kv_bits, num_arrays, *bounds = KINDS[request.param]
    if architecture not in ARCHITECTURES:
        return build(architecture), kv_bits, num_arrays, bounds
    heads = {"head_dim": 32} if kv_bits else {}
    return load(tmp_path_factory.mktemp("model"), architecture, **heads), kv_bits, num_arrays, bounds


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tmp_path_factory.mktemp("model"), "llama")


def load(folder, architecture, **changes):
    return load_model(make_model(folder, architecture, **changes))[0]


@dataclass
class Table:
    """A runner whose steps are laid out by hand; `logits` keeps what every token was drawn from."""

    model: object
    kv_bits: int | None = None
    logits: dict = field(default_factory=dict)  # sequence, number of its output token → array
    sequences: dict = field(default_factory=dict)  # by id

    def __post_init__(self):
        self.runner = Runner(self.model, self.kv_bits, CHUNK)
        self.pool = SlotPool(Ledger(1 << 40), self.runner.cost)

    def sequence(self, sequence_id, prompt_ids, output_ids=(), prefix=None, max_tokens=OUTPUT + LATER):
        s = Sequence(sequence_id, tuple(prompt_ids), SamplingParams(max_tokens), frozenset(), output_ids=[*output_ids])
        s.prefix, s.slot = prefix, self.pool.take(s.max_length)
        self.sequences[sequence_id] = s
        return s

    def launch(self, step):
        """Launch a step; the rows that it takes up first are admitted with it."""
        begin = [*(restore.sequence_id for restore in step.restores), *step.rows]
        new = [i for i in dict.fromkeys(begin) if i not in self.runner.live]
        step = replace(step, admitted=tuple(admission(self.sequences[i]) for i in new))
        drawn, original = [], runner_module.draw

        def draw(logits, rows, *rest):
            drawn.append(logits)
            return original(logits, rows, *rest)

        runner_module.draw = draw
        try:
            flight = self.runner.launch(step)
        finally:
            runner_module.draw = original
        for (rows, _), logits in zip(flight.drawn, drawn, strict=True):
            for row, its_logits in zip(rows, logits, strict=True):
                s, index = self.sequences[row.sequence_id], self.runner.rows.lengths[row.sequence_id]
                self.logits[s, index - len(s.prompt_ids)] = its_logits.astype(mx.float32)
        return flight

    def commit(self, step, flight):
        result = flight.collect()
        for chunk in step.prefill:
            self.sequences[chunk.sequence_id].num_computed = chunk.end
        for sequence_id in step.decoding:
            self.sequences[sequence_id].num_computed += 1
        for sequence_id in step.drawing:
            self.sequences[sequence_id].append(result.tokens[sequence_id])
        return result

    def run(self, *sequences, restores=(), cuts=False, num_chunks=2, until=OUTPUT + LATER):
        """Compute sequences to their ends, each step with up to `num_chunks` chunks; returns the cuts' payloads."""
        payloads = {}
        for restore in restores:
            self.sequences[restore.sequence_id].num_computed = restore.num_tokens
        while going := [s for s in sequences if len(s.output_ids) < until and s.finish_reason is None]:
            chunks = [c for s in going if not s.decoding for c in chunks_of(s)][:num_chunks]
            decoding = [s for s in going if s.decoding]
            planned = [c for chunk in chunks for c in cuts_of(chunk.sequence_id, chunk.start, chunk.end)]
            planned += [c for s in decoding for c in cuts_of(s.sequence_id, s.num_computed, s.num_computed + 1)]
            has_states = self.runner.layout.states  # else the engine asks for none, and several chunks may be one pass
            planned = [replace(cut, state=cut.state and has_states) for cut in planned]
            decode = tuple(Decode(s.sequence_id, s.output_ids[-1]) for s in decoding)
            step = Step(tuple(chunks), decode, restores=tuple(restores), cuts=tuple(planned) if cuts else ())
            payloads |= self.commit(step, self.launch(step)).payloads
            restores = ()
        return payloads

    def release(self, *sequences):
        for s in sequences:
            self.runner.release(s.sequence_id)
            self.pool.give_back(s.slot)


def chunks_of(s):
    starts = [s.num_computed, *range(s.num_computed // CHUNK * CHUNK + CHUNK, s.num_tokens, CHUNK)]
    return [
        Chunk(s.sequence_id, a, b, b == s.num_tokens) for a, b in zip(starts, [*starts[1:], s.num_tokens], strict=True)
    ]


def cuts_of(sequence_id, start, end):
    """The blocks that are filled as the row goes from `start` to `end` tokens, with states at the ends of chunks."""
    ends = range(start // BLOCK * BLOCK + BLOCK, end + 1, BLOCK)
    return [Cut(sequence_id, e - BLOCK, e, e == end and e % (2 * BLOCK) == 0) for e in ends]


def prompt(index, num_tokens):
    return tuple((31 * index + 7 * i + i * i) % 300 for i in range(num_tokens))


@dataclass
class Whole:
    """A row that was computed to its end, and what was cut out of it: its blocks in order, and a tail up to `exact`."""

    sequence: Sequence
    exact: int
    logits: list
    payloads: list
    tail: object
    bytes: list  # what the payloads hold, as it was when they were cut

    def parts(self, n):
        whole, rest = divmod(n, BLOCK)
        payloads = [*self.payloads, self.tail]
        return tuple(Part(payload, BLOCK) for payload in payloads[:whole]) + (
            (Part(payloads[whole], rest),) if rest else ()
        )

    def lengths(self, layout):
        """The numbers of tokens with which a row can begin."""
        wanted = [BLOCK, 30, CHUNK, 100, 2 * CHUNK, 149, PROMPT, 160, 192, 200]
        if layout.states:
            wanted = [n for n in wanted if n % BLOCK == 0 and self.payloads[n // BLOCK - 1].has_state]
        return [*wanted, self.exact]


def contents(payload):
    return [np.array(array.view(mx.uint8)).tobytes() for array in payload.arrays]


def whole(model, kv_bits):
    """Computes the row beside another one, in steps of several chunks, and cuts it."""
    table = Table(model, kv_bits)
    other, s = table.sequence(1, prompt(1, 37)), table.sequence(2, prompt(2, PROMPT))
    table.run(other, until=5)
    cuts = table.run(s, other, cuts=True, until=OUTPUT)
    exact = s.num_computed
    payloads = [payload for cut, payload in sorted(cuts.items(), key=lambda c: c[0].end) if cut.sequence_id == 2]
    assert len(payloads) == exact // BLOCK
    tail = table.runner.cut(2, len(payloads) * BLOCK, exact, True)
    table.run(s)
    logits = [np.array(table.logits[s, i]) for i in range(OUTPUT + LATER)]
    table.release(other, s)
    assert table.runner.num_rows == table.runner.kv_bytes == 0
    return Whole(s, exact, logits, payloads, tail, [contents(p) for p in [*payloads, tail]])


@pytest.fixture(scope="module")
def row(kind):
    model, kv_bits, _, _ = kind
    return whole(model, kv_bits)


def go_on(table, row, n, sequence_id=7, prefix=None):
    """A sequence that begins with the first n tokens of a row, and knows the token that comes after these."""
    outputs = row.sequence.output_ids[: max(0, n + 1 - PROMPT)]
    s = table.sequence(sequence_id, row.sequence.prompt_ids, outputs, prefix)
    return s, Restore(sequence_id, row.parts(n), n)


def assert_goes_on(table, row, s, n, bounds=(0.0, 0.0)):
    first, bound = max(0, n + 1 - PROMPT), bounds[n > 2 * CHUNK]
    for i in range(first, len(s.output_ids)):
        difference = np.abs(np.array(table.logits[s, i]) - row.logits[i]).max()
        assert difference <= bound, f"with {n} tokens, output token {i}: {difference}"
    assert s.output_ids == row.sequence.output_ids[: len(s.output_ids)]


def test_a_restored_row_goes_on_as_if_it_had_never_stopped(kind, row):
    model, kv_bits, _, bounds = kind
    table = Table(model, kv_bits)
    for n in row.lengths(table.runner.layout):
        s, restore = go_on(table, row, n)
        fresh = table.sequence(8, prompt(3, 20))
        # Once until each token of a ring was written over.
        table.run(s, fresh, restores=[restore], until=OUTPUT if n == PROMPT else len(s.output_ids) + LATER)
        assert_goes_on(table, row, s, n, bounds)
        assert table.runner.kv_bytes <= table.pool.ledger.used_bytes
        table.release(s, fresh)
    assert [contents(p) for p in [*row.payloads, row.tail]] == row.bytes, "a payload was written to"
    assert table.runner.num_rows == table.runner.kv_bytes == 0


def test_many_rows_restored_at_once_go_on_in_one_batch(kind, row):
    model, kv_bits, _, bounds = kind
    table = Table(model, kv_bits)
    lengths = [n for n in row.lengths(table.runner.layout) if n >= 2 * CHUNK]
    pairs = [go_on(table, row, n, sequence_id=n) for n in lengths]
    table.run(*(s for s, _ in pairs), restores=[restore for _, restore in pairs], num_chunks=1)
    for (s, _), n in zip(pairs, lengths, strict=True):
        assert_goes_on(table, row, s, n, bounds)


def test_what_is_cut_out_of_a_restored_row_is_what_was_put_in(kind, row):
    model, kv_bits, _, _ = kind
    table = Table(model, kv_bits)
    n = 2 * CHUNK
    s, restore = go_on(table, row, n)
    table.run(s, restores=[restore], until=0)  # no step at all
    table.commit(step := Step(restores=(restore,)), table.launch(step))
    again = table.runner.cut(7, n - BLOCK, n, True)
    assert contents(again) == row.bytes[n // BLOCK - 1]


@pytest.mark.parametrize("name", rare_ones_slow((n for n in CASES if n not in REFUSED), CASES, FEWEST))
def test_rows_of_every_architecture_go_on_where_they_were_cut(name):
    model = build(name)
    table = Table(model)
    assert not table.runner.layout.refused
    first = table.sequence(1, prompt(2, 30))
    cuts = table.run(first, cuts=True, until=7)
    tail = Cut(1, 32, 36, True)
    cuts[tail] = table.runner.cut(1, 32, 36, True)
    for cut, payload in cuts.items():
        assert payload.nbytes == table.runner.cost.cut_bytes(cut.end - cut.start, cut.state)
    table.run(first, until=10)
    second = table.sequence(2, first.prompt_ids, first.output_ids[:7])
    parts = tuple(Part(payload, cut.end - cut.start) for cut, payload in cuts.items())
    table.run(second, restores=[Restore(2, parts, 36)], until=10)
    for i in range(7, 10):
        difference = np.abs(np.array(table.logits[first, i]) - np.array(table.logits[second, i])).max()
        assert difference <= (1e-4 if table.runner.layout.windows else 0.0), f"output token {i}: {difference}"


# Bytes


@pytest.fixture
def exact_memory():
    """Every array in a buffer of its own size, where MLX else takes an old one up to twice as large."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


def test_a_cut_takes_the_bytes_that_were_reserved_for_it(kind, row):
    model, kv_bits, num_arrays, _ = kind
    cost, layout = Runner(model, kv_bits).cost, Runner(model, kv_bits).layout
    assert all(len(p.arrays) <= num_arrays for p in row.payloads)
    assert len(row.tail.arrays) == num_arrays
    for payload in [*row.payloads, row.tail]:
        state = layout.states and payload.has_state
        assert payload.nbytes == sum(map(len, contents(payload))) == cost.cut_bytes(payload.num_tokens, state)


def test_a_payload_keeps_nothing_of_its_row_alive(kind, exact_memory):
    model, kv_bits, _, _ = kind
    Runner(model, kv_bits)
    mx.synchronize()
    before = mx.get_active_memory()
    table = Table(model, kv_bits)
    s, other = table.sequence(1, prompt(2, PROMPT)), table.sequence(2, prompt(1, 70))
    table.run(other, until=3)
    payloads = list(table.run(s, other, cuts=True, until=12).values())
    payloads.append(table.runner.cut(1, 160, 161, True))
    table.release(s, other)
    del table, s, other
    mx.synchronize()
    constants = 64  # of the model's, made as they are needed
    assert 0 <= mx.get_active_memory() - before - sum(p.nbytes for p in payloads) < constants
    del payloads
    assert 0 <= mx.get_active_memory() - before < constants


def test_a_single_plane_is_copied_as_several_are():
    planes = [mx.zeros((1, 2, 3, 4))]
    mx.eval(planes)
    before = mx.get_active_memory()
    array = joined(planes)
    mx.eval(array)
    assert mx.get_active_memory() > before


# Windows


@pytest.mark.parametrize("architecture", ["gemma3", "gear"])
def test_tokens_that_a_window_has_lost_are_left_out_and_told(architecture, tmp_path):
    model = load(tmp_path, architecture) if architecture in ARCHITECTURES else build(architecture)
    table = Table(model)
    (window,) = table.runner.layout.windows
    s = table.sequence(1, prompt(1, 100), max_tokens=40)
    table.run(s, until=31)
    assert s.num_computed == 130
    first = 130 - window
    gone, part, there = (table.runner.cut(1, start, start + 20, False) for start in (0, first - 10, 110))
    assert (gone.window_start, part.window_start, there.window_start) == (20, first, 110)
    cost = table.runner.cost
    assert gone.nbytes == 20 * cost.token_bytes
    assert gone.nbytes < part.nbytes < there.nbytes == cost.cut_bytes(20, False)


def test_of_a_long_run_of_tokens_a_window_keeps_its_own_length(tmp_path):
    table = Table(load(tmp_path, "gemma3"))
    s = table.sequence(1, prompt(1, 2 * CHUNK))
    table.run(s, until=1)  # the ring holds tokens of the last chunk beside its window
    payload = table.runner.cut(1, 0, 2 * CHUNK, False)
    assert payload.window_start == 2 * CHUNK - 64
    assert payload.nbytes == table.runner.cost.cut_bytes(2 * CHUNK, False)


# Steps


def test_chunks_of_one_sequence_in_one_step_are_each_cut_before_the_next(kind):
    model, kv_bits, _, _ = kind

    def cut(num_chunks):
        table = Table(model, kv_bits)
        payloads = table.run(table.sequence(1, prompt(2, PROMPT)), cuts=True, num_chunks=num_chunks, until=1)
        return {(cut.start, cut.end): contents(payload) for cut, payload in payloads.items()}

    one_by_one = cut(1)
    assert len(one_by_one) == PROMPT // BLOCK
    assert cut(3) == one_by_one


def test_a_row_that_runs_ahead_is_cut_as_it_was(llama):
    table = Table(llama)
    s = table.sequence(1, prompt(2, 20))
    table.run(s, until=12)
    assert not table.runner.must_wait(1)
    assert s.num_computed == 31
    step = Step(decode=(Decode(1, s.output_ids[-1]),), cuts=(Cut(1, 16, 32, False),))
    ahead = Step(decode=(Decode(1, None),))
    flight = table.launch(step)
    flight_ahead = table.launch(ahead)
    (payload,) = table.commit(step, flight).payloads.values()
    later = table.runner.cut(1, 16, 32, False)
    table.commit(ahead, flight_ahead)
    calm = Table(llama)
    (expected, *_) = [
        p for c, p in calm.run(calm.sequence(1, prompt(2, 20)), cuts=True, until=14).items() if c.end == 32
    ]
    assert contents(payload) == contents(later) == contents(expected)


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gemma2"])
def test_a_row_that_the_step_ahead_leaves_out_can_still_be_cut(architecture, llama):
    table = Table(llama if architecture == "llama" else build(architecture))
    ending, going = table.sequence(1, prompt(1, 20)), table.sequence(2, prompt(2, 33))
    table.run(ending, going, until=2)
    expected = contents(table.runner.cut(1, 0, 20, False))
    step = Step(decode=tuple(Decode(s.sequence_id, s.output_ids[-1]) for s in (ending, going)))
    ahead = Step(decode=(Decode(2, None),))
    flight, flight_ahead = table.launch(step), table.launch(ahead)
    table.commit(step, flight)
    assert contents(table.runner.cut(1, 0, 20, False)) == expected
    table.release(ending)
    table.commit(ahead, flight_ahead)
    assert going.output_ids == table_alone(table.model, going, len(going.output_ids))


def table_alone(model, s, until):
    """The output of a sequence by itself."""
    table = Table(model)
    again = table.sequence(1, s.prompt_ids)
    table.run(again, until=until)
    return again.output_ids


def test_rows_that_windows_or_states_keep_from_going_back_do_not_run_ahead(kind):
    model, kv_bits, _, _ = kind
    table = Table(model, kv_bits)
    layout = table.runner.layout
    table.run(table.sequence(1, (1,)), until=1)
    assert table.runner.must_wait(1) == bool(layout.windows or layout.states)


def test_nothing_is_kept_of_a_row_that_failed(tmp_path):
    model = load(tmp_path, "llama")
    model.model.embed_tokens.weight[299] = mx.nan
    table = Table(model)
    table.sequence(1, (*prompt(1, 20), 299))
    table.sequence(2, prompt(1, 20))
    cuts = (Cut(1, 0, 16, False), Cut(2, 0, 16, False))
    result = table.launch(Step((Chunk(1, 0, 21, True), Chunk(2, 0, 20, True)), cuts=cuts)).collect()
    assert list(result.failed) == [1]
    assert list(result.payloads) == [cuts[1]]


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gemma2"])
def test_long_restores_are_laid_out_piece_by_piece(architecture, llama, monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: False)  # as on a GPU
    monkeypatch.setattr(rows_module, "SPAN_TOKENS", 37)
    model = llama if architecture == "llama" else build(architecture)
    row, table = whole(model, None), Table(model)
    s, restore = go_on(table, row, 200)
    table.run(s, restores=[restore])
    assert_goes_on(table, row, s, 200)


def test_a_row_of_half_precision_is_put_back_bit_by_bit(tmp_path):
    model = load(tmp_path, "llama")
    model.set_dtype(mx.bfloat16)
    row, table = whole(model, None), Table(model)
    s, restore = go_on(table, row, 200)
    table.run(s, restores=[restore])
    assert_goes_on(table, row, s, 200)


def test_a_row_put_where_another_was_has_nothing_of_it_and_changes_nothing_that_was_cut_out_of_it(llama):
    row, table = whole(llama, None), Table(llama)
    old, other = table.sequence(1, prompt(1, 100)), table.sequence(2, prompt(2, 100))
    table.run(old, other, until=3)
    before = contents(table.runner.cut(1, 0, 96, False))
    payload = table.runner.cut(1, 0, 96, False)  # not waited for
    slot = old.slot
    table.release(old)
    s = table.sequence(7, row.sequence.prompt_ids[:100])
    assert (s.slot, s.slot.slab) == (slot, other.slot.slab)
    table.launch(Step(restores=(Restore(7, row.parts(33), 33),)))
    assert contents(payload) == before
    for layer in table.runner.rows.layers.values():
        for (plane,) in layer.slabs[slot.slab.slab_id]:
            assert mx.abs(plane[slot.index, :, :33]).sum() > 0
            assert mx.abs(plane[slot.index, :, 33:]).max() == 0


# Shared prefixes


def test_rows_that_share_a_prefix_hold_it_once_and_go_on_as_if_they_did_not(kind, row, monkeypatch):
    model, kv_bits, _, bounds = kind
    table = Table(model, kv_bits)
    if not table.runner.layout.sharing:
        return
    monkeypatch.setattr(rows_module, "SPAN_TOKENS", 50)
    prefix, cost = SharedPrefix(3, 2 * CHUNK), table.runner.cost
    lengths = [n for n in row.lengths(table.runner.layout) if n >= 2 * CHUNK]
    pairs = [go_on(table, row, n, sequence_id=n, prefix=prefix) for n in lengths]
    rows = [s for s, _ in pairs]
    before = prefix.num_tokens * cost.token_bytes
    table.run(*rows, restores=[restore for _, restore in pairs])
    for (s, _), n in zip(pairs, lengths, strict=True):
        # Quantized tokens are then summed up in two parts.
        assert_goes_on(table, row, s, n, (1e-4, 1e-4) if kv_bits else bounds)
    assert table.runner.kv_bytes <= table.pool.ledger.used_bytes + before
    held = [len(layer.prefixes) for layer in table.runner.rows.layers.values()]
    assert set(held) == {1}
    across = table.runner.cut(rows[-1].sequence_id, 100, 170, False)
    for k, array in enumerate(across.full):
        expected = np.concatenate([part.payload.full[k] for part in row.parts(208)], axis=2)[:, :, 100:170]
        assert (np.array(array) == expected).all()
    table.release(*rows[1:])
    assert table.runner.kv_bytes >= before
    table.release(rows[0])
    assert table.runner.kv_bytes == 0


@pytest.mark.usefixtures("cpu_ways")
def test_a_row_that_shares_a_prefix_moves_with_what_is_its_own(llama):
    row, table = whole(llama, None), Table(llama)
    s, restore = go_on(table, row, 160, prefix=SharedPrefix(3, 2 * CHUNK))
    s.slot = table.pool.take(60)
    table.run(s, restores=[restore], until=20)
    assert s.slot.capacity < s.num_computed
    new = table.pool.take(300)
    step = Step(decode=(Decode(7, s.output_ids[-1]),), moves=(Move(7, s.slot, new),))
    table.commit(step, table.launch(step))
    table.run(s)
    assert_goes_on(table, row, s, 160)


def test_a_row_may_have_nothing_but_what_it_shares(llama):
    row, table = whole(llama, None), Table(llama)
    s, restore = go_on(table, row, 160, prefix=SharedPrefix(3, 160))
    table.run(s, restores=[restore])
    assert_goes_on(table, row, s, 160)


def test_a_reset_drops_prefixes_too(llama):
    row, table = whole(llama, None), Table(llama)
    _, restore = go_on(table, row, 160, prefix=SharedPrefix(3, 2 * CHUNK))
    table.launch(Step(restores=(restore,)))
    table.runner.reset()
    assert table.runner.kv_bytes == 0


# What cannot be reused


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_put_back_exactly_is_refused_with_the_reason(name):
    layout = Runner(build(name)).layout
    assert REFUSED[name] in layout.refused
    assert layout == replace(Layout(), refused=layout.refused)
