"""A model that follows instructions, through a real MCP client: a session, forks of it, and JSON.

Run it with `make demo-real`, which makes the model's folder first, or `python examples/real/assistant.py FOLDER` with a
folder of any instruct model. Prints what is said, and fails if an answer is wrong.
"""

import asyncio
import json
import sys

from mcp import Client, StdioServerParameters

FOLLOW_UPS = {"And of Italy?": "Rome", "And of Japan?": "Tokyo", "Which river flows through it?": "Seine"}
NOTE = "Maria Lopez, aged 34, moved to Madrid in May. She works as a nurse."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 30},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


async def main(folder: str) -> None:
    """Ask, go on from the answer in three ways at once, and have a note read into JSON."""
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "mlx_mcp", "serve", "--standalone", "--model", folder]
    )
    async with Client(server) as client:

        async def call(tool: str, **arguments: object) -> dict:
            result = await client.call_tool(tool, arguments)
            assert not result.is_error, result.content[0].text
            return result.structured_content

        async def ask(prompt: str, **arguments: object) -> dict:
            answer = await call("generate", prompt=prompt, max_tokens=60, **arguments)
            counts = f"{answer['cached_tokens']} tokens cached, {answer['computed_tokens']} computed"
            print(f"asked:  {prompt}\nanswer: {answer['text'].strip()}\n        ({counts})")
            return answer

        first = await ask("What is the capital of France? Answer in one sentence.", keep=True)
        assert "Paris" in first["text"], first

        forks = (await call("fork_session", session=first["session"], count=len(FOLLOW_UPS)))["sessions"]
        asked = [ask(prompt, session=fork) for prompt, fork in zip(FOLLOW_UPS, forks, strict=True)]
        for word, answer in zip(FOLLOW_UPS.values(), await asyncio.gather(*asked), strict=True):
            assert word in answer["text"], answer
            assert answer["cached_tokens"] >= first["prompt_tokens"], "a fork computes what is new"

        person = json.loads((await ask(f"Write as JSON with name, age and city: {NOTE}", json_schema=PERSON))["text"])
        assert person == {"name": "Maria Lopez", "age": 34, "city": "Madrid"}, person


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
