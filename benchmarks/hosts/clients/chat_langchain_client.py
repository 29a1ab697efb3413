"""langchain-openai: a chat model with a tool bound to it, and the loop that an agent makes of it."""

from __future__ import annotations

from chat_story import MODEL, PROMPT, lookup, main
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


async def chat(address: str, token: str) -> list[str]:
    """Stream, carry the call out, and stream again."""
    model = ChatOpenAI(base_url=address, api_key=token, model=MODEL).bind_tools([tool(lookup)])
    messages, pieces = [HumanMessage(PROMPT)], []
    while True:
        whole, pieces = None, []
        async for chunk in model.astream(messages):
            whole = chunk if whole is None else whole + chunk
            pieces += [chunk.text] if chunk.text else []
        if not whole.tool_calls:
            return pieces
        messages.append(whole)
        messages += [ToolMessage(lookup(**call["args"]), tool_call_id=call["id"]) for call in whole.tool_calls]


if __name__ == "__main__":
    main("langchain-openai", chat)
