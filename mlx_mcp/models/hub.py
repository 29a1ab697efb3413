"""Fetches what of a model is not whole in the hub's cache. Imports no mlx.

Files are fetched here and laid out by huggingface_hub: it keeps nothing of a file whose download was cut off, cannot be
cancelled, and waits for a server that sends nothing for as long as that stays connected.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    is_offline_mode,
    snapshot_download,
    utils,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile

from mlx_mcp.core.ports import LoadProgress, Report
from mlx_mcp.errors import Abandoned, MlxMcpError, ModelError
from mlx_mcp.models.hub_cache import find_usable, find_whole, missing, missing_core, repo_folder, snapshots

# What mlx_lm reads of a repository, less Python files: those are never run here.
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]
STALL_S = 60.0
MIN_BYTES_S = 1000  # less than this on average is taken for nothing
RETRY_S = 1.0
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
CHECKED_BYTES = 16 << 20  # read at once when a file is checked
T = TypeVar("T")

_utils: Any = utils  # it re-exports without saying so


class Silent(_utils.tqdm):  # type: ignore[misc]
    """Draws nothing, since stdout and stderr belong to others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


class CutOff(Exception):
    """The hub did not go on with a file; it may if it is asked again."""


def fetch(repo: str, report: Report, may_fetch: bool = True, stall_s: float = STALL_S) -> Path:
    """The local folder of a whole model of the hub. Asks the hub only for a model that is not whole in the cache.

    A download that was cut off or abandoned goes on where it ended. One that makes no progress for `stall_s`, which is
    fewer than a thousand bytes a second, is given up.

    Raises:
        ModelError: it is not whole here and cannot be fetched; with what is missing, and what to do.
        Abandoned: `report` raised it.
    """
    try:
        _utils.validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelError(
            f"{repo!r} is neither a folder nor a hub id: give one of them, such as 'owner/name'."
        ) from error
    cache = Path(constants.HF_HUB_CACHE)
    found = find_whole(cache, repo)
    if found is not None:
        return found
    what = lacking(cache, repo)
    try:
        if not may_fetch:
            raise ModelError(
                f"{what}, and callers can have nothing downloaded. Have the server started with `--model {repo}`, or "
                "choose another model (list_models shows them)."
            )
        if is_offline_mode():
            raise ModelError(
                f"{what}, and HF_HUB_OFFLINE forbids to fetch it. Unset that, or give the path of a local folder."
            )
        return download(cache, repo, report, stall_s)
    except Abandoned:
        raise
    except Exception as error:  # the library raises errors of its own, the system's, and its HTTP client's
        usable = find_usable(cache, repo)
        if usable is not None:
            return usable
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{what}, and it could not be downloaded: {first_line(error)} Check the name and the network, or give the "
            "path of a local folder."
        ) from error


@dataclass(frozen=True)
class Plan:
    """What a download of a model would fetch; `whole` is the folder of one that needs none."""

    num_files: int
    total_bytes: int
    here_bytes: int
    whole: Path | None = None

    @property
    def lacking_bytes(self) -> int:
        """What is still to be fetched."""
        return self.total_bytes - self.here_bytes


def plan(repo: str) -> Plan:
    """Say what of a model is here, and what a download would fetch; asks the hub unless all is here.

    Raises:
        ModelError: the hub cannot be asked, or has no such model.
    """
    cache = Path(constants.HF_HUB_CACHE)
    whole = find_whole(cache, repo)
    if whole is not None:
        sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
        return Plan(len(sizes), sum(sizes), sum(sizes), whole)
    if is_offline_mode():
        raise ModelError(f"{lacking(cache, repo)}, and HF_HUB_OFFLINE forbids to fetch it. Unset that.")
    try:
        revision, files = hub_files(repo)
    except Exception as error:  # the library raises errors of its own, the system's, and its HTTP client's
        raise ModelError(
            f"The hub could not be asked for {repo!r}: {first_line(error)} Check the name and the network; for a model "
            "that needs permission set HF_TOKEN."
        ) from error
    blobs = repo_folder(cache, repo) / "blobs"
    unfinished = sum(path.stat().st_size for path in blobs.glob("*.mlx-mcp.incomplete"))
    snapshot = repo_folder(cache, repo) / "snapshots" / revision
    total = sum(file.size for file in files)
    here = sum(file.size for file in files if (snapshot / file.path).is_file() or (blobs / blob_name(file)).is_file())
    return Plan(len(files), total, min(total, here + unfinished))


