import pytest

from mlx_mcp.chat.message import Image, Message, Text, ToolCall
from mlx_mcp.engine.requests import GenerateRequest, check
from mlx_mcp.errors import InvalidRequest


def test_an_image_is_refused_before_any_model_is_loaded():
    seen = Message("user", (Text("What is this?"), Image(b"\x89PNG", "image/png")))
    alone = Message("user", seen.content[1:])
    for request in (
        GenerateRequest((seen,)),
        GenerateRequest((alone,)),
        GenerateRequest((seen, Message("user", "hi")), context=True),
    ):
        with pytest.raises(InvalidRequest, match="cannot see: leave images out"):
            check(request)


CALL = Message("assistant", tool_calls=(ToolCall("look", {}),))
RESULT = Message("tool", "", name="look")
HI = Message("user", "hi")


@pytest.mark.parametrize("session", ["", "s"])
def test_results_come_after_the_answer_that_asked_for_them(session):
    whole = () if session else (HI, CALL)
    for messages in ((*whole, RESULT), (*whole, RESULT, RESULT, HI), (*whole, RESULT, CALL, RESULT)):
        check(GenerateRequest(messages, session=session))
    for messages in ((HI, RESULT), (HI, Message("assistant", "a"), RESULT), (*whole, RESULT, HI, RESULT)):
        with pytest.raises(InvalidRequest, match="right after the answer that asked for it"):
            check(GenerateRequest(messages, session=session))
    with pytest.raises(InvalidRequest, match="has no `name`"):
        check(GenerateRequest((*whole, Message("tool", "x")), session=session))


def test_a_result_needs_an_answer_before_it_where_no_session_has_one():
    with pytest.raises(InvalidRequest, match="right after the answer"):
        check(GenerateRequest((RESULT,)))


@pytest.mark.parametrize("messages", [(), (Message("user", " "),), (Message("system", "S"),)])
def test_messages_that_ask_nothing_are_refused(messages):
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        check(GenerateRequest(messages))
    with pytest.raises(InvalidRequest, match="model's own"):
        check(GenerateRequest((HI, *messages, Message("assistant", "a"))))


def test_a_raw_prompt_stands_in_place_of_messages():
    check(GenerateRequest((), raw="hi"))
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        check(GenerateRequest((), raw=""))
