"""The engine whole: client, thread, scheduler and the MLX backend, on the embedded model."""

import asyncio
import json
import re

import jsonschema
import mlx.core as mx
import pytest

from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.core.sampling import PARAMETERS, Sampling
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import FinishReason
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.requests import GenerateRequest, Result
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import GenerationFailed, InvalidRequest, RequestTooLarge
from mlx_mcp.mlx_backend.loader import MlxLoader
from mlx_mcp.mlx_backend.runner import Runner
from mlx_mcp.models.registry import Registry
from tests.comparing import OPENBLAS, assert_same, num_same, quantized
from tests.effort import drawn
from tests.engine.test_client import until
from tests.models_made import TEMPLATE, make_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["person", "place", "thing"]},
        "port": {"type": "integer", "minimum": 0, "maximum": 65535},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "secret": {"type": "boolean"},
    },
    "required": ["name", "kind", "port", "tags", "secret"],
    "additionalProperties": False,
}
FACTS = "Alice's badge is 771. The deploy code is 4096. Bob has the pet parrot."
QUESTIONS = {"What is the deploy code?": "4096", "What is Alice's badge?": "771", "What is Bob's pet?": "parrot"}


def make_client(limits=None, kv_bits=None, max_kv_bytes=1 << 30, registry=None, max_weights_bytes=1 << 30):
    loader = MlxLoader(kv_bits)
    thread = EngineThread(lambda: Engine(loader, limits or Limits(), max_weights_bytes, max_kv_bytes))
    return EngineClient(thread, registry or Registry(None), loader)


@pytest.fixture
def client():
    client = make_client()
    yield client
    assert client.close()


def ask(text, system=None, **settings):
    messages = (Message("system", system),) if system else ()
    drawn = {name: settings.pop(name) for name in PARAMETERS if name in settings}
    return GenerateRequest((*messages, Message("user", text)), sampling=Sampling(**drawn), **settings)


async def answer(client, request):
    async for update in client.generate(request):
        if isinstance(update, Result):
            return update
    raise AssertionError("no result")


async def test_a_template_that_loops_for_one_prompt_is_left_with_its_calls_and_all_others_go_on(tmp_path):
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    folder = make_model(tmp_path / "looping")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = "{% if 'loop' in messages[-1].content %}" + loop + "{% endif %}" + TEMPLATE
    path.write_text(json.dumps(settings))
    looping = Registry(str(folder)).resolve(None)
    client = make_client(registry=Registry(None, named={"looping": looping}))
    usual = ask("hi", model="looping", max_tokens=2)
    try:
        before = await answer(client, usual)
        calls = [asyncio.create_task(answer(client, ask(f"loop {i}", model="looping"))) for i in range(12)]
        pool = client._models.loaded["looping"].tokenizer._processes._pool
        await until(lambda: pool.num_busy > 1)
        assert (await answer(client, ask("hi", max_tokens=2))).model == "embedded"
        for call in calls:
            call.cancel()
        await until(lambda: not pool.num_busy, timeout_s=9)  # sooner than the deadline
        assert (await answer(client, usual)).text == before.text
        assert all(call.cancelled() for call in calls)
    finally:
        assert client.close()


@pytest.mark.long
async def test_models_that_take_turns_for_the_room_of_one_each_say_what_they_say_alone(tmp_path):
    names = ("one", "two")
    folders = [make_model(tmp_path / name, intermediate_size=4096 + 64 * i) for i, name in enumerate(names)]
    specs = {name: Registry(str(folder)).resolve(None) for name, folder in zip(names, folders, strict=True)}
    limit = (
        2.5 * (folders[1] / "model.safetensors").stat().st_size
    )  # as long as it is not loaded, twice that is assumed
    requests = [ask(f"hi {i}", model=name, max_tokens=6) for i in range(4) for name in names]
    roomy, tight = (
        make_client(registry=Registry(None, named=specs), max_weights_bytes=n) for n in (1 << 30, int(limit))
    )
    try:
        alone = [await answer(roomy, request) for request in requests]
        assert len({result.text for result in alone[:2]}) == 2
        together = await asyncio.gather(*(answer(tight, request) for request in requests))
        for result, expected in zip(together, alone, strict=True):
            assert result.model == expected.model
            assert OPENBLAS or result.text == expected.text
        held = []
        for _ in range(4):
            for name in names:
                await answer(tight, ask("hi", model=name, max_tokens=2))
                held.append(mx.get_active_memory() + mx.get_cache_memory())
        assert max(held[2:]) <= held[1] * 1.1  # what an unloaded model took was given back
    finally:
        assert roomy.close()
        assert tight.close()


