"""The user's consent, asked for through the host, in both protocol eras."""

from typing import Annotated

import pytest
from mcp import Client, MCPError
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import CallToolResult, ElicitResult, InputRequiredResult, TextContent
from pydantic import BaseModel

from mlx_mcp.api.mcp.arguments import Arguments
from mlx_mcp.api.mcp.consent import Asking, may_fetch, may_remove
from mlx_mcp.api.mcp.results import reply
from mlx_mcp.api.mcp.strict_tool import StrictTool


@pytest.fixture(params=["auto", "legacy"])
def mode(request):
    return request.param


def server():
    """A server whose tools ask, and count how often they got further."""
    made = MCPServer("asks")
    made.done = []

    async def asking(work) -> CallToolResult | InputRequiredResult:
        try:
            answer = await work
        except Asking as question:
            return question.result
        made.done.append(answer)
        return CallToolResult(content=[TextContent(type="text", text=str(answer))])

    @made.tool()
    async def fetch(ctx: Context, size: int = 0) -> CallToolResult | InputRequiredResult:
        return await asking(may_fetch(ctx, "owner/model", size, 5_000_000_000))

    @made.tool()
    async def remove(ctx: Context, sessions: list[str], confirm: bool = False) -> CallToolResult | InputRequiredResult:
        return await asking(may_remove(ctx, sessions, confirm))

    return made


def user(action, content=None):
    """A host whose user replies so to every question; and the questions."""
    asked = []

    async def reply(context, params):
        asked.append(params)
        return ElicitResult(action=action, content=content)

    return reply, asked


@pytest.mark.parametrize(
    ("action", "content", "goes_on"),
    [
        ("accept", {"go_ahead": True}, True),
        ("accept", {"go_ahead": False}, False),
        ("decline", None, False),
        ("cancel", None, False),
    ],
)
async def test_what_the_user_says_counts(mode, action, content, goes_on):
    replies, asked = user(action, content)
    made = server()
    async with Client(made, mode=mode, elicitation_callback=replies) as client:
        result = await client.call_tool("fetch", {"size": 2_500_000_000})
    assert (result.is_error, result.content[0].text, made.done) == (False, str(goes_on), [goes_on])
    (question,) = asked
    assert "owner/model" in question.message
    assert "2.5 GB; 5.0 GB are free" in question.message
    assert question.requested_schema["properties"]["go_ahead"]["type"] == "boolean"


class Given(Arguments):
    """Of the tool below."""

    size: int


class Answer(BaseModel):
    """What it returns."""

    may: bool


async def test_a_tool_of_this_package_can_ask_too(mode):
    class Tools:
        async def fetch(self, given: Given, ctx: Context) -> Annotated[CallToolResult, Answer]:
            """Ask."""
            try:
                return reply(Answer(may=await may_fetch(ctx, "owner/model", given.size, 10**9)))
            except Asking as question:
                return question.result

    replied, asked = user("accept", {"go_ahead": True})
    made = MCPServer("asks", tools=[StrictTool.make(Tools().fetch, "Fetch")])
    async with Client(made, mode=mode, elicitation_callback=replied) as client:
        result = await client.call_tool("fetch", {"size": 7})
    assert (result.structured_content, len(asked)) == ({"may": True}, 1)


async def test_a_host_that_cannot_ask_downloads_what_the_servers_user_has_named(mode):
    async with Client(server(), mode=mode) as client:
        assert (await client.call_tool("fetch", {})).content[0].text == "True"


async def test_a_host_that_cannot_ask_has_to_confirm_that_sessions_are_removed(mode):
    made = server()
    async with Client(made, mode=mode) as client:
        refused = await client.call_tool("remove", {"sessions": ["notes"]})
        assert refused.is_error
        assert "confirm=true" in refused.content[0].text
        assert "mlx-mcp sessions rm" in refused.content[0].text
        assert made.done == []
        assert (await client.call_tool("remove", {"sessions": ["notes"], "confirm": True})).content[0].text == "True"
        assert (await client.call_tool("remove", {"sessions": []})).content[0].text == "True"


async def test_many_sessions_are_counted_in_the_question(mode):
    replies, asked = user("decline")
    async with Client(server(), mode=mode, elicitation_callback=replies) as client:
        assert (await client.call_tool("remove", {"sessions": list(map(str, range(14)))})).content[0].text == "False"
    assert "9 and 4 more" in asked[0].message


async def test_a_reply_that_is_filled_in_wrong_is_no_consent(mode):
    replies, _ = user("accept", {"go_ahead": "perhaps"})
    made = server()
    async with Client(made, mode=mode, elicitation_callback=replies) as client:
        result = await client.call_tool("fetch", {})
    assert made.done in ([], [False])
    if mode == "legacy":
        assert "The reply to the question was not of its form; call again" in result.content[0].text
    else:
        assert result.content[0].text == "False"


async def test_a_reply_counts_only_to_a_question_that_was_asked():
    made = server()
    can_ask, _ = user("cancel")
    yes = {"consent": ElicitResult(action="accept", content={"go_ahead": True})}
    async with Client(made, elicitation_callback=can_ask) as client:
        asked = await client.session.call_tool("fetch", {}, input_responses=yes, allow_input_required=True)
        assert isinstance(asked, InputRequiredResult)
        assert made.done == []
        for arguments, state in (({"size": 9 * 10**9}, asked.request_state), ({}, "download owner/model")):
            with pytest.raises(MCPError, match="requestState"):
                await client.session.call_tool("fetch", arguments, input_responses=yes, request_state=state)
        reply = {"input_responses": yes, "request_state": asked.request_state}
        assert (await client.session.call_tool("fetch", {}, **reply)).content[0].text == "True"
