"""Jobs: work that outlasts its call, and its outcome until it is fetched."""

import asyncio

import pytest

from mlx_mcp.errors import GenerationFailed, InvalidRequest, UnknownResult
from mlx_mcp.service import jobs as module
from mlx_mcp.service.activity import Meter
from mlx_mcp.service.jobs import Jobs, JobState, Key
from tests.engine.test_client import until


def work(gate=None, outcome="done", told=()):
    """Work that tells its progress, waits for a gate, and returns or raises its outcome."""

    async def run(report):
        for line in told:
            await report([Meter(line=line)])
        if gate is not None:
            await gate.wait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return run


@pytest.fixture
def gate():
    return asyncio.Event()


async def test_an_outcome_is_its_owners_alone(gate):
    jobs = Jobs()
    job = jobs.start("us", "generate", work(gate))
    jobs.hand_over(job)
    assert jobs.get("us", job.result_id) is job
    assert jobs.of("us") == [job]
    assert jobs.of("them") == []
    for owner, result_id in (("them", job.result_id), ("us", "r-none")):
        with pytest.raises(UnknownResult, match="get_result without a result_id lists yours"):
            jobs.get(owner, result_id)
    gate.set()
    assert await job.wait(20)
    assert job.result() == "done"


async def test_a_handle_cannot_be_guessed():
    jobs = Jobs()
    ids = {jobs.start("us", "generate", work()).result_id for _ in range(50)}
    assert len(ids) == 50
    assert all(len(each) >= 24 for each in ids)  # 128 bits


async def test_a_wait_ends_in_time_and_the_work_goes_on(gate):
    jobs = Jobs()
    job = jobs.start("us", "generate", work(gate))
    assert not await job.wait(0.01)
    assert job.state is JobState.RUNNING
    assert jobs.busy
    gate.set()
    assert await job.wait(20)
    assert (job.state, jobs.busy) == (JobState.DONE, False)


async def test_a_failure_is_raised_to_whoever_asks():
    job = Jobs().start("us", "generate", work(outcome=InvalidRequest("no such thing")))
    assert await job.wait(20)
    assert job.state is JobState.FAILED
    with pytest.raises(InvalidRequest, match="no such thing"):
        job.result()


async def test_a_cancelled_job_ends_and_says_so(gate):
    jobs = Jobs()
    job = jobs.start("us", "generate", work(gate))
    await asyncio.sleep(0)
    jobs.cancel(job)
    assert await job.wait(20)
    assert job.state is JobState.CANCELLED
    with pytest.raises(GenerationFailed, match="call again if it is needed"):
        job.result()
    jobs.cancel(job)  # again is no error
    assert not jobs.busy


async def test_a_job_that_is_cancelled_before_it_has_begun_ends_too(gate):
    jobs = Jobs()
    job = jobs.start("us", "generate", work(gate))
    jobs.cancel(job)
    assert await job.wait(20)
    assert job.state is JobState.CANCELLED


async def test_what_is_cut_off_at_the_end_of_the_process_fails(gate):
    jobs = Jobs()
    job = jobs.start("us", "generate", work(gate))
    await asyncio.sleep(0)
    jobs.cut_off()
    assert await job.wait(20)
    with pytest.raises(GenerationFailed, match="gives calls no more time"):
        job.result()


async def test_everybody_who_waits_hears_of_progress_and_one_who_fails_stops_nobody(gate, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 0.0)
    heard, going = [], asyncio.Event()

    async def tell(meters):
        heard.append(meters[0].line)

    async def broken(meters):
        raise OSError("gone")

    async def run(report):
        await going.wait()
        await report([Meter(line="half")])
        await report([Meter(line="nearly")])
        await gate.wait()

    job = Jobs().start("us", "generate", run)
    waiting = [asyncio.create_task(job.wait(5, report)) for report in (broken, tell, tell)]
    await until(lambda: len(job.reports) == 2)  # the same function twice is one
    going.set()
    await until(lambda: len(heard) == 2)
    gate.set()
    assert await asyncio.gather(*waiting) == [True] * 3
    assert (heard, job.reports) == (["half", "nearly"], set())


async def test_who_comes_later_hears_at_once_how_far_it_is(gate, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 0.0)
    job = Jobs().start("us", "generate", work(gate, told=["half"]))
    await until(lambda: job.meters)
    heard = []

    async def tell(meters):
        heard.append(meters[0].line)

    assert not await job.wait(0.01, tell)
    assert heard == ["half"]
    gate.set()


