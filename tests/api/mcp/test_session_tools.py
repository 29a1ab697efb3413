"""Sessions, forks, batches and files as an in-memory MCP client sees them, over fakes: one token per character."""

import asyncio
import contextlib

import pytest
from mcp import Client, MCPError

from mlx_mcp.api.mcp import calls
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.api.web import translate
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from tests.engine.test_client import until
from tests.fakes import FakeLoader, fake_client

SYSTEM = "You read reports, and answer questions about them in one short sentence."  # more than a block


@pytest.fixture
def engine():
    engine = fake_client(FakeLoader(context_tokens=2000), block_tokens=16)
    yield engine
    assert engine.close()


@pytest.fixture
def files(tmp_path):
    """Reads files from a folder with two."""
    (tmp_path / "report.txt").write_text("All is well with the river, the bridge and the mill.\n")
    (tmp_path / "notes.txt").write_text("Mind the gap.\n")
    return FileReader((tmp_path,), 1000, 1500)


def connect(engine, files=None):
    return Client(build_server(Service(engine, Registry(None)), files))


async def call(client, tool, **arguments):
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content[0].text
    return result.structured_content


async def refusal(client, tool, **arguments):
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.structured_content
    return result.content[0].text


async def generate(client, prompt, **arguments):
    return await call(client, "generate", prompt=prompt, **arguments)


async def tokens(client, session):
    listed = await call(client, "list_sessions")
    return next(s["tokens"] for s in listed["sessions"] if session in (s["session"], s.get("name")))


@contextlib.asynccontextmanager
async def held(engine, client, prompt, **arguments):
    """A call whose first step does not end until the block does, in which `engine` gets what is sent meanwhile."""
    runner = engine.loader.runner
    if not engine.stats.models:
        await generate(client, "load")
    runner.steps.clear()
    runner.gate.clear()
    running = asyncio.create_task(generate(client, prompt, **arguments))
    try:
        await until(lambda: runner.steps)
        yield running
        await until(lambda: engine.thread._inbox)
    finally:
        runner.gate.set()
    await running


# Sessions


async def test_a_session_remembers_and_computes_only_what_is_new(engine):
    async with connect(engine) as client:
        first = await generate(client, "abc", keep=True)
        assert (first["prompt_tokens"], first["cached_tokens"], first["computed_tokens"]) == (3, 0, 3)
        before = await tokens(client, first["session"])
        second = await generate(client, "de", session=first["session"])
        assert second["text"] == "de"
        assert second["session"] == first["session"]
        assert second["prompt_tokens"] == before + 3  # with the bar that begins a turn
        assert second["cached_tokens"] >= before - 1
        assert second["computed_tokens"] == second["prompt_tokens"] - second["cached_tokens"]
        assert second["restored_tokens"] == 0
        assert await tokens(client, first["session"]) > before


async def test_nothing_is_kept_unless_it_is_asked_for(engine):
    async with connect(engine) as client:
        assert "session" not in await generate(client, "abc")
        assert (await call(client, "list_sessions"))["sessions"] == []


async def test_a_session_that_is_asked_without_keeping_stays_as_it_was(engine):
    async with connect(engine) as client:
        session = (await call(client, "create_session", system=SYSTEM))["session"]
        before = await tokens(client, session)
        answers = await asyncio.gather(*(generate(client, f"q{i}", session=session, keep=False) for i in range(4)))
        assert [a["text"] for a in answers] == [SYSTEM + f"q{i}" for i in range(4)]
        assert all(a["cached_tokens"] >= len(SYSTEM) and "session" not in a for a in answers)
        assert await tokens(client, session) == before


async def test_a_second_turn_hears_that_the_session_is_busy_or_waits_for_its_own(engine):
    async with connect(engine) as client:
        session = (await generate(client, "abc", keep=True))["session"]
        async with held(engine, client, "first", session=session):
            busy = asyncio.create_task(refusal(client, "generate", prompt="second", session=session))
            waits = asyncio.create_task(generate(client, "third", session=session, queue=True))
        assert "session_busy" in await busy
        assert (await waits)["text"] == "third"
        assert (await generate(client, "fourth", session=session))["text"] == "fourth"


async def test_a_primed_context_is_computed_once_and_its_prompts_go_on_with_its_last_message(engine):
    async with connect(engine) as client:
        created = await call(client, "create_session", system="S.", messages=[{"role": "user", "content": "U."}])
        assert created["tokens"] == len("S.U.\n\n")
        assert (created["cached_tokens"], created["computed_tokens"]) == (0, created["tokens"])
        answer = await generate(client, "q", session=created["session"])
        assert answer["text"] == "S.U.\n\nq"
        assert answer["computed_tokens"] <= 2


