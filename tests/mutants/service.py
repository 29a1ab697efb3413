"""Faults in service: what is done for callers. See `mutant.py`."""

from tests.mutants.mutant import fault

MUTANTS = [
    fault(
        "file-root check left out",
        "service/files.py",
        "            if top is None:\n                continue\n",
        '            if top is None:\n                top = Path("/")\n',
        "test_files.py::test_whether_something_exists_outside_cannot_be_told",
    ),
    fault(
        "link in place of a file followed after the check",
        "service/files.py",
        "FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK",
        "FILE = os.O_RDONLY | os.O_NONBLOCK",
        "test_files.py::test_a_link_put_in_place_after_the_check_is_not_followed",
    ),
    fault(
        "link in place of a folder followed after the check",
        "service/files.py",
        "FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW",
        "FOLDER = os.O_RDONLY | os.O_DIRECTORY",
        "test_files.py::test_a_link_put_in_place_after_the_check_is_not_followed",
    ),
    fault(
        "links outside decide where a path ends",
        "service/files.py",
        "Path(os.path.normpath(root / path))",
        "Path(root / path)",
        "test_files.py::test_a_link_outside_does_not_decide_where_a_path_ends",
    ),
    fault(
        "pipe waited for",
        "service/files.py",
        "        if not stat.S_ISREG(info.st_mode):\n",
        "        if False:\n",
        "test_files.py::test_pipes_devices_and_sockets_are_not_waited_for",
    ),
    fault(
        "file longer than the limit read",
        "service/files.py",
        "            if len(data) <= limit:\n",
        "            if len(data) <= limit + 1:\n",
        "test_files.py::test_a_file_that_grows_while_it_is_read_is_cut_off",
    ),
    fault(
        "files together longer than the limit read",
        "service/files.py",
        "            if total > self._max_total_bytes:\n",
        "            if len(data) > self._max_total_bytes:\n",
        "test_files.py::test_all_files_together_have_a_limit",
    ),
]
