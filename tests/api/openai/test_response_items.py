"""The input of a response → messages, and as it is shown again."""

import pytest

from mlx_mcp.api.openai.messages import call_id_of
from mlx_mcp.api.openai.response_items import input_messages, shown_items
from mlx_mcp.chat.message import Image, Message, Text, ToolCall
from mlx_mcp.errors import InvalidRequest

CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "red"}


def said(role, content, **more):
    return {"role": role, "content": content} | more


def test_a_text_is_a_users():
    assert input_messages("hi") == (Message("user", "hi"),)


def test_messages_are_taken_with_and_without_their_type():
    items = [said("developer", "a"), said("user", [{"type": "input_text", "text": "b"}], type="message")]
    assert input_messages(items) == (Message("system", "a"), Message("user", (Text("b"),)))


def test_what_a_model_said_is_one_message():
    items = [
        said("user", "a"),
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        said("assistant", [{"type": "output_text", "text": "b"}], type="message"),
        CALL,
        CALL | {"call_id": "c2"},
        RESULT,
        RESULT | {"call_id": "c2", "output": [{"type": "input_text", "text": "blue"}]},
        said("assistant", "c"),
    ]
    calls = tuple(ToolCall("look", {"at": 1}, call_id) for call_id in ("c1", "c2"))
    assert input_messages(items) == (
        Message("user", "a"),
        Message("assistant", (Text("b"),), "hm", calls),
        Message("tool", "red", call_id="c1", name="look"),
        Message("tool", (Text("blue"),), call_id="c2", name="look"),
        Message("assistant", (Text("c"),)),
    )


def test_thoughts_begin_a_message_and_text_after_calls_begins_another():
    thoughts = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    items = [CALL, said("assistant", "a"), thoughts, said("assistant", "b")]
    assert input_messages(items) == (
        Message("assistant", (), "", (ToolCall("look", {"at": 1}, "c1"),)),
        Message("assistant", (Text("a"),)),
        Message("assistant", (Text("b"),), "hm"),
    )


def test_a_result_finds_its_call_in_what_came_before():
    before = [Message("assistant", tool_calls=(ToolCall("look", {}, "c1"),))]
    assert input_messages([RESULT], before)[0].name == "look"
    own = call_id_of(ToolCall("see", {}))
    assert input_messages([RESULT | {"call_id": own}])[0].name == "see"
    with pytest.raises(InvalidRequest, match="no message before it has that call"):
        input_messages([RESULT])


def test_pictures_are_left_to_the_service():
    picture = {"type": "input_image", "image_url": "https://example.com/a.png"}
    assert input_messages([said("user", [picture])])[0].content == (Image(b"", "image/unknown"),)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": "msg_1"},
        {"type": "web_search_call"},
        {"type": 1},
        {"role": "critic", "content": "x"},
        {"role": "user"},
        {"type": "function_call", "name": "x"},
        {"type": "function_call_output", "call_id": "c1"},
        {},
    ],
)
def test_an_item_that_cannot_be_told_is_refused(item):
    with pytest.raises(InvalidRequest, match="An item of the input, of type"):
        input_messages([item])


@pytest.mark.parametrize("content", [1, [1], {"a": 1}])
def test_a_content_that_is_none_is_refused(content):
    with pytest.raises(InvalidRequest, match="must be a text or a list of parts"):
        input_messages([said("user", content)])


@pytest.mark.parametrize("arguments", ["[1]", "{", "1"])
def test_arguments_that_are_no_object_are_refused(arguments):
    with pytest.raises(InvalidRequest, match="of a function_call are no JSON object"):
        input_messages([CALL | {"arguments": arguments}])


def test_an_input_is_shown_with_types_and_ids():
    [text] = shown_items("hi")
    assert text.pop("id")
    assert text == {
        "type": "message",
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_text", "text": "hi"}],
    }
    message, call = shown_items([said("assistant", "a"), CALL | {"id": "fc_1"}])
    assert message["content"] == [{"type": "output_text", "text": "a"}]
    assert call == CALL | {"id": "fc_1", "status": "completed"}
