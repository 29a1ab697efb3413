"""One good call for each API over HTTP, and spoilt ones made of it. An API that is not in the tree is left out."""

import json
import random
from dataclasses import dataclass, field
from typing import Any

from tests.api.http.routes import routes

META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
MODERN = {
    "accept": "application/json, text/event-stream",
    "mcp-protocol-version": "2026-07-28",
    "mcp-method": "tools/call",
    "mcp-name": "generate",
}
GENERATE = {"name": "generate", "arguments": {"prompt": "hello", "model": "tiny", "max_tokens": 5}, "_meta": META}
USER = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Call:
    """A request that is answered with 200."""

    name: str
    path: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


ALL = (
    Call("mcp", "/mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": GENERATE}, MODERN),
    Call("echo", "/echo/x", {"text": "hello", "max_tokens": 5}),
    Call("openai-chat", "/v1/chat/completions", {"model": "tiny", "messages": USER, "max_tokens": 5}),
    Call("openai-completions", "/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 5}),
    Call("openai-responses", "/v1/responses", {"model": "tiny", "input": "hello", "store": False}),
    Call(
        "anthropic",
        "/v1/messages",
        {"model": "tiny", "messages": USER, "max_tokens": 5},
        {"anthropic-version": "2023-06-01"},
    ),
    Call(
        "openai-chat-stream",
        "/v1/chat/completions",
        {"model": "tiny", "messages": USER, "max_tokens": 5, "stream": True},
    ),
    Call(
        "anthropic-stream",
        "/v1/messages",
        {"model": "tiny", "messages": USER, "max_tokens": 5, "stream": True},
        {"anthropic-version": "2023-06-01"},
    ),
    Call("batch", "/v1/batch", {"model": "tiny", "prompts": ["hello"], "max_tokens": 5}),
)
CALLS = tuple(call for call in ALL if ("POST", call.path) in routes())

RETRY = (429, 503, 529)  # what tells a client to try again; 529 is Anthropic's

NUMBERS = (0, -1, 1, 2**63, -(2**63), 1.5, 1e308, 10**400, True)
TEXTS = ("", "x", "\0", "\ud800", "é" * 100, "x" * 5000, "../../etc/passwd", "<|im_end|>", "{", "tiny", "default")


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, deep ones rarely."""
    kind = rng.randrange(7 if depth < 4 else 5)
    if kind == 0:
        return None
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind in (3, 4):
        return rng.choice(TEXTS)
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice((*TEXTS, "role", "content", "type", "text")): value(rng, depth + 1) for _ in range(rng.randrange(4))
    }


def spoil(rng: random.Random, body: Any) -> Any:
    """The body with one part of it replaced, removed or added, somewhere."""
    if isinstance(body, dict) and body and rng.random() < 0.9:
        name = rng.choice(list(body))
        if rng.random() < 0.5 and isinstance(body[name], dict | list):
            return body | {name: spoil(rng, body[name])}
        if rng.random() < 0.2:
            return {each: kept for each, kept in body.items() if each != name}
        return body | {rng.choice((name, name, name, rng.choice(TEXTS))): value(rng)}
    if isinstance(body, list) and body and rng.random() < 0.9:
        at = rng.randrange(len(body))
        return [*body[:at], spoil(rng, body[at]), *body[at + 1 :]]
    return value(rng)


def malformed(rng: random.Random, body: dict[str, Any]) -> bytes:
    """The bytes of a body that is mostly not as it should be."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    data = json.dumps(spoil(rng, body)).encode()
    if kind == 1:  # cut off
        return data[: rng.randrange(len(data))]
    if kind == 2:  # a byte is another
        at = rng.randrange(len(data))
        return data[:at] + rng.randbytes(1) + data[at + 1 :]
    if kind == 3:
        return rng.choice((b"", b"[" * 50_000, b"1" * 50_000, b'{"a":' * 10_000, b"NaN", b"\xef\xbb\xbf{}", b"null"))
    return data
