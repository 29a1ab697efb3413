"""MCP Inspector's CLI, against one target in one protocol era; every call is a client of its own."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.hosts.clients.story import FACTS, TOOLS
from benchmarks.hosts.place import COMMANDS, run

QUESTION = "What is the code of Rex?"


class Inspector:
    """Asks a target: a command, or an address with its options."""

    def __init__(self, target: list[str], era: str) -> None:
        inspector = str(COMMANDS / "mcp-inspector")
        self._command = [inspector, "--cli", *target, "--protocol-era", era, "--format", "json", "-q"]
        self._era = era

    def finds_no_fault(self) -> str:
        """It lists the tools, and `--strict` finds no fault in their schemas."""
        listed = json.loads(run(*self._command, "--method", "tools/list", "--strict"))
        names = [tool["name"] for tool in listed["result"]["tools"]]
        assert names == TOOLS, names
        return "no fault in a schema"

    def call(self, tool: str, **arguments: Any) -> Any:
        """What a tool returns."""
        given = [f"{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in arguments.items()]
        pairs = [part for pair in given for part in ("--tool-arg", pair)]
        called = run(*self._command, "--method", "tools/call", "--tool-name", tool, *pairs)
        return json.loads(called)["result"]["structuredContent"]

    def lists_and_calls(self) -> str:
        """It lists the tools, and calls what needs nothing from before."""
        said = self.finds_no_fault()
        assert self.call("generate", prompt=f"{FACTS} {QUESTION}")["text"] == "4096"
        assert self.call("list_models")["models"][0]["name"] == "embedded"
        batch = self.call("generate_batch", prompts=[QUESTION, "What is the code of Kim?"], system=FACTS)
        assert [result["text"] for result in batch["results"]] == ["4096", "771"], batch
        return said

    def goes_on_in_sessions(self) -> str:
        """A session goes on from client to client until it is closed."""
        name = self._era
        made = self.call("create_session", messages=[{"role": "user", "content": FACTS}], name=name, ttl_s=60)
        forks = self.call("fork_session", session=name, names=[f"{name}-fork"])
        assert forks["tokens"] == made["tokens"], forks
        answer = self.call("generate", session=f"{name}-fork", prompt=QUESTION)
        assert answer["text"] == "4096", answer
        assert answer["cached_tokens"] >= made["tokens"], answer
        held = [session["session"] for session in self.call("list_sessions")["sessions"]]
        assert {made["session"], *forks["sessions"]} <= set(held), held
        closed = self.call("close_session", sessions=[name, f"{name}-fork"])["closed"]
        assert len(closed) == 2, closed
        return "made, forked, asked, listed, closed"
