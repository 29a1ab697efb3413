"""The tokens that callers over HTTP are known by: one file, which has their digests and never the tokens themselves.

A token is 256 random bits. Nobody can guess one, so one round of SHA-256 hides it as well as a slow hash would, which
is for passwords that people choose; and every request has its token checked.

Guarantees:
    - What `add` and `revoke` change survives a power cut once they return, and two commands at once lose nothing.
    - Another process sees a change at its next look: the file is replaced whole, and read again when it is another.
    - A file that others could read or change, or that is damaged, has no tokens, and lets nobody in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_mcp.errors import InvalidRequest, StorageError
from mlx_mcp.storage.folder import Calls, reading, write_durably

FILE, LOCK = "tokens.json", "tokens.lock"
PREFIX = "mlx_"  # so that programs which look for leaked secrets can know one
TOKEN_BYTES = 32
MAX_BYTES = 4 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEFAULT = "default"  # the principal of the setting `token`

Mark = tuple[int, ...]  # what tells one state of the file from another


@dataclass(frozen=True)
class Token:
    """A token as it is kept; its name is the principal's, whose sessions and limits it gives access to."""

    name: str
    digest: str  # SHA-256, hexadecimal
    created_at: float  # seconds since 1970, as `expires_at`
    expires_at: float | None = None
    limits: Mapping[str, int] = field(default_factory=dict)  # in place of the limits that hold for all

    def has_expired(self, now: float) -> bool:
        """Whether it is not valid any more."""
        return self.expires_at is not None and now >= self.expires_at


class TokenFile:
    """The tokens of one state folder, which must exist."""

    def __init__(self, folder: str | Path, calls: Calls | None = None) -> None:
        self.path = Path(folder) / FILE
        self._calls = calls or Calls()
        self._mark: Mark | None = None
        self._tokens: tuple[Token, ...] = ()
        self._fault: StorageError | None = None

    @property
    def exists(self) -> bool:
        """Whether there is a file, be it empty or damaged: then callers need a token."""
        return self._look() is not None

    def tokens(self) -> tuple[Token, ...]:
        """All tokens, in the order in which they were added. The file is read only if it has changed.

        Raises:
            StorageError: it is damaged, or others could read or change it.
        """
        mark = self._look()
        if mark != self._mark or mark is None:
            self._tokens, self._fault = (), None
            if mark is not None:
                try:
                    self._tokens = self._read()
                except StorageError as error:
                    self._fault = error
            self._mark = mark
        if self._fault is not None:
            raise self._fault
        return self._tokens

    def find(self, token: str, now: float) -> Token | None:
        """The token that this is, if it is one and has not expired; compared in constant time.

        Raises:
            StorageError: see `tokens`.
        """
        given, found = digest_of(token), None
        for each in self.tokens():  # all of them, wherever it is
            if hmac.compare_digest(given, each.digest):
                found = each
        return None if found is None or found.has_expired(now) else found

    def of(self, name: str) -> Token | None:
        """The token of that name.

        Raises:
            StorageError: see `tokens`.
        """
        return next((each for each in self.tokens() if each.name == name), None)

    def add(self, name: str, expires_at: float | None = None, limits: Mapping[str, int] | None = None) -> str:
        """Make a token, and return it: nobody can read it afterwards.

        Raises:
            InvalidRequest: the name cannot be one, or is taken.
            StorageError: it cannot be written, or see `tokens`.
        """
        if not NAME.fullmatch(name) or name == DEFAULT:
            raise InvalidRequest(
                f"{name[:80]!r} cannot be a token's name. Choose up to 64 letters, digits, '.', '_' or '-', the first "
                f"a letter or digit, and not {DEFAULT!r}, which is the one of MLX_MCP_TOKEN."
            )
        token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        with self._changing() as tokens:
            if any(each.name == name for each in tokens):
                raise InvalidRequest(
                    f"There is a token named {name!r} already. Choose another name, or `mlx-mcp token revoke {name}` "
                    "first."
                )
            tokens.append(Token(name, digest_of(token), time.time(), expires_at, dict(limits or {})))
        return token

    def revoke(self, name: str) -> None:
        """Have a token let nobody in from now on. The file stays, also without any token in it.

        Raises:
            InvalidRequest: there is none of that name.
            StorageError: it cannot be written, or see `tokens`.
        """
        with self._changing() as tokens:
            kept = [each for each in tokens if each.name != name]
            if len(kept) == len(tokens):
                raise InvalidRequest(
                    f"There is no token named {name[:80]!r}. `mlx-mcp token list` shows those there are."
                )
            tokens[:] = kept

    def _look(self) -> Mark | None:
        """The state of the file; None if there is none."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return None
        except OSError:
            return ()  # there may be one
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def _read(self) -> tuple[Token, ...]:
        try:
            with reading(self._calls, self.path) as file:
                found = os.fstat(file.fd)
                if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                    raise StorageError(
                        f"Others could read or change the tokens in {self.path}, so none of them is valid. Make it "
                        f"yours alone: `chmod 600 {self.path}`."
                    )
                data = file.read(MAX_BYTES, 0)
        except OSError as error:
            raise unusable(self.path, error) from error
        try:
            return tuple(token_of(each) for each in json.loads(data)["tokens"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StorageError(
                f"The tokens in {self.path} cannot be read: the file is damaged. Move it away, and add the tokens "
                "again with `mlx-mcp token add`."
            ) from error

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """The tokens, to be changed in place and written at the end of the block; one process at a time does this."""
        folder = None
        try:
            folder = self._calls.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            lock = self._calls.open(LOCK, os.O_RDWR | os.O_CREAT, folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                tokens = list(self.tokens())
                yield tokens
                data = json.dumps({"tokens": [asdict(each) for each in tokens]}, indent=1).encode()
                write_durably(self._calls, folder, FILE, [(0, [data])])
            finally:
                self._calls.close(lock)
        except OSError as error:
            raise unusable(self.path, error) from error
        finally:
            if folder is not None:
                self._calls.close(folder)


def token_of(value: Any) -> Token:
    """A token as the file has it.

    Raises:
        ValueError: it is none.
        KeyError: a part of it is missing.
        TypeError: it is none.
    """
    name, digest, expires_at = str(value["name"]), str(value["digest"]), value["expires_at"]
    if not NAME.fullmatch(name) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("no token")
    limits = {str(limit): int(number) for limit, number in value["limits"].items()}
    return Token(name, digest, float(value["created_at"]), None if expires_at is None else float(expires_at), limits)


def unusable(path: Path, error: OSError) -> StorageError:
    """The error to raise where the system does not let the file be read or written."""
    return StorageError(
        f"The tokens in {path} cannot be read or written: {error.strerror}. Check that folder, or set "
        "MLX_MCP_STATE_DIR to another one."
    )


def digest_of(token: str) -> str:
    """What of a token is kept: of equal length for every token, and ASCII, whatever the token has in it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
