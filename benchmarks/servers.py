"""Our server and its peers, each asked through its own network interface, all by the same client."""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from llama import Messages
from processes import Process

ANSWER_S = 900  # how long a call may take
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "sharing", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
GoOn = Callable[[str], Awaitable["Answer"]]  # the next turn of a context, for one token


@dataclass(frozen=True)
class Answer:
    """One token, and how long it took."""

    text: str
    seconds: float
    prompt_tokens: int
    cached_tokens: int


class Server(ABC):
    """What the workloads ask of any server. All answers are of one token."""

    process: Process
    primings: dict[str, Callable[[str, int], Awaitable[list[GoOn]]]]  # the ways to prime a prefix for children

    @abstractmethod
    async def say(self, messages: Messages) -> Answer:
        """Answer a whole conversation."""

    @abstractmethod
    async def begin(self, messages: Messages) -> tuple[Answer, GoOn]:
        """Answer a system prompt and a prompt, and go on from there as this server's users would."""

    @abstractmethod
    async def bytes_before(self) -> int:
        """What `bytes_stored` is counted from."""

    @abstractmethod
    async def bytes_stored(self) -> tuple[int, int | None] | None:
        """What is kept in memory of keys and values, and of how many sequences if not of all; None if it is unknown."""

    @abstractmethod
    async def forget(self) -> None:
        """Let go of what the last workload left open."""


class Ours(Server):
    """mlx-mcp, through MCP: a POST for a call, by the client that the peers are asked with."""

    def __init__(self, process: Process, address: str, http: httpx2.AsyncClient) -> None:
        self.process, self.address, self.http = process, address, http
        self.primings = {"children": self.children, "forks": self.forks}

    @staticmethod
    async def find(process: Process) -> str:
        """The address that it prints."""

        async def look() -> str | None:
            found = re.search(r" at (http://\S+)/mcp\n", process.log.read_text(errors="replace"))
            return found and found[1]

        return await process.started(look)

    async def call(self, tool: str, **arguments: Any) -> tuple[dict[str, Any], float]:
        """What a tool returns, and the seconds until then."""
        params = {"name": tool, "arguments": arguments, "_meta": META}
        asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        headers = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": tool}
        headers["accept"] = "application/json, text/event-stream"
        response, seconds = await post(self, f"{self.address}/mcp", asked, headers)
        result = response.get("result", {"isError": True})
        if result.get("isError"):
            raise self.process.failed(f"refused {tool}: {response}")
        return result["structuredContent"], seconds

    async def generate(self, before_s: float = 0.0, **arguments: Any) -> tuple[Answer, str]:
        """A `generate` for one token, and the session it is kept in; `before_s` is added to its time."""
        result, seconds = await self.call("generate", max_tokens=1, **arguments)
        answer = Answer(result["text"], before_s + seconds, result["prompt_tokens"], result["cached_tokens"])
        return answer, result.get("session", "")

    async def say(self, messages: Messages) -> Answer:
        """Without a session if there is one prompt only; else what comes before is put in one, which counts."""
        *earlier, (_, prompt) = [message for message in messages if message[0] != "system"]
        system = "".join(text for role, text in messages if role == "system")
        if not earlier:
            return (await self.generate(system=system, prompt=prompt))[0]
        turns = [{"role": role, "content": text} for role, text in earlier]
        created, seconds = await self.call("create_session", system=system, messages=turns)
        return (await self.generate(seconds, session=created["session"], prompt=prompt, keep=False))[0]

    async def begin(self, messages: Messages) -> tuple[Answer, GoOn]:
        """In a session."""
        given: dict[str, Any] = {"prompt" if role == "user" else role: text for role, text in messages}
        answer, session = await self.generate(**given, keep=True)
        return answer, self.turn(session)

    def turn(self, session: str, keep: bool = True) -> GoOn:
        """What goes on with a session."""

        async def go_on(prompt: str) -> Answer:
            return (await self.generate(session=session, prompt=prompt, keep=keep))[0]

        return go_on

    async def children(self, prefix: str, count: int) -> list[GoOn]:
        """Calls that leave the parent's session as it is."""
        created, _ = await self.call("create_session", system=prefix)
        return [self.turn(created["session"], keep=False)] * count

    async def forks(self, prefix: str, count: int) -> list[GoOn]:
        """A fork of the parent's session for each."""
        created, _ = await self.call("create_session", system=prefix)
        forked, _ = await self.call("fork_session", session=created["session"], count=count)
        return [self.turn(session) for session in forked["sessions"]]

    async def bytes_before(self) -> int:
        """What is cached from before: it stays."""
        return (await self.bytes_stored())[0]

    async def bytes_stored(self) -> tuple[int, int | None]:
        """As /health says."""
        return (await self.http.get(f"{self.address}/health")).json()["cache_bytes"], None

    async def forget(self) -> None:
        """Close all sessions."""
        await self.call("close_session", all=True)