async def test_a_job_without_a_handle_leaves_nothing(gate):
    jobs = Jobs()
    for outcome in ("done", InvalidRequest("no such thing")):
        await jobs.start("us", "generate", work(outcome=outcome)).wait(20)
    job = jobs.start("us", "generate", work(gate))
    with pytest.raises(UnknownResult):
        jobs.get("us", job.result_id)
    jobs.cancel(job)
    await job.wait(20)
    assert not jobs._jobs
    assert not jobs._tasks


async def test_an_outcome_goes_after_its_time():
    jobs = Jobs(ttl_s=0.02)
    job = jobs.start("us", "generate", work())
    jobs.hand_over(job)
    await until(lambda: not jobs.of("us"))
    with pytest.raises(UnknownResult):
        jobs.get("us", job.result_id)


async def test_too_many_outcomes_push_out_the_oldest_fetched_ones_first_and_none_of_others(monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    jobs = Jobs()

    async def kept(owner):
        job = jobs.start(owner, "generate", work())
        await job.wait(20)
        jobs.hand_over(job)
        return job

    theirs = await kept("them")
    first, second = await kept("us"), await kept("us")
    second.fetched = True
    third = await kept("us")
    assert jobs.of("us") == [third, first]
    assert jobs.of("them") == [theirs]


async def test_what_is_kept_and_what_goes_on_is_counted(gate):
    jobs = Jobs()
    job = jobs.start("us", "generate", work(gate))
    assert (jobs.num_running, jobs.num_unfetched) == (0, 0)  # its call waits for it
    jobs.hand_over(job)
    assert (jobs.num_running, jobs.num_unfetched) == (1, 0)
    gate.set()
    await job.wait(20)
    assert (jobs.num_running, jobs.num_unfetched) == (0, 1)
    job.fetched = True
    assert jobs.num_unfetched == 0


KEY = Key("k", "this")


async def test_the_work_of_a_key_is_done_once_and_its_outcome_is_kept(gate):
    jobs, begun = Jobs(), []

    async def run(report):
        begun.append(len(begun))
        await gate.wait()
        return begun[-1]

    first, again = jobs.once("us", "generate", KEY, run), jobs.once("us", "generate", KEY, run)
    other, theirs = jobs.once("us", "generate", Key("l", "this"), run), jobs.once("them", "generate", KEY, run)
    assert again is first
    assert len({first, other, theirs}) == 3
    gate.set()
    assert await first.wait(20)
    assert jobs.once("us", "generate", KEY, run).result() == 0
    assert jobs.get("us", first.result_id) is first
    with pytest.raises(InvalidRequest, match="was used for another call"):
        jobs.once("us", "generate", Key("k", "that"), run)


async def test_a_key_is_free_again_when_its_work_has_failed_or_its_outcome_is_gone():
    jobs = Jobs(ttl_s=0.01)
    failed = jobs.once("us", "generate", KEY, work(outcome=InvalidRequest("no")))
    assert await failed.wait(20)
    done = jobs.once("us", "generate", KEY, work())
    assert done is not failed
    assert await done.wait(20)
    await until(lambda: not jobs.of("us"))
    assert jobs.once("us", "generate", KEY, work()) is not done
    assert len(jobs._keyed) == 1


async def test_a_job_that_is_dropped_ends_and_nothing_of_it_is_kept(gate):
    jobs = Jobs()
    job = jobs.once("us", "generate", KEY, work(gate))
    await asyncio.sleep(0)
    jobs.drop(job)
    assert await job.wait(20)
    assert job.state is JobState.CANCELLED
    assert jobs.of("us") == []
    assert not jobs._keyed
    with pytest.raises(UnknownResult):
        jobs.get("us", job.result_id)


async def test_those_that_follow_a_job_see_what_comes_of_it_until_its_end(gate):
    jobs = Jobs()
    job = jobs.start("us", "generate", work(gate, told=["one", "two"]))
    seen = []
    async for meters in job.changes():
        seen.append(meters[0].line)
        gate.set()
    assert seen[0] == "two"
    assert job.state is JobState.DONE
    assert not job.watchers
    assert [meters async for meters in job.changes()] == []
