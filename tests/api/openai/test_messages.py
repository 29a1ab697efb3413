"""Messages in OpenAI's form → messages as the service has them."""

import base64

import pytest

from mlx_mcp.api.openai.chat_shapes import TakenMessage
from mlx_mcp.api.openai.messages import call_id_of, messages_of
from mlx_mcp.chat.message import Image, Message, Text, ToolCall
from mlx_mcp.errors import InvalidRequest

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}


def read(*messages):
    return messages_of([TakenMessage.model_validate(message) for message in messages])


def said(role, content, **more):
    return {"role": role, "content": content} | more


def test_every_role_is_taken_and_a_developers_message_is_a_systems():
    conversation = read(
        said("system", "a"),
        said("developer", "b"),
        said("user", "c", name="ann"),
        said("assistant", None, tool_calls=[CALL]),
        said("tool", "d", tool_call_id="c1"),
        said("assistant", "e", reasoning_content="hm"),
        said("user", "f"),
        said("system", "g"),
    )
    assert conversation == (
        Message("system", "a"),
        Message("system", "b"),
        Message("user", "c"),
        Message("assistant", tool_calls=(ToolCall("look", {"at": 1}, "c1"),)),
        Message("tool", "d", call_id="c1", name="look"),
        Message("assistant", "e", reasoning="hm"),
        Message("user", "f"),
        Message("system", "g"),
    )


def test_the_old_role_of_a_functions_result_has_its_name():
    assert read(said("function", "x", name="look")) == (Message("tool", "x", name="look"),)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_thoughts_are_taken_by_either_name(key):
    assert read(said("assistant", "x", **{key: "hm"}))[0].reasoning == "hm"


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_a_content_in_parts_stays_in_parts(kind):
    parts = [{"type": kind, "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert read(said("user", parts))[0].content == (Text("a"), Text("b"))


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "data:image/png;base64,!!", "data:text/plain;base64,aaaa"]
)
def test_a_picture_that_is_not_in_the_message_is_not_fetched(url):
    part = {"type": "image_url", "image_url": {"url": url}}
    assert read(said("user", [part]))[0].content == (Image(b"", "image/unknown"),)


def test_a_picture_is_read_from_its_data_url():
    url = f"data:image/png;base64,{base64.b64encode(b'png').decode()}"
    for given in ({"type": "image_url", "image_url": {"url": url}}, {"type": "input_image", "image_url": url}):
        assert read(said("user", [given]))[0].images == (Image(b"png", "image/png"),)


@pytest.mark.parametrize("part", [{"type": "input_audio"}, {"type": "file"}, {"type": "text"}, {}, {"type": 1}])
def test_a_part_that_is_neither_text_nor_picture_is_refused(part):
    with pytest.raises(InvalidRequest, match="cannot be told to a model here"):
        read(said("user", [part]))


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_are_taken_as_text_and_as_an_object(arguments):
    call = {"function": {"name": "look", "arguments": arguments}}
    assert read(said("assistant", "", tool_calls=[call]))[0].tool_calls == (ToolCall("look", {"a": 1}),)


def test_a_call_without_arguments_has_none():
    call = {"function": {"name": "look", "arguments": ""}}
    assert read(said("assistant", "", tool_calls=[call]))[0].tool_calls == (ToolCall("look", {}),)


@pytest.mark.parametrize(
    "call",
    [{}, {"function": {"name": "x"}}, {"function": {"name": "", "arguments": "{}"}}]
    + [{"function": {"name": "x", "arguments": arguments}} for arguments in ("[1]", "{", "1", "[" * 9999)],
)
def test_a_call_that_is_none_is_refused(call):
    with pytest.raises(InvalidRequest, match="is no call of a function"):
        read(said("assistant", "", tool_calls=[call]))


def test_a_result_finds_its_function_by_the_id_that_was_made_here():
    made = call_id_of(ToolCall("look_at.it", {}))
    assert made != call_id_of(ToolCall("look_at.it", {}))
    assert read(said("tool", "x", tool_call_id=made))[0].name == "look_at.it"
    assert call_id_of(ToolCall("look", {}, "functions.look:0")) == "functions.look:0"


def test_a_result_of_a_call_that_is_not_there_is_refused():
    with pytest.raises(InvalidRequest, match="no message before it has that call"):
        read(said("user", "hi"), said("tool", "x", tool_call_id="c9"))