class Peer(Server):
    """A peer, through OpenAI's chat completions. Every turn sends all that was said before."""

    def __init__(self, process: Process, address: str, model: Path, http: httpx2.AsyncClient) -> None:
        self.process, self.address, self.model, self.http = process, address, model, http
        self.primings = {"children": self.children}

    @staticmethod
    async def find(process: Process, address: str, http: httpx2.AsyncClient) -> str:
        """The address, once it listens."""

        async def look() -> str | None:
            try:
                return address if (await http.get(f"{address}/health", timeout=1)).is_success else None
            except httpx2.TransportError:
                return None

        return await process.started(look)

    async def say(self, messages: Messages) -> Answer:
        """One completion."""
        chat = [{"role": role, "content": text} for role, text in messages]
        asked = {"model": str(self.model), "messages": chat, "max_tokens": 1, "temperature": 0.0}
        body, seconds = await post(self, f"{self.address}/v1/chat/completions", asked, {})
        usage = body["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Answer(body["choices"][0]["message"]["content"], seconds, usage["prompt_tokens"], cached)

    async def begin(self, messages: Messages) -> tuple[Answer, GoOn]:
        """The answer becomes part of what is sent."""
        answer = await self.say(messages)

        async def go_on(prompt: str) -> Answer:
            return await self.say([*messages, ("assistant", answer.text), ("user", prompt)])

        return answer, go_on

    async def children(self, prefix: str, count: int) -> list[GoOn]:
        """Calls that begin as an earlier one did."""
        await self.say([("system", prefix), ("user", "the")])

        async def go_on(prompt: str) -> Answer:
            return await self.say([("system", prefix), ("user", prompt)])

        return [go_on] * count

    async def bytes_before(self) -> int:
        """Nothing: of what was there before, a swarm larger than its cache leaves nothing."""
        return 0

    async def bytes_stored(self) -> tuple[int, int | None] | None:
        """It does not say."""
        return None

    async def forget(self) -> None:
        """It has nothing open."""


class MlxLmServer(Peer):
    """mlx_lm.server, which says in its log what it keeps."""

    async def bytes_stored(self) -> tuple[int, int | None]:
        """As its log says at the beginning of each call, in GB with two decimals."""
        await self.say([("user", "the")])
        found = re.findall(r"Prompt Cache: (\d+) sequences, ([\d.]+) GB", self.process.log.read_text(errors="replace"))
        if not found:
            raise self.process.failed("does not log the size of its cache any more")
        sequences, gigabytes = found[-1]
        return round(float(gigabytes) * 1e9), int(sequences)


async def post(server: Ours | Peer, url: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[Any, float]:
    """What a server answers, and the seconds until then.

    Raises:
        ServerFailed: it does not, or by an error.
    """
    start = time.perf_counter()
    try:
        response = await server.http.post(url, json=body, headers=headers)
    except httpx2.HTTPError as error:
        raise server.process.failed(f"did not answer ({error!r})") from error
    seconds = time.perf_counter() - start
    if not response.is_success:
        raise server.process.failed(f"answered {response.status_code}: {response.text}")
    # A call that takes long is answered by a stream of events, of which the last is the answer.
    events = re.findall("^data: (.*)$", response.text, re.MULTILINE)
    return json.loads(events[-1] if events else response.content), seconds