@pytest.mark.long
async def test_answers_at_temperature_1_all_obey_the_schema(client):
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
    count = drawn(200, least=10)
    requests = [
        ask(f"Tell me about thing {i}.", temperature=1.0, seed=i, grammar=grammar, max_tokens=400) for i in range(count)
    ]
    results = await asyncio.gather(*(answer(client, request) for request in requests))
    texts = set()
    for result in results:
        assert result.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(result.text), SCHEMA)
        texts.add(result.text)
    assert len(texts) > 0.75 * count


async def test_an_answer_that_max_tokens_cuts_says_so(client):
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
    result = await answer(client, ask("Hi", temperature=1.0, seed=1, grammar=grammar, max_tokens=5))
    assert result.finish_reason is FinishReason.LENGTH
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.text)


async def test_grammars_of_every_kind_and_none_share_a_batch(client):
    lark = 'start: greeting ", " NAME "!"\ngreeting: "Hello" | "Good day"\nNAME: /[A-Z][a-z]{2,5}/'
    requests = [
        ask("Hi", temperature=1.0, seed=1, grammar=Grammar(GrammarKind.REGEX, r"[0-9]{3}-[0-9]{4}")),
        ask("Hi", temperature=1.0, seed=2, grammar=Grammar(GrammarKind.LARK, lark)),
        ask("Hi", temperature=1.0, seed=3, grammar=Grammar(GrammarKind.JSON_SCHEMA, '{"enum": ["yes", "no"]}')),
        ask("What is the deploy code?", FACTS),
    ]
    number, greeting, choice, code = await asyncio.gather(*(answer(client, request) for request in requests))
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", number.text)
    assert re.fullmatch(r"(Hello|Good day), [A-Z][a-z]{2,5}!", greeting.text)
    assert json.loads(choice.text) in ("yes", "no")
    assert code.text.strip() == "4096"


async def test_a_schema_that_cannot_be_compiled_is_refused_and_never_queued(client):
    grammar = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "colour"}')
    with pytest.raises(InvalidRequest, match="JSON schema"):
        await answer(client, ask("Hi", grammar=grammar))
    assert (client.stats.running, client.stats.waiting) == (0, 0)


@pytest.mark.parametrize("kv_bits", [None, pytest.param(8, marks=pytest.mark.long)])
async def test_forty_callers_at_once_are_each_answered_right(kv_bits):
    client = make_client(kv_bits=kv_bits, limits=Limits(max_running=12))
    try:
        asked = [list(QUESTIONS)[i % 3] for i in range(40)]
        results = await asyncio.gather(*(answer(client, ask(question, FACTS)) for question in asked))
    finally:
        client.close()
    assert [r.text.strip().rstrip(".") for r in results] == [QUESTIONS[question] for question in asked]


async def test_a_seed_gives_the_same_text_alone_and_in_any_batch(client):
    def request(seed):
        return ask("Tell me a story.", FACTS, temperature=3.0, top_p=0.98, seed=seed, max_tokens=60)

    alone = [(await answer(client, request(seed))).text for seed in range(4)]
    others = [ask(question, FACTS, temperature=0.5, min_p=0.1) for question in QUESTIONS]
    crowd = await asyncio.gather(
        *(answer(client, r) for r in [*others, *(request(seed) for seed in range(4)), *others])
    )
    assert [r.text for r in crowd[3:7]] == alone
    assert len(set(alone)) == 4