def blob_name(file: RepoFile) -> str:
    """Under what name the cache keeps a file: its SHA-256 if it is large, else what git calls it."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def hub_files(repo: str) -> tuple[str, list[RepoFile]]:
    """The revision of a repository's main branch, and the files in it that mlx_lm reads."""
    api = HfApi()
    revision = api.repo_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    assert revision is not None, "the hub names a revision"
    files = [file for file in api.list_repo_tree(repo, recursive=True, revision=revision) if isinstance(file, RepoFile)]
    return revision, [file for file in files if any(fnmatch(file.path, pattern) for pattern in HUB_FILES)]


def free_bytes() -> int:
    """The bytes that are free on the disk with the hub's cache."""
    folder = Path(constants.HF_HUB_CACHE).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(repo: str) -> int | None:
    """The bytes that a repository takes in the hub's cache, unfinished files included; None if nothing is there."""
    folder = repo_folder(Path(constants.HF_HUB_CACHE), repo)
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def remove(repo: str) -> int:
    """Remove a repository from the hub's cache; returns the bytes that are free again.

    Raises:
        ModelError: it cannot be removed.
    """
    cache = Path(constants.HF_HUB_CACHE)
    freed = size_of(repo) or 0
    try:
        shutil.rmtree(repo_folder(cache, repo))
    except OSError as error:
        raise ModelError(f"{repo!r} could not be removed: {error}. Remove its folder yourself.") from error
    shutil.rmtree(cache / ".locks" / repo_folder(cache, repo).name, ignore_errors=True)
    return freed


def lacking(cache: Path, repo: str) -> str:
    """Why the cache is not enough, as the beginning of a sentence."""
    folders = snapshots(cache, repo)
    if not folders:
        return f"{repo!r} is not in the local hub cache"
    folder = min(folders, key=lambda each: len(missing_core(each)))
    names = missing(folder)
    return f"{repo!r} is not whole in the local hub cache ({', '.join(names[:4])}{', …' if names[4:] else ''} missing)"


def first_line(error: BaseException) -> str:
    """What an error says, in one line that ends with a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].rstrip('.')}."


@dataclass
class Download:
    """How many bytes of a repository's files are here, and whether more still come."""

    repo: str
    total_bytes: int
    report: Report
    stall_s: float
    done_bytes: int = 0
    since: float = 0.0  # when the bytes were last counted for the stall limit
    counted: int = 0

    def add(self, nbytes: int) -> None:
        """Count bytes that have come, or are known to be here; fewer than none where they have to be fetched again."""
        self.done_bytes += nbytes
        self.tell()

    def tell(self, doing: str = "fetching") -> None:
        """Report the progress.

        Raises:
            Abandoned: nobody waits any more.
        """
        self.report(LoadProgress(doing, self.done_bytes, self.total_bytes))

    def rest(self) -> None:
        """Begin to measure anew: nothing was asked of the hub until now."""
        self.since, self.counted = time.monotonic(), self.done_bytes

    def check_stall(self, why: str) -> None:
        """See that the hub still sends something.

        Raises:
            ModelError: it does not.
        """
        passed = time.monotonic() - self.since
        if passed < self.stall_s:
            return
        if self.done_bytes - self.counted < MIN_BYTES_S * passed:
            raise ModelError(
                f"The hub has sent next to nothing of {self.repo!r} for {passed:.0f} s ({why}). "
                f"{self.done_bytes / 1e6:,.1f} of {self.total_bytes / 1e6:,.1f} MB are here: call again to go on from "
                "there, or check the network."
            )
        self.rest()


