"""The main job in one page: a real MCP client starts the server, lists its models, and asks one of them.

Run it with `make demo`, or `python examples/recall.py` where mlx-mcp is installed. It needs no network: the embedded
model answers. Prints the dialog, and fails if the answer is wrong.
"""

import asyncio
import sys

from mcp import Client, StdioServerParameters

FACTS = "Alice's badge is 771. The deploy code is 4096. Bob has the pet parrot."
QUESTION = "What is the deploy code?"


async def main() -> None:
    """Ask one recall question over stdio, as an agent host would."""
    server = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve", "--standalone"])
    async with Client(server) as client:
        models = await client.call_tool("list_models", {})
        print("models:", ", ".join(model["name"] for model in models.structured_content["models"]))

        async def show(progress: float, total: float | None, message: str | None) -> None:
            print(f"  … {message}")

        result = await client.call_tool("generate", {"system": FACTS, "prompt": QUESTION}, progress_callback=show)
        answer = result.structured_content
        print(f"told:   {FACTS}\nasked:  {QUESTION}\nanswer: {answer['text']}")
        print(
            f"        ({answer['model']}, {answer['prompt_tokens']} prompt tokens, ended by {answer['finish_reason']})"
        )
        assert answer["text"].strip() == "4096", answer


if __name__ == "__main__":
    asyncio.run(main())
