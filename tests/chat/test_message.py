from mlx_mcp.chat.message import Image, Message, Text, ToolCall

LOOK = ToolCall("look", {"at": "door"}, "call_1")


def test_a_plain_message_is_its_role_and_its_text_and_nothing_else():
    assert Message("user", "hi").to_template() == {"role": "user", "content": "hi"}
    assert Message("user", (Text("h"), Text("i"))).to_template() == {"role": "user", "content": "hi"}


def test_a_template_sees_reasoning_and_tool_calls_by_the_names_that_templates_use():
    assert Message("assistant", "", "The door first.", (LOOK,)).to_template() == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "The door first.",
        "tool_calls": [{"type": "function", "id": "call_1", "function": {"name": "look", "arguments": {"at": "door"}}}],
    }
    (call,) = Message("assistant", tool_calls=(ToolCall("look", {}),)).to_template()["tool_calls"]
    assert "id" not in call


def test_a_template_sees_whose_result_a_tools_message_is():
    assert Message("tool", "It is open.", call_id="call_1", name="look").to_template() == {
        "role": "tool",
        "content": "It is open.",
        "tool_call_id": "call_1",
        "name": "look",
    }


def test_a_message_tells_its_images_from_its_text():
    image = Image(b"\x89PNG", "image/png")
    message = Message("user", (Text("What is "), image, Text("this?")))
    assert (message.text, message.images) == ("What is this?", (image,))
    assert (Message("user", "hi").text, Message("user", "hi").images) == ("hi", ())
