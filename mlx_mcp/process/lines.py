"""Lines between a host, a relay and the engine. Only the top level of a line is parsed.

Has also the engine's own notices to a relay, which no host sees. Standard library only, and little of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

LONGEST_LINE = (4 << 20) + 1024  # a little more than the engine takes, unless it was set to take more
CHUNK = 1 << 16

# Notices of the engine to a relay whose hello has `notices`.
ALIVE = "mlx-mcp/alive"  # sent every ALIVE_S, whatever else is sent
ENDING = "mlx-mcp/ending"  # the last line: which requests were not taken up, so that another engine can take them
ALIVE_S = 2.0

# Requests that stay open for as long as their sender listens. Nobody waits for their answers.
LISTENING = frozenset(("subscriptions/listen",))
ACKNOWLEDGED = "notifications/subscriptions/acknowledged"  # the first that such a request gets
SUBSCRIPTION = "io.modelcontextprotocol/subscriptionId"  # says in `_meta` which request gets it

BAD_ID = "The id of a request must be a string or an integer. This one is neither, so its answer has no id."

# A string, or a bracket; possessive, so that a long string takes no memory.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[][{}]', re.DOTALL)
_MEMBER = re.compile(rb'"(id|method|result|error)"\s*:\s*("(?:[^"\\]++|\\.)*+"|-?[0-9]+(?![0-9.eE]))?', re.DOTALL)

Id = int | str


class Envelope:
    """The top level of a line: a request has a method and an id, a notification has a method, an answer has an id.

    An answer has a result or an error, too. A line with only an id is an error, which the engine reports. `bad_id`
    says that the id is neither an integer nor a string, as MCP requires it to be; `id` is None then.
    """

    __slots__ = ("answers", "bad_id", "id", "method")

    def __init__(self, id: Id | None, method: str, answers: bool, bad_id: bool) -> None:
        self.id, self.method, self.answers, self.bad_id = id, method, answers, bad_id

    @property
    def bad_request(self) -> bool:
        """Whether it is a request that cannot be answered under its id. Some clients give notifications the id null."""
        return self.bad_id and self.method != "" and not self.method.startswith("notifications/")


def envelope(line: bytes) -> Envelope:
    """Parse the top level of a line. A line that is no message has neither id nor method."""
    depth, id_, method, answers, bad_id = 0, None, "", False, False
    for token in _TOKEN.finditer(line):
        first = line[token.start()]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
        elif depth == 1 and (member := _MEMBER.match(line, token.start())) is not None:
            if member[1] in (b"result", b"error"):
                answers = True
            if member[2] is None:
                bad_id = bad_id or member[1] == b"id"
                continue
            try:
                value = json.loads(member[2])
            except ValueError:
                continue
            if member[1] == b"id":
                id_ = value
            elif member[1] == b"method" and isinstance(value, str):
                method = value
    return Envelope(id_, method, answers and not method, bad_id and id_ is None)


def notice(method: str, **params: object) -> bytes:
    """A notice of the engine as a line."""
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params}).encode() + b"\n"


def pieces(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bool, bool]]:
    """Split what is read into lines; yields (data, whether a line begins with it, whether a line ends with it).

    A line of at most LONGEST_LINE bytes comes whole.
    """
    buffer, first = bytearray(), True
    while chunk := read(CHUNK):
        start = 0
        while (end := chunk.find(b"\n", start) + 1) > 0:
            yield bytes(buffer) + chunk[start:end], first, True
            buffer.clear()
            first, start = True, end
        buffer += chunk[start:]
        if len(buffer) > LONGEST_LINE:
            yield bytes(buffer), first, False
            buffer.clear()
            first = False
    if buffer:
        yield bytes(buffer), first, True