async def test_a_context_may_be_a_conversation(engine):
    async with connect(engine) as client:
        said = [{"role": "user", "content": "U."}, {"role": "assistant", "content": "A."}]
        created = await call(client, "create_session", system="S.", messages=said)
        answer = await generate(client, "q", session=created["session"])
        assert (answer["text"], answer["prompt_tokens"]) == ("q", len("S.U.A.|q"))


async def test_a_name_stands_for_the_handle(engine):
    async with connect(engine) as client:
        created = await call(client, "create_session", system=SYSTEM, name="reader")
        assert created["name"] == "reader"
        await generate(client, "q", session="reader")
        assert (await call(client, "close_session", sessions=["reader"]))["closed"] == [created["session"]]


async def test_a_session_is_made_as_it_is_wished(engine):
    async with connect(engine) as client:
        await call(client, "create_session", system=SYSTEM, name="a", ttl_s=60, pinned=True)
        await call(client, "create_session", system=SYSTEM, name="b", ephemeral=True)
        b, a = (await call(client, "list_sessions"))["sessions"]  # used last, first
        assert (a["name"], a["pinned"], a["ephemeral"], a["busy"], a["tokens"]) == (
            "a",
            True,
            False,
            False,
            len(SYSTEM),
        )
        assert a["cached_tokens"] == len(SYSTEM)
        assert 50 <= a["expires_in_s"] <= 60
        assert a["idle_s"] >= 0
        assert (b["name"], b["pinned"], b["ephemeral"], b["expires_in_s"]) == ("b", False, True, 86400)
        assert "parent" not in a


async def test_a_session_that_there_is_no_room_to_pin_says_that_it_is_not_pinned():
    engine = fake_client(FakeLoader(context_tokens=2000), block_tokens=16, max_kv_bytes=2000)
    try:
        async with connect(engine) as client:
            first = await call(client, "create_session", system="a" * 600, pinned=True, model="tiny")
            second = await call(client, "create_session", system="b" * 600, pinned=True, model="tiny")
            listed = (await call(client, "list_sessions"))["sessions"]
    finally:
        assert engine.close()
    assert "note" not in first
    assert "It is not pinned" in second["note"]
    assert [session["pinned"] for session in listed] == [False, True]


async def test_a_list_that_no_host_would_take_is_cut(engine, monkeypatch):
    async with connect(engine) as client:
        monkeypatch.setattr(translate, "MAX_LISTED", 2)
        await call(client, "create_session", system=SYSTEM, name="root")
        await call(client, "fork_session", session="root", count=4)
        listed = await call(client, "list_sessions")
        assert (len(listed["sessions"]), listed["not_shown"]) == (2, 3)
        closed = await call(client, "close_session", all=True)
        assert (len(closed["closed"]), closed["not_shown"]) == (2, 3)


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("generate", {"prompt": "x", "session": "nobody"}, "Session not found: 'nobody'"),
        ("generate", {"prompt": "x", "session": "root", "system": "S"}, "belong to a session from its beginning"),
        ("generate", {"prompt": "x", "session": "root", "tools": []}, None),
        ("generate", {"prompt": "x", "session": "root", "model": "tiny"}, None),
        ("generate", {"prompt": "x", "session": "root", "model": "other"}, "leave `model` out"),
        ("generate", {"prompt": " ", "session": "root"}, "prompt is empty"),
        ("create_session", {}, "context is empty"),
        ("create_session", {"system": "S", "name": "root"}, "already"),
        ("create_session", {"system": "S", "name": "a b"}, "cannot be a session's name"),
        ("create_session", {"system": "S", "ttl_s": 0}, "ttl_s"),
        ("create_session", {"system": "S", "ttl_s": 1e300}, "ttl_s"),
        ("create_session", {"messages": [{"role": "system", "content": "S"}]}, "messages.0.role"),
        ("create_session", {"messages": [{"role": "user", "text": "S"}]}, "messages.0.text: Extra inputs"),
        ("create_session", {"system": "x" * 2001}, "context is 2000 tokens"),
        ("fork_session", {"session": "nobody"}, "Session not found"),
        ("fork_session", {"session": "root", "count": 65}, "count"),
        ("fork_session", {"session": "root", "count": 3, "names": ["a", "b"]}, "one for each"),
        (
            "fork_session",
            {"session": "root", "names": ["a", "a"]},
            "`names` has a fork named 'a' already: give each a name",
        ),
        ("fork_session", {"session": "root", "names": ["a", "root"]}, "There is a session named 'root' already"),
        ("close_session", {}, "all=true"),
        ("close_session", {"sessions": []}, "all=true"),
        ("close_session", {"sessions": ["root"], "all": True}, "one of the two"),
        ("close_session", {"sessions": ["root", "nobody"]}, "Session not found: 'nobody'"),
        ("generate_batch", {"prompts": []}, "prompts"),
        ("generate_batch", {"prompts": ["x"] * 65}, "prompts"),
        ("generate_batch", {"prompts": ["x"] * 33, "n": 2, "temperature": 1}, "66 branches"),
        ("generate_batch", {"prompts": ["x"], "n": 2}, "temperature, say 0.8"),
        ("generate_batch", {"prompts": ["x", "y"], "session": "nobody"}, "Session not found"),
        ("generate_batch", {"prompts": ["x", "y"], "session": "nobody", "keep": True}, "Session not found"),
    ],
)
async def test_a_bad_call_is_told_what_to_change_and_changes_nothing(engine, tool, arguments, words):
    async with connect(engine) as client:
        await call(client, "create_session", system=SYSTEM, name="root")
        before = (await call(client, "list_sessions"))["sessions"]
        if words is None:
            await call(client, tool, **arguments)
            return
        assert words in await refusal(client, tool, **arguments)
        after = (await call(client, "list_sessions"))["sessions"]
        assert [(s["session"], s["tokens"]) for s in after] == [(s["session"], s["tokens"]) for s in before]


