"""LiteLLM: its own call, with the server as an OpenAI-compatible provider."""

from __future__ import annotations

import json

import litellm
from chat_story import MODEL, PROMPT, lookup, main

litellm.suppress_debug_info = True
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": lookup.__doc__,
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}


async def chat(address: str, token: str) -> list[str]:
    """Stream, carry the call out, and stream again; the chunks are put together by LiteLLM."""
    messages: list = [{"role": "user", "content": PROMPT}]
    while True:
        stream = await litellm.acompletion(
            f"openai/{MODEL}", messages, tools=[TOOL], stream=True, api_base=address, api_key=token
        )
        chunks = [chunk async for chunk in stream]
        message = litellm.stream_chunk_builder(chunks).choices[0].message
        if not message.tool_calls:
            return [text for chunk in chunks if (text := chunk.choices[0].delta.content)]
        messages.append(message)
        for call in message.tool_calls:
            result = lookup(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


if __name__ == "__main__":
    main("litellm", chat)
