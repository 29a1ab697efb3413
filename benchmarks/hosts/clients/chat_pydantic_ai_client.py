"""pydantic-ai: an agent with a tool, its answer streamed."""

from __future__ import annotations

from chat_story import MODEL, PROMPT, lookup, main
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


async def chat(address: str, token: str) -> list[str]:
    """Run the agent; it calls the tool by itself."""
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=address, api_key=token))
    agent = Agent(model, tools=[lookup])
    async with agent.run_stream(PROMPT) as run:
        return [piece async for piece in run.stream_text(delta=True, debounce_by=None)]


if __name__ == "__main__":
    main("pydantic-ai-slim", chat)
