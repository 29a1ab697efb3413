"""Branches over one context, on an engine whose model answers what its script says."""

import asyncio
import json
import re
import threading
from dataclasses import replace

import pytest

from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.errors import GenerationFailed, InvalidRequest, PromptTooLong, RateLimited, UnknownSession
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.limits import Limiter, Limits
from mlx_mcp.service.service import Service
from mlx_mcp.service.sessions import create_session, list_sessions
from mlx_mcp.service.values import Ending
from mlx_mcp.workflows.deliberate.deliberate import deliberate
from mlx_mcp.workflows.deliberate.task import Branch, Judge, Task, branches_of
from tests.fakes import FakeLoader, fake_client
from tests.service.house import CALLER, asked, requests_of, unheard

SCHEMA = {"type": "object", "properties": {"v": {"type": "string"}}, "required": ["v"]}
CONTEXT = "".join(chr(97 + i * i % 26) for i in range(2000))


@pytest.fixture
def service():
    service = Service(fake_client(FakeLoader(context_tokens=9000), block_tokens=16), Registry(None))
    service.engine.loader.runner.says = role_of
    yield service
    assert service.engine.close()


def role_of(text):
    """A model that answers with the role that it is told."""
    return text.rpartition("\n\n")[2]


def judged_by(said):
    """The same, and what it says as a judge is `said`."""
    return lambda text: said if "answers were written" in text else role_of(text)


def voting(*values, **given):
    return task(*(json.dumps({"v": value}) for value in values), judge=Judge.VOTE, schema=SCHEMA, **given)


def task(*roles, judge=Judge.MERGE, **given):
    return Task("Do it.", tuple(Branch(role) for role in roles), judge, **{"system": "S.", **given})


async def ask(service, given, report=unheard):
    return await deliberate(service, CALLER, given, report)


def statuses(made):
    return [answered.came.status.value for answered in made.branches]


def texts(made):
    return [None if answered.came.result is None else answered.came.result.text for answered in made.branches]


async def sessions(service):
    return {info.session_id for info in await list_sessions(service, CALLER)}


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_eight_branches_compute_the_context_once_and_then_their_tails_alone(service):
    before = await ask(service, task("a", "b", system="T" * 100))  # the model is loaded, and lets the counts begin
    computed = service.engine.loader.runner.num_computed
    roles = [f"As {name}, say what you see." for name in "abcdefgh"]
    made = await ask(service, voting(*roles, system=CONTEXT))
    tails = sum(len("Do it.\n\n" + json.dumps({"v": role})) for role in roles)
    written = sum(answered.came.counts.written_tokens for answered in made.branches)
    fed = service.engine.loader.runner.num_computed - computed - written  # a written token is fed back as a decode
    assert len(CONTEXT) + tails <= made.counts.computed_tokens + 8 * 16
    assert made.counts.computed_tokens <= 1.1 * (len(CONTEXT) + tails)
    assert fed <= 1.1 * (len(CONTEXT) + tails)
    assert before.counts.calls == 4
    assert made.counts.calls == 9


async def test_a_branch_cut_by_its_deadline_keeps_its_text_and_goes_on_in_its_session(service, monkeypatch):
    runner, ended = service.engine.loader.runner, threading.Event()
    runner.says = lambda text: "slow " * 300 if role_of(text) == "slow" else "quick"
    launch, end = runner.launch, Ending.end

    def held(step):
        """Hold the engine at the slow branch's 20th token, until its deadline has come."""
        if not ended.is_set() and any(len(row.output_ids) >= 20 for row in runner.live.values()):
            assert ended.wait(10)
        return launch(step)

    monkeypatch.setattr(runner, "launch", held)
    monkeypatch.setattr(Ending, "end", lambda ending: (end(ending), ended.set()))
    given = replace(task(), branches=(Branch("quick"), Branch("slow", timeout_s=1.0)))
    made = await ask(service, given)
    assert statuses(made) == ["done", "timed_out"]
    cut = made.branches[1].came.result
    assert cut.text
    assert ("slow " * 300).startswith(cut.text)
    assert len(cut.text) <= 21
    runner.says = lambda text: "and the rest"
    session = cut.session.session_id
    on = (await generate(service, CALLER, asked("go on"), Options(session=session), unheard)).result
    assert (on.text, on.session.session_id) == ("and the rest", session)
    assert on.cached_tokens >= cut.prompt_tokens, "what it had is not computed again"


async def test_a_vote_stops_as_soon_as_no_other_value_can_win(service):
    runner = service.engine.loader.runner
    made = await ask(service, voting("a", "a", "A ", "b" * 3000, "c" * 3000))
    assert statuses(made) == ["done", "done", "done", "not_needed", "not_needed"]
    assert (json.loads(made.text), made.tally.counts, made.tally.tied) == ({"v": "a"}, (("a", 3),), False)
    assert made.session == made.branches[0].came.result.session.session_id
    kept = {answered.came.result.session.session_id for answered in made.branches[:3]}
    assert await sessions(service) == kept, "no fork of what was not needed is left"
    assert service.engine.stats.rows == 0
    assert runner.num_rows == 0
    assert made.counts.written_tokens < 3000


