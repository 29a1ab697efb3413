"""Faults in install: hosts' files, and what is kept of edits. See `mutant.py`."""

from tests.mutants.mutant import fault

ODD = "test_odd_files.py::test_uninstall_leaves_a_file_byte_for_byte_as_it_was_before_install"
NAMED = "test_odd_files.py::test_two_servers_of_different_names_come_and_go_in_any_order"

MUTANTS = [
    fault(
        "host's file replaced before it is on disk",
        "install/host_file.py",
        "        os.fchmod(fd, mode)\n        os.fsync(fd)\n",
        "        os.fchmod(fd, mode)\n",
        "test_files.py::test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one_and_the_record_before_both",
    ),
    fault(
        "host's file written in place",
        "install/host_file.py",
        "                written(temporary, after, mode, target)\n                os.replace(temporary, target)\n",
        "                target.write_bytes(after)\n",
        "test_files.py::test_a_new_file_is_the_users_alone",
    ),
    fault(
        "symbolic link replaced by a file",
        "install/host_file.py",
        '    """\n    target = Path(os.path.realpath(path))\n    try:\n',
        '    """\n    target = path\n    try:\n',
        "test_files.py::test_a_symbolic_link_stays_one_and_what_it_leads_to_is_changed",
    ),
    fault(
        "read-only file written",
        "install/host_file.py",
        "if not mode & 0o222:",
        "if False:",
        "test_files.py::test_a_read_only_file_is_refused_with_what_to_do",
    ),
    fault(
        "byte order mark lost",
        "install/host_file.py",
        '(BOM if (self.data or b"").startswith(BOM) else b"")',
        'b""',
        ODD,
    ),
    fault(
        "file that changed meanwhile overwritten",
        "install/host_file.py",
        "if read(target).data != before:",
        "if False:",
        "test_files.py::test_a_file_that_changes_while_it_is_edited_is_left_as_it_is_then",
    ),
    fault(
        "edit recorded after the file is changed",
        "install/registration.py",
        "            if change.edit:\n                self.record.add(change.edit)\n            try:\n",
        "            try:\n",
        "test_files.py::test_a_kill_leaves_the_old_or_the_new_file_and_both_can_go_on_from_there",
    ),
    fault(
        "another program's entry replaced",
        "install/registration.py",
        "if current is not None and not own and not force:",
        "if False:",
        "test_files.py::test_an_entry_of_another_program_is_refused_and_by_force_replaced_and_put_back",
    ),
    fault(
        "folders of a killed install forgotten",
        "install/registration.py",
        "made | set(map(str, missing_folders(self.file)))",
        "set(map(str, missing_folders(self.file)))",
        "test_files.py::test_a_kill_leaves_the_old_or_the_new_file_and_both_can_go_on_from_there",
    ),
    fault(
        "folders not handed on",
        "install/record.py",
        "        for folder in reversed(folders):\n",
        "        for folder in ():\n",
        "test_files.py::test_folders_that_several_files_needed_go_with_the_last_of_them",
    ),
    fault(
        "second comma after a trailing one",
        "install/json_text.py",
        '(last.node.end, "") if comma is None else (comma + 1, ",")',
        '(last.node.end, "")',
        "test_drawn_files.py::test_an_entry_changes_nothing_else_in_a_drawn_file_and_is_taken_back_exactly",
    ),
    fault(
        "table's header found in a text",
        "install/toml_text.py",
        "                tomllib.loads(text[:at])\n",
        "",
        "test_odd_files.py::test_without_the_record_the_entry_goes_and_all_else_stays",
    ),
    fault(
        "what was not proved is written",
        "install/yaml_text.py",
        "            if same(load(text), wanted):\n                return text\n",
        "            load(text)\n            return text\n",
        NAMED,
        "test_files.py::test_a_file_that_is_broken_or_cannot_be_edited_is_refused_untouched_and_the_error_says_where",
    ),
    fault(
        "environment of uvx registered as it is",
        "install/server.py",
        "    if EPHEMERAL.search(prefix + os.sep):\n",
        "    if False:\n",
        "test_command_line.py::test_an_environment_of_uvx_is_registered_as_uvx",
    ),
    fault(
        "token written in clear",
        "install/hosts.py",
        "token = server.token or self.variable.format(server.token_variable)",
        'token = server.token or os.environ.get(server.token_variable, "")',
        "test_command_line.py::test_hosts_that_read_variables_get_a_reference_and_the_others_the_token_only_where_asked",
    ),
]
