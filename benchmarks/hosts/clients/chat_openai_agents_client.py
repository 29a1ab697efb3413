"""openai-agents: an agent with a tool, over the responses API, which it uses by itself, and over chat completions."""

from __future__ import annotations

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from chat_story import ASKED, MODEL, PROMPT, lookup, main
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent


async def chat(address: str, token: str) -> list[str]:
    """Run the agent with either API; it calls the tool by itself."""
    set_tracing_disabled(True)  # traces go to OpenAI
    client = AsyncOpenAI(base_url=address, api_key=token)
    told = []
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        ASKED.clear()
        agent = Agent(name="badges", model=kind(MODEL, client), tools=[function_tool(lookup)])
        events = Runner.run_streamed(agent, PROMPT).stream_events()
        raw = [event.data async for event in events if event.type == "raw_response_event"]
        told.append([each.delta for each in raw if isinstance(each, ResponseTextDeltaEvent)])
    assert told[0] == told[1], told
    return told[0]


if __name__ == "__main__":
    main("openai-agents", chat)
