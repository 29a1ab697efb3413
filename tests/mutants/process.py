"""Faults in process: processes that share an engine. See `mutant.py`."""

from tests.mutants.mutant import fault

MUTANTS = [
    fault(
        "in-flight id lost by the relay",
        "process/link.py",
        "                self.waiting[id_] = Asked(method, line, self._num_sent + 1)\n",
        "                pass\n",
        "test_relay.py::test_a_link_knows_what_its_engine_has_not_answered",
    ),
    fault(
        "answered request answered again by the relay",
        "process/link.py",
        "                self.waiting.pop(seen.id, None)\n",
        "                pass\n",
        "test_relay.py::test_a_link_knows_what_its_engine_has_not_answered",
    ),
    fault(
        "cancelled request answered by the relay",
        "process/link.py",
        "            self.waiting.pop(id_, None)\n",
        "            pass\n",
        "test_relay.py::test_a_link_knows_what_its_engine_has_not_answered",
    ),
    fault(
        "second handshake's answer passed on",
        "process/link.py",
        "                self.greeted.set()\n                return False\n",
        "                self.greeted.set()\n                return True\n",
        "test_relay.py::test_the_handshake_is_replayed_and_its_second_answer_swallowed",
    ),
    fault(
        "id below the top level taken for a line's",
        "process/lines.py",
        "elif depth == 1 and (member",
        "elif depth >= 1 and (member",
        "test_relay.py::test_the_top_level_of_a_line_is_read_and_nothing_below",
    ),
    fault(
        "line passed on in pieces",
        "process/lines.py",
        "            yield bytes(buffer) + chunk[start:end], first, True\n",
        "            yield chunk[start:end], first, True\n",
        "test_relay.py::test_lines_come_whole_however_they_were_cut",
    ),
    fault(
        "another user's engine spoken to",
        "process/place.py",
        "        if uid != os.geteuid():\n",
        "        if False:\n",
        "test_place.py::test_nothing_is_said_to_an_engine_that_the_kernel_takes_for_anothers",
    ),
    fault(
        "what is no socket connected to",
        "process/place.py",
        "    if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.geteuid():\n",
        "    if False:\n",
        "test_place.py::test_nothing_is_sent_to_what_is_no_socket_of_ours",
    ),
    fault(
        "engine's folder open to others",
        "process/place.py",
        "    if stat.S_IMODE(info.st_mode) & 0o077:\n",
        "    if False:\n",
        "test_place.py::test_a_folder_that_others_may_enter_is_no_place_for_an_engine",
    ),
    fault(
        "engine's socket open to others",
        "process/place.py",
        "            os.chmod(self.socket, 0o600)\n",
        "            os.chmod(self.socket, 0o666)\n",
        "test_place.py::test_a_socket_is_its_users_alone_and_takes_a_stale_ones_place",
    ),
    fault(
        "link in the log's place followed",
        "process/daemon.py",
        "os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC",
        "os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC",
        "test_place.py::test_a_link_in_the_logs_place_is_not_followed",
    ),
    fault(
        "two engines in one folder",
        "process/daemon.py",
        "    while not locked(fd):\n",
        "    while False:\n",
        "test_place.py::test_no_engine_lives_beside_another",
    ),
]
