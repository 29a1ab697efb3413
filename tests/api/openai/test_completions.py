"""Completions without a chat, and models, by OpenAI's own client."""

import asyncio

import openai
import pytest

from mlx_mcp.chat.message import Message
from tests.api.openai.house import client_of, user
from tests.service.house import requests_of

CODE = "The code is 4096. What is the code?"


async def complete(client, prompt="hello", **asked):
    return await client.completions.create(**{"model": "tiny", "prompt": prompt} | asked)


async def test_a_text_is_gone_on_with_and_nothing_in_it_is_a_part_of_an_answer(engine):
    async with client_of(engine) as client:
        made = await complete(client, "a[b]{c}", logprobs=0)
        cut = await complete(client, "x" * 40)
    assert made.id.startswith("cmpl-")
    assert made.model_dump(exclude_unset=True, exclude={"id", "created"}) == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "a[b]{c}",
                "finish_reason": "stop",
                "logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []},
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 7,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("x" * 16, "length")  # as OpenAI's without max_tokens


async def test_several_prompts_have_their_answers_in_order(engine):
    async with client_of(engine) as client:
        made = await complete(client, ["one", "two"], n=2, temperature=1.0)
    assert [(choice.index, choice.text) for choice in made.choices] == [(0, "one"), (1, "one"), (2, "two"), (3, "two")]
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (6, 12)


async def test_a_stream_has_the_text_of_every_answer(engine):
    async with client_of(engine) as client:
        stream = await complete(client, ["one", "two"], stream=True, stream_options={"include_usage": True})
        chunks = [chunk.model_dump(exclude_unset=True) async for chunk in stream]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 12
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in (0, 1)]
    assert texts == ["one", "two"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop", "stop"]


async def test_the_model_is_given_the_text_and_no_chat(engine, monkeypatch):
    asked = requests_of(type("", (), {"engine": engine})(), monkeypatch)
    async with client_of(engine) as client:
        await complete(client, "hello", seed=3)
        await client.chat.completions.create(model="tiny", messages=user("hello"))
    assert [(request.raw, request.messages) for request in asked] == [
        ("hello", ()),
        (None, (Message("user", "hello"),)),
    ]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": [1, 2]}, "token ids are not taken"),
        ({"prompt": [[1]]}, "token ids are not taken"),
        ({"prompt": []}, "must be a text or a list of texts"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"echo": True}, "The prompt is not repeated"),
        ({"suffix": "x"}, "No text can be put in between"),
        ({"best_of": 3}, "Answers are not ranked here"),
        ({"n": 2, "temperature": 0}, "all n answers are the same"),
        ({"prompt": ["x"] * 65}, "there may be 64"),
    ],
)
async def test_what_cannot_be_done_is_refused(engine, asked, told):
    async with client_of(engine) as client:
        with pytest.raises(openai.BadRequestError, match=told):
            await complete(client, **asked)


async def test_the_built_in_model_writes_its_own_template(embedded):
    # On a thread, as the engine does it: the thread that prepares a model leaves no streams behind.
    spec = embedded.registry.resolve(None)
    tokenizer = (await asyncio.to_thread(embedded.engine.loader.prepare, spec, lambda progress: None)).tokenizer
    rendered = tokenizer.decode(tokenizer.encode_chat([Message("user", CODE)]).ids)
    asked = {"model": "embedded", "max_tokens": 20}
    async with client_of(embedded.engine, embedded) as client:
        raw = await complete(client, rendered, **asked, logprobs=1)
        chat = await client.chat.completions.create(messages=user(CODE), **asked)
        stream = await complete(client, rendered, **asked, logprobs=1, stream=True)
        last = [chunk async for chunk in stream][-1]
    assert raw.choices[0].text == chat.choices[0].message.content == "4096"
    assert raw.usage.prompt_tokens == chat.usage.prompt_tokens
    told = raw.choices[0].logprobs
    assert ("".join(told.tokens), told.text_offset[0], len(told.top_logprobs)) == ("4096", 0, len(told.tokens))
    assert [next(iter(top.values())) for top in told.top_logprobs] == told.token_logprobs
    assert last.choices[0].logprobs == told


async def test_models_are_listed_and_shown(embedded):
    async with client_of(embedded.engine, embedded) as client:
        [listed] = [model async for model in client.models.list()]
        assert listed == await client.models.retrieve("embedded") == await client.models.retrieve("default")
        with pytest.raises(openai.NotFoundError, match="Did you mean 'embedded'") as caught:
            await client.models.retrieve("owner/embeddedd")
    told = {"id": "embedded", "object": "model", "created": 0, "owned_by": "mlx-mcp", "max_model_len": 2048}
    assert listed.model_dump(exclude_unset=True) == told
    assert caught.value.code == "model_not_found"
