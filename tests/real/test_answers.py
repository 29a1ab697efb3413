"""Calls of every kind, each compared with what mlx_lm makes of the same tokens."""

import asyncio

import numpy as np
import pytest

from mlx_mcp.mlx_backend.sampler import uniform
from tests.real.beside import BOUND, log_softmax
from tests.real.product import hosting
from tests.real.prompts import PROMPTS, some

MAX_TOKENS = 24
BRIEFING = (
    "You are the librarian of a small town. The library opens at nine and closes at six, and on Sundays it is closed. "
    "Children may borrow five books, adults ten. A book is lent for three weeks. The reading room is on the second "
    "floor, beside the map collection. Your name is Martha. Answer in one short sentence, and be friendly. "
) * 3


async def test_alone_each_text_is_the_one_that_mlx_lm_generates(product, reference):
    asked = some(PROMPTS, 3)
    theirs = reference.generate([reference.prompt(("user", text)) for text in asked], MAX_TOKENS)
    async with hosting(product) as host:
        ours = [await host.generate(text, max_tokens=MAX_TOKENS) for text in asked]
    for text, answer, their in zip(asked, ours, theirs, strict=True):
        prompt = reference.prompt(("user", text))
        assert answer["prompt_tokens"] == len(prompt)
        gap = reference.gap(prompt, answer)
        assert gap <= BOUND, (text, answer, their)
        assert gap or answer["text"] == their


async def test_in_a_batch_each_is_what_mlx_lm_makes_of_it_alone(product, reference):
    asked = some(PROMPTS, 12)
    async with hosting(product) as host:
        batch = await host.call("generate_batch", prompts=asked, max_tokens=MAX_TOKENS)
    for text, answer in zip(asked, batch["results"], strict=True):
        assert reference.gap(reference.prompt(("user", text)), answer) <= BOUND, (text, answer)


async def test_forks_go_on_as_mlx_lm_does_with_the_whole_conversation_and_compute_only_what_is_new(product, reference):
    questions = some(["When do you open?", "What is your name?", "Where are the maps?", "How many books for me?"], 3)
    async with hosting(product) as host:
        parent = await host.call("create_session", system=BRIEFING)
        forks = (await host.call("fork_session", session=parent["session"], count=len(questions)))["sessions"]

        async def talk(fork, first):
            turns = [(first, await host.generate(first, session=fork, max_tokens=MAX_TOKENS))]
            turns.append(("Thank you!", await host.generate("Thank you!", session=fork, max_tokens=8)))
            return turns

        talks = await asyncio.gather(*map(talk, forks, questions))
        again = await host.generate(questions[0], session=parent["session"], keep=False, max_tokens=MAX_TOKENS)
        await host.call("close_session", sessions=[parent["session"], *forks])
    for turns in talks:
        chat = [("system", BRIEFING)]
        before = parent["tokens"]
        for text, answer in turns:
            chat.append(("user", text))
            prompt = reference.prompt(*chat)
            assert reference.gap(prompt, answer) <= BOUND, (text, answer)
            assert answer["prompt_tokens"] == len(prompt)
            assert answer["computed_tokens"] <= len(prompt) - before + 1
            chat.append(("assistant", answer["text"]))
            before = len(prompt) + answer["completion_tokens"]
    assert again["text"] == talks[0][0][1]["text"]


async def test_log_probabilities_are_those_of_mlx_lm(product, reference):
    text = PROMPTS[3]
    async with hosting(product) as host:
        answer = await host.generate(text, max_tokens=MAX_TOKENS, logprobs=5)
    choices = answer["logprobs"]
    ids = reference.ids(choices)
    expected = log_softmax(reference.logits(reference.prompt(("user", text)), ids))
    found = np.array([choice["logprob"] for choice in choices])
    assert np.abs(found - expected[np.arange(len(ids)), ids]).max() < BOUND
    for choice, row in zip(choices, expected, strict=True):
        likeliest = np.argsort(-row)[:5]
        assert np.abs(np.array([logprob for _, logprob in choice["top"]]) - row[likeliest]).max() < BOUND
        apart = np.diff(-row[likeliest]).min() > BOUND
        assert not apart or [token for token, _ in choice["top"]] == [
            reference.tokenizer.decode([i]) for i in likeliest
        ]


