"""Faults in hosting: lines, connections and the end of a process. See `mutant.py`."""

from tests.mutants.mutant import fault

MUTANTS = [
    fault(
        "line longer than the limit taken",
        "hosting/stdio.py",
        "    if len(line) > max_bytes:\n",
        "    if False:\n",
        "test_stdio.py::test_a_bad_line_is_answered_and_the_server_goes_on",
    ),
    fault(
        "end of a process that waits for tools and not for the wire",
        "hosting/connections.py",
        "        return self.requests.waiting or self.activity.busy\n",
        "        return self.activity.busy\n",
        "test_connections.py::test_a_process_that_is_stopped_waits_until_answers_that_are_read_late_are_on_the_wire",
    ),
    fault(
        "requests taken up while the process ends",
        "hosting/stdio.py",
        "        return not self.returning\n",
        "        return True\n",
        "test_connections.py::test_what_is_read_after_the_stop_is_left_to_the_next_engine_but_a_cancel_is_heard",
    ),
    fault(
        "id that is none taken for a notification's",
        "hosting/stdio.py",
        "    if isinstance(message, JSONRPCNotification) and envelope(line).bad_request:\n",
        "    if False:\n",
        "test_connections.py::test_a_request_whose_id_is_no_string_and_no_integer_is_answered_with_an_error",
    ),
]
