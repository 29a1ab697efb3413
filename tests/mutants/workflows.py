"""Faults in workflows: programs over the service. See `mutant.py`."""

from tests.mutants.mutant import fault

MUTANTS = [
    fault(
        "branch cancelled at its deadline, with what it wrote",
        "workflows/deliberate/branches.py",
        "            self.ending.end()\n",
        "            self.task.cancel()\n",
        "deliberate/test_deliberate.py::test_a_branch_cut_by_its_deadline_keeps_its_text_and_goes_on_in_its_session",
    ),
    fault(
        "vote taken for certain as soon as one value leads",
        "workflows/deliberate/judging.py",
        "self.votes > second + num_open",
        "self.votes > second",
        "deliberate/test_deliberate.py::test_a_vote_that_is_not_certain_waits_for_all_and_a_tie_goes_to_the_first",
    ),
    fault(
        "branches that a vote does not need left running",
        "workflows/deliberate/branches.py",
        "            self._end_all(Status.NOT_NEEDED)\n",
        "            pass\n",
        "deliberate/test_deliberate.py::test_a_vote_stops_as_soon_as_no_other_value_can_win",
    ),
    fault(
        "budget of a deliberation without the judge's share",
        "workflows/deliberate/branches.py",
        "left <= self.reserve",
        "left <= 0",
        "deliberate/test_deliberate.py::test_one_budget_ends_all_branches_and_leaves_the_judge_its_share",
    ),
    fault(
        "the same program run again and again",
        "workflows/reason_over/free.py",
        "if reply.key in seen:",
        "if False:",
        "reason_over/test_reason_over.py::test_a_program_that_comes_twice_ends_the_run",
    ),
    fault(
        "value taken that does not obey the schema",
        "workflows/reason_over/free.py",
        "ran.said.submitted and not fault and",
        "ran.said.submitted and",
        "reason_over/test_reason_over.py::test_a_value_that_does_not_obey_the_schema_is_not_taken",
    ),
    fault(
        "sessions of a run left open",
        "workflows/reason_over/free.py",
        "            await close_sessions(self.service, self.caller.tenant, mine)\n",
        "            pass\n",
        "reason_over/test_reason_over.py::test_a_cancelled_run_leaves_no_session_and_no_row",
    ),
    fault(
        "conversation not begun again when it is full",
        "workflows/reason_over/free.py",
        "                await self._fork()\n"
        "                prompt = replies.compacted(self.sandbox.state.variables, len(self.steps)",
        "                prompt = replies.compacted(self.sandbox.state.variables, len(self.steps)",
        "reason_over/test_reason_over.py::test_a_conversation_that_is_full_begins_again_with_the_variables",
    ),
    fault(
        "answer over a part of the input told as one over all of it",
        "workflows/reason_over/reason_over.py",
        "        if unread:\n",
        "        if False:\n",
        "reason_over/test_with_interpreter.py::"
        "test_parts_that_are_too_long_for_a_model_are_halved_and_what_stays_unread_is_told",
    ),
    fault(
        "places of programs all for one owner",
        "workflows/sandbox/places.py",
        " and self._taken[owner] < self.num_of_one",
        "",
        "sandbox/test_places.py::test_one_owner_never_has_all_places",
    ),
    fault(
        "places of programs given to who has most",
        "workflows/sandbox/places.py",
        "chosen = min(could",
        "chosen = max(could",
        "sandbox/test_places.py::test_a_place_that_gets_free_goes_to_the_owner_who_has_fewest",
    ),
    fault(
        "trial that failed for want of room remembered",
        "workflows/reason_over/trial.py",
        "        if isinstance(error, RequestError) and not isinstance(error, BudgetSpent):\n",
        "        if True:\n",
        "reason_over/test_reason_over.py::test_a_trial_that_failed_for_want_of_room_or_time_says_nothing_of_the_model",
    ),
]
