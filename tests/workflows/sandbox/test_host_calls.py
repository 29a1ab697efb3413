"""What a program can call, over a service of fakes: one token a character, and a model that repeats its prompt."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Generator
from typing import Any

import pytest

from mlx_mcp.core.sampling import Sampling
from mlx_mcp.engine.requests import GenerateRequest
from mlx_mcp.service.limits import Limiter, Limits
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.workflows.asking import Asker, Budget
from mlx_mcp.workflows.sandbox.host_calls import FUNCTIONS, Failure, HostCalls, Refused, Submitted
from mlx_mcp.workflows.sandbox.runtime import HostCall
from tests.service.house import CALLER, make_service, requests_of, unheard

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture
def service() -> Generator[Service]:
    service = make_service()
    yield service
    assert service.engine.close()


def host_of(service: Service, budget: Budget | None = None, **remembered: str) -> HostCalls:
    return HostCalls(Asker(service, CALLER, budget or Budget(), unheard), remembered)


async def ask(host: HostCalls, name: str, *args: Any, **kwargs: Any) -> Any:
    return await host.answer(HostCall(name, args, kwargs))


async def refusal(host: HostCalls, name: str, *args: Any, **kwargs: Any) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        await ask(host, name, *args, **kwargs)
    return caught.value.type, caught.value.message


def texts(requests: list[GenerateRequest]) -> list[str]:
    """What models were told, by role."""
    return [" / ".join(f"{each.role}: {each.content}" for each in request.messages) for request in requests]


async def test_what_is_shared_comes_first_in_every_prompt(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    got, host = requests_of(service, monkeypatch), host_of(service)
    assert await ask(host, "llm_query", "Who?", text="Once.") == "Once.\n\nWho?"
    assert await ask(host, "llm_map", "Label:", ["a", 2.5, None]) == [
        "Label:\n\na",
        "Label:\n\n2.5",
        "Label:\n\nnull",
    ]
    assert await ask(host, "llm_query_batched", ["a", "b"], system="S.") == ["S.a", "S.b"]
    assert await ask(host, "llm_ask", "Once.", ["Who?", "Where?"], system="S.") == [
        "S.Once.\n\nWho?",
        "S.Once.\n\nWhere?",
    ]
    assert texts(got) == [
        "user: Once.\n\nWho?",
        "user: Label:\n\na",
        "user: Label:\n\n2.5",
        "user: Label:\n\nnull",
        "system: S. / user: a",
        "system: S. / user: b",
        "system: S. / user: Once.\n\n",  # computed once, as a session
        "user: Who?",
        "user: Where?",
    ]
    assert len({request.lane for request in got if not request.context}) == 1
    assert not any(request.keep for request in got if request.session)
    assert not known_sessions(service)  # the text's has gone again


async def test_a_schema_gives_what_the_answer_says_and_holds_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, host = requests_of(service, monkeypatch), host_of(service)
    said = await ask(host, "llm_query_batched", ['{"n": 1}', "no JSON", "2"], schema=SCHEMA, max_tokens=20)
    assert said == [{"n": 1}, None, 2]
    assert [json.loads(request.grammar.source) for request in got if request.grammar] == [SCHEMA] * 3
    assert got[0].sampling == Sampling(max_tokens=20)
    [failure] = host.said.failures
    assert failure.index == 1
    assert "so it is no JSON. Give a larger max_tokens" in failure.error
    assert await refusal(host, "llm_query", '{"n": 12', schema=SCHEMA, max_tokens=3) == (
        "RuntimeError",
        "The answer was cut off after 3 tokens, so it is no JSON. Give a larger max_tokens, or bounds in the schema "
        "(maxLength, maxItems).",
    )
    assert await ask(host, "llm_query", "long", max_tokens=2) == "lo"
    assert host.said.notes == ["Answers that max_tokens cut off: 1. Give more, or ask for shorter ones."]


async def test_a_remembered_text_is_asked_over_and_never_changed(service: Service) -> None:
    host = host_of(service)
    assert await ask(host, "remember", "Once.", "story", system="S.") == "story"
    assert await ask(host, "remember", "Other.") == "text2"
    for _ in range(2):
        assert await ask(host, "llm_query", "Who?", over="story") == "S.Once.\n\nWho?"
    assert await ask(host, "llm_query_batched", ["a", "b"], text="More.", over="text2") == [
        "Other.\n\nMore.\n\na",
        "Other.\n\nMore.\n\nb",
    ]
    assert set(host.remembered.values()) == host.opened == set(known_sessions(service))
    assert {info.num_tokens for info in known_sessions(service).values()} == {len("S.Once.\n\n"), len("Other.\n\n")}
    told = await refusal(host, "llm_query", "Who?", over="stori")
    assert told == ("ValueError", "'stori' is not remembered, but 'story', 'text2'. Call remember(text, name) first.")
    told = await refusal(host, "llm_query", "Who?", over="story", system="S.")
    assert "give it to remember, not here. Call it so: llm_query(prompt, text=''" in told[1]
    await service.engine.close_sessions("us", (host.remembered["story"],))
    assert (await refusal(host, "llm_query", "Who?", over="story"))[0] == "ValueError"


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "told"),
    [
        ("llm_query", (), {}, "missing a required argument: 'prompt'"),
        ("llm_query", (1,), {}, "prompt is a str, not int"),
        ("llm_query", ("a",), {"model": "x"}, "got an unexpected keyword argument 'model'"),
        ("llm_query", ("a",), {"max_tokens": True}, "max_tokens is an int, not bool"),
        ("llm_query", ("a",), {"temperature": "0"}, "temperature is an int or a float, not str"),
        ("llm_query", ("a",), {"schema": "int"}, "schema is a dict (a JSON schema), not str"),
        ("llm_query", ("a",), {"text": None}, "text is a str, not NoneType"),
        ("llm_query_batched", ("abc",), {}, "prompts is a list, not str"),
        ("llm_query_batched", (["a", 1],), {}, "prompts[1] is a str, not int"),
        ("llm_map", ("a", "b"), {}, "items is a list, not str"),
        ("llm_map", ("a", ["b"]), {"over": "c"}, "got an unexpected keyword argument 'over'"),
        ("llm_ask", ("a",), {}, "missing a required argument: 'questions'"),
        ("remember", ("a", 1), {}, "name is a str, not int"),
        ("submit", (), {}, "missing a required argument: 'value'"),
    ],
)
async def test_a_wrong_call_says_how_it_is_called(
    service: Service, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], told: str
) -> None:
    assert await refusal(host_of(service), name, *args, **kwargs) == (
        "TypeError",
        f"{name}: {told}. Call it so: {FUNCTIONS[name]}.",
    )


@pytest.mark.parametrize("name", FUNCTIONS)
async def test_a_function_takes_its_arguments_in_the_order_that_is_told(service: Service, name: str) -> None:
    function = inspect.signature(host_of(service)._functions[name])
    told = ast.parse(FUNCTIONS[name], mode="eval").body
    assert isinstance(told, ast.Call)
    names = [each.id for each in told.args if isinstance(each, ast.Name)] + [each.arg for each in told.keywords]
    assert list(function.parameters) == names
    defaults = [ast.literal_eval(each.value) for each in told.keywords]
    assert [each.default for each in function.parameters.values()][len(told.args) :] == defaults


async def test_what_the_service_refuses_is_an_exception_that_says_what_to_change(service: Service) -> None:
    host = host_of(service)
    assert (await refusal(host, "sing"))[0] == "NameError"
    assert (await refusal(host, "llm_query", "a" * 3000))[0] == "ValueError"
    assert (await refusal(host, "llm_query", ""))[1] == "The prompt is empty. Say in `prompt` what the model should do."
    assert "temperature" in (await refusal(host, "llm_query_batched", ["a", "b"], temperature=9))[1]
    assert host.said.num_failed == 0  # the program was told
    with pytest.raises(Submitted):
        await ask(host, "submit", {"a": 1})
    assert (host.said.submitted, host.said.value) == (True, {"a": 1})


async def test_failures_are_none_and_the_first_are_told(service: Service) -> None:
    host = host_of(service)
    said = await ask(host, "llm_query_batched", ["a", *["b" * 3000] * 8, "c"])
    assert said == ["a", *[None] * 8, "c"]
    assert await ask(host, "llm_query_batched", []) == []
    assert (host.said.num_failed, [each.index for each in host.said.failures]) == (8, [1, 2, 3, 4, 5])
    assert isinstance(host.said.failures[0], Failure)
    assert (host.asker.counts.calls, host.asker.counts.failed) == (10, 8)


async def test_only_single_questions_in_a_row_are_a_hint(service: Service) -> None:
    host = host_of(service)
    for _ in range(3):
        await ask(host, "llm_query", "a")
    await ask(host, "llm_query_batched", ["a"])
    await ask(host, "llm_query", "a")
    assert host.said.notes == []
    for _ in range(3):
        await ask(host, "llm_query", "a")
    [note] = host.said.notes
    assert "asked 4 questions one after the other" in note


async def test_a_caller_that_may_have_no_more_sessions_still_gets_its_answers(service: Service) -> None:
    service = Service(service.engine, service.registry, limits=Limiter(lambda tenant: Limits(sessions=0)))
    host = host_of(service)
    assert await ask(host, "llm_ask", "Once.", ["Who?", "Where?"]) == ["Once.\n\nWho?", "Once.\n\nWhere?"]
    kind, told = await refusal(host, "remember", "Once.")
    assert kind == "RuntimeError"
    assert "You have 0 sessions and sandboxes and may have 0" in told
