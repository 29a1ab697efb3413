"""Messages between this process and a CPython child: JSON, or bytes, with the length before them.

Neither side runs code to read one, so that this process can read what a hostile program wrote.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO, Any

MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # of JSON from the child; what is longer is read by nobody
_LENGTH = struct.Struct(">I")


class Malformed(ValueError):
    """What came is no message."""


def write_bytes(stream: IO[bytes], data: bytes) -> None:
    """Write bytes, and have them sent.

    Raises:
        OSError: nobody reads any more.
    """
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_bytes(stream: IO[bytes], max_bytes: int) -> bytes:
    """Wait for bytes.

    Raises:
        EOFError: the other side has ended.
        Malformed: they would be more than `max_bytes`.
    """
    length = stream.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        raise EOFError
    (num,) = _LENGTH.unpack(length)
    if num > max_bytes:
        raise Malformed(f"{num} bytes, and at most {max_bytes} are read")
    data = stream.read(num)
    if len(data) < num:
        raise EOFError
    return data


def encoded(value: Any) -> bytes:
    """A value of JSON as it is sent. Half characters become question marks."""
    # Not in ASCII, which takes six bytes for a character of most alphabets, and three times as long.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def write_message(stream: IO[bytes], message: Mapping[str, Any]) -> None:
    """Write a message, and have it sent.

    Raises:
        OSError: nobody reads any more.
    """
    write_bytes(stream, encoded(message))


def read_message(stream: IO[bytes], max_bytes: int = MAX_MESSAGE_BYTES) -> dict[str, Any]:
    """Wait for a message. Of what is in it, nothing is checked.

    Raises:
        EOFError: the other side has ended.
        Malformed: it is longer than `max_bytes`, or no object of JSON.
    """
    data = read_bytes(stream, max_bytes)
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise Malformed("no JSON") from exc
    if not isinstance(message, dict):
        raise Malformed("no object")
    return message