async def test_a_session_that_leaves_no_room_for_a_turn_says_nothing_of_a_max_tokens_that_nobody_gave(engine):
    async with connect(engine) as client:
        await call(client, "create_session", system="x" * 1990, name="full")
        text = await refusal(client, "generate", prompt="y" * 20, session="full")
    assert "context is 2000 tokens" in text
    assert "max_tokens" not in text


async def test_a_session_that_was_closed_or_has_expired_is_unknown(engine):
    async with connect(engine) as client:
        await call(client, "create_session", system=SYSTEM, name="closed")
        await call(client, "close_session", sessions=["closed"])
        assert "Session not found: 'closed'" in await refusal(client, "generate", prompt="x", session="closed")
        expired = (await call(client, "create_session", system=SYSTEM, ttl_s=0.01))["session"]
        async with asyncio.timeout(10):
            while (await call(client, "list_sessions"))["sessions"]:
                await asyncio.sleep(0.01)
        assert "has expired" in await refusal(client, "generate", prompt="x", session=expired)


async def test_closing_all_leaves_none_and_ends_their_turns(engine):
    async with connect(engine) as client:
        session = (await generate(client, "abc", keep=True))["session"]
        await call(client, "fork_session", session=session, count=2)
        runner = engine.loader.runner
        runner.steps.clear()
        runner.gate.clear()
        turn = asyncio.create_task(refusal(client, "generate", prompt="x", session=session))
        await until(lambda: runner.steps)
        closing = asyncio.create_task(call(client, "close_session", all=True))
        await until(lambda: engine.thread._inbox)
        runner.gate.set()
        assert len((await closing)["closed"]) == 3
        assert "was closed" in await turn
        assert (await call(client, "list_sessions"))["sessions"] == []
        assert (await call(client, "close_session", all=True))["closed"] == []


async def test_anothers_session_is_unknown_and_unseen(engine, monkeypatch):
    async with connect(engine) as client:
        created = await call(client, "create_session", system=SYSTEM, name="mine")
        monkeypatch.setattr(calls, "tenant", lambda: "another")
        for session in ("mine", created["session"]):
            assert "Session not found" in await refusal(client, "generate", prompt="x", session=session)
            assert "Session not found" in await refusal(client, "fork_session", session=session)
            assert "Session not found" in await refusal(client, "close_session", sessions=[session])
            assert "Session not found" in await refusal(client, "generate_batch", prompts=["x"], session=session)
        assert (await call(client, "list_sessions"))["sessions"] == []
        assert (await call(client, "close_session", all=True))["closed"] == []
        theirs = await call(client, "create_session", system=SYSTEM, name="mine")
        assert theirs["cached_tokens"] == 0  # keys and values are not shared either


