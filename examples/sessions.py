"""A briefing is read once, and every agent goes on from it: four forks of one session, and a batch over it.

Run it with `python examples/sessions.py` where mlx-mcp is installed; no network is needed. Each agent is told a secret
of its own, all at once, and then asked for its own and for what the briefing says; none hears another's. Prints how
many tokens were computed, and fails if an answer is wrong or the briefing was read twice.
"""

import asyncio
import sys

from mcp import Client, StdioServerParameters

BRIEFING = " ".join(
    f"{name}'s badge is {100 + 71 * i}."
    for i, name in enumerate(["Adam", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Henry", "Iris", "Jack"])
)
SECRETS = {"Karen": "317", "Liam": "428", "Mia": "539", "Noah": "640"}  # each agent's own


async def main() -> None:
    """Brief once, fork, tell and ask all agents together."""
    server = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve", "--standalone"])
    async with Client(server) as client:

        async def call(tool: str, **arguments: object) -> dict:
            result = await client.call_tool(tool, arguments)
            assert not result.is_error, result.content[0].text
            return result.structured_content

        briefing = await call("create_session", system=BRIEFING, name="briefing")
        print(f"briefing: {briefing['tokens']} tokens, computed {briefing['computed_tokens']}")
        forks = await call("fork_session", session="briefing", names=list(SECRETS))

        async def agent(name: str, session: str) -> tuple[str, str]:
            told = await call("generate", session=session, prompt=f"{name}'s badge is {SECRETS[name]}.")
            assert told["cached_tokens"] >= briefing["tokens"], "the briefing was read again"
            own = await call("generate", session=session, prompt=f"What is {name}'s badge?")
            shared = await call("generate", session=session, prompt="What is Bob's badge?")
            computed = sum(turn["computed_tokens"] for turn in (told, own, shared))
            print(f"{name}: own {own['text']}, shared {shared['text']}, computed {computed} tokens in three turns")
            return own["text"], shared["text"]

        answers = await asyncio.gather(*map(agent, SECRETS, forks["sessions"]))
        assert answers == [(secret, "171") for secret in SECRETS.values()], answers

        asked = [f"What is {name}'s badge?" for name in ("Carol", "Grace", "Karen")]
        batch = (await call("generate_batch", session="briefing", prompts=asked))["results"]
        for prompt, result in zip(asked, batch, strict=True):
            print(f"{prompt} {result['text']} ({result['cached_tokens']} tokens cached)")
        assert [result["text"] for result in batch[:2]] == ["242", "526"]
        assert batch[2]["text"] != SECRETS["Karen"], "what a fork is told, nobody else hears"
        await call("close_session", all=True)


if __name__ == "__main__":
    asyncio.run(main())
