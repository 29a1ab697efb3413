"""Answers in prompts that are sent whole again: their tokens are those that the model wrote."""

import random
from types import SimpleNamespace

import pytest

from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.engine.requests import GenerateRequest, Result
from mlx_mcp.engine.spellings import Spellings, runs
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from mlx_mcp.models.registry import EMBEDDED_FOLDER
from tests.effort import drawn
from tests.models_made import make_model, write_tokenizer

WORDS = ("alpha", "badge", "count", "771", " ", "\n", ".", "é", "<|end|>", "The ", "{}")


@pytest.fixture(scope="module", params=["embedded", "chatml"])
def model(request, tmp_path_factory):
    """As much of a model as has to do with text."""
    folder = EMBEDDED_FOLDER
    if request.param == "chatml":
        folder = tmp_path_factory.mktemp("chatml")
        template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        write_tokenizer(folder, template)
    return SimpleNamespace(name="model", tokenizer=ChatTokenizer(folder, None, isolated=False))


def letter_by_letter(model, text):
    """The tokens of a text that nobody would choose, and the same text as its tokenizer encodes it."""
    ids = [token_id for letter in text for token_id in model.tokenizer._encoder.encode_following([letter], bool)]
    assert model.tokenizer.decode(tuple(ids)) == text
    return tuple(ids)


def chat(model, *texts):
    roles = ("user", "assistant")
    return model.tokenizer.encode_chat([Message(roles[i % 2], text) for i, text in enumerate(texts)]).ids


def test_an_answer_has_the_tokens_that_it_was_written_with(model):
    spellings, prompt = Spellings(), chat(model, "What is it?")
    written = letter_by_letter(model, "The badge of Alice is seven.")
    spellings.remember("", model, prompt, written)
    encoded = chat(model, "What is it?", "The badge of Alice is seven.", "And now?")
    given = spellings.respelt("", model, encoded)
    assert given[: len(prompt) + len(written)] == prompt + written
    assert model.tokenizer.decode(given) == model.tokenizer.decode(encoded)
    assert given != encoded


def test_nothing_else_is_changed(model):
    spellings, prompt = Spellings(), chat(model, "What is it?")
    text = "The badge of Alice is seven."
    spellings.remember("", model, prompt, letter_by_letter(model, text))
    other = SimpleNamespace(name="other", tokenizer=model.tokenizer)
    said_by_the_user, said = chat(model, text), chat(model, "What is it?", text, "And now?")
    changed = chat(model, "What is it?", text + "!", "And now?")
    assert spellings.respelt("", model, said_by_the_user) == said_by_the_user
    assert spellings.respelt("", model, changed) == changed
    assert spellings.respelt("somebody else", model, said) == said
    assert spellings.respelt("", other, said) == said
    assert spellings.respelt("", model, said) != said


def test_the_latest_spelling_of_an_answer_counts(model):
    spellings, prompt = Spellings(), chat(model, "What is it?")
    usual = chat(model, "What is it?", "badge", "x")[len(prompt) :]
    spellings.remember("", model, prompt, letter_by_letter(model, "badge"))
    spellings.remember("", model, prompt, usual[:1])
    again = chat(model, "What is it?", model.tokenizer.decode(usual[:1]), "x")
    assert spellings.respelt("", model, again) == again


def test_a_text_that_is_no_text_is_not_remembered(model):
    spellings, prompt = Spellings(), chat(model, "What is it?")
    broken = letter_by_letter(model, "🧭")[:1]
    assert "\ufffd" in model.tokenizer.decode(broken)
    spellings.remember("", model, prompt, broken)
    encoded = chat(model, "What is it?", "\ufffd", "And now?")
    assert spellings.respelt("", model, encoded) == encoded


def test_the_oldest_answers_are_forgotten_first(model):
    spellings = Spellings(max_tokens=100)
    for i in range(20):
        spellings.remember("", model, chat(model, "What?"), letter_by_letter(model, f"answer {i:06}"))
    encoded = [chat(model, "What?", f"answer {i:06}", "x") for i in range(20)]
    changed = [spellings.respelt("", model, ids) != ids for ids in encoded]
    assert changed == sorted(changed)
    assert 3 <= sum(changed) <= 8


def test_whatever_was_written_a_prompt_decodes_to_the_same_text(model):
    rng, spellings, size = random.Random(7), Spellings(max_tokens=500), 300
    texts = []
    for _ in range(drawn(400, least=30)):
        question = "".join(rng.choices(WORDS, k=3))
        prompt = chat(model, "x" + question)
        output = tuple(rng.randrange(size) for _ in range(rng.randrange(1, 12)))
        spellings.remember(rng.choice("ab"), model, prompt, output)
        texts.append(model.tokenizer.decode(output))
        encoded = chat(model, "x" + question, rng.choice(texts), "y", rng.choice(texts), "z")
        given = spellings.respelt("a", model, encoded)
        controls = model.tokenizer.control_ids
        assert model.tokenizer.decode(given) == model.tokenizer.decode(encoded)
        assert [i for i in given if i in controls] == [i for i in encoded if i in controls]


def test_runs_lie_between_control_tokens():
    found = [(run.opener, run.start, run.end) for run in runs((5, 0, 7, 8, 0, 0, 9), frozenset({0}))]
    assert found == [(0, 2, 4), (0, 6, 7)]


async def answer(client, messages, **how):
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=1, **how)
    words = Grammar(GrammarKind.REGEX, "[a-z ]{20}[a-z]") if not how else None
    request = GenerateRequest(tuple(messages), sampling=sampling, grammar=words)
    return [update async for update in client.generate(request)][-1]


async def test_a_conversation_that_is_sent_whole_again_computes_only_what_is_new(tmp_path):
    from mlx_mcp.config import Config
    from mlx_mcp.wiring import wire

    client, _ = wire(Config.load(model=str(make_model(tmp_path / "model"))))
    try:
        messages, known = [Message("system", "You help the agent. " * 8)], 0
        for question in ("Write of the sea.", "Go on.", "And of the file?", "Once more.", "The end."):
            messages.append(Message("user", question))
            result = await answer(client, messages)
            assert isinstance(result, Result)
            assert result.finish_reason.value == "stop"
            assert result.cached_tokens == known, question
            known = result.prompt_tokens + result.completion_tokens
            messages.append(Message("assistant", result.text))
    finally:
        client.close()


async def test_what_a_stop_string_ended_is_kept_too():
    from mlx_mcp.config import Config
    from mlx_mcp.wiring import wire

    client, _ = wire(Config.load())
    try:
        said = [Message("user", "Count from 1 to 30.")]
        result = await answer(client, said, stop=(" 9",))
        said += [Message("assistant", result.text), Message("user", "Count from 1 to 9.")]
        again = await answer(client, said, stop=(" 9",))
        assert result.stop_string == " 9"
        assert again.cached_tokens >= result.prompt_tokens + 10
    finally:
        client.close()