async def test_a_session_whose_name_is_nearly_right_is_suggested(engine):
    async with connect(engine) as client:
        await call(client, "create_session", system=SYSTEM, name="reports")
        assert "Did you mean 'reports'?" in await refusal(client, "generate", prompt="x", session="report")
        assert "Did you mean 'reports'?" in await refusal(client, "fork_session", session="Reports")
        assert "Did you mean" not in await refusal(client, "fork_session", session="quite another")


# Forks


async def test_forks_go_on_apart_from_where_their_parent_was(engine):
    async with connect(engine) as client:
        parent = (await call(client, "create_session", system=SYSTEM))["session"]
        forked = await call(client, "fork_session", session=parent, count=3)
        assert len(set(forked["sessions"])) == 3
        assert (forked["tokens"], forked["model"]) == (len(SYSTEM), "tiny")
        assert "names" not in forked
        answers = await asyncio.gather(
            *(generate(client, f"q{i}", session=f) for i, f in enumerate(forked["sessions"]))
        )
        assert [a["text"] for a in answers] == [SYSTEM + f"q{i}" for i in range(3)]
        assert min(a["cached_tokens"] for a in answers) == len(SYSTEM)
        assert await tokens(client, parent) == len(SYSTEM)
        await call(client, "close_session", sessions=[parent])
        assert (await generate(client, "more", session=forked["sessions"][0]))["text"] == "more"


async def test_forks_may_have_names_and_know_their_parent(engine):
    async with connect(engine) as client:
        parent = (await call(client, "create_session", system=SYSTEM))["session"]
        forked = await call(client, "fork_session", session=parent, names=["left", "right"])
        assert forked["names"] == ["left", "right"]
        listed = {s["session"]: s for s in (await call(client, "list_sessions"))["sessions"]}
        assert [listed[f]["name"] for f in forked["sessions"]] == ["left", "right"]
        assert {listed[f]["parent"] for f in forked["sessions"]} == {parent}


async def test_a_fork_taken_while_the_parent_generates_begins_where_its_last_finished_turn_ended(engine):
    async with connect(engine) as client:
        parent = (await generate(client, "abc", keep=True))["session"]
        before = await tokens(client, parent)
        async with held(engine, client, "long turn", session=parent):
            forking = asyncio.create_task(call(client, "fork_session", session=parent))
        assert (await forking)["tokens"] == before
        assert await tokens(client, parent) > before


# Many at once


async def test_a_batch_answers_in_order_over_one_context(engine):
    async with connect(engine) as client:
        batch = await call(client, "generate_batch", prompts=["a", "b", "c"], system="S.")
        assert [r["text"] for r in batch["results"]] == ["S.a", "S.b", "S.c"]
        assert batch["model"] == "tiny"
        assert batch["results"][0] == {
            "text": "S.a",
            "finish_reason": "stop",
            "cached_tokens": 0,
            "restored_tokens": 0,
            "computed_tokens": 3,
            "completion_tokens": 3,
        }


async def test_a_batch_branches_off_a_session_and_leaves_it_alone(engine):
    runner = engine.loader.runner
    async with connect(engine) as client:
        session = (await call(client, "create_session", system=SYSTEM))["session"]
        runner.steps.clear()
        runner.gate.clear()
        arguments = {"prompts": [f"q{i}" for i in range(8)], "session": session}
        asking = asyncio.create_task(call(client, "generate_batch", **arguments))
        # All are in flight: in the step that the gate holds, or on their way.
        await until(lambda: runner.steps and len(runner.steps[0].rows) + len(engine.thread._inbox) == 8)
        runner.gate.set()
        batch = await asking
        assert [r["text"] for r in batch["results"]] == [SYSTEM + f"q{i}" for i in range(8)]
        assert all(r["cached_tokens"] >= len(SYSTEM) and "session" not in r for r in batch["results"])
        assert [s["tokens"] for s in (await call(client, "list_sessions"))["sessions"]] == [len(SYSTEM)]
        assert max(len(step.decode) for step in runner.steps) == 8


@pytest.mark.parametrize("from_session", [True, False])
async def test_a_batch_that_is_kept_hands_a_session_to_every_branch(engine, from_session):
    async with connect(engine) as client:
        system = {"session": (await call(client, "create_session", system="S."))["session"]} if from_session else {}
        batch = await call(client, "generate_batch", prompts=["a", "b"], keep=True, **(system or {"system": "S."}))
        assert [r["text"] for r in batch["results"]] == ["S.a", "S.b"]
        sessions = [r["session"] for r in batch["results"]]
        assert len({*sessions, *system.values()}) == 2 + from_session
        assert (await generate(client, "more", session=sessions[1]))["text"] == "more"
        assert len((await call(client, "list_sessions"))["sessions"]) == 2 + from_session


