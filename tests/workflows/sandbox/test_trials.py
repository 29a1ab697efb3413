import json
import stat

from mlx_mcp.workflows.sandbox.trials import Trials


def test_what_a_trial_has_shown_is_known_to_the_next_process(tmp_path):
    path = tmp_path / "state" / "writes-programs.json"
    Trials(str(path)).note("coder 7", True)
    Trials(str(path)).note("tiny 1", False)
    after = Trials(str(path))
    assert [after.known(each) for each in ("coder 7", "tiny 1", "coder 8")] == [True, False, None]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_damaged_or_says_something_else_says_nothing(tmp_path):
    path = tmp_path / "writes-programs.json"
    for text in ("{", "[1]", json.dumps({"coder 7": "yes"}), ""):
        path.write_text(text)
        assert Trials(str(path)).known("coder 7") is None
    trials = Trials(str(path))
    trials.note("coder 7", True)
    assert Trials(str(path)).known("coder 7") is True


def test_where_nothing_can_be_written_it_is_known_for_as_long_as_the_process_lives(tmp_path):
    (tmp_path / "file").write_text("")
    trials = Trials(str(tmp_path / "file" / "writes-programs.json"))
    trials.note("coder 7", False)
    assert trials.known("coder 7") is False
