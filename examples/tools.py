"""An agent with two tools, in one session: it asks for a call, is given the result, and goes on until it answers.

Run it with `python examples/tools.py` where mlx-mcp is installed; no network is needed. The model asks for calls in
`tool_calls`; carrying them out is the caller's part, and what came of them goes back in `messages` with the role tool.
Each turn of the session sends and computes only what is new. Prints the turns, and fails if an answer is wrong or
anything is computed twice.
"""

import asyncio
import sys

from mcp import Client, StdioServerParameters

BADGES = {"Alice's badge": "771", "Bob's badge": "342", "Carol's badge": "508"}
SENT: dict[str, str] = {}


def lookup(key: str) -> str:
    """Find what is on file."""
    return BADGES.get(key, "unknown")


def send(name: str, text: str) -> str:
    """Note what somebody is told."""
    SENT[name] = text
    return f"{name} has the badge {text}."


def function(name: str, *arguments: str) -> dict:
    """A function in OpenAI's form; all its arguments are strings."""
    parameters = {"type": "object", "properties": {each: {"type": "string"} for each in arguments}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = {"lookup": lookup, "send": send}
OFFERED = [function("lookup", "key"), function("send", "name", "text")]


async def main() -> None:
    """Have the agent look a badge up, pass it on, and say who has it."""
    server = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve", "--standalone"])
    async with Client(server) as client:
        session: dict[str, object] = {"tools": OFFERED, "keep": True}  # what the first turn says of it
        known = 0  # tokens that were read or written before

        async def turn(**said: object) -> dict:
            nonlocal session, known
            result = await client.call_tool("generate", said | session)
            assert not result.is_error, result.content[0].text
            answer = result.structured_content
            print(f"{said}\n    → {answer.get('tool_calls') or answer['text']}")
            # The last token of an answer is computed when the session goes on.
            new = answer["prompt_tokens"] - known
            assert answer["computed_tokens"] <= new + 1, "something was computed twice"
            known = answer["prompt_tokens"] + answer["completion_tokens"]
            session = {"session": answer["session"]}
            return answer

        async def ask(prompt: str) -> str:
            answer = await turn(prompt=prompt)
            while calls := answer.get("tool_calls"):
                results = [
                    {"role": "tool", "name": call["name"], "content": TOOLS[call["name"]](**call["arguments"])}
                    for call in calls
                ]
                answer = await turn(messages=results)
            return answer["text"]

        badge = await ask("Look up Bob's badge.")
        assert badge == "342", badge
        await ask(f"Call send with name Alice and text {badge}.")
        assert SENT == {"Alice": "342"}, SENT
        answer = await ask("What is Alice's badge?")
        assert answer == "342", answer


if __name__ == "__main__":
    asyncio.run(main())