async def test_a_vote_that_is_not_certain_waits_for_all_and_a_tie_goes_to_the_first(service):
    late = " " * 200  # which a vote does not count
    made = await ask(service, voting("b", "a" + late, "a" + late, "b" + late + late))
    assert (made.tally.counts, made.tally.tied, made.tally.of) == ((("b", 2), ("a" + late, 2)), True, 4)
    assert json.loads(made.text) == {"v": "b"}
    assert statuses(made) == ["done"] * 4


async def test_a_branch_without_a_whole_answer_has_no_vote(service):
    service.engine.loader.runner.says = lambda text: role_of(text) if "cut" not in text else '{"v": "' + "x" * 99
    made = await ask(service, voting("cut", "a", sampling=Sampling(max_tokens=40)))
    assert (made.tally.counts, statuses(made)) == ((("a", 1),), ["length", "done"])
    none = await ask(service, voting("cut", "cut too", sampling=Sampling(max_tokens=40)))
    assert none.text == ""
    assert "nothing to count. Raise max_tokens or timeout_s" in none.error
    assert len(none.branches) == 2
    assert none.branches[0].came.result.session.session_id in await sessions(service)


async def test_a_merge_reads_every_answer_whole_and_is_anchored_on_the_majority(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    roles = [json.dumps({"v": value}) for value in ("yes", "no", "yes")]
    service.engine.loader.runner.says = judged_by("The one answer.")
    made = await ask(service, task(*roles, schema=SCHEMA))
    judge = got[-1].messages[-1].text
    assert all(f"\n{role}\n</answer>" in judge for role in roles)
    assert '2 of 3 say "yes"' in judge
    assert judge.startswith("Do it.\n\n3 answers were written")
    assert (made.text, made.error) == ("The one answer.", "")
    assert made.session in await sessions(service)
    assert len({request.lane for request in got[1:]}) == 1, "one lane for all"


async def test_a_pick_gives_the_answer_of_the_chosen_branch(service):
    service.engine.loader.runner.says = judged_by('{"reason": "It is right.", "choice": 2}')
    made = await ask(service, task("first", "second", "third", judge=Judge.PICK))
    assert (made.text, made.session) == ("second", made.branches[1].came.result.session.session_id)


async def test_a_split_asks_each_branch_a_question_of_its_own(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    planned = json.dumps({"questions": ["Where?", "When?"]})

    def says(text):
        if "Break it into" in text:
            return planned
        return "Here, now." if "Each answers a part" in text else role_of(text)

    service.engine.loader.runner.says = says
    made = await ask(service, task("", "", "", judge=Judge.SPLIT, schema=SCHEMA))
    assert texts(made) == [f"Answer this part of it alone: {which}?" for which in ("Where", "When")]
    assert [request.grammar is None for request in got[1:]] == [False, True, True, False]
    assert made.text == "Here, now."


async def test_a_judge_that_fails_loses_nothing_of_the_branches(service):
    service.engine.loader.runner.says = judged_by("x" * 500)
    made = await ask(service, task("a", "b", judge=Judge.PICK, sampling=Sampling(max_tokens=50)))
    assert made.text == ""
    assert "gave no whole answer (length). Raise max_tokens or budget_tokens" in made.error
    assert statuses(made) == ["done", "done"]
    assert len(await sessions(service)) == 2


async def test_answers_that_are_too_long_for_the_judge_are_said_to_be(service):
    service.engine.loader.runner.says = judged_by("never")
    made = await ask(service, task("a" * 4000, "b" * 4000, "c" * 4000))
    assert re.search(r"could not answer: .* Lower max_tokens if the answers are too long for it\.", made.error)
    assert "What the branches said is in their sessions" in made.error
    assert len(await sessions(service)) == 3


async def test_one_budget_ends_all_branches_and_leaves_the_judge_its_share(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    service.engine.loader.runner.endless = True
    made = await ask(service, task("a", "b", "c", budget_tokens=400, sampling=Sampling(max_tokens=1000)))
    assert statuses(made) == ["budget"] * 3
    written = sum(answered.came.counts.written_tokens for answered in made.branches)
    assert 290 <= written <= 310
    assert got[-1].sampling.max_tokens == 400 - written
    assert made.counts.written_tokens <= 410


async def test_each_model_computes_the_context_once_for_its_branches(service, monkeypatch):
    got = requests_of(service, monkeypatch)
    given = task("a", "b", "c")
    made = await ask(service, replace(given, branches=(Branch("a"), Branch("b", "other"), Branch("c", "other"))))
    models = [answered.came.result.model for answered in made.branches]
    assert models == ["tiny", "other", "other"]
    assert sum(request.context for request in got) == 2
    assert texts(made) == ["a", "b", "c"]


async def test_branches_go_on_from_a_session_which_stays_as_it_is(service):
    context = await create_session(service, CALLER, Context("S."), "", (), SessionOptions(), unheard)
    base = context.result.session.session_id
    made = await ask(service, task("a", "b", system="", session=base))
    kept = {answered.came.result.session for answered in made.branches}
    assert {info.parent_id for info in kept} == {base}
    assert base in await sessions(service)
    assert next(i for i in await list_sessions(service, CALLER) if i.session_id == base).num_tokens == 2
    with pytest.raises(UnknownSession):
        await ask(service, task("a", "b", system="", session="nobody"))


async def test_without_a_context_each_branch_opens_its_own_session(service):
    made = await ask(service, task("a", "b", system=""))
    kept = {answered.came.result.session.session_id for answered in made.branches}
    assert await sessions(service) == {*kept, made.session}


@pytest.mark.parametrize("system", ["S.", ""])
async def test_a_cancelled_deliberation_leaves_no_row_and_no_session(service, system):
    runner = service.engine.loader.runner
    runner.says = lambda text: "short" if "first" in text.rpartition("|")[2] else "endless " * 200
    given = task("first", "second", "third", system=system, sampling=Sampling(max_tokens=1500))
    call = asyncio.create_task(ask(service, given))
    await until(lambda: runner.num_rows == 2 and service.engine.stats.output_tokens > 30)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: service.engine.stats.rows == 0)
    assert await sessions(service) == set()


async def test_a_failing_branch_is_told_and_the_others_are_judged(service):
    given = replace(task("a", "b" * 9000), branches=(Branch("a"), Branch("b" * 9000), Branch("c")))
    made = await ask(service, given)
    assert statuses(made) == ["done", "failed", "done"]
    assert isinstance(made.branches[1].came.error, PromptTooLong)
    with pytest.raises(PromptTooLong):
        await ask(service, task("b" * 9000, "c" * 9000))
    assert len(await sessions(service)) == 3, "of two branches and the judge"


async def test_a_branch_that_has_not_begun_by_its_deadline_leaves_no_fork(service, monkeypatch):
    context = await create_session(service, CALLER, Context("S."), "", (), SessionOptions(), unheard)
    base, gate, fork = context.result.session.session_id, service.engine.loader.runner.gate, service.engine.fork

    async def fork_and_hold(*given):
        made = await fork(*given)
        gate.clear()  # no branch gets a row now
        asyncio.get_running_loop().call_later(0.4, gate.set)
        return made

    monkeypatch.setattr(service.engine, "fork", fork_and_hold)
    late = tuple(Branch(role, timeout_s=0.1) for role in "ab")
    with pytest.raises(GenerationFailed, match="raise timeout_s or budget_tokens"):
        await ask(service, replace(task(system="", session=base), branches=late))
    assert await sessions(service) == {base}


async def test_more_calls_than_the_caller_may_have_at_once_are_refused(service):
    limited = replace(service, limits=Limiter(lambda tenant: Limits(sessions=3)))
    with pytest.raises(RateLimited, match="close_session"):
        await ask(limited, task("a", "b", "c"))
    assert await sessions(service) == set()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": " "}, "`task` is empty. Say in it"),
        ({"branches": (Branch(),)}, "1 branches; there must be from 2 to 64"),
        ({"session": "s"}, "leave one of the two out"),
        ({"system": "", "session": "s", "model": "tiny"}, "name no other, or give `files`"),
        ({"judge": Judge.VOTE}, "give `json_schema`, such as"),
        ({"judge": Judge.VOTE, "schema": {"properties": {"a": {}, "b": {}}}}, "`vote_on` must be given.* a, b"),
        ({"vote_on": "c", "schema": SCHEMA}, "`vote_on` must be a property of `json_schema`, which has: v"),
    ],
)
async def test_what_cannot_be_carried_out_is_refused_with_what_to_do(service, monkeypatch, change, says):
    got = requests_of(service, monkeypatch)
    with pytest.raises(InvalidRequest, match=says):
        await ask(service, replace(task("a", "b"), **change))
    assert got == []


def test_branches_that_nothing_tells_apart_are_drawn_with_seeds_that_count_up():
    made = branches_of((), 3, Sampling(seed=5), 9.0)
    assert made == tuple(Branch("", "", 0.8, seed, 9.0) for seed in (5, 6, 7))
    roles = branches_of((Branch("a"), Branch("b", timeout_s=1.0, seed=1)), 1, Sampling(), None)
    assert roles == (Branch("a"), Branch("b", timeout_s=1.0, seed=1))
    with pytest.raises(InvalidRequest, match=r"Give a temperature, say 0\.8, or each its own role"):
        branches_of((Branch("a"),), 2, Sampling(temperature=0.0), None)
