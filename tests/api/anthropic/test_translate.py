"""What clients send → what the service takes, part by part."""

import base64
import json

import pytest

from mlx_mcp.api.anthropic.messages import own_id
from mlx_mcp.api.anthropic.shapes import CountRequest, MessagesRequest
from mlx_mcp.api.anthropic.translate import told_by
from mlx_mcp.chat.message import Image, Message, Text, ToolCall
from mlx_mcp.chat.prompt import AUTO, NO_SWITCH, NONE, REQUIRED, Grammar, GrammarKind, Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.values import Sampling

BILLING = "x-anthropic-billing-header: cc_version=2.1.332.a1b; cc_entrypoint=cli;"
USER = {"role": "user", "content": "hi"}
TOOL = {"name": "look", "description": "looks", "input_schema": {"type": "object", "properties": {"at": {}}}}
FUNCTION = {
    "type": "function",
    "function": {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {"at": {}}}},
}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "sea"}}
CALLED = {"role": "assistant", "content": [CALL]}


def told(*messages, **fields):
    return told_by(MessagesRequest.model_validate({"messages": messages or [USER]} | fields))


def messages(*given, **fields):
    return told(*given, **fields).messages


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def text(said):
    return {"type": "text", "text": said}


def result(content, call_id="toolu_1", **fields):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content} | fields


# System


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ("be brief", "be brief"),
        ([text("be"), text("brief")], "be\n\nbrief"),
        ([text(BILLING), text("be brief")], "be brief"),
        ([text(f"{BILLING}\n\nbe"), text("brief")], "be\n\nbrief"),
        (f"{BILLING}\nbe brief", "be brief"),
        ([text("be brief"), text(f"keep {BILLING}")], f"be brief\n\nkeep {BILLING}"),
    ],
)
def test_the_system_prompt_is_its_blocks_without_the_billing_line(system, said):
    assert messages(system=system) == (Message("system", said), Message("user", "hi"))


@pytest.mark.parametrize("system", [None, "", [], [text(BILLING)], BILLING])
def test_an_empty_system_prompt_is_none(system):
    assert messages(system=system) == (Message("user", "hi"),)


def test_a_system_message_amid_a_conversation_stays_where_it_is():
    env = {"role": "system", "content": [text("it rains")]}
    given = messages(USER, env, {"role": "assistant", "content": "ho"}, USER, env, system="s")
    assert [message.role for message in given] == ["system", "user", "system", "assistant", "user", "system"]
    assert given[2] == Message("system", "it rains")


# Messages


def test_a_users_texts_are_one_message():
    assert messages(user(text("<system-reminder>"), text("hi"))) == (Message("user", "<system-reminder>\n\nhi"),)


def test_turns_of_one_role_are_one_turn():
    ho = {"role": "assistant", "content": "ho"}
    assert messages(USER, USER, ho, ho, USER) == (
        Message("user", "hi\n\nhi"),
        Message("assistant", "hoho"),
        Message("user", "hi"),
    )


def test_an_answer_has_thoughts_text_and_calls():
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "redacted_thinking", "data": "secret"},
        text("I "),
        text("look."),
        CALL,
    ]
    given = told(USER, {"role": "assistant", "content": blocks}, user(result("open")))
    call = ToolCall("look", {"at": "sea"}, "toolu_1")
    assert given.messages[1:] == (
        Message("assistant", "I look.", "hm", (call,)),
        Message("tool", "open", call_id="toolu_1", name="look"),
    )
    assert "blocks of other types" in given.ignored


def test_results_come_in_the_order_of_their_calls_and_before_the_users_text():
    second = CALL | {"id": "toolu_2", "name": "read"}
    asked = {"role": "assistant", "content": [CALL, second]}
    given = messages(USER, asked, user(text("and?"), result("two", "toolu_2"), result([text("o"), text("ne")])))
    assert given[2:] == (
        Message("tool", "o\n\nne", call_id="toolu_1", name="look"),
        Message("tool", "two", call_id="toolu_2", name="read"),
        Message("user", "and?"),
    )


