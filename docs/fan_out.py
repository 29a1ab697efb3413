"""The fan-out of five-minutes.md as a program: one session, a fork for each of three agents, all asked at once."""

import asyncio
import sys

from mcp import Client, StdioServerParameters

FACTS = "Alice's badge is 771. Bob's badge is 342. Carol's badge is 109."
NAMES = ["Alice", "Bob", "Carol"]


async def main() -> None:
    """Prime a session, fork it, and ask every fork at once."""
    server = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve"])
    async with Client(server) as client:

        async def call(tool: str, **arguments: object) -> dict:
            return (await client.call_tool(tool, arguments)).structured_content

        primed = await call("create_session", messages=[{"role": "user", "content": FACTS}])
        print(f"create_session: {primed['tokens']} tokens, computed once")
        forks = (await call("fork_session", session=primed["session"], count=3))["sessions"]
        print(f"fork_session:   {len(forks)} forks, nothing copied")
        asked = zip(forks, NAMES, strict=True)
        answers = await asyncio.gather(*(call("generate", session=f, prompt=f"What is {n}'s badge?") for f, n in asked))
        for name, answer in zip(NAMES, answers, strict=True):
            figures = f"{answer['cached_tokens']} tokens cached, {answer['computed_tokens']} computed"
            print(f"{name}: {answer['text']}   {figures}")


if __name__ == "__main__":
    asyncio.run(main())