async def test_samples_of_a_prompt_come_together_and_each_has_its_own_seed(engine, monkeypatch):
    async with connect(engine) as client:
        asked = []
        for_real = engine.generate
        monkeypatch.setattr(engine, "generate", lambda request: asked.append(request) or for_real(request))
        batch = await call(client, "generate_batch", prompts=["a", "b"], n=3, temperature=1, seed=2**32 - 1)
        assert [r["text"] for r in batch["results"]] == ["a", "a", "a", "b", "b", "b"]
        assert [r.sampling.seed for r in asked] == [2**32 - 1, 0, 1] * 2
        assert len({r.lane for r in asked}) == 1
        await call(client, "generate_batch", prompts=["a"], n=2, temperature=1)
        assert [r.sampling.seed for r in asked[-2:]] == [None, None]
        assert asked[-1].lane not in ("", asked[0].lane)


@pytest.mark.parametrize("keep", [False, True])
async def test_a_branch_that_fails_is_told_in_its_place_and_the_others_go_on(engine, keep):
    async with connect(engine) as client:
        session = (await call(client, "create_session", system="S."))["session"]
        batch = await call(client, "generate_batch", prompts=["a", "b" * 2000, "c"], session=session, keep=keep)
        a, b, c = batch["results"]
        assert (a["text"], c["text"]) == ("S.a", "S.c")
        assert list(b) == ["error"]
        assert "Shorten the prompt" in b["error"]
        kept = {s["session"] for s in (await call(client, "list_sessions"))["sessions"]}
        assert kept == ({session, a["session"], c["session"]} if keep else {session})


async def test_a_batch_all_of_whose_branches_fail_is_an_error(engine):
    async with connect(engine) as client:
        assert "regex and grammar" in await refusal(client, "generate_batch", prompts=["a"], regex="a", grammar="b")
        assert "malformed" in await refusal(client, "generate_batch", prompts=["a", "b"], regex="malformed")


async def test_a_dead_engine_fails_the_whole_batch(engine):
    async with connect(engine) as client:
        await generate(client, "load")
        engine.close()
        with pytest.raises(MCPError, match="restart the server"):
            await client.call_tool("generate_batch", {"prompts": ["a", "b"]})


@pytest.mark.parametrize("keep", [False, True])
async def test_cancelling_a_batch_cancels_every_branch_and_leaves_no_fork(engine, keep):
    async with connect(engine) as client:
        session = (await call(client, "create_session", system="S."))["session"]
        runner = engine.loader.runner
        runner.endless = True
        runner.steps.clear()
        runner.gate.clear()
        arguments = {"prompts": list("abcd"), "session": session, "keep": keep, "max_tokens": 1900}
        batch = asyncio.create_task(client.call_tool("generate_batch", arguments))
        await until(lambda: runner.steps and len(runner.steps[0].rows) + len(engine.thread._inbox) == 4)
        batch.cancel()
        runner.gate.set()
        with contextlib.suppress(asyncio.CancelledError):
            await batch
        await until(lambda: engine.stats.rows == engine.stats.running == 0 and engine.stats.sessions == 1)
        assert [s["session"] for s in (await call(client, "list_sessions"))["sessions"]] == [session]


async def test_a_batch_that_is_cancelled_while_it_forks_leaves_no_fork(engine):
    async with connect(engine) as client:
        session = (await call(client, "create_session", system="S."))["session"]
        async with held(engine, client, "x"):
            arguments = {"prompts": ["a", "b"], "session": session, "keep": True}
            batch = asyncio.create_task(client.call_tool("generate_batch", arguments))
            await until(lambda: engine.thread._inbox)
            batch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await batch
        await until(lambda: engine.stats.running == 0 and engine.stats.sessions == 1)
        assert [s["session"] for s in (await call(client, "list_sessions"))["sessions"]] == [session]


async def test_a_batchs_progress_is_one_number_that_rises(engine, monkeypatch):
    async with connect(engine) as client:
        monkeypatch.setattr(calls, "PROGRESS_INTERVAL_S", 0.0)
        monkeypatch.setattr("mlx_mcp.service.jobs.QUIET_S", 0.0)
        seen = []

        async def show(progress, total, message):
            seen.append((progress, total, message))

        arguments = {"prompts": ["a", "bb", "c" * 40], "max_tokens": 50}
        await client.call_tool("generate_batch", arguments, progress_callback=show)
        values = [progress for progress, _, _ in seen]
        assert values == sorted(set(values))
        assert any("0 of 3 done; loading tiny" in message for _, _, message in seen)
        assert {total for _, total, _ in seen} == {None, 3 * 50 + 43}
        assert 43 < seen[-1][0] <= 2 * 43
        assert seen[-1][2] in ("0 of 3 done", "1 of 3 done", "2 of 3 done")


