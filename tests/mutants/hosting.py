"""Faults in hosting: lines, connections and the end of a process. See `mutant.py`."""

from tests.mutants.mutant import fault

MUTANTS = [
    fault(
        "line longer than the limit taken",
        "hosting/message_lines.py",
        "    if len(line) > max_bytes:\n",
        "    if False:\n",
        "test_stdio.py::test_a_bad_line_is_answered_and_the_server_goes_on",
    ),
    fault(
        "end of a process that waits for tools and not for the wire",
        "hosting/connection.py",
        "        return self.requests.waiting or self.activity.busy\n",
        "        return self.activity.busy\n",
        "test_connections.py::test_a_process_that_is_stopped_waits_until_answers_that_are_read_late_are_on_the_wire",
    ),
    fault(
        "requests taken up while the process ends",
        "hosting/open_requests.py",
        "        return not self.returning\n",
        "        return True\n",
        "test_connections.py::test_what_is_read_after_the_stop_is_left_to_the_next_engine_but_a_cancel_is_heard",
    ),
    fault(
        "texts of exceptions in the log",
        "hosting/logs.py",
        '        event["error"] = type(error).__name__\n',
        '        event["error"] = repr(error)\n',
        "test_logs.py::test_an_exception_is_told_by_its_kind_and_place_alone",
    ),
    fault(
        "words of other packages in the log",
        "hosting/logs.py",
        "        elif not is_of(its, *PLAIN):\n",
        "        elif False:\n",
        "test_logs.py::test_of_other_packages_only_warnings_are_kept_and_no_words",
    ),
    fault(
        "log of a process left in the old file",
        "hosting/logs.py",
        "                os.dup2(self.stream.fileno(), fd)\n",
        "                pass\n",
        "test_logs.py::test_what_a_process_prints_goes_to_the_new_file_after_that",
    ),
    fault(
        "traces sent without being asked for",
        "hosting/traces.py",
        "    if not config.traces:\n",
        "    if False:\n",
        "test_traces.py::test_no_exporter_is_looked_for_unless_the_settings_say_so",
    ),
    fault(
        "end of a process not told to probes",
        "hosting/connections.py",
        "            self._lifecycle.draining = True\n",
        "            pass\n",
        "test_connections.py::test_whoever_looks_sees_calls_of_all_connections_and_that_the_process_is_about_to_end",
    ),
    fault(
        "id that is none taken for a notification's",
        "hosting/message_lines.py",
        "    if isinstance(message, JSONRPCNotification) and envelope(line).bad_request:\n",
        "    if False:\n",
        "test_connections.py::test_a_request_whose_id_is_no_string_and_no_integer_is_answered_with_an_error",
    ),
]
