"""Reads streams of chat completions for `streams.py`, with as little work as Python can: no client is measured there.

Runs in a process of its own. For each line on stdin, `PORT STREAMS TOKENS SEED`, it asks for so many streams at once
and says on stdout, as JSON, after how many seconds all had ended and after how many the first text of each had come.
"""

from __future__ import annotations

import json
import random
import re
import selectors
import socket
import sys
import time
from statistics import median

FIRST_TEXT = re.compile(rb'"content":"[^"]')
END = b"0\r\n\r\n"  # of a response in chunks


class Reading:
    """One stream, from its request on."""

    def __init__(self, port: int, prompt: str, tokens: int) -> None:
        messages = [{"role": "user", "content": prompt}]
        body = json.dumps({"messages": messages, "max_tokens": tokens, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
        self._began = time.perf_counter()
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.sendall(head.encode() + body)
        self._until_first = b""
        self._end = b""
        self.first_s = 0.0

    def read(self) -> bool:
        """Read what is there; returns whether it was the last."""
        data = self.socket.recv(65_536)
        assert data, "a stream was cut off"
        if not self.first_s:
            self._until_first += data
            if FIRST_TEXT.search(self._until_first):
                self.first_s = time.perf_counter() - self._began
        self._end = (self._end + data)[-len(END) :]
        return self._end == END


def read_all(port: int, streams: int, tokens: int, seed: int) -> dict[str, float]:
    """Read streams at once to their ends; returns the seconds for all, and the median of those to the first text."""
    chance, began = random.Random(seed), time.perf_counter()
    readings = [Reading(port, str(chance.random()), tokens) for _ in range(streams)]
    with selectors.DefaultSelector() as selector:
        for reading in readings:
            selector.register(reading.socket, selectors.EVENT_READ, reading)
        while selector.get_map():
            for key, _ in selector.select():
                if key.data.read():
                    selector.unregister(key.fileobj)
                    key.data.socket.close()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "first": median(reading.first_s for reading in readings)}


def main() -> None:
    """Read what each line of stdin asks for, up to its end."""
    for line in sys.stdin:
        port, streams, tokens, seed = map(int, line.split())
        print(json.dumps(read_all(port, streams, tokens, seed)), flush=True)


if __name__ == "__main__":
    main()
