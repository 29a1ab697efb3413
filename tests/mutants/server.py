"""Faults in server: what callers are served. See `mutant.py`."""

from tests.mutants.mutant import fault

MUTANTS = [
    fault(
        "token check left out",
        "server/http.py",
        "        if not hmac.compare_digest(digest(token), self._digest):\n",
        "        if False:\n",
        "test_http.py::test_with_a_token_only_those_who_have_it_get_in",
    ),
    fault(
        "callers over HTTP taken for one",
        "server/calls.py",
        'return "" if token is None else token.client_id',
        'return ""',
        "test_http.py::test_sessions_and_cached_prompts_are_their_callers_alone",
    ),
    fault(
        "file-root check left out",
        "server/files.py",
        "            if top is None:\n                continue\n",
        '            if top is None:\n                top = Path("/")\n',
        "test_files.py::test_whether_something_exists_outside_cannot_be_told",
    ),
    fault(
        "link in place of a file followed after the check",
        "server/files.py",
        "FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK",
        "FILE = os.O_RDONLY | os.O_NONBLOCK",
        "test_files.py::test_a_link_put_in_place_after_the_check_is_not_followed",
    ),
    fault(
        "link in place of a folder followed after the check",
        "server/files.py",
        "FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW",
        "FOLDER = os.O_RDONLY | os.O_DIRECTORY",
        "test_files.py::test_a_link_put_in_place_after_the_check_is_not_followed",
    ),
    fault(
        "links outside decide where a path ends",
        "server/files.py",
        "Path(os.path.normpath(root / path))",
        "Path(root / path)",
        "test_files.py::test_a_link_outside_does_not_decide_where_a_path_ends",
    ),
    fault(
        "pipe waited for",
        "server/files.py",
        "        if not stat.S_ISREG(info.st_mode):\n",
        "        if False:\n",
        "test_files.py::test_pipes_devices_and_sockets_are_not_waited_for",
    ),
    fault(
        "file longer than the limit read",
        "server/files.py",
        "            if len(data) <= limit:\n",
        "            if len(data) <= limit + 1:\n",
        "test_files.py::test_a_file_that_grows_while_it_is_read_is_cut_off",
    ),
    fault(
        "files together longer than the limit read",
        "server/files.py",
        "            if total > self._max_total_bytes:\n",
        "            if len(data) > self._max_total_bytes:\n",
        "test_files.py::test_all_files_together_have_a_limit",
    ),
    fault(
        "body size check left out",
        "server/messages.py",
        "            if len(body) > self._max_bytes:\n",
        "            if False:\n",
        "test_arrival.py::test_a_long_body_is_refused_as_soon_as_it_is_too_long_and_the_connection_ends",
    ),
    fault(
        "Host check left out",
        "server/gate.py",
        "if len(hosts) != 1 or not self._is_ours(hosts[0].lower()):",
        "if len(hosts) != 1:",
        "test_http.py::test_a_page_that_rebinds_its_name_is_kept_out",
    ),
    fault(
        "Origin check left out",
        "server/gate.py",
        "            if not self._may_call(origin.lower()):\n",
        "            if False:\n",
        "test_http.py::test_a_page_that_rebinds_its_name_is_kept_out",
    ),
    fault(
        "line longer than the limit taken",
        "server/stdio.py",
        "    if len(line) > max_bytes:\n",
        "    if False:\n",
        "test_stdio.py::test_a_bad_line_is_answered_and_the_server_goes_on",
    ),
]
