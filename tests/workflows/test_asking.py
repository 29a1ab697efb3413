"""Many calls of one run, over a service of fakes: budgets, limits, fairness, and what is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence

import pytest

from mlx_mcp.chat.message import Message
from mlx_mcp.engine.requests import Result
from mlx_mcp.errors import BudgetSpent, CapacityError, EngineDead
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.activity import Meter, progress_line
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.limits import Limiter, Limits
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.workflows import asking
from mlx_mcp.workflows.asking import WINDOW, Asker, Budget, Outcome
from mlx_mcp.workflows.counting import Counts
from tests.fakes import FakeLoader, FakeRunner, fake_client
from tests.service.house import CALLER, make_service, unheard


@pytest.fixture
def service() -> Generator[Service]:
    service = make_service()
    yield service
    assert service.engine.close()


def asker_of(service: Service, **budget: float) -> Asker:
    return Asker(service, CALLER, Budget(**budget), unheard)  # type: ignore[arg-type]


def chats(*prompts: str) -> list[tuple[Message, ...]]:
    return [(Message("user", prompt),) for prompt in prompts]


def read(outcomes: Sequence[Outcome]) -> list[str | type[Exception]]:
    return [outcome.text if isinstance(outcome, Result) else type(outcome) for outcome in outcomes]


def runner_of(service: Service) -> FakeRunner:
    return service.engine.loader.runner  # type: ignore[attr-defined, no-any-return]


async def test_answers_are_in_order_counted_and_told_without_their_texts(service: Service) -> None:
    told: list[str] = []

    async def report(meters: Sequence[Meter]) -> None:
        assert [each.text for each in meters] == [""]
        told.append(progress_line(meters))

    asker = Asker(service, CALLER, Budget(), report)
    prompts = [f"{index:03}" for index in range(200)]
    assert read(await asker.ask(chats(*prompts), Options())) == prompts
    assert asker.counts == Counts(200, 0, 600, 0, 0, 600, 800) or asker.counts.calls == 200
    assert asker.counts.computed_tokens + asker.counts.cached_tokens == asker.counts.prompt_tokens == 600
    assert told[-1] == "200 of 200 answers, 0 running"
    assert max(int(line.split(", ")[1].split()[0]) for line in told) == WINDOW


async def test_more_calls_than_the_budget_has_are_refused_before_any_is_made(service: Service) -> None:
    asker = asker_of(service, calls=3)
    await asker.ask(chats("a", "b"), Options())
    with pytest.raises(BudgetSpent, match=r"These are 2 calls, and this run may make 1 more \(of 3\)"):
        await asker.ask(chats("a", "b"), Options())
    assert asker.counts.calls == 2
    await asker.ask(chats("a"), Options())
    with pytest.raises(BudgetSpent, match=r"These are 1 calls, and this run may make 0 more"):
        await asker.open(Context("S."), "name")


async def test_when_tokens_are_used_up_the_rest_of_a_batch_fails(service: Service) -> None:
    asker = asker_of(service, tokens=400)
    outcomes = read(await asker.ask(chats(*[f"{index:04}" for index in range(300)]), Options()))
    answered = [each for each in outcomes if isinstance(each, str)]
    assert 400 <= asker.counts.spent_tokens < 400 + 9 * WINDOW
    assert 0 < len(answered) < 300
    assert set(outcomes) - set(answered) == {BudgetSpent}
    with pytest.raises(BudgetSpent, match="tokens computed and written, and may have 400"):
        await asker.ask(chats("a"), Options())


async def test_when_the_time_is_up_calls_are_cut_off_and_what_was_answered_stays(service: Service) -> None:
    await asker_of(service).ask(chats("load"), Options())
    asker, runner = asker_of(service, seconds=0.1), runner_of(service)
    runner.gate.clear()
    assert read(await asker.ask(chats("b", "c"), Options())) == [BudgetSpent, BudgetSpent]
    runner.gate.set()
    with pytest.raises(BudgetSpent, match=r"This run has used the 0\.1 s that it may take"):
        await asker.ask(chats("a"), Options())
    await idle(service)


async def idle(service: Service) -> None:
    async with asyncio.timeout(30):
        while service.engine.stats.running or service.engine.stats.waiting:
            await asyncio.sleep(0.001)


async def test_a_cancelled_run_leaves_no_row_and_no_session(service: Service) -> None:
    runner = runner_of(service)
    await asker_of(service).ask(chats("load"), Options())
    for begin in (lambda a: a.ask(chats(*["a"] * 100), Options()), lambda a: a.open(Context("S."), "run-1")):
        runner.endless = True
        runner.steps.clear()
        runner.gate.clear()
        running = asyncio.create_task(begin(asker_of(service)))
        async with asyncio.timeout(30):
            while not runner.steps:
                await asyncio.sleep(0.001)
        running.cancel()
        runner.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        await idle(service)
        assert not known_sessions(service)


async def test_a_principal_with_few_places_has_its_run_in_these(service: Service) -> None:
    limited = Service(service.engine, service.registry, limits=Limiter(lambda tenant: Limits(calls_at_once=2)))
    most = 0

    async def report(meters: Sequence[Meter]) -> None:
        nonlocal most
        most = max(most, int(meters[0].line.split(", ")[1].split()[0]))

    asker = Asker(limited, CALLER, Budget(), report)
    assert read(await asker.ask(chats(*"abcdefgh"), Options())) == list("abcdefgh")
    assert most == 2


async def test_a_call_that_there_is_no_room_for_is_made_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    refused = iter([CapacityError("Full.", 600), CapacityError("Full.", 0.01)])
    real = asking.run

    async def once_full(*args: object) -> Result:
        for error in refused:
            raise error
        return await real(*args)  # type: ignore[arg-type]

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asking, "run", once_full)
    monkeypatch.setattr(asyncio, "sleep", pause)
    assert read(await asker_of(service).ask(chats("a"), Options())) == ["a"]
    assert pauses == [asking.MAX_PAUSE_S, 0.01]


async def test_a_dead_engine_fails_the_run(service: Service) -> None:
    asker = asker_of(service)
    await asker.ask(chats("load"), Options())
    service.engine.close()
    with pytest.raises(EngineDead):
        await asker.ask(chats("a", "b"), Options())


async def test_another_windows_first_token_waits_for_one_answer_of_a_runs_500_questions() -> None:
    """However many questions a run has, another window's call begins when the first of the rows that run has ended."""
    engine = fake_client(FakeLoader(context_tokens=2000), block_tokens=16)
    ours, theirs = (Service(engine.for_connection(Registry(None), group), Registry(None)) for group in ("1", "2"))
    runner = runner_of(ours)
    asker = Asker(ours, CALLER, Budget(), unheard)
    questions = [f"question {index:04}" for index in range(500)]
    running = asyncio.create_task(asker.ask(chats(*questions), Options()))
    try:
        async with asyncio.timeout(60):
            while asker.counts.calls < 5:
                await asyncio.sleep(0.001)
            runner.gate.clear()
            runner.steps.clear()
            while not runner.steps:  # the engine waits in a step
                await asyncio.sleep(0.001)
            context = Context(messages=(Message("user", "hi"),))
            other = asyncio.create_task(generate(theirs, CALLER, context, Options(), unheard))
            while not any("104, 105" in str(command) for command in list(engine.thread._inbox)):
                await asyncio.sleep(0.001)
            assert asker.counts.calls < 400
            runner.gate.set()
            await other
            await running
        hi = tuple(map(ord, "hi"))
        began = next(at for at, step in enumerate(runner.steps) if any(a.prompt_ids == hi for a in step.admitted))
        assert began <= len(questions[0]) + 3
    finally:
        assert engine.close()
