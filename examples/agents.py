"""Twelve sub-agents at once on one model: each is told a fact of its own and answers from it, in a form that parses.

Run it with `python examples/agents.py` where mlx-mcp is installed; no network is needed. The calls run as one batch:
an agent with a long brief does not hold up the others, and no agent sees another's. Prints each answer, and fails if
one is wrong.
"""

import asyncio
import sys

from mcp import Client, StdioServerParameters

NAMES = ["Adam", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Henry", "Iris", "Jack", "Karen", "Liam"]
CODES = {name: str(100 + 71 * i) for i, name in enumerate(NAMES)}


async def main() -> None:
    """Ask all agents together; every other one has a long brief."""
    server = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve", "--standalone"])
    async with Client(server) as client:

        async def ask(number: int, name: str) -> str:
            others = [f"{other} likes tea." for other in NAMES if other != name]
            brief = " ".join([*others * (number % 2), f"{name}'s code is {CODES[name]}."])
            arguments = {"system": brief, "prompt": f"What is {name}'s code?", "regex": "[0-9]{3}"}
            result = await client.call_tool("generate", arguments)
            return result.structured_content["text"]

        answers = await asyncio.gather(*(ask(number, name) for number, name in enumerate(NAMES)))
        for name, answer in zip(NAMES, answers, strict=True):
            print(f"{name}: {answer}")
        assert answers == list(CODES.values())


if __name__ == "__main__":
    asyncio.run(main())
