"""Several answers at once, piece by piece, and forks that are closed if nobody gets their answer."""

import asyncio
from contextlib import aclosing

import pytest

from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.errors import GenerationFailed, InvalidRequest, PromptTooLong, UnknownSession
from mlx_mcp.service.generate import Options
from mlx_mcp.service.several import closed_unless_whole, forked, stream_answers, stream_completions
from mlx_mcp.service.values import Delta, Progress, Result, Sampling, SessionOptions
from tests.service.house import CALLER, asked, make_service, requests_of


@pytest.fixture
def service():
    service = make_service()
    yield service
    service.engine.close()


def options(**given):
    return Options("tiny", **given)


async def collect(pieces):
    async with aclosing(pieces):
        return [piece async for piece in pieces]


def results(pieces):
    return {index: update for index, update in pieces if isinstance(update, Result)}


async def test_every_answer_is_told_by_its_index_and_ends_in_its_result(service):
    sampling = Sampling(temperature=1.0, seed=4)
    pieces = await collect(stream_answers(service, CALLER, asked("hello"), 3, options(sampling=sampling)))
    assert {index: result.text for index, result in results(pieces).items()} == dict.fromkeys(range(3), "hello")
    for index in range(3):
        own = [update for at, update in pieces if at == index]
        assert "".join(update.text for update in own if isinstance(update, Delta)) == "hello"
        assert isinstance(own[-1], Result)


async def test_seeds_count_up_over_the_answers(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    sampling = Sampling(temperature=1.0, seed=2**32 - 1)
    await collect(stream_answers(service, CALLER, asked("hi"), 2, options(sampling=sampling)))
    assert [request.sampling.seed for request in got] == [2**32 - 1, 0]
    assert len({request.lane for request in got}) == 1


async def test_the_first_answer_that_fails_ends_all(service, monkeypatch):
    begun, ended = [], []

    async def generate(request):
        begun.append(request)
        if len(begun) == 2:
            raise GenerationFailed("It broke. Call again.")
        try:
            yield Progress("queued", "queued")
            await asyncio.Event().wait()
        finally:
            ended.append(request)

    monkeypatch.setattr(service.engine, "generate", generate)
    failing = asyncio.create_task(
        collect(stream_answers(service, CALLER, asked("hi"), 2, options(sampling=Sampling(temperature=1.0))))
    )
    await asyncio.wait([failing], timeout=5)
    assert isinstance(failing.exception() if failing.done() else None, GenerationFailed)
    assert ended == begun[:1]


async def test_prompts_are_gone_on_with_in_order(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    pieces = await collect(stream_completions(service, CALLER, ["one", "two"], 1, options()))
    assert [result.text for _, result in sorted(results(pieces).items())] == ["one", "two"]
    assert [request.raw for request in got] == ["one", "two"]


async def test_a_prompt_without_a_chat_can_be_held_to_a_grammar(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    held = options(grammar=Grammar(GrammarKind.REGEX, "a+"))
    pieces = await collect(stream_completions(service, CALLER, ["aa"], 1, held))
    assert results(pieces)[0].text == "aa"
    assert got[0].raw == "aa"


async def test_several_answers_cannot_be_kept_in_one_session(service):
    for given in ({"keep": True}, {"session": "s_x"}):
        with pytest.raises(InvalidRequest, match="A session goes on with one answer, and n is 2"):
            await collect(stream_answers(service, CALLER, asked("hi"), 2, options(**given)))


async def opened(service):
    pieces = await collect(stream_answers(service, CALLER, asked("one"), 1, options(keep=True)))
    return results(pieces)[0].session.session_id


async def test_an_answer_in_a_fork_leaves_the_parent_as_it_was(service):
    parent = await opened(service)
    named = options(opening=SessionOptions("child"))
    pieces = await collect(stream_answers(service, CALLER, asked("two"), 1, named, parent))
    child = results(pieces)[0].session
    assert (child.name, child.parent_id) == ("child", parent)
    assert service.engine.thread.sessions[parent].num_tokens == 6


async def test_a_fork_is_closed_if_its_answer_fails_or_nobody_waits(service):
    parent = await opened(service)
    with pytest.raises(PromptTooLong):
        await collect(stream_answers(service, CALLER, asked("x" * 2001), 1, options(), parent))
    assert set(service.engine.thread.sessions) == {parent}
    service.engine.loader.runner.endless = True
    long = options(sampling=Sampling(max_tokens=1000))
    async with aclosing(stream_answers(service, CALLER, asked("two"), 1, long, parent)) as pieces:
        await anext(pieces)
        assert len(service.engine.thread.sessions) == 2
    assert set(service.engine.thread.sessions) == {parent}


async def test_a_fork_of_a_session_that_is_not_there_is_refused(service):
    with pytest.raises(UnknownSession):
        async with forked(service, CALLER, "s_none"):
            pass


async def test_a_caller_that_leaves_while_it_is_forked_leaves_no_fork(service):
    parent = await opened(service)
    forks = []

    async def fork():
        async with forked(service, CALLER, parent) as handle:
            forks.append(handle)

    task = asyncio.create_task(fork())
    await asyncio.sleep(0)  # the fork is asked for
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not forks
    assert set(service.engine.thread.sessions) == {parent}


async def test_a_named_session_is_closed_unless_its_answer_was_got(service):
    named = options(keep=True, opening=SessionOptions("new"))

    async def make(answers, then=None):
        async with closed_unless_whole(service, CALLER, "new"):
            if answers:
                await collect(stream_answers(service, CALLER, asked("hi"), 1, named))
            if then is not None:
                raise then

    await make(answers=True)
    assert [info.name for info in service.engine.thread.sessions.values()] == ["new"]
    await service.engine.close_sessions(CALLER.tenant, ("new",))
    for answers in (True, False):
        with pytest.raises(RuntimeError, match="gone"):
            await make(answers, RuntimeError("gone"))
        assert not service.engine.thread.sessions
