"""The protocol's conformance suite, against the server of fixtures.py."""

from __future__ import annotations

import re
import shutil
import subprocess

from benchmarks.hosts.place import COMMANDS, LIMIT_S, WORK

REVISIONS = ("2025-11-25", "2026-07-28")
# Scenarios that a revision does not require, and why they fail here. Whatever else fails is a fault.
EXPECTED = {
    "json-schema-2020-12": "a tool of that name alone has these keywords; ours say what they need in fewer",
    "server-sse-polling": "no events are stored: a client that lost its connection calls again",
    "tasks-mrtr-input": "our tasks ask for no input",
    "tasks-mrtr-composition": "our tools ask for no input before a task",
    "tasks-request-headers": "the SDK does not compare Mcp-Name with the task of tasks/get",
    "tasks-required-task-error": "no tool requires tasks: whoever takes none gets a handle",
}


def passes(revision: str, url: str) -> str:
    """All that a revision of the protocol requires passes, and what fails of the rest is EXPECTED to."""
    folder = WORK / "conformance" / revision
    shutil.rmtree(folder, ignore_errors=True)
    command = [str(COMMANDS / "conformance"), "server", "--url", url, "--requirements", revision, "-o", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    said = judged(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return said


def judged(output: str) -> str:
    """What the suite printed, in short; fails if more failed than is EXPECTED to."""
    every, _, beside = output.partition("=== SUMMARY ===")[2].partition("Not scored")
    outcomes = {name: sign == "✓" for sign, name in re.findall(r"^ *([✓✗]) ([\w-]+)", every, re.M)}
    extras = set(re.findall(r"^ *[✓✗] ([\w-]+)", beside, re.M))
    failed = {name for name, passed in outcomes.items() if not passed}
    assert outcomes, f"no summary: {output}"
    assert failed <= extras & EXPECTED.keys(), f"failed: {sorted(failed - (extras & EXPECTED.keys()))}\n{output}"
    said = f"{len(outcomes.keys() - extras)} required scenarios pass"
    return f"{said}; {len(failed)} others fail as expected" if failed else said
