"""An Anthropic endpoint on loopback whose model plays a script: what Claude Code's model says, without a model.

A scene is a generator. It yields what the model asks for, a list of calls to make at once, is sent their results, and
returns the model's last words. The user's last message with `PLAY name` says which scene a conversation plays, so that
sub-agents play scenes of their own. A request that comes again is answered as before.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

Json = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A tool that the model asks for."""

    tool: str
    arguments: Json


@dataclass(frozen=True)
class Result:
    """What came back to the model."""

    text: str
    is_error: bool = False

    @property
    def json(self) -> Any:
        """The text as JSON, as Claude Code shows structured results."""
        assert not self.is_error, self.text
        return json.loads(self.text)


Scene = Generator[list[Call], list[Result], str]


@dataclass
class Conversation:
    """One play of a scene, as far as it has come."""

    scene: Scene
    said: list[list[Json]] = field(default_factory=list)  # blocks, one list for each turn of the model
    stopped: str = ""  # why the scene ended early

    def answer(self, messages: list[Json], ids: Iterator[int]) -> list[Json]:
        """The blocks of the model's turn after these messages."""
        made = {block.get("id") for message in messages if message["role"] == "assistant" for block in blocks(message)}
        num_turns = sum(turn[0].get("id", "words") in made for turn in self.said)
        while len(self.said) <= num_turns:
            results = results_of(messages, self.said[-1]) if self.said else None
            self.said.append(self._go_on(results, ids))
        return self.said[num_turns]

    def _go_on(self, results: list[Result] | None, ids: Iterator[int]) -> list[Json]:
        try:
            calls = next(self.scene) if results is None else self.scene.send(results)
        except StopIteration as end:
            return [{"type": "text", "text": end.value or "Done."}]
        except Exception as error:  # the test raises it again
            self.stopped = f"{type(error).__name__}: {error}"
            return [{"type": "text", "text": self.stopped}]
        return [
            {"type": "tool_use", "id": f"toolu_{next(ids):04}", "name": c.tool, "input": c.arguments} for c in calls
        ]


class Endpoint(ThreadingHTTPServer):
    """The server; `requests` are all that it was asked, whoever asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[Json] = []
        self._conversations: dict[str, Conversation] = {}
        self._lock = threading.RLock()  # a scene may take another into the programme
        self._ids = itertools.count(1)

    def answer(self, request: Json) -> list[Json]:
        """The model's turn: by its scene, or a word where Claude Code asks for something else, such as a title."""
        with self._lock:
            self.requests.append(request)
            said = [text for message in request["messages"] if message["role"] == "user" for text in texts(message)]
            played = re.findall(r"PLAY[ -]([\w-]+)", "\n".join(said))
            if not played or not request.get("tools"):
                return [{"type": "text", "text": "Nothing."}]
            return self._conversations[played[-1]].answer(request["messages"], self._ids)

    def perform(self, name: str, scene: Callable[[], Scene]) -> None:
        """Take a scene into the programme, in place of an earlier one of that name."""
        with self._lock:
            self._conversations[name] = Conversation(scene())

    def raise_what_failed(self) -> None:
        """Fail if a scene did."""
        stopped = {name: talk.stopped for name, talk in self._conversations.items() if talk.stopped}
        self._conversations.clear()
        assert not stopped, stopped


@contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint that serves within the block."""
    with Endpoint() as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever)
        thread.start()
        try:
            yield endpoint
        finally:
            endpoint.shutdown()
            thread.join()


def blocks(message: Json) -> list[Json]:
    """What a message consists of."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def texts(message: Json) -> list[str]:
    """The texts of a message."""
    return [block["text"] for block in blocks(message) if block["type"] == "text"]


def results_of(messages: list[Json], asked: list[Json]) -> list[Result]:
    """The results of the model's last calls, in their order."""
    every = [block for message in messages if message["role"] == "user" for block in blocks(message)]
    came = {block["tool_use_id"]: block for block in every if block["type"] == "tool_result"}
    return [result(came[block["id"]]) for block in asked]


def result(block: Json) -> Result:
    """A block with a tool's result, as text."""
    content = block.get("content", "")
    text = content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)
    return Result(text, bool(block.get("is_error")))


def events(turn: list[Json]) -> Iterator[Json]:
    """A message of these blocks, as the events of a stream.

    It has an id of its own: Claude Code joins messages of one id.
    """
    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": "scripted", "content": []}
    yield {"type": "message_start", "message": message | {"stop_reason": None, "stop_sequence": None, "usage": usage}}
    for index, block in enumerate(turn):
        if block["type"] == "text":
            empty, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = block | {"input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    reason = "tool_use" if any(block["type"] == "tool_use" for block in turn) else "end_turn"
    yield {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": usage}
    yield {"type": "message_stop"}


class Handler(BaseHTTPRequestHandler):
    """One connection of Claude Code."""

    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer `/v1/messages`, and `/v1/messages/count_tokens` with a small number."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "count_tokens" in self.path:
            self._send("application/json", json.dumps({"input_tokens": 100}))
        else:
            lines = (
                f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
                for event in events(self.server.answer(request))
            )
            self._send("text/event-stream", "".join(lines))

    def do_HEAD(self) -> None:
        """Say that the endpoint is there."""
        self._send("text/plain", "")

    do_GET = do_HEAD

    def _send(self, kind: str, body: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""