@pytest.mark.parametrize(
    ("content", "said"), [("no", "Error: no"), ([text("no")], "Error: no"), (None, "Error: "), ([], "Error: ")]
)
def test_a_result_that_is_an_error_says_so(content, said):
    assert messages(USER, CALLED, user(result(content, is_error=True)))[2].content == said


@pytest.mark.parametrize(
    ("shown", "own"),
    [
        ("toolu_0123456789abcdef", ""),
        ("toolu_0123456789abcdef_functions.look:0", "functions.look:0"),
        ("toolu_01AnthropicsOwn", "toolu_01AnthropicsOwn"),
        ("call_1", "call_1"),
    ],
)
def test_a_call_has_the_id_that_the_model_wrote(shown, own):
    assert own_id(shown) == own
    given = messages(USER, {"role": "assistant", "content": [CALL | {"id": shown}]}, user(result("x", shown)))
    assert (given[1].tool_calls[0].call_id, given[2].call_id, given[2].name) == (own, own, "look")


def test_documents_and_search_results_are_text():
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "body"}}
    parts = {"type": "document", "context": "C", "source": {"type": "content", "content": [text("a"), text("b")]}}
    whole = {"type": "document", "source": {"type": "content", "content": "all"}}
    found = {"type": "search_result", "title": "F", "source": "https://x", "content": [text("hit")]}
    assert messages(user(plain, parts, whole, found)) == (Message("user", "T\nbody\n\nC\na\n\nb\n\nall\n\nF\nhit"),)


def test_a_picture_comes_as_its_bytes():
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    shown = Image(b"hi", "image/png")
    assert messages(user(text("see"), picture)) == (Message("user", (Text("see"), shown)),)
    assert messages(USER, CALLED, user(result([picture], is_error=True)))[2].content == (Text("Error: "), shown)
    assert messages(USER, user(picture)) == (Message("user", (Text("hi"), shown)),)


REFUSED = {
    "a call without an id": (
        [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "x"}]}],
        "no name or no id",
    ),
    "a result of no call": ([user(result("x", "toolu_9"))], "has a tool_use block of that id"),
    "a PDF": ([user({"type": "document", "source": {"type": "base64", "data": "aGk="}})], "A document is no text"),
    "a picture elsewhere": (
        [user({"type": "image", "source": {"type": "url", "url": "x"}})],
        "nothing is fetched here",
    ),
    "a broken picture": ([user({"type": "image", "source": {"type": "base64", "data": "*"}})], "image is not base64"),
    "an answer that is begun": ([USER, {"role": "assistant", "content": "I"}], "an answer cannot be begun"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_understood_is_refused(case):
    given, words = REFUSED[case]
    with pytest.raises(InvalidRequest, match=words):
        messages(*given)


def test_what_anthropics_servers_would_know_is_ignored_and_told():
    blocks = [{"type": "server_tool_use", "id": "x", "name": "web_search", "input": {}}, text("found")]
    more = {"type": "container_upload", "file_id": "f"}
    given = told(USER, {"role": "assistant", "content": blocks}, user(more, text("so?")))
    assert given.messages[1:] == (Message("assistant", "found"), Message("user", "so?"))
    assert given.ignored == {"blocks of other types", "unknown fields"}


# Tools


def test_tools_are_functions():
    assert told(tools=[TOOL, {"name": "bare", "input_schema": {}}]).options.tools == (
        FUNCTION,
        {"type": "function", "function": {"name": "bare", "description": "", "parameters": {}}},
    )


def test_tools_that_only_anthropic_runs_are_left_out():
    given = told(tools=[{"type": "web_search_20250305", "name": "web_search"}, TOOL | {"type": "custom"}])
    assert given.options.tools == (FUNCTION,)
    assert given.ignored == {"tools of other types"}


def test_a_deferred_tool_is_told_of_once_a_result_refers_to_it():
    deferred = [TOOL | {"defer_loading": True}, TOOL | {"name": "DeferredToolPlaceholder", "defer_loading": True}]
    assert told(tools=deferred).options.tools == ()
    reference = {"type": "tool_reference", "tool_name": "look"}
    given = told(USER, CALLED, user(result([reference])), tools=deferred)
    assert given.options.tools == (FUNCTION,)
    assert given.messages[-1].content == "The tool look can be called now."
    assert given.ignored == {"defer_loading"}


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        (None, AUTO),
        ({"type": "auto"}, AUTO),
        ({"type": "any"}, REQUIRED),
        ({"type": "none"}, NONE),
        ({"type": "tool", "name": "look"}, "look"),
    ],
)
def test_a_choice_of_tools(choice, meant):
    assert told(tools=[TOOL], tool_choice=choice).options.tool_choice == meant


