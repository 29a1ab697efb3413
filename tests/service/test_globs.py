"""Files that a program is given: by patterns, by hundreds, inside the roots and nowhere else."""

import os
from pathlib import Path

import pytest

from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service import files, globs
from mlx_mcp.service.files import FileReader, Texts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project, beside a folder with a secret."""
    for name in (
        "app.log",
        "src/a.py",
        "src/deep/er/b.py",
        "src/deep/c.txt",
        "src/.hidden/d.py",
        "src/.e.py",
        "docs/[1].md",
        "docs/1.md",
        "../outside/secret.py",
    ):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return tmp_path / "project"


def texts(root: Path, *patterns: str, max_bytes: int = 10_000) -> Texts:
    return FileReader((root,), 10, 10, max_texts_bytes=max_bytes).texts(patterns)


def refusal(root: Path, *patterns: str, max_bytes: int = 10_000) -> str:
    with pytest.raises(InvalidRequest) as caught:
        texts(root, *patterns, max_bytes=max_bytes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.log", ["app.log"]),
        ("src/*.py", ["src/a.py"]),
        ("src/**/*.py", ["src/a.py", "src/deep/er/b.py"]),
        ("**/*.py", ["src/a.py", "src/deep/er/b.py"]),
        ("**/deep/**", ["src/deep/c.txt", "src/deep/er/b.py"]),
        ("src/**/**/b.*", ["src/deep/er/b.py"]),
        ("src/.*.py", ["src/.e.py"]),
        ("src/.hidden/*", ["src/.hidden/d.py"]),
        ("s?c/[a-b].py", ["src/a.py"]),
        ("docs/[1].md", ["docs/[1].md"]),
        ("./src/../app.*", ["app.log"]),
    ],
)
def test_a_pattern_finds_files_by_folders_in_order(root: Path, pattern: str, found: list[str]) -> None:
    assert list(texts(root, pattern).files) == found
    assert list(texts(root, str(root / pattern)).files) == found


def test_files_are_there_once_by_their_paths_below_the_root(root: Path) -> None:
    assert texts(root, "src/a.py", "src/*.py", "src/a.py").files == {"src/a.py": "text of src/a.py"}
    assert texts(root) == Texts()


def test_no_wildcard_leads_outside(root: Path, tmp_path: Path) -> None:
    os.symlink(tmp_path / "outside", root / "way")
    os.symlink(tmp_path / "outside" / "secret.py", root / "src" / "link.py")
    os.symlink(root / "app.log", root / "src" / "fine.py")
    assert list(texts(root, "src/*.py").files) == ["src/a.py", "app.log"]
    for pattern in ("way/*", "*/secret.py", "../outside/*.py", f"{tmp_path}/outside/*", "*/../../outside/*.py", "/*"):
        assert "No file matches" in refusal(root, pattern), pattern
        assert "secret" not in refusal(root, pattern) or "secret" in pattern


def test_what_is_no_text_is_left_out_where_a_pattern_found_it_and_refused_by_its_name(root: Path) -> None:
    (root / "src" / "z.py").write_bytes(b"\0")
    os.mkfifo(root / "src" / "y.py")
    made = texts(root, "src/*.py")
    assert list(made.files) == ["src/a.py"]
    assert list(made.left_out) == ["src/y.py", "src/z.py"]
    assert "is no UTF-8 text" in made.left_out["src/z.py"]
    assert "is no UTF-8 text" in refusal(root, "src/z.py")


def test_there_are_limits_of_bytes_files_and_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "have more than 30 characters, which is what one call may have read" in refusal(
        root, "**/*.py", max_bytes=30
    )
    assert "has more than 5 bytes" in refusal(root, "app.log", max_bytes=5)
    assert "larger MLX_MCP_MAX_SANDBOX_FILES_BYTES" in refusal(root, "app.log", max_bytes=5)
    monkeypatch.setattr(files, "MAX_TEXTS", 1)
    assert "These are more than 1 files: give fewer, or narrower patterns" in refusal(root, "**/*.py")
    monkeypatch.setattr(globs, "MAX_SEEN", 3)
    assert "has more than 3 names to look through: begin the pattern with a folder" in refusal(root, "**/*.py")


def test_a_folder_that_cannot_be_read_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.open_below

    def failing(top: Path, names: tuple[str, ...], last: int = files.FILE) -> int:
        if names[-1:] == ("deep",):
            raise PermissionError
        return real(top, names, last)

    monkeypatch.setattr(files, "open_below", failing)
    assert list(texts(root, "**/*.py").files) == ["src/a.py"]


def test_where_there_are_no_roots_the_error_says_so() -> None:
    with pytest.raises(InvalidRequest, match="This server reads no files"):
        FileReader((), 1, 1).texts(["*"])