def download(cache: Path, repo: str, report: Report, stall_s: float) -> Path:
    """Fetch the files that mlx_lm reads of a repository's main branch; see `fetch`."""
    report(LoadProgress("asking the hub"))
    revision, files = hub_files(repo)
    progress = Download(repo, sum(file.size for file in files), report, stall_s)
    for file in sorted(files, key=lambda file: file.size):  # small ones first: what is wrong with a name shows soon
        if (repo_folder(cache, repo) / "snapshots" / revision / file.path).is_file():
            progress.add(file.size)
        elif file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:  # larger ones come by the library's own protocol only
            url = hf_hub_url(repo, file.path, revision=revision)
            fetch_file(repo_folder(cache, repo) / "blobs", url, progress)
    progress.tell()
    # With all blobs here this makes links, the reference and the list of files.
    return Path(snapshot_download(repo, allow_patterns=HUB_FILES, tqdm_class=Silent))


def fetch_file(blobs: Path, url: str, progress: Download) -> None:
    """Have one file's blob in the cache, under the name that the hub gives it."""
    progress.rest()
    metadata = retried(progress, lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT))
    name, size = metadata.etag, metadata.size
    if name is None or size is None or re.fullmatch(r"[\w.-]+", name) is None:
        return  # the library says what is wrong with it
    blobs.mkdir(parents=True, exist_ok=True)
    with held(blobs / f"{name}.mlx-mcp.incomplete", progress) as part:
        if (blobs / name).is_file():
            progress.add(size)
            os.unlink(part.name)
            return
        have = part.seek(0, os.SEEK_END)
        if have > size:
            have = part.truncate(0)
        progress.add(have)
        while part.seek(0, os.SEEK_END) < size:
            retried(progress, lambda: receive(url, part, progress))
        check_digest(part, name, size, progress)
        os.fsync(part.fileno())
        os.replace(part.name, blobs / name)


def retried(progress: Download, ask: Callable[[], T]) -> T:
    """Ask the hub until it answers, as long as the stall limit allows.

    Raises:
        ModelError: it does not.
        Abandoned: nobody waits any more.
    """
    while True:
        try:
            with cut_offs():
                return ask()
        except CutOff as error:
            progress.tell()
            progress.check_stall(str(error))
            time.sleep(min(RETRY_S, progress.stall_s / 10))


@contextmanager
def cut_offs() -> Iterator[None]:
    """Make every error CutOff after which the hub may be asked again.

    Raises:
        CutOff: the connection failed, or the hub has a fault that passes.
        OSError: the hub refuses, or the disk does.
    """
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in TRANSIENT:
            raise CutOff(first_line(error)) from error
        raise
    except (CutOff, MlxMcpError, OSError):
        raise
    except Exception as error:  # of the HTTP client; which one that is depends on the library's version
        raise CutOff(first_line(error)) from error


@contextmanager
def held(path: Path, progress: Download) -> Iterator[BinaryIO]:
    """An unfinished file, opened to go on with, and to be written by nobody else meanwhile."""
    while True:
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.tell("waiting for another program that fetches")
                time.sleep(RETRY_S)
                continue
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else whoever had it has finished it
                    yield file
                    return


def receive(url: str, part: BinaryIO, progress: Download) -> None:
    """Append to a file what the hub sends from its end on; raises as `cut_offs` does, or whatever the client does."""
    have = part.seek(0, os.SEEK_END)
    headers = _utils.build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    client: Any = get_session()
    timeout_s = min(progress.stall_s, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    with client.stream("GET", url, headers=headers, timeout=timeout_s) as answer:
        if answer.status_code != 416:
            _utils.hf_raise_for_status(answer)
        if answer.status_code != 206:  # it knows no ranges, or not this one
            progress.add(-have)
            part.truncate(0)
        if answer.status_code == 416:
            raise CutOff("it has no such range")
        for chunk in answer.iter_raw():
            part.write(chunk)
            progress.add(len(chunk))
            progress.check_stall("it is slow")
    part.flush()


def check_digest(part: BinaryIO, name: str, size: int, progress: Download) -> None:
    """See that a large file is what the hub has: its name is its SHA-256 then, else one that only git can tell.

    Raises:
        ModelError: it is not; then nothing is left of it.
    """
    if part.seek(0, os.SEEK_END) == size:
        if len(name) != 64:
            return
        digest = hashlib.sha256()
        part.seek(0)
        while data := part.read(CHECKED_BYTES):
            digest.update(data)
            progress.tell("checking")
        if digest.hexdigest() == name:
            return
    part.truncate(0)
    raise ModelError(f"A file of {progress.repo!r} did not come as the hub has it. Call again to fetch it anew.")
