"""Counts which of a client's requests wait for an answer, and which are left to the next engine."""

from __future__ import annotations

from collections import Counter

from mcp_types import JSONRPCRequest, RequestId

from mlx_mcp.process.lines import LISTENING


class OpenRequests:
    """One client's requests that were read and are not answered on the wire, except those that only listen.

    Only the event loop uses it.
    """

    def __init__(self) -> None:
        self.num_read = 0  # lines
        self.returned: list[RequestId] = []  # read after `return_others`, and not taken up
        self.returning = False
        self._open: Counter[RequestId] = Counter()

    @property
    def waiting(self) -> bool:
        """Whether the client waits for an answer."""
        return self._open.total() > 0

    def return_others(self) -> None:
        """Take up no request from now on: the client gives them to another server."""
        self.returning = True

    def take(self, request: JSONRPCRequest) -> bool:
        """Note a request that was read; returns whether to take it up."""
        if self.returning:
            self.returned.append(request.id)
        elif request.method not in LISTENING:
            self._open[request.id] += 1
        return not self.returning

    def settle(self, id_: RequestId) -> None:
        """Note that the request was answered, or was cancelled and will not be."""
        if self._open[id_] > 1:
            self._open[id_] -= 1
        else:
            del self._open[id_]
