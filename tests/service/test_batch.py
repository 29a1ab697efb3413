import asyncio

import pytest

from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.requests import Result
from mlx_mcp.errors import EngineDead, InvalidRequest, PromptTooLong, UnknownSession
from mlx_mcp.service.batch import generate_batch
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options
from mlx_mcp.service.sessions import create_session, list_sessions
from tests.service.house import CALLER, make_service, requests_of, unheard


@pytest.fixture
def service():
    service = make_service()
    yield service
    assert service.engine.close()


async def batch(service, prompts, n=1, context=None, **options):
    return await generate_batch(service, CALLER, context or Context(), prompts, n, Options(**options), unheard)


async def session_of(service, system="S."):
    made = await create_session(service, CALLER, Context(system), "", (), SessionOptions(), unheard)
    return made.result.session.session_id


async def test_answers_to_a_prompt_come_together_with_seeds_that_count_up_in_one_lane(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    came = await batch(service, ["a", "b"], 3, Context("S."), sampling=Sampling(temperature=1, seed=2**32 - 1))
    assert [outcome.text for outcome in came.outcomes] == [*["S.a"] * 3, *["S.b"] * 3]
    assert [request.sampling.seed for request in got] == [2**32 - 1, 0, 1] * 2
    await batch(service, ["a"], 2, sampling=Sampling(temperature=1))
    assert [request.sampling.seed for request in got[6:]] == [None, None]
    assert [len({request.lane for request in some}) for some in (got[:6], got[6:], got)] == [1, 1, 2]


async def test_what_can_only_fail_is_refused_before_anything_is_asked_of_the_engine(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    with pytest.raises(InvalidRequest, match="65 branches; there may be 64"):
        await batch(service, list("abcde"), 13, sampling=Sampling(temperature=1))
    with pytest.raises(InvalidRequest, match="At temperature 0 all n answers are the same"):
        await batch(service, ["a"], 2, sampling=Sampling(temperature=0))
    assert got == []


@pytest.mark.parametrize("keep", [False, True])
async def test_a_branch_that_fails_leaves_no_fork_and_the_others_go_on(service, keep):
    session = await session_of(service)
    came = await batch(service, ["a", "b" * 3000, "c"], session=session, keep=keep)
    texts = [outcome.text if isinstance(outcome, Result) else type(outcome) for outcome in came.outcomes]
    assert texts == ["S.a", PromptTooLong, "S.c"]
    kept = {info.session_id for info in await list_sessions(service, CALLER)}
    assert kept == {session, *(o.session.session_id for o in came.outcomes if keep and isinstance(o, Result))}


async def test_a_batch_all_of_whose_branches_fail_is_the_first_ones_failure(service):
    with pytest.raises(UnknownSession):
        await batch(service, ["a", "b"], session="nobody")
    with pytest.raises(UnknownSession):
        await batch(service, ["a", "b"], session="nobody", keep=True)


async def test_a_cancelled_batch_on_forks_closes_them_all(service):
    session = await session_of(service)
    runner = service.engine.loader.runner
    runner.endless = True
    runner.gate.clear()
    runner.steps.clear()
    call = asyncio.create_task(batch(service, list("abc"), session=session, keep=True))
    async with asyncio.timeout(30):
        while not runner.steps:
            await asyncio.sleep(0.001)
        call.cancel()
        runner.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert [info.session_id for info in await list_sessions(service, CALLER)] == [session]


async def test_a_dead_engine_fails_the_whole_batch(service):
    await batch(service, ["a"])
    service.engine.close()
    with pytest.raises(EngineDead):
        await batch(service, ["a", "b"])
