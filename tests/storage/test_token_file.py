"""The file of tokens: what is kept, who may change it, and when a change takes hold."""

import json
import os
import stat
import threading

import pytest

from mlx_mcp.errors import InvalidRequest, StorageError
from mlx_mcp.storage.folder import Calls
from mlx_mcp.storage.token_file import TokenFile, digest_of

NOW = 1_000_000_000_000.0  # long after anything that is added here


def test_a_token_is_found_by_itself_alone_and_is_nowhere_in_the_folder(tmp_path):
    file = TokenFile(tmp_path)
    token = file.add("ann", limits={"sessions": 3})
    other = file.add("bob")
    assert [file.find(each, NOW).name for each in (token, other)] == ["ann", "bob"]
    assert file.of("ann").limits == {"sessions": 3}
    for wrong in ("", token[:-1], token + "x", token.upper(), "ünï", "\ud800", digest_of(token)):
        assert file.find(wrong, NOW) is None
    assert len(token) > 43  # 256 bits
    for path in tmp_path.iterdir():
        assert token.encode() not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_process_sees_each_change_at_its_next_look_and_reads_nothing_meanwhile(tmp_path):
    reads = []

    class Counting(Calls):
        def pread(self, fd, nbytes, offset):
            reads.append(fd)
            return super().pread(fd, nbytes, offset)

    commands, server = TokenFile(tmp_path), TokenFile(tmp_path, Counting())
    assert not server.exists
    assert server.tokens() == ()
    token = commands.add("ann")
    assert server.find(token, NOW) is not None
    num_reads = len(reads)
    for _ in range(100):
        server.find(token, NOW)
    assert len(reads) == num_reads
    commands.revoke("ann")
    assert server.find(token, NOW) is None
    assert server.exists  # so that nobody gets in without one now


def test_a_token_is_valid_until_it_expires(tmp_path):
    file = TokenFile(tmp_path)
    token = file.add("ann", expires_at=50.0)
    assert file.find(token, 49.9) is not None
    assert file.find(token, 50.0) is None


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "x" * 65, "default", ".x", "a/b", "a\n"])
def test_a_name_that_could_be_taken_for_something_else_is_refused(tmp_path, name):
    with pytest.raises(InvalidRequest, match="cannot be a token's name"):
        TokenFile(tmp_path).add(name)


def test_a_name_has_one_token(tmp_path):
    file = TokenFile(tmp_path)
    file.add("ann")
    with pytest.raises(InvalidRequest, match="There is a token named 'ann' already"):
        file.add("ann")
    with pytest.raises(InvalidRequest, match="There is no token named 'bob'"):
        file.revoke("bob")
    file.revoke("ann")
    file.add("ann")


def test_tokens_that_are_added_at_once_are_all_there(tmp_path):
    added = {}

    def add(number):
        added[f"t{number}"] = TokenFile(tmp_path).add(f"t{number}")

    threads = [threading.Thread(target=add, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file = TokenFile(tmp_path)
    assert {name: file.find(token, NOW).name for name, token in added.items()} == {name: name for name in added}


def spoil_mode(path):
    path.chmod(0o644)


def spoil_link(path):
    moved = path.with_name("elsewhere")
    path.rename(moved)
    path.symlink_to(moved)


def spoil_folder(path):
    path.unlink()
    path.mkdir()


SPOILT = {
    "others may read it": (spoil_mode, "so none of them is valid. Make it yours alone"),
    "a link": (spoil_link, "cannot be read or written: Too many levels"),
    "a folder": (spoil_folder, "Check that folder, or set MLX_MCP_STATE_DIR"),
    "no JSON": (lambda path: path.write_text("{"), "the file is damaged. Move it away"),
    "no tokens": (lambda path: path.write_text("[]"), "the file is damaged"),
    "deep": (lambda path: path.write_text("[" * 100_000), "the file is damaged"),
    "half a token": (lambda path: path.write_text('{"tokens": [{"name": "ann"}]}'), "the file is damaged"),
    "a digest that is none": (
        lambda path: path.write_text(
            json.dumps(
                {"tokens": [{"name": "a", "digest": "", "created_at": 0, "expires_at": None, "limits": {}}]},
            )
        ),
        "the file is damaged",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_file_lets_nobody_in_and_says_what_to_do(tmp_path, spoil, words):
    file = TokenFile(tmp_path)
    token = file.add("ann")
    spoil(file.path)
    for _ in range(2):  # also where it was looked at before
        with pytest.raises(StorageError, match=words):
            file.find(token, NOW)
    assert file.exists


def test_a_disk_that_is_full_changes_nothing(tmp_path):
    class Full(Calls):
        def pwrite(self, fd, buffers, offset):
            raise OSError(28, os.strerror(28))

    token = TokenFile(tmp_path).add("ann")
    with pytest.raises(StorageError, match="No space left"):
        TokenFile(tmp_path, Full()).add("bob")
    assert [each.name for each in TokenFile(tmp_path).tokens()] == ["ann"]
    assert TokenFile(tmp_path).find(token, NOW) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.json", "tokens.lock"]
