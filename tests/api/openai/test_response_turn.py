"""A request for a response, and the one that it goes on from → what the service takes."""

import pytest

from mlx_mcp.api.openai.response_shapes import ResponseRequest
from mlx_mcp.api.openai.response_turn import Told, goes_on, turn_of
from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import Reasoning
from mlx_mcp.service.replies import Reply
from mlx_mcp.service.values import Sampling, SessionOptions

LOOK = {"type": "function", "name": "look", "parameters": {}}
LOOK_OF_CHAT = {"type": "function", "function": {"name": "look", "parameters": {}}}
USER, ANSWER, SYSTEM = Message("user", "one"), Message("assistant", "uno"), Message("system", "Brief.")


def turn(previous=None, **members):
    return turn_of(ResponseRequest.model_validate({"input": "two", "model": "tiny"} | members), "resp_new", previous)


def before(model="tiny", instructions="Brief.", tools=()):
    return Reply("resp_old", "", None, None, Told(model, instructions, tools), (SYSTEM, USER, ANSWER), 9, "s_old")


def test_a_conversation_begins_with_its_instructions():
    made = turn(instructions="Brief.", tools=[LOOK], temperature=0.5, max_output_tokens=7, reasoning={"effort": "low"})
    assert made.context.messages == made.messages == (SYSTEM, Message("user", "two"))
    assert made.options.tools == (LOOK_OF_CHAT,)
    assert made.options.sampling == Sampling(temperature=0.5, max_tokens=7)
    assert made.options.shorten
    assert (made.options.reasoning, made.options.model, made.parent) == (Reasoning.LOW, "tiny", "")
    assert made.told == Told("tiny", "Brief.", (LOOK_OF_CHAT,))


def test_a_response_that_is_stored_opens_a_session_of_its_id_that_is_never_written_to_disk():
    assert (turn().options.keep, turn().options.opening) == (True, SessionOptions("resp_new", ephemeral=True))
    assert turn(store=False).options.keep is False


@pytest.mark.parametrize("same", [{}, {"instructions": "Brief."}, {"instructions": None}, {"model": ""}])
def test_it_goes_on_in_a_fork_where_nothing_else_is_said(same):
    made = turn(before(), **same)
    assert (made.parent, made.options.session, made.options.model) == ("s_old", "", "")
    assert made.context.messages == (Message("user", "two"),)
    assert made.messages == (SYSTEM, USER, ANSWER, Message("user", "two"))
    assert made.told == before().told


def test_what_is_not_stored_asks_the_session_itself_and_leaves_it():
    made = turn(before(), store=False)
    assert (made.parent, made.options.session, made.options.keep) == ("", "s_old", False)


@pytest.mark.parametrize(
    ("change", "system"),
    [
        ({"instructions": "Long."}, (Message("system", "Long."),)),
        ({"instructions": ""}, ()),
        ({"tools": [LOOK]}, (SYSTEM,)),
        ({"model": "other"}, (SYSTEM,)),
        ({"input": [{"role": "assistant", "content": "two"}, {"role": "user", "content": "x"}]}, (SYSTEM,)),
    ],
)
def test_it_is_told_anew_where_something_else_is_said(change, system):
    made = turn(before(), **change)
    assert (made.parent, made.options.session) == ("", "")
    assert made.context.messages == made.messages
    assert made.messages[: len(system) + 2] == (*system, USER, ANSWER)
    assert made.options.opening.name == "resp_new"


def test_tools_that_are_offered_again_are_not_told_again():
    held = before(tools=(LOOK_OF_CHAT,))
    assert turn(held, tools=[LOOK], tool_choice="required").options.tools == ()
    assert turn(held, tools=[LOOK], tool_choice="required").options.tool_choice == "required"
    assert turn(held).options.tool_choice == "none"
    assert turn(before()).options.tool_choice == "auto"


@pytest.mark.parametrize(
    ("roles", "goes"),
    [("user", True), ("tool user", True), ("", False), ("assistant user", False), ("user system", False)],
)
def test_a_turn_begins_with_the_user_or_a_result_and_has_no_system_message(roles, goes):
    assert goes_on([Message(role, "x") for role in roles.split()]) == goes
