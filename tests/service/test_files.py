import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest

from mlx_mcp.errors import InvalidRequest
from mlx_mcp.process.place import project_folder
from mlx_mcp.service.files import FileReader, default_roots

OUTSIDE = "outside the allowed folders"


@pytest.fixture
def root(tmp_path):
    """A root with one file, beside a folder with a secret."""
    root = tmp_path / "project"
    write(root / "src" / "a.py", "print(1)\n")
    write(tmp_path / "outside" / "a.py", "secret")
    return root


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(*paths, roots, max_file_bytes=1000, max_total_bytes=2000):
    return FileReader(tuple(roots), max_file_bytes, max_total_bytes).read(list(map(str, paths)))


def refusal(*paths, roots, **limits):
    with pytest.raises(InvalidRequest) as caught:
        read(*paths, roots=roots, **limits)
    return str(caught.value)


# What is read


def test_files_are_shown_with_their_paths_and_an_empty_line_between(root):
    write(root / "b c.txt", "no newline at its end")
    write(root / "empty", "")
    assert read("src/a.py", "b c.txt", "empty", roots=[root]) == (
        '<file path="src/a.py">\nprint(1)\n</file>\n\n'
        '<file path="b c.txt">\nno newline at its end\n</file>\n\n'
        '<file path="empty">\n</file>'
    )
    assert read(roots=[root]) == ""


@pytest.mark.parametrize("path", ["src/a.py", "./src//a.py", "src/../src/a.py", "src/a.py/", "{root}/src/a.py"])
def test_a_path_is_relative_to_the_root_or_absolute(root, path):
    assert read(path.format(root=root), roots=[root]) == '<file path="src/a.py">\nprint(1)\n</file>'


def test_a_relative_path_is_looked_up_in_one_root_after_the_other(root, tmp_path):
    other = tmp_path / "other"
    write(other / "src" / "a.py", "hidden by the first")
    write(other / "b.txt", "b")
    assert "print(1)" in read("src/a.py", roots=[root, other])
    assert read("b.txt", roots=[root, other]) == '<file path="b.txt">\nb\n</file>'
    assert "hidden" in read(other / "src" / "a.py", roots=[root, other])
    assert read("../other/b.txt", roots=[root, other]) == '<file path="b.txt">\nb\n</file>'


def test_a_file_that_is_given_twice_is_shown_once(root):
    (root / "link").symlink_to("src/a.py")
    assert read("src/a.py", root / "src" / "a.py", "link", roots=[root]).count("<file") == 1


def test_text_is_utf_8_and_a_byte_order_mark_is_dropped(root):
    write(root / "bom", b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe\r\n")
    assert read("bom", roots=[root]) == '<file path="bom">\ngrüße\r\n</file>'


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"ab\xff", "byte 2 is 0xff"), (b"\xef\xbb\xbfab\xc3", "byte 5 is 0xc3"), (b"PK\0\0", "byte 2 is 0x00")],
)
def test_what_is_no_text_is_refused_with_the_place(root, content, fault):
    write(root / "x", content)
    assert f"'x' is no UTF-8 text: {fault}." in refusal("x", roots=[root])


def test_names_cannot_break_out_of_where_they_are_shown(root):
    write(root / 'a"><b\n\x1b.txt', "x")
    assert read('a"><b\n\x1b.txt', roots=[root]) == '<file path="a&quot;><b\\n\\x1b.txt">\nx\n</file>'
    assert "'a\\n\\x1b.txt'" in refusal("a\n\x1b.txt", roots=[root])


# Links and roots


def test_a_link_is_followed_to_what_lies_inside_a_root(root, tmp_path):
    other = tmp_path / "other"
    write(other / "b.txt", "b")
    (root / "link").symlink_to("src/a.py")
    (root / "folder").symlink_to(root / "src")
    (root / "other").symlink_to(other)
    assert read("link", roots=[root]) == read("folder/a.py", roots=[root]) == read("src/a.py", roots=[root])
    assert read("other/b.txt", roots=[root, other]) == '<file path="b.txt">\nb\n</file>'
    assert OUTSIDE in refusal("other/b.txt", roots=[root])


