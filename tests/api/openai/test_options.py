"""How an answer shall be, in OpenAI's form → as the service has it."""

import json

import pytest

from mlx_mcp.api.openai.chat_request import context_of, options_of, parent_of
from mlx_mcp.api.openai.chat_shapes import ChatRequest
from mlx_mcp.api.openai.options import UNLIMITED_TOKENS, choice_of, function_of, functions_of, grammar_of, namespaces_of
from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import Grammar, GrammarKind, Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.generate import Options
from mlx_mcp.service.values import Sampling

LOOK = {"type": "function", "function": {"name": "look", "parameters": {}}}


def asked(**members):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}]} | members)


def options(**members):
    return options_of(asked(**members))


# What is asked for where a request says nothing.
DEFAULT = Options(sampling=Sampling(max_tokens=UNLIMITED_TOKENS), shorten=True)


def test_an_answer_may_take_all_of_the_context_by_default():
    assert options() == DEFAULT
    assert context_of(asked()).messages == (Message("user", "hi"),)


def test_every_sampling_parameter_reaches_the_engine():
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 5,
    }
    more = {"max_tokens": 9, "logit_bias": {"3": -100}, "stop": ["a", "b"], "logprobs": True, "top_logprobs": 2}
    assert options(**given, **more).sampling == Sampling(
        **given, max_tokens=9, logit_bias=((3, -100.0),), stop=("a", "b"), logprobs=2
    )


def test_null_counts_as_left_out():
    shown = ChatRequest.model_json_schema()["properties"]
    optional = dict.fromkeys(set(shown) - {"messages"})
    assert options(**optional) == DEFAULT


def test_the_newer_name_of_max_tokens_counts():
    assert options(max_tokens=9, max_completion_tokens=4).sampling.max_tokens == 4
    assert options(max_completion_tokens=4).sampling.max_tokens == 4


@pytest.mark.parametrize(("seed", "taken"), [(-1, 2**32 - 1), (2**40 + 3, 3), (0, 0)])
def test_a_seed_of_any_size_is_one_of_ours(seed, taken):
    assert options(seed=seed).sampling.seed == taken


def test_one_stop_string_is_a_list_of_one():
    assert options(stop="end").sampling.stop == ("end",)


def test_log_probabilities_need_no_alternatives():
    assert options(logprobs=True).sampling.logprobs == 0
    assert options(logprobs=False).sampling.logprobs is None
    with pytest.raises(InvalidRequest, match="goes with logprobs"):
        options(top_logprobs=2)


@pytest.mark.parametrize(
    ("effort", "reasoning"),
    [
        ("none", Reasoning.OFF),
        ("minimal", Reasoning.LOW),
        ("low", Reasoning.LOW),
        ("medium", Reasoning.MEDIUM),
        ("high", Reasoning.HIGH),
        ("xhigh", Reasoning.HIGH),
        (None, None),
    ],
)
def test_every_effort_is_one_of_ours(effort, reasoning):
    assert options(reasoning_effort=effort).reasoning == reasoning


def test_tools_are_taken_without_what_is_null():
    given = {"type": "function", "function": {"name": "look", "description": None, "parameters": {}}}
    assert options(tools=[given]).tools == (LOOK,)
    assert function_of({"type": "function", "name": "look", "parameters": {}, "strict": None}, nested=False) == LOOK


def test_functions_in_a_namespace_are_functions_like_the_others():
    look, see = ({"type": "function", "name": name, "parameters": {}} for name in ("look", "see"))
    tools = [look, {"type": "namespace", "name": "eyes", "tools": [see]}]
    assert [tool["function"]["name"] for tool in functions_of(tools)] == ["look", "see"]
    assert namespaces_of(tools) == {"see": "eyes"}
    with pytest.raises(InvalidRequest, match="which this server does not run"):
        functions_of([{"type": "namespace", "name": "eyes", "tools": [{"type": "web_search"}]}])
    with pytest.raises(InvalidRequest, match="of type 'namespace'"):
        functions_of([{"type": "namespace"}])


@pytest.mark.parametrize("kind", ["custom", "web_search", "mcp", None])
def test_a_tool_that_is_no_function_is_refused(kind):
    with pytest.raises(InvalidRequest, match="which this server does not run"):
        function_of({"type": kind, "name": "x"}, nested=False)


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "look"}}, "look"),
        ({"type": "function", "name": "look"}, "look"),
    ],
)
def test_every_choice_of_a_tool_is_taken(given, choice):
    assert choice_of(given) == choice


@pytest.mark.parametrize("given", ["any", {"type": "allowed_tools"}, {"type": "function", "name": ""}, {}])
def test_another_choice_is_refused(given):
    with pytest.raises(InvalidRequest, match="For a choice among some"):
        choice_of(given)


def test_a_form_is_a_grammar():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    whole = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    assert grammar_of({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, nested=True) == whole
    assert grammar_of({"type": "json_schema", "name": "x", "schema": schema}, nested=False) == whole
    assert grammar_of({"type": "json_object"}, nested=True) == Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
    assert grammar_of({"type": "text"}, nested=True) is None
    assert grammar_of({}, nested=False) is None


def test_a_form_that_cannot_be_is_refused():
    for form in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 1}}):
        with pytest.raises(InvalidRequest, match="has no schema: write it"):
            grammar_of(form, nested=True)
    with pytest.raises(InvalidRequest, match="Give text, json_object or json_schema"):
        grammar_of({"type": "grammar"}, nested=True)


def test_what_came_before_tools_is_refused():
    with pytest.raises(InvalidRequest, match="is what came before tools"):
        options(functions=[{"name": "look"}])


def test_a_turn_goes_on_with_a_session_or_a_fork_of_one():
    assert options(session_id="s").session == "s"
    forked = asked(parent_session_id="p")
    assert (options_of(forked).session, parent_of(forked)) == ("", "p")
    left = asked(parent_session_id="p", keep=False)  # nothing is kept, so that no fork is needed
    assert (options_of(left).session, options_of(left).keep, parent_of(left)) == ("p", False, "")
    with pytest.raises(InvalidRequest, match="are two ways to go on"):
        options(session_id="s", parent_session_id="p")


def test_what_nobody_knows_is_ignored():
    assert options(user="ann", metadata={"a": "b"}, store=True, service_tier="flex", colour="red") == DEFAULT