def test_a_choice_of_no_tool_is_refused():
    with pytest.raises(InvalidRequest, match="and names none"):
        told(tools=[TOOL], tool_choice={"type": "tool"})


def test_one_call_at_a_time_can_be_asked_for():
    assert told(tool_choice={"type": "auto", "disable_parallel_tool_use": True}).one_call
    assert not told(tool_choice={"type": "auto"}).one_call


# How it is to answer


@pytest.mark.parametrize(
    ("thinking", "effort", "meant", "budget"),
    [
        (None, None, Reasoning.OFF, None),
        (None, "high", Reasoning.OFF, None),
        ({"type": "disabled"}, "high", Reasoning.OFF, None),
        ({"type": "enabled", "budget_tokens": 2048}, None, Reasoning.ON, 2048),
        ({"type": "enabled", "budget_tokens": 2048}, "low", Reasoning.LOW, 2048),
        ({"type": "adaptive", "display": "updates"}, None, None, None),
        ({"type": "adaptive"}, "medium", Reasoning.MEDIUM, None),
        ({"type": "adaptive"}, "xhigh", Reasoning.HIGH, None),
        ({"type": "adaptive"}, "max", Reasoning.HIGH, None),
        ({"type": "between_tools"}, "unheard of", None, None),
    ],
)
def test_thinking_and_effort_are_reasoning(thinking, effort, meant, budget):
    given = told(thinking=thinking, output_config={"effort": effort})
    assert given.options.reasoning is meant
    assert given.options.sampling.reasoning_budget == budget
    assert ("effort" in given.ignored) == (effort == "unheard of")
    assert given.unasked == ((NO_SWITCH,) if thinking is None else ())


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("place", ["output_format", "output_config"])
def test_a_schema_is_a_grammar(place):
    wanted = {"type": "json_schema", "schema": SCHEMA}
    given = told(**{place: wanted if place == "output_format" else {"format": wanted}}).options.grammar
    assert given == Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))


def test_another_format_is_refused_and_text_is_none():
    for wanted in ({"type": "xml"}, {"type": "json_schema"}):
        with pytest.raises(InvalidRequest, match="none that is known"):
            told(output_format=wanted)
    assert told(output_format={"type": "text"}).options.grammar is None


def test_sampling_is_what_is_said_of_it():
    given = told(max_tokens=128000, temperature=0.5, top_p=0.9, top_k=40, stop_sequences=["a", "b"], model="m")
    assert given.options.sampling == Sampling(128000, temperature=0.5, top_p=0.9, top_k=40, stop=("a", "b"))
    assert (given.options.model, given.options.shorten) == ("m", True)
    assert told().options.sampling == Sampling()
    assert told_by(CountRequest(messages=[USER])).options.sampling == Sampling()


def test_no_tokens_compute_the_prompt_and_say_nothing():
    given = told(max_tokens=0)
    assert given.silent
    assert given.options.sampling.max_tokens == 1


def test_hints_and_unknown_fields_are_ignored_and_only_those_that_are_known_are_named():
    given = told(
        user(text("hi") | {"cache_control": {"type": "ephemeral"}}),
        metadata={"user_id": "x"},
        context_management={"edits": []},
        canary={"canary": 1},
        tools=[TOOL | {"strict": True}],
        thinking={"type": "adaptive", "display": "updates"},
    )
    known = {"cache_control", "metadata", "context_management", "strict", "display"}
    assert given.ignored == known | {"unknown fields"}


def test_pictures_data_may_be_long():
    data = base64.b64encode(bytes(100_000)).decode()
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    assert len(messages(user(picture))[0].images[0].data) == 100_000
