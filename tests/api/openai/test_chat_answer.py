"""What the service returns → the answers of chat completions."""

import json

import pytest

from mlx_mcp.api.openai.chat_answer import Chunks, bytes_of, completion
from mlx_mcp.api.openai.counts import Thinking, usage_of
from mlx_mcp.api.openai.head import Head
from mlx_mcp.api.openai.shape import event
from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.message import ToolCall
from mlx_mcp.core.sequence import FinishReason
from mlx_mcp.service.values import Delta, Result, TokenChoice

HEAD = Head("chatcmpl-1", "tiny", 5)
CALL = ToolCall("look", {"at": "ö"}, "c1")


def result(text="a", reason=FinishReason.STOP, **more):
    return Result(text, reason, "tiny", 4, 7, **more)


def whole(*results, **more):
    made = completion(HEAD, results, usage_of(results, [Thinking()] * len(results)), **more)
    return made.sent()


@pytest.mark.parametrize("reason", FinishReason)
def test_every_reason_is_one_of_openais(reason):
    assert whole(result(reason=reason))["choices"][0]["finish_reason"] == reason.value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (result(), {"content": "a"}),
        (result(""), {"content": ""}),
        (result("", reasoning="hm"), {"content": "", "reasoning_content": "hm", "reasoning": "hm"}),
        (
            result("", tool_calls=(CALL,)),
            {
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "ö"}'}}
                ],
            },
        ),
    ],
)
def test_a_message_has_what_the_model_said_and_no_more(given, said):
    assert whole(given)["choices"][0]["message"] == {"role": "assistant", "refusal": None} | said


def test_a_prompt_counts_once_however_many_answers_it_has():
    results = [result(cached_tokens=2, restored_tokens=1), result(cached_tokens=4)]
    usage = whole(*results)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 14, 18)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    two_prompts = usage_of(results, [], 2).sent()
    assert (two_prompts["prompt_tokens"], two_prompts["prompt_tokens_details"]) == (8, {"cached_tokens": 7})


def test_tokens_between_thoughts_are_not_thoughts():
    thinking = Thinking()
    for kind, num_tokens in (("reasoning", 2), ("answer", 3), ("answer", 3), ("tool_call", 5), ("reasoning", 6)):
        thinking.take(Delta("x", num_tokens, TextKind(kind)))
    assert thinking.num_tokens == 2 + 1


def test_notes_are_told_once_each():
    assert whole(result(notes=("A.", "B.")), result(notes=("A.",)), note="C.")["note"] == "C. A. B."
    assert "note" not in whole(result())


def test_log_probabilities_have_bytes_where_a_token_is_whole_characters():
    logprobs = (TokenChoice(1, "ö", -0.5, ((1, "ö", -0.5), (2, "\ufffd", -1.0))),)
    [token] = whole(result(logprobs=logprobs), logprobs=True)["choices"][0]["logprobs"]["content"]
    assert token == {
        "token": "ö",
        "bytes": [0xC3, 0xB6],
        "logprob": -0.5,
        "top_logprobs": [
            {"token": "ö", "bytes": [0xC3, 0xB6], "logprob": -0.5},
            {"token": "\ufffd", "bytes": None, "logprob": -1.0},
        ],
    }
    assert bytes_of("") == []


@pytest.mark.parametrize("usage", [True, False])
def test_chunks_have_null_for_usage_only_where_it_comes_at_the_end(usage):
    chunks = Chunks(HEAD, logprobs=False, parallel=True, usage=usage)
    made = [chunks.opening(0), *chunks.ending(0, result(tool_calls=(CALL,)))]
    sent = [*map(event, made), chunks.text(0, Delta("a", 1))]
    assert all((b'"usage":null' in each) == usage for each in sent)
    assert len(made) == 4
    assert chunks.text(0, Delta("x", 2, TextKind.TOOL_CALL)) is None


@pytest.mark.parametrize("text", ["a", '"quoted"', "\0", "ö\n\u2028\r\n", "\\u0000", ""])
@pytest.mark.parametrize("kind", [TextKind.ANSWER, TextKind.REASONING])
def test_any_text_is_one_line_of_an_event_and_reads_as_it_was(text, kind):
    chunks = Chunks(Head("chatcmpl-1", '"a\0b"'), logprobs=False, parallel=True, usage=False)
    for _ in range(2):
        sent = chunks.text(3, Delta(text, 1, kind)).decode()
        data, *ends = sent.split("\n")
        assert ends == ["", ""]
        told = json.loads(data.removeprefix("data: "))
        names = ("content",) if kind is TextKind.ANSWER else ("reasoning_content", "reasoning")
        assert told["choices"] == [{"index": 3, "delta": dict.fromkeys(names, text), "finish_reason": None}]
        assert told["model"] == '"a\0b"'
