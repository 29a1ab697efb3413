"""The faults that `run.py` plants: where, what, and which tests must notice, which are the same layer's.

`file` is relative to mlx_mcp, tests are relative to the folder of the file's layer. A snippet must be in its file
once: choose it as short as that allows, so that changes around it leave it alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault: `new` in place of `old`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def layer(self) -> str:
        """The package that it is planted in."""
        return self.file.partition("/")[0]

    @property
    def path(self) -> str:
        """Its file, from the root of the tree."""
        return f"mlx_mcp/{self.file}"

    @property
    def test_ids(self) -> list[str]:
        """The tests as pytest knows them."""
        return [f"tests/{self.layer}/{test}" for test in self.tests]


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A mutant."""
    return Mutant(name, file, old, new, tests)


CORE = [
    fault(
        "reference leaked: what a row was restored from",
        "core/kv_cache_manager.py",
        "        for block in self.restoring:\n            self.pool.release(block)\n",
        "",
        "test_kv_cache_manager.py::test_whatever_comes_and_goes_every_reference_and_byte_is_somebodys",
    ),
    fault(
        "reference leaked: what a block is built on",
        "core/kv_cache_manager.py",
        "self.pool.release(self.building.pop(cut))",
        "self.building.pop(cut)",
        "test_kv_cache_manager.py::test_whatever_comes_and_goes_every_reference_and_byte_is_somebodys",
    ),
    fault(
        "reference leaked: a pinned session's",
        "core/session.py",
        "            if pinned:\n                self.pool.release(old)\n",
        "",
        "test_session.py::test_the_blocks_of_a_pinned_session_stay_until_it_ends_or_goes_on",
    ),
    fault(
        "reference freed twice",
        "core/kv_cache_manager.py",
        "            self.pool.release(block)\n        self.restoring.clear()\n",
        "            self.pool.release(block)\n            self.pool.release(block)\n        self.restoring.clear()\n",
        "test_kv_cache_manager.py::test_a_block_that_a_row_is_restored_from_stays_until_the_row_has_it",
    ),
    fault(
        "block released too often unnoticed",
        "core/block_pool.py",
        '            assert each.ref_count > 0, f"a block at {each.start} released too often"\n',
        "",
        "test_block_pool.py::test_a_block_released_too_often_is_a_bug_that_shows",
    ),
    fault(
        "block in use evicted",
        "core/block_pool.py",
        "there = block.payload is not None and not block.children and not block.ref_count",
        "there = block.payload is not None and not block.children",
        "test_block_pool.py::test_nothing_is_evicted_for_what_would_not_fit_even_then",
    ),
    fault(
        "reference not taken for a restore",
        "core/kv_cache_manager.py",
        "            self.pool.acquire(match.blocks[-1])\n            self.restoring",
        "            self.restoring",
        "test_kv_cache_manager.py::test_a_block_that_a_row_is_restored_from_stays_until_the_row_has_it",
    ),
    fault(
        "pinned session evicted",
        "core/session.py",
        "            self.pool.acquire(leaf)\n",
        "            pass\n",
        "test_session.py::test_the_blocks_of_a_pinned_session_stay_until_it_ends_or_goes_on",
    ),
    fault(
        "pins take more than half of all memory",
        "core/session.py",
        "self.pool.ledger.limit_bytes // 2",
        "self.pool.ledger.limit_bytes",
        "test_session.py::test_pins_take_half_of_all_memory_at_most",
    ),
    fault(
        "use of a branch lost with it",
        "core/block_pool.py",
        "        parent.last_used = max(parent.last_used, block.last_used)\n",
        "",
        "test_block_pool.py::test_the_use_of_a_branch_counts_for_its_stem",
    ),
    fault(
        "bytes of a dropped block kept on the ledger",
        "core/block_pool.py",
        "        self.ledger.refund(block.nbytes)\n",
        "",
        "test_block_pool.py::test_a_tail_goes_with_the_last_session_that_goes_on_from_it_and_whole_blocks_stay",
    ),
    fault(
        "bytes of a slab kept on the ledger",
        "core/slots.py",
        "            self.ledger.refund(before - self.used_bytes)\n",
        "",
        "test_slots.py::test_a_freed_slot_is_taken_again_and_a_slab_goes_with_its_last_row",
    ),
    fault(
        "bytes of a shared prefix kept on the ledger",
        "core/kv_cache_manager.py",
        "                self.pool.ledger.refund(prefix.num_tokens * self.slots.cost.token_bytes)\n",
        "",
        "test_kv_cache_manager.py::test_rows_that_share_a_prefix_give_it_back_with_the_last_of_them",
    ),
    fault(
        "bytes of logits kept on the ledger",
        "core/kv_cache_manager.py",
        "            self.pool.ledger.refund(track.logits.nbytes)\n",
        "",
        "test_kv_cache_manager.py::test_logits_that_no_block_takes_are_given_back",
    ),
    fault(
        "a byte more than the limit",
        "core/slots.py",
        "self.used_bytes + num_bytes - self.limit_bytes",
        "self.used_bytes + num_bytes - self.limit_bytes - 1",
        "test_block_pool.py::test_nothing_is_evicted_for_what_would_not_fit_even_then",
    ),
    fault(
        "two rows in one slot",
        "core/slots.py",
        "        self.free[slab_id].remove(index)\n",
        "",
        "test_slots.py::test_rows_of_one_class_share_a_slab_and_others_do_not",
    ),
    fault(
        "tenant left out of the root",
        "core/kv_cache_manager.py",
        "self.fingerprint + cuts.encode() + tenant.encode()",
        "self.fingerprint + cuts.encode()",
        "test_kv_cache_manager.py::test_two_tenants_begin_with_nothing_of_each_other",
    ),
    fault(
        "fingerprint left out of the root",
        "core/kv_cache_manager.py",
        "self.fingerprint + cuts.encode() + tenant.encode()",
        "cuts.encode() + tenant.encode()",
        "test_kv_cache_manager.py::test_what_was_computed_otherwise_is_no_hit",
    ),
    fault(
        "chunks left out of the root",
        "core/kv_cache_manager.py",
        "{self.cache.block_tokens} {self.chunk_tokens}",
        "{self.cache.block_tokens}",
        "test_kv_cache_manager.py::test_what_was_computed_otherwise_is_no_hit",
    ),
    fault(
        "tokens not compared on a hit",
        "core/prefix_cache.py",
        "return child if child is not None and child.tokens == tuple(tokens) else None",
        "return child",
        "test_prefix_cache.py::test_hashes_cut_to_a_byte_give_misses_and_never_another_prefix",
    ),
    fault(
        "tokens from a tier not compared",
        "core/kv_cache_manager.py",
        "if not same or stored.tokens != sequence.tokens(end, end + len(stored.tokens)):",
        "if not same:",
        "test_kv_cache_manager.py::test_blocks_of_other_tokens_or_of_another_place_are_not_taken_from_a_tier",
    ),
    fault(
        "place of blocks from a tier not compared",
        "core/kv_cache_manager.py",
        "if not same or stored.tokens",
        "if stored.tokens",
        "test_kv_cache_manager.py::test_blocks_of_other_tokens_or_of_another_place_are_not_taken_from_a_tier",
    ),
    fault(
        "parent left out of a block's hash",
        "core/prefix_cache.py",
        "BlockHash(blake2b(parent + array",
        "BlockHash(blake2b(array",
        "test_kv_cache_manager.py::test_the_same_block_after_another_prefix_has_another_hash_and_another_key",
    ),
    fault(
        "parent left out of a block's key",
        "core/prefix_cache.py",
        "return blake2b(parent + array",
        "return blake2b(array",
        "test_kv_cache_manager.py::test_the_same_block_after_another_prefix_has_another_hash_and_another_key",
    ),
    fault(
        "reuse one token too long: no token left to compute",
        "core/prefix_cache.py",
        "                end -= 1\n",
        "                pass\n",
        "test_prefix_cache.py::test_at_least_one_token_is_left_to_compute",
    ),
    fault(
        "reuse one token too long: past where prompts part",
        "core/prefix_cache.py",
        "        if a != b:\n            return i\n",
        "        if a != b:\n            return i + 1\n",
        "test_prefix_cache.py::test_a_prefix_is_found_to_the_token",
    ),
    fault(
        "a block used beyond the tokens that match",
        "core/prefix_cache.py",
        "min(b.end, self.num_tokens) - b.start",
        "b.end - b.start",
        "test_prefix_cache.py::test_a_prefix_is_found_to_the_token",
    ),
    fault(
        "states used at another token than their own",
        "core/prefix_cache.py",
        "if layout.states and not (end == last.end and last.payload.has_state):",
        "if layout.states and not last.payload.has_state:",
        "test_prefix_cache.py::test_states_go_on_only_from_where_they_were_kept",
    ),
    fault(
        "window restored with a gap",
        "core/prefix_cache.py",
        "if block.payload.window_start > max(block.start, needed):",
        "if block.payload.window_start > max(block.end, needed):",
        "test_prefix_cache.py::test_windows_go_on_only_where_their_tokens_are_there",
    ),
    fault(
        "states of another moment kept",
        "core/kv_cache_manager.py",
        "        if states and not exact:\n            return None  # nothing could go on from its end\n",
        "",
        "test_kv_cache_manager.py::test_a_row_whose_states_are_of_another_moment_leaves_no_tail",
    ),
    fault(
        "one prefix computed by all who need it",
        "core/kv_cache_manager.py",
        "        if leader is None or leader.num_computed >= (at + 1) * size:\n",
        "        if True:\n",
        "test_kv_cache_manager.py::test_who_needs_a_prefix_that_another_computes_waits_for_it",
    ),
    fault(
        "another tenant's session found",
        "core/session.py",
        "if found is None or found.tenant != tenant:",
        "if found is None:",
        "test_session.py::test_a_session_is_found_by_its_own_tenant_alone",
    ),
    fault(
        "ttl ignored",
        "core/session.py",
        "and now - s.used_at > s.ttl_s]",
        "and now - s.used_at > self.ttl_s]",
        "test_session.py::test_a_session_ends_when_it_was_left_alone_for_longer_than_its_time",
    ),
    fault(
        "session ended in the midst of a turn",
        "core/session.py",
        "if s.turn is None and not s.queue and now",
        "if not s.queue and now",
        "test_session.py::test_a_session_in_the_midst_of_a_turn_does_not_end",
    ),
    fault(
        "name kept by a session that has ended",
        "core/session.py",
        "        self._names.pop((session.tenant, session.options.name), None)\n",
        "",
        "test_session.py::test_a_name_is_free_again_when_its_session_ends",
    ),
    fault(
        "ephemeral session leaves its blocks",
        "core/session.py",
        "whole=session.options.ephemeral and leaf is None",
        "whole=False",
        "test_session.py::test_an_ephemeral_session_takes_with_it_what_nobody_else_goes_on_from",
    ),
    fault(
        "blocks that others go on from dropped",
        "core/block_pool.py",
        "if each.children or each.ref_count or each.num_sessions:",
        "if each.children or each.ref_count:",
        "test_block_pool.py::test_a_session_that_leaves_nothing_behind_spares_what_others_go_on_from",
    ),
    fault(
        "oldest row preempted in place of the youngest",
        "core/scheduler.py",
        "self._preempt(self.running[-1], preempted)",
        "self._preempt(self.running[0], preempted)",
        "test_scheduler.py::test_when_memory_runs_out_the_youngest_gives_way_keeps_its_tokens_and_comes_back",
    ),
    fault(
        "preempted row resumed one token late",
        "core/scheduler.py",
        "        sequence.num_computed = 0\n",
        "        sequence.num_computed = 1\n",
        "test_scheduler.py::test_a_preempted_row_is_computed_again_over_prompt_and_output",
    ),
    fault(
        "restored row resumed one token late",
        "core/kv_cache_manager.py",
        "sequence.num_computed = match.num_tokens\n",
        "sequence.num_computed = match.num_tokens + 1\n",
        "test_kv_cache_manager.py::test_a_preempted_sequence_begins_again_with_what_was_kept_of_it_and_no_token_later",
    ),
    fault(
        "preempted row loses its turn",
        "core/scheduler.py",
        "self.waiting = {sequence.session: queue, **self.waiting}",
        "self.waiting = {**self.waiting, sequence.session: queue}",
        "test_scheduler.py::test_sequences_computed_again_after_a_fault_still_give_way",
        "test_scheduler.py::test_rows_that_give_way_together_come_back_in_their_order",
    ),
    fault(
        "groups take no turns for places",
        "core/scheduler.py",
        "for count in sorted({running[queue[0].group] for queue in self.waiting.values()}):",
        "for count in sorted({running[queue[0].group] for queue in self.waiting.values()}, reverse=True):",
        "test_scheduler.py::test_a_free_place_goes_to_the_group_that_runs_the_least",
    ),
    fault(
        "groups take no turns for prefill",
        "core/scheduler.py",
        "key=lambda s: (self.group_turns[s.group], self.turns[s.session])",
        "key=lambda s: self.turns[s.session]",
        "test_scheduler.py::test_prefill_is_shared_evenly_by_groups_and_within_one_by_sessions",
    ),
    fault(
        "sessions take no turns",
        "core/scheduler.py",
        "            self._to_the_end(session)\n",
        "            if not self.waiting[session]:\n                del self.waiting[session]\n",
        "test_scheduler.py::test_sessions_take_turns_for_places_and_within_one_the_order_holds",
    ),
    fault(
        "chunks end elsewhere than at multiples",
        "core/scheduler.py",
        "(start // size + 1) * size",
        "start + size",
        "test_scheduler.py::test_chunks_end_at_the_same_places_whatever_else_runs",
        "test_kv_cache_manager.py::test_what_is_left_after_a_cached_prefix_is_cut_where_it_would_be_anyway",
    ),
    fault(
        "prefill budget exceeded",
        "core/scheduler.py",
        "if used + end - start > budget:",
        "if used > budget:",
        "test_scheduler.py::test_a_budget_is_never_exceeded",
    ),
    fault(
        "running ahead of a full slot",
        "core/scheduler.py",
        "s.num_tokens - s.num_shared < s.slot.capacity",
        "s.num_tokens - s.num_shared <= s.slot.capacity",
        "test_scheduler.py::test_no_step_goes_ahead_of_other_work",
    ),
    fault(
        "one token more than max_tokens",
        "core/sequence.py",
        "if len(self.output_ids) >= self.params.max_tokens:",
        "if len(self.output_ids) > self.params.max_tokens:",
        "test_scheduler.py::test_max_tokens_ends_a_sequence_with_length",
    ),
    fault(
        "stop token kept in the output",
        "core/sequence.py",
        "            self.finish_reason = FinishReason.STOP\n            return\n",
        "            self.finish_reason = FinishReason.STOP\n",
        "test_scheduler.py::test_a_stop_token_ends_a_sequence_and_is_no_part_of_its_output",
    ),
    fault(
        "stop string cut one late",
        "core/stop_strings.py",
        "return text[: min(found)[1]]",
        "return text[: min(found)[1] + 1]",
        "test_stop_strings.py::test_a_stop_string_that_comes_in_pieces_is_never_shown_in_part",
    ),
    fault(
        "stop string shown in part",
        "core/stop_strings.py",
        "range(min(len(text), len(stop) - 1), 0, -1)",
        "range(min(len(text), len(stop) - 2), 0, -1)",
        "test_stop_strings.py::test_a_stop_string_that_comes_in_pieces_is_never_shown_in_part",
    ),
    fault(
        "a miss explained one token late",
        "core/miss.py",
        "            index = alike(coded, other)\n",
        "            index = alike(coded, other) + 1\n",
        "test_miss.py::test_a_changed_nonce_near_the_beginning_is_found_and_shown",
    ),
]

MUTANTS = CORE
