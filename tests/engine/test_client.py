import asyncio
import contextlib

import pytest

from mlx_mcp.core.ports import Message
from mlx_mcp.engine import client as client_module
from mlx_mcp.engine.client import Delta, GenerateRequest, Progress, Result
from mlx_mcp.errors import EngineDead, InvalidRequest, ModelError, PromptTooLong, UnknownModel
from tests.fakes import FakeLoader, fake_client


def asking(text, **options):
    return GenerateRequest((Message("user", text),), **options)


async def collect(client, request):
    return [update async for update in client.generate(request)]


async def answer(client, request):
    return (await collect(client, request))[-1]


@pytest.fixture
def client():
    client = fake_client()
    yield client
    assert client.close()


async def until(condition, timeout_s=5.0):
    """Wait for what another thread will make true; asyncio has no event for it."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


async def test_text_comes_in_deltas_and_the_result_holds_all_of_it(client):
    updates = await collect(client, asking("hello"))
    assert "".join(u.text for u in updates if isinstance(u, Delta)) == "hello"
    assert updates[-1] == Result("hello", "stop", "tiny", 5, 5)


async def test_progress_is_told_in_every_phase(client):
    phases = [u.phase for u in await collect(client, asking("hello")) if isinstance(u, Progress)]
    assert list(dict.fromkeys(phases)) == ["loading", "queued", "prefill"]


async def test_a_loaded_model_is_not_loaded_again(client):
    await answer(client, asking("a"))
    updates = await collect(client, asking("b"))
    assert all(u.phase != "loading" for u in updates if isinstance(u, Progress))
    assert client.loader.prepared == ["tiny"]


async def test_eight_callers_of_a_cold_model_share_one_load_and_each_get_their_own_answer(client):
    client.loader.hold.clear()
    calls = [asyncio.create_task(answer(client, asking(f"text {i}"))) for i in range(8)]
    await until(lambda: client.loader.prepared)
    client.loader.hold.set()
    assert [r.text for r in await asyncio.gather(*calls)] == [f"text {i}" for i in range(8)]
    assert client.loader.materialised == ["tiny"]


async def test_a_stop_string_ends_the_answer_and_frees_the_row(client):
    client.loader.runner.endless = True
    result = await answer(client, asking("one END two", stop=("END",)))
    assert (result.text, result.finish_reason) == ("one ", "stop")
    await until(lambda: client.stats.rows == 0)


async def test_max_tokens_cuts_with_length(client):
    result = await answer(client, asking("hello", max_tokens=2))
    assert (result.text, result.finish_reason, result.completion_tokens) == ("he", "length", 2)


async def test_a_cancelled_call_frees_its_row_and_leaves_the_others(client):
    await answer(client, asking("warm"))
    runner = client.loader.runner
    runner.endless, runner.steps = True, []
    runner.gate.clear()
    doomed = asyncio.create_task(answer(client, asking("abc", max_tokens=90)))
    await until(lambda: runner.steps)  # its first step is being computed
    other = asyncio.create_task(answer(client, asking("xyz", max_tokens=90)))
    await until(lambda: client.thread._inbox)
    doomed.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await doomed
    runner.gate.set()
    assert (await other).finish_reason == "length"
    first, *later = runner.steps
    assert first.prefill[0].sequence.prompt_ids == (97, 98, 99)
    assert all(first.prefill[0].sequence not in step.decode for step in later)


async def test_a_call_cancelled_while_its_model_loads_leaves_nothing_behind(client):
    client.loader.hold.clear()
    call = asyncio.create_task(answer(client, asking("abc")))
    await until(lambda: client.loader.prepared)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    client.loader.hold.set()
    assert (await answer(client, asking("abc"))).text == "abc"


async def test_a_long_wait_shows_signs_of_life(client, monkeypatch):
    monkeypatch.setattr(client_module, "KEEPALIVE_S", 0.01)
    await answer(client, asking("a"))
    client.loader.runner.gate.clear()
    signs = 0
    async for update in client.generate(asking("abc")):
        signs += isinstance(update, Progress)
        if signs == 5:
            client.loader.runner.gate.set()
    assert signs >= 5


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (asking(""), InvalidRequest, "prompt is empty"),
        (asking(" \n"), InvalidRequest, "prompt is empty"),
        (asking("a", max_tokens=0), InvalidRequest, "at least 1"),
        (asking("a", max_tokens=-1), InvalidRequest, "at least 1"),
        (asking("a", max_tokens=10**9), PromptTooLong, "Lower max_tokens to 99"),
        (asking("a" * 100), PromptTooLong, "Shorten the prompt to fewer than 100 tokens"),
        (asking("a" * 99, max_tokens=2), PromptTooLong, "Lower max_tokens to 1"),
        (asking("a", temperature=-0.1), InvalidRequest, "temperature"),
        (asking("a", temperature=float("nan")), InvalidRequest, "temperature"),
        (asking("a", top_p=0), InvalidRequest, "top_p"),
        (asking("a", stop=("",)), InvalidRequest, "stop string is empty"),
        (asking("a", model="none"), UnknownModel, "Call list_models"),
    ],
)
async def test_a_bad_request_is_refused_with_the_next_step_and_the_client_goes_on(client, request_, error, words):
    with pytest.raises(error, match=words):
        await answer(client, request_)
    assert (await answer(client, asking("fine"))).text == "fine"


async def test_without_max_tokens_the_answer_gets_what_the_context_leaves(client):
    client.loader.runner.endless = True
    result = await answer(client, asking("a" * 90))
    assert (result.completion_tokens, result.finish_reason) == (10, "length")


async def test_a_model_that_cannot_be_prepared_says_why_and_may_be_tried_again(client):
    client.loader.fail = ModelError("no config.json")
    with pytest.raises(ModelError, match=r"no config\.json"):
        await answer(client, asking("a"))
    client.loader.fail = None
    assert (await answer(client, asking("a"))).text == "a"


async def test_a_library_that_exits_while_it_prepares_a_model_leaves_nobody_waiting(client):
    client.loader.fail = SystemExit("no tokenizer for you")
    calls = [answer(client, asking("a")) for _ in range(3)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(r) for r in results} == {ModelError}
    client.loader.fail = None
    assert (await answer(client, asking("a"))).text == "a"


async def test_a_model_that_was_unloaded_meanwhile_is_loaded_again(client):
    await answer(client, asking("a"))
    client.loader.weights_bytes = 950
    await answer(client, asking("b", model="other"))
    assert (await answer(client, asking("c"))).text == "c"
    assert client.loader.materialised == ["tiny", "other", "tiny"]


async def test_a_dead_engine_answers_every_call_at_once(client):
    await answer(client, asking("a"))
    client.loader.runner.endless = True
    calls = [asyncio.create_task(answer(client, asking("abc", max_tokens=90))) for _ in range(4)]
    client.loader.runner.explode = SystemExit("gone")
    async with asyncio.timeout(2):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(r) for r in results} == {EngineDead}
    with pytest.raises(EngineDead):
        await answer(client, asking("abc"))


def test_one_client_serves_several_event_loops(client):
    assert asyncio.run(answer(client, asking("one"))).text == "one"
    assert asyncio.run(answer(client, asking("two"))).text == "two"


async def test_a_loop_that_closed_in_mid_call_frees_its_row():
    loader = FakeLoader()
    loader.runner.endless = True
    client = fake_client(loader)

    async def begin():
        async for update in client.generate(asking("abc", max_tokens=90)):
            if isinstance(update, Delta):
                return

    await asyncio.to_thread(lambda: asyncio.run(begin()))
    await until(lambda: client.stats.rows == 0 and client.stats.running == 0)
    client.close()