async def test_branches_and_forks_of_a_file_answer_right_with_the_embedded_model(tmp_path):
    codes = {name: str(100 + 71 * i) for i, name in enumerate("Adam Bob Carol Dave Erin Frank Grace".split())}
    (tmp_path / "badges.txt").write_text(" ".join(f"{name}'s badge is {code}." for name, code in codes.items()))
    engine, registry = wire(Config.load(model="embedded", openblas=False))
    reader = FileReader((tmp_path,), 10_000, 10_000)
    asked = ["Bob", "Carol", "Frank"]
    questions = [f"What is {name}'s badge?" for name in asked]
    async with Client(build_server(Service(engine, registry), reader)) as client:
        badges = await call(client, "create_session", files=["badges.txt"])
        batch = await call(client, "generate_batch", prompts=questions, session=badges["session"])
        assert [r["text"] for r in batch["results"]] == [codes[name] for name in asked]
        assert min(r["cached_tokens"] for r in batch["results"]) == badges["tokens"]
        (fork,) = (await call(client, "fork_session", session=badges["session"]))["sessions"]
        turns = [await generate(client, question, session=fork) for question in questions]
        assert [turn["text"] for turn in turns] == [codes[name] for name in asked]
        assert all(turn["computed_tokens"] <= 14 for turn in turns)
    assert engine.close()


# Files


async def test_files_come_before_the_prompt_and_calls_with_the_same_files_share_them(engine, files):
    async with connect(engine, files) as client:
        first = await generate(client, "Why?", files=["report.txt"], system="S.")
        assert first["text"].startswith("S.")
        assert "All is well" in first["text"]
        assert first["text"].endswith("\n\nWhy?")
        second = await generate(client, "How?", files=["report.txt"], system="S.")
        assert second["cached_tokens"] >= 48
        batch = await call(client, "generate_batch", prompts=["Who?", "When?"], files=["report.txt"], system="S.")
        assert all(result["cached_tokens"] >= 48 for result in batch["results"])


async def test_files_belong_to_the_users_first_message_of_a_context(engine, files):
    async with connect(engine, files) as client:
        only = await call(client, "create_session", files=["notes.txt"])
        answer = await generate(client, "q", session=only["session"], keep=False)
        assert answer["text"].startswith((await generate(client, "q", files=["notes.txt"]))["text"])
        said = [{"role": "user", "content": "U."}, {"role": "assistant", "content": "A."}]
        talk = await call(client, "create_session", system="S.", files=["notes.txt"], messages=said)
        assert talk["tokens"] == only["tokens"] + len("S.U.A.")
        more = await generate(client, "Next.", session=talk["session"], files=["notes.txt"])
        assert more["prompt_tokens"] == talk["tokens"] + 1 + only["tokens"] + len("Next.")


@pytest.mark.parametrize("tool", ["generate", "generate_batch", "create_session"])
async def test_a_file_outside_of_the_folders_is_refused(engine, files, tool):
    async with connect(engine, files) as reading, connect(engine) as client:
        arguments = {"generate": {"prompt": "x"}, "generate_batch": {"prompts": ["x"]}, "create_session": {}}[tool]
        assert "/etc/hostname" in await refusal(reading, tool, files=["/etc/hostname"], **arguments)
        await refusal(client, tool, files=["notes.txt"], **arguments)  # its server reads none


# Misses


async def test_a_prompt_that_changes_near_its_beginning_is_told_what_changed(engine):
    async with connect(engine) as client:
        report = " ".join(f"Line {i} of the report." for i in range(20))
        await generate(client, "Sum it up.", system=f"Today is Monday. {report}")
        again = await generate(client, "Sum it up.", system=f"Today is Friday. {report}")
        assert again["miss"]["reason"] == "diverged"
        assert again["miss"]["index"] == len("Today is ")
        assert again["miss"]["before"].endswith("Today is ")
        assert again["miss"]["after"].startswith("Friday")
        assert again["miss"]["earlier"].startswith("Monday")
        assert "miss" not in await generate(client, "Sum it up.", system=f"Today is Friday. {report}")