async def test_each_token_at_a_temperature_is_where_its_seed_falls_in_mlx_lms_distribution(product, reference):
    text, temperature = "Tell me something about cats.", 0.7
    seeds = some(range(40), 4)
    async with hosting(product) as host:

        async def draw(seed):
            return await host.generate(text, temperature=temperature, seed=seed, max_tokens=MAX_TOKENS, logprobs=0)

        together = await asyncio.gather(*map(draw, seeds))
        alone = await draw(seeds[0])
        batch = await host.call(
            "generate_batch",
            prompts=[text],
            n=len(seeds),
            temperature=temperature,
            seed=seeds[0],
            max_tokens=MAX_TOKENS,
        )
    prompt, far = reference.prompt(("user", text)), 0.0
    for seed, answer in [*zip(seeds, together, strict=True), (seeds[0], alone)]:
        ids = reference.ids(answer["logprobs"])
        probabilities = np.exp(log_softmax(reference.logits(prompt, ids) / temperature))
        for index, token_id in enumerate(ids):
            ends = np.cumsum(probabilities[index])
            start, u = ends[token_id] - probabilities[index, token_id], uniform(seed, index)
            far = max(far, start - u, u - ends[token_id])
    assert far < 1e-3
    assert len({answer["text"] for answer in together}) == len(seeds)
    same = [drawn["text"] == answer["text"] for drawn, answer in zip(batch["results"], together, strict=True)]
    assert sum(same) >= len(seeds) - 1, "a seed gives the same text, unless two tokens are very close"


async def test_a_stop_string_ends_the_same_text_early(product):
    async with hosting(product) as host:
        whole = (await host.generate(PROMPTS[16], max_tokens=MAX_TOKENS))["text"]
        stop = whole.split()[6]
        cut = await host.generate(PROMPTS[16], max_tokens=MAX_TOKENS, stop=[stop, "never said"])
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["completion_tokens"] < MAX_TOKENS


async def test_calls_that_begin_alike_compute_it_once(product, reference):
    shared = "Rules of the house, for whoever asks. " + BRIEFING
    asked = [f"How do I get a card number {i}?" for i in range(6)]
    async with hosting(product) as host:
        answers = await asyncio.gather(*(host.generate(text, system=shared, max_tokens=4) for text in asked))
    prompts = [reference.prompt(("system", shared), ("user", text)) for text in asked]
    common = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    blocks = common - common % 64  # what the first has of it while it is still read
    assert [answer["prompt_tokens"] for answer in answers] == list(map(len, prompts))
    assert sum(answer["computed_tokens"] for answer in answers) <= sum(map(len, prompts)) - 5 * blocks
    for prompt, answer in zip(prompts, answers, strict=True):
        assert reference.gap(prompt, answer) <= BOUND


async def test_a_call_that_is_cancelled_midway_frees_its_row_and_changes_no_other(product, reference):
    async with hosting(product) as host:
        writing = asyncio.Event()

        async def heard(done, total, message):
            if message and not message.startswith(("reading", "queued", "loading")):
                writing.set()

        long = host.call("generate", heard, prompt="Count from one to one thousand in words.", max_tokens=2000)
        cancelled = asyncio.create_task(long)
        async with asyncio.timeout(300):
            await writing.wait()
        beside = asyncio.create_task(host.generate(PROMPTS[1], max_tokens=MAX_TOKENS))
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        answer = await beside
        async with asyncio.timeout(60):
            while (await asyncio.to_thread(product.health))["running"]:
                await asyncio.sleep(0.05)
    assert reference.gap(reference.prompt(("user", PROMPTS[1])), answer) <= BOUND


async def test_tools_are_refused_with_what_to_do_since_the_models_template_knows_none(product):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    async with hosting(product) as host:
        said = await host.refusal("generate", prompt="What is the weather?", tools=[tool])
    assert "cannot be given tools" in said
    assert "Choose another model" in said