def test_a_root_may_be_a_link_and_one_may_lie_in_another(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    for path in ["src/a.py", tmp_path / "link" / "src" / "a.py", root / "src" / "a.py"]:
        assert "print(1)" in read(path, roots=[tmp_path / "link"])
    assert "print(1)" in read("a.py", roots=[root / "src", root])


def test_a_root_may_be_missing_until_it_is_there(tmp_path):
    reader = FileReader((tmp_path / "later",), 1000, 1000)
    with pytest.raises(InvalidRequest, match=r"There is no file 'a\.txt'"):
        reader.read(["a.txt"])
    write(tmp_path / "later" / "a.txt", "a")
    assert reader.read(["a.txt"]) == '<file path="a.txt">\na\n</file>'


def test_without_roots_the_caller_hears_how_to_allow_some():
    assert "MLX_MCP_FILE_ROOTS" in refusal("/etc/hostname", roots=[])
    assert read(roots=[]) == ""


# What is not read


@pytest.mark.parametrize("name", ["a.py", "missing", "a.py/missing", "missing/a.py", ""])
def test_whether_something_exists_outside_cannot_be_told(root, name):
    (root / "link").symlink_to("../outside")
    (root / "file").symlink_to(f"../outside/{name}")
    outside = root.parent / "outside"
    (outside / "leads back").symlink_to(root)
    for path in [outside / name, f"../outside/{name}", f"src/../../outside/{name}", f"link/{name}", "file"]:
        expected = f"{str(path)!r} is outside the allowed folders ({root}): give a path inside"
        assert refusal(path, roots=[root]).startswith(expected)
    # What a link outside leads to does not decide where the path ends.
    assert OUTSIDE in refusal(outside / "leads back" / ".." / "project" / ".." / "a.py", roots=[root])
    assert OUTSIDE in refusal(f"{root}-more/a.py", roots=[root])


def test_a_link_outside_does_not_decide_where_a_path_ends(root):
    outside = root.parent / "outside"
    (outside / "there").symlink_to(root / "src")
    assert OUTSIDE in refusal(outside / "there" / ".." / "src" / "a.py", roots=[root])


@pytest.mark.parametrize("path", ["missing", "src/missing", "src/a.py/x", "~/a.py", "*.py"])
def test_what_is_not_there_is_said_not_to_be(root, path):
    assert f"There is no file {path!r} in {root}. Give a path relative to such a folder" in refusal(path, roots=[root])


@pytest.mark.parametrize("path", ["", ".", "src", "src/", "{root}"])
def test_folders_are_not_read(root, path):
    assert "is a folder: give the files in it, one by one" in refusal(path.format(root=root), roots=[root])


@pytest.mark.parametrize("path", ["a\0b", "half \ud83d", "a/" * 3000])
def test_what_can_be_no_path_is_refused(root, path):
    assert "cannot be the path of a file: give another" in refusal(path, roots=[root])


def test_an_over_long_name_is_refused(root):
    assert "cannot be read: File name too long. Give another file" in refusal("x" * 300, roots=[root])


@pytest.mark.timeout(10)
def test_pipes_devices_and_sockets_are_not_waited_for(root, monkeypatch):
    os.mkfifo(root / "pipe")
    assert "is no regular file: give one that is" in refusal("pipe", roots=[root])
    assert "is no regular file" in refusal("/dev/zero", roots=[Path("/dev")])
    monkeypatch.chdir(root)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert "cannot be read" in refusal("socket", roots=[root])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_the_system_forbids_is_refused(root):
    (root / "src" / "a.py").chmod(0)
    assert "Permission denied" in refusal("src/a.py", roots=[root])


def test_a_loop_of_links_is_refused(root):
    (root / "loop").symlink_to("loop")
    assert "'loop' cannot be read" in refusal("loop", roots=[root])


# Limits


def test_a_file_may_be_as_long_as_the_limit(root):
    write(root / "x", "é" * 50)
    assert read("x", roots=[root], max_file_bytes=100)
    assert "99 bytes: give the part that matters in the call" in refusal("x", roots=[root], max_file_bytes=99)


def test_a_file_that_grows_while_it_is_read_is_cut_off(root, monkeypatch):
    write(root / "x", "x" * 100)
    empty = os.stat(root)  # stands for the time when it was short
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((0o100644, *empty[1:6], 0, *empty[7:10])))
    assert "99 bytes: give the part that matters in the call" in refusal("x", roots=[root], max_file_bytes=99)