@pytest.mark.parametrize("kv_bits", [None, pytest.param(8, marks=pytest.mark.long)])
async def test_prompts_asked_again_are_answered_to_the_bit_as_at_first_and_computed_no_more(kv_bits):
    client, settings = make_client(kv_bits=kv_bits), {"max_tokens": 60, "logprobs": 5}
    requests = [ask("Tell me a story.", FACTS, temperature=3.0, seed=seed, **settings) for seed in range(3)]
    requests += [ask(question, FACTS, **settings) for question in QUESTIONS]
    requests += [ask("Hi", FACTS, repetition_penalty=1.5, logit_bias=((9, 2.0),), **settings)]
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
    requests += [ask("Go", FACTS, temperature=1.0, seed=1, grammar=grammar)]
    try:
        first = [await answer(client, request) for request in requests]
        again = await asyncio.gather(*(answer(client, request) for request in requests))
    finally:
        client.close()
    if not quantized(kv_bits):  # else a draw may end elsewhere
        assert [r.text for r in again] == [r.text for r in first]
    for one, other in zip(again, first, strict=True):
        if OPENBLAS:
            same = num_same(*([choice.token_id for choice in r.logprobs or ()] for r in (one, other)))
            found, expected = ([choice.logprob for choice in (r.logprobs or ())[:same]] for r in (one, other))
            assert_same(found, expected, quantized(kv_bits))
        else:
            assert one.logprobs == other.logprobs
    assert all(r.cached_tokens == r.prompt_tokens and r.miss is None for r in again)
    assert [r.cached_tokens == r.prompt_tokens for r in first] == [False, True, True] + [False] * 5


@pytest.mark.long
async def test_memory_too_small_for_all_slows_them_down_and_changes_no_answer():
    roomy, tight = make_client(), make_client(max_kv_bytes=5 << 19)
    requests = [ask(f"Tell me of {i}.", FACTS, temperature=4.0, seed=i, max_tokens=300) for i in range(6)]
    try:
        expected = await asyncio.gather(*(answer(roomy, request) for request in requests))
        results = await asyncio.gather(*(answer(tight, request) for request in requests))
        with pytest.raises(RequestTooLarge, match=r"max_tokens to \d+ or less"):
            await answer(tight, ask("Hi", max_tokens=1500))
        assert tight.stats.preemptions > 0
        assert roomy.stats.preemptions == 0
    finally:
        roomy.close()
        tight.close()
    assert [r.text for r in results] == [r.text for r in expected]


async def test_log_probabilities_come_with_every_token(client):
    result = await answer(client, ask("What is the deploy code?", FACTS, logprobs=3))
    assert "".join(choice.text for choice in result.logprobs).strip() == "4096"
    for choice in result.logprobs:
        assert len(choice.top) == 3
        assert choice.top[0][0] == choice.token_id  # greedy
        assert choice.logprob == choice.top[0][2] <= 0


async def test_a_bias_forbids_and_forces_tokens(client):
    free = await answer(client, ask("What is the deploy code?", FACTS, logprobs=0))
    first = free.logprobs[0].token_id
    barred = await answer(client, ask("What is the deploy code?", FACTS, logprobs=0, logit_bias=((first, -100.0),)))
    assert barred.logprobs[0].token_id != first
    forced = await answer(client, ask("Hi", logprobs=0, max_tokens=4, logit_bias=((first, 100.0),)))
    assert {choice.token_id for choice in forced.logprobs} == {first}


async def test_a_tool_call_comes_parsed(client):
    lookup = {
        "type": "function",
        "function": {"name": "lookup", "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}},
    }
    result = await answer(client, ask("Look up Alice.", tools=(lookup,)))
    assert result.finish_reason is FinishReason.TOOL_CALLS
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("lookup", {"key": "Alice"})]
    assert result.text == ""


async def test_a_step_that_raises_fails_its_rows_and_the_engine_goes_on(client, monkeypatch):
    await answer(client, ask("What is the deploy code?", FACTS))
    launch, failures = Runner.launch, iter([RuntimeError("the device is on fire")])

    def sometimes(self, step):
        for failure in failures:
            raise failure
        return launch(self, step)

    monkeypatch.setattr(Runner, "launch", sometimes)
    with pytest.raises(GenerationFailed, match="on fire"):
        await answer(client, ask("What is the deploy code?", FACTS))
    result = await answer(client, ask("What is the deploy code?", FACTS))
    assert result.text.strip() == "4096"
    await until(lambda: (client.stats.rows, client.stats.kv_bytes, client.stats.kv_reserved_bytes) == (0, 0, 0))
