"""What the service returns → a response and its events."""

import pytest

from mlx_mcp.api.openai.head import Head
from mlx_mcp.api.openai.response_shapes import ResponseRequest
from mlx_mcp.api.openai.response_turn import turn_of
from mlx_mcp.api.openai.response_writer import ResponseWriter
from mlx_mcp.api.openai.responses import response_of
from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.core.sequence import FinishReason
from mlx_mcp.errors import CapacityError, GenerationFailed
from mlx_mcp.service.values import Delta, Result

THOUGHT, SAID, CALL = TextKind.REASONING, TextKind.ANSWER, TextKind.TOOL_CALL


def writer(parallel=True):
    body = ResponseRequest(input="hi", model="tiny")
    return ResponseWriter(
        response_of(body, Head("resp_1", "tiny"), turn_of(body, "resp_1", None)), parallel, {"y": "eyes"}
    )


def result(text="", reason=FinishReason.STOP, **more):
    return Result(text, reason, "tiny", 4, 7, **more)


def written(deltas, ended, parallel=True):
    """The events of an answer, and what writes them."""
    made = writer(parallel)
    events = list(made.opening())
    for number, (kind, text) in enumerate(deltas, 1):
        events += made.text(Delta(text, number, kind))
    return events + list(made.ending(ended)), made


def kinds(events):
    return [event.type.removeprefix("response.") for event in events]


def items(made):
    return [(item.type, item.status) for item in made.response.output]


@pytest.mark.parametrize(
    ("deltas", "ended", "expected"),
    [
        ([(SAID, "a")], result("a"), ["message"]),
        ([(THOUGHT, "a")], result(reasoning="a"), ["reasoning"]),
        ([(THOUGHT, "a"), (SAID, "b")], result("b", reasoning="a"), ["reasoning", "message"]),
        ([(SAID, "a"), (THOUGHT, "b"), (SAID, "c")], result("ac"), ["message", "reasoning", "message"]),
        ([], result(), ["message"]),
        ([(CALL, "x")], result(tool_calls=(ToolCall("x", {}),)), ["function_call"]),
        (
            [(SAID, "a"), (CALL, "x"), (SAID, "b"), (CALL, "y")],
            result("ab", tool_calls=(ToolCall("x", {}), ToolCall("y", {}))),
            ["message", "function_call", "function_call"],
        ),
    ],
)
def test_items_are_what_was_written_in_its_order(deltas, ended, expected):
    events, made = written(deltas, ended)
    assert items(made) == [(kind, "completed") for kind in expected]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    opened = [event for event in events if event.type == "response.output_item.added"]
    closed = [event for event in events if event.type == "response.output_item.done"]
    assert (
        [event.output_index for event in opened] == [event.output_index for event in closed] == [*range(len(expected))]
    )
    assert [event.item.id for event in opened] == [event.item.id for event in closed]
    assert [event.item for event in closed] == made.response.output
    assert events[-1].response is made.response


def test_text_that_goes_on_after_a_call_is_one_item():
    events, made = written([(SAID, "a"), (CALL, "x"), (SAID, "b")], result("ab", tool_calls=(ToolCall("x", {}),)))
    assert made.response.output[0].content[0].text == "ab"
    assert kinds(events)[-5:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_an_answer_that_was_cut_off_is_incomplete_with_the_item_it_was_in():
    _, made = written([(THOUGHT, "a"), (SAID, "b")], result("b", FinishReason.LENGTH, reasoning="a"))
    assert items(made) == [("reasoning", "completed"), ("message", "incomplete")]
    assert (made.response.status, made.response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.response.completed_at is None


def test_the_message_of_an_answer_has_its_calls_with_the_ids_that_were_shown():
    calls = (ToolCall("x", {"a": 1}), ToolCall("y", {}, "own"))
    _, made = written([(THOUGHT, "t"), (SAID, "a")], result("a", reasoning="t", tool_calls=calls))
    shown = [item.call_id for item in made.response.output if item.type == "function_call"]
    assert shown[1] == "own"
    assert [item.sent().get("namespace") for item in made.response.output[2:]] == [None, "eyes"]
    assert made.message == Message("assistant", "a", "t", (ToolCall("x", {"a": 1}, shown[0]), calls[1]))
    _, one = written([], result(tool_calls=calls), parallel=False)
    assert len(one.response.output) == len(one.message.tool_calls) == 1


def test_tokens_are_counted():
    _, made = written([(THOUGHT, "a"), (THOUGHT, "b"), (SAID, "c")], result("c", cached_tokens=1, restored_tokens=2))
    assert made.response.usage.sent() == {
        "input_tokens": 4,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 11,
    }


@pytest.mark.parametrize(
    ("error", "code"), [(CapacityError("Full.", 3), "server_overloaded"), (GenerationFailed("Broken."), "server_error")]
)
def test_a_response_that_broke_off_ends_with_why(error, code):
    made = writer()
    events = [*made.opening(), *made.text(Delta("a", 1)), *made.failing(error)]
    assert kinds(events)[-2:] == ["error", "failed"]
    assert events[-2].error.message == events[-2].message == str(error)
    assert (events[-1].response.status, events[-1].response.error.code) == ("failed", code)


def test_events_that_were_made_before_do_not_change():
    made = writer()
    created = next(made.opening())
    list(made.text(Delta("a", 1)))
    list(made.ending(result("a")))
    assert created.response.output == []