def test_all_files_together_have_a_limit(root):
    for name in "xyz":
        write(root / name, "x" * 50)
    assert read("x", "y", "x", roots=[root], max_total_bytes=100)
    refused = refusal("x", "y", "z", roots=[root], max_total_bytes=149)
    assert "up to 'z' have 150 bytes, and a call may have 149 read. Give fewer" in refused


def test_so_many_files_and_no_more_are_read_at_once(root):
    assert read(*["src/a.py"] * 64, roots=[root])
    assert "65 files are too many for a call: give at most" in refusal(*["src/a.py"] * 65, roots=[root])


# Swapping what was checked for something else


@pytest.mark.parametrize("swapped", ["", "src", "src/a.py"])
def test_a_link_put_in_place_after_the_check_is_not_followed(root, monkeypatch, swapped):
    resolve = os.path.realpath
    outside = root.parent / "outside"

    def resolve_and_swap(path):
        resolved = resolve(path)
        if str(path).endswith("a.py"):
            (root / swapped).rename(root.parent / "away")
            (root / swapped).symlink_to(outside / "a.py" if swapped.endswith("py") else outside)
        return resolved

    if swapped == "":  # else the file is in a folder that the outside has not
        write(outside / "src" / "a.py", "secret")
    monkeypatch.setattr(os.path, "realpath", resolve_and_swap)
    assert "src/a.py" in refusal("src/a.py", roots=[root])


def test_however_a_folder_is_swapped_nothing_outside_is_read(root):
    done = threading.Event()
    folder, away, outside = root / "src", root / "away", root.parent / "outside"

    def swap():
        while not done.is_set():
            folder.rename(away)
            folder.symlink_to(outside)
            folder.unlink()
            away.rename(folder)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for _ in range(1000):
            with contextlib.suppress(InvalidRequest):
                assert "secret" not in read("src/a.py", roots=[root])
    finally:
        done.set()
        swapping.join(10)


# The host's project


def test_the_default_root_is_the_hosts_project_else_the_working_directory(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.delenv("CLAUDE_PROJECT_DIR", raising=False)
    assert default_roots(project_folder()) == (root.resolve(),)
    monkeypatch.setenv("CLAUDE_PROJECT_DIR", str(root / "src"))
    assert default_roots(project_folder()) == (root.resolve() / "src",)


@pytest.mark.parametrize("folder", ["/", "{home}", "{home}/..", "{link}"])
def test_no_folder_that_holds_the_home_is_a_default_root(root, tmp_path, monkeypatch, folder):
    (tmp_path / "link").symlink_to(root)
    folder = folder.format(home=root, link=tmp_path / "link")
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("CLAUDE_PROJECT_DIR", folder)
    assert default_roots(project_folder()) == ()
    monkeypatch.delenv("CLAUDE_PROJECT_DIR")
    monkeypatch.chdir(folder)
    assert default_roots(project_folder()) == ()
    monkeypatch.chdir(root / "src")
    assert default_roots(project_folder()) == (root.resolve() / "src",)


def test_a_working_directory_that_is_gone_is_no_root(tmp_path, monkeypatch):
    monkeypatch.delenv("CLAUDE_PROJECT_DIR", raising=False)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert default_roots(project_folder()) == ()


@pytest.mark.parametrize(
    ("roots", "folder", "words"),
    [
        (None, "{home}", "It was started in {home}, which is or holds your home folder"),
        (None, "/", "It was started in /, which is or holds your home folder"),
        (None, None, "The folder that it was started in is gone"),
        ((), "{home}/src", "reads no files. Give"),
    ],
)
def test_a_window_that_reads_no_files_says_why_and_what_to_set(root, monkeypatch, roots, folder, words):
    monkeypatch.setenv("HOME", str(root))
    folder = folder and folder.format(home=root)
    with pytest.raises(InvalidRequest, match="MLX_MCP_FILE_ROOTS") as refused:
        FileReader.of_window(roots, folder, 1000, 1000, 1000).read(["a.py"])
    assert words.format(home=root) in str(refused.value)


def test_a_window_reads_its_projects_folder_or_what_was_set(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    write(root / "src" / "b.py", "one")
    assert "one" in FileReader.of_window(None, str(root / "src"), 1000, 1000, 1000).read(["b.py"])
    assert "one" in FileReader.of_window((root / "src",), "/", 1000, 1000, 1000).read(["b.py"])
