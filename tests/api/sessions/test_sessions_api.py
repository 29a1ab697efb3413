"""The API for sessions on a real socket, over fakes."""

import asyncio
import contextlib
import json
import time

import httpx2
import pytest

from mlx_mcp.errors import EngineDead
from mlx_mcp.hosting.faces import APIS
from mlx_mcp.models.registry import Registry
from tests.api.http.routes import serving_all
from tests.api.http.test_auth import bearer, tokens
from tests.engine.test_client import until
from tests.fakes import FakeStore, fake_client

__all__ = ["tokens"]
AGENT = f"Sessions API python-httpx2/{httpx2.__version__}"


@pytest.fixture
async def engine():
    engine = fake_client(open_store=FakeStore)
    yield engine
    engine.close()


@pytest.fixture
async def http(engine):
    async with serving_all(engine, APIS) as address, httpx2.AsyncClient(base_url=address, timeout=20) as client:
        yield client


# Each operation that takes a handle, H in path and body.
WITH_HANDLES = [
    ("GET", "/v1/sessions/H", "{}"),
    ("DELETE", "/v1/sessions/H", "{}"),
    ("POST", "/v1/sessions/H/fork", "{}"),
    ("POST", "/v1/sessions/H/generate", '{"prompt": "y"}'),
    ("POST", "/v1/sessions/H/generate", '{"prompt": "y", "stream": true}'),
    ("POST", "/v1/sessions/H/persist", "{}"),
    ("POST", "/v1/batch", '{"prompts": ["y"], "session": "H"}'),
    ("GET", "/v1/results/H", "{}"),
    ("DELETE", "/v1/results/H", "{}"),
]


class Mine:
    """A gate that is always open, and has a step fail."""

    def __init__(self, runner, steps):
        self.runner, self.left = runner, steps

    def wait(self, timeout):
        self.left -= 1
        if not self.left:
            self.runner.explode = RuntimeError("boom")
        return True


async def post(http, path, body=None, **headers):
    return await http.post(path, json=body or {}, headers=headers)


async def made(http, **body):
    """The handle of a session that was just made."""
    response = await post(http, "/v1/sessions", {"system": "Be kind. "} | body)
    assert response.status_code == 201, response.text
    return response.json()["session"]


def problem(response):
    """What an error says; it is one of this API."""
    assert response.headers["content-type"] == "application/problem+json"
    told = response.json()
    assert told["status"] == response.status_code
    return told


def events(response):
    """The events of a stream: names, and data."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block.splitlines() for block in response.text.strip().split("\n\n")]
    named = [dict(line.split(": ", 1) for line in block) for block in blocks if not block[0].startswith(":")]
    told = [(each["event"], json.loads(each["data"])) for each in named]
    assert all(name == data.get("type", "error") for name, data in told)
    return told


async def test_a_session_is_made_told_of_and_ended(http):
    response = await post(http, "/v1/sessions", {"system": "Be kind. ", "name": "kind", "ttl_s": 60, "pinned": True})
    assert response.status_code == 201
    handle = response.json()["session"]
    assert response.json() | {"session": ""} == {
        "session": "",
        "name": "kind",
        "model": "tiny",
        "tokens": 9,
        "cached_tokens": 0,
        "restored_tokens": 0,
        "computed_tokens": 9,
        "note": response.json()["note"],
    }
    shown = (await http.get("/v1/sessions/kind")).json()
    assert (shown["session"], shown["tokens"], shown["pinned"], shown["busy"]) == (handle, 9, True, False)
    assert shown["expires_in_s"] <= 60
    assert "transcript" not in shown
    told = (await http.get(f"/v1/sessions/{handle}?transcript=true")).json()
    [message] = told["transcript"]
    assert (message.pop("who"), abs(message.pop("at") - time.time()) < 60) == (AGENT, True)
    assert message == {"text": "Be kind."}
    assert (await http.delete(f"/v1/sessions/{handle}")).json() == {"closed": [handle]}
    assert problem(await http.get(f"/v1/sessions/{handle}"))["code"] == "unknown_session"


@pytest.mark.parametrize(
    ("agent", "who"),
    [
        ("claude-cli/2.1.332 (external, cli)", "Sessions API claude-cli/2.1.332"),
        ("x" * 200, "Sessions API " + "x" * 51),
        ("", "Sessions API"),
    ],
)
async def test_a_turn_was_asked_for_by_the_api_and_the_first_word_of_the_user_agent(http, agent, who):
    http.headers["user-agent"] = agent
    handle = await made(http)
    told = (await http.get(f"/v1/sessions/{handle}?transcript=true")).json()
    assert [message["who"] for message in told["transcript"]] == [who]


async def test_a_turn_goes_on_with_the_session_unless_it_is_not_kept(http):
    handle = await made(http)
    aside = await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "aside", "keep": False})
    assert (aside.status_code, aside.json()["text"]) == (200, "Be kind. aside")
    assert "session" not in aside.json()
    turn = (await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "hello"})).json()
    assert (turn["session"], turn["cached_tokens"], turn["computed_tokens"]) == (handle, 9, 5)
    again = (await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "and?", "max_tokens": 2})).json()
    assert (again["text"], again["finish_reason"]) == ("an", "length")
    assert again["prompt_tokens"] == 9 + 5 + 14 + 5


async def test_forks_have_what_their_parent_has_and_the_names_that_were_asked_for(http):
    handle = await made(http, name="base")
    forks = await post(http, "/v1/sessions/base/fork", {"names": ["ann", "bob"]})
    assert forks.status_code == 201
    assert (forks.json()["names"], forks.json()["tokens"]) == (["ann", "bob"], 9)
    assert (await http.get("/v1/sessions/ann")).json()["parent"] == handle
    assert len((await post(http, "/v1/sessions/base/fork", {"count": 3})).json()["sessions"]) == 3
    assert len((await http.post("/v1/sessions/base/fork")).json()["sessions"]) == 1  # no body asks for nothing special


async def test_every_session_is_on_one_page_whatever_is_used_between_the_pages(http):
    await made(http, name="base")
    await post(http, "/v1/sessions/base/fork", {"count": 5})
    listed, after = [], ""
    while after is not None:
        page = (await http.get("/v1/sessions", params={"limit": 2, "after": after})).json()
        assert len(page["sessions"]) <= 2
        listed += [each["session"] for each in page["sessions"]]
        after = page.get("next")
        await post(http, f"/v1/sessions/{listed[-1]}/generate", {"prompt": "x"})
    assert len(listed) == len(set(listed)) == 6
    whole = (await http.get("/v1/sessions")).json()
    assert [each["session"] for each in whole["sessions"]] == listed == sorted(listed)
    assert "next" not in whole


async def test_a_persisted_session_has_versions_to_fork_from(http):
    handle = await made(http)
    kept = (await post(http, f"/v1/sessions/{handle}/persist", {"version": "start"})).json()
    assert (kept["session"], kept["version"], kept["tokens"]) == (handle, "start", 9)
    await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "hello"})
    assert (await post(http, f"/v1/sessions/{handle}/fork", {"version": "start"})).json()["tokens"] == 9
    missing = await post(http, f"/v1/sessions/{handle}/fork", {"version": "end"})
    assert (missing.status_code, problem(missing)["code"]) == (404, "unknown_version")
    assert (await http.get(f"/v1/sessions/{handle}")).json()["versions"] == ["start"]


async def test_many_prompts_are_answered_over_one_context(http):
    handle = await made(http)
    batch = (await post(http, "/v1/batch", {"session": handle, "prompts": ["a", "b"], "keep": True})).json()
    assert [each["text"] for each in batch["results"]] == ["Be kind. a", "Be kind. b"]
    assert len({each["session"] for each in batch["results"]} | {handle}) == 3
    alone = {"system": "S", "messages": [{"role": "user", "content": "m"}], "prompts": ["p"], "model": "tiny"}
    assert (await post(http, "/v1/batch", alone)).json()["results"][0]["text"] == "Smp"
    alike = problem(await post(http, "/v1/batch", {"prompts": ["a"], "n": 2, "temperature": 0}))
    assert "Give a temperature" in alike["detail"]


async def test_a_model_is_loaded_and_unloaded_by_its_name(http, engine):
    engine.registry = Registry(None)
    loaded = (await post(http, "/v1/models/embedded/load")).json()
    assert (loaded["name"], loaded["loaded"]) == ("embedded", True)
    assert (await http.post("/v1/models/embedded/unload")).json() == {"model": "embedded", "freed_mb": 0.0}
    assert engine.stats.models == ()
    unloaded = await post(http, "/v1/models/owner/none/unload")
    assert (unloaded.status_code, problem(unloaded)["code"]) == (404, "unknown_model")
    assert "owner/none" in problem(unloaded)["detail"]


async def test_a_stream_has_the_text_in_pieces_and_then_the_whole_answer(http):
    handle = await made(http)
    told = events(await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "[hm]hello{f}", "stream": True}))
    deltas = [data for name, data in told if name == "delta"]
    assert {each["kind"] for each in deltas} == {"answer", "reasoning", "tool_call"}
    assert "".join(each["text"] for each in deltas if each["kind"] == "answer") == "Be kind. hello"
    name, last = told[-1]
    assert (name, last["result"]["text"], last["result"]["reasoning"]) == ("result", "Be kind. hello", "hm")
    assert last["result"]["tool_calls"][0]["name"] == "f"
    assert [name for name, _ in told if name != "progress"] == ["delta"] * len(deltas) + ["result"]


async def test_a_stream_tells_how_far_it_is_before_there_is_text(http, engine):
    handle = await made(http)
    await engine.unload_model("tiny")
    told = events(await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "hello", "stream": True}))
    assert told[0][0] == "progress"
    assert told[0][1]["phase"] == "loading"
    assert told[0][1]["message"]


async def test_an_error_before_the_stream_has_a_status_and_one_amid_it_is_its_last_event(http, engine):
    missing = await post(http, "/v1/sessions/none/generate", {"prompt": "x", "stream": True})
    assert (missing.status_code, problem(missing)["code"]) == (404, "unknown_session")
    handle = await made(http)
    engine.loader.runner.gate = Mine(engine.loader.runner, 5)
    *told, (name, last) = events(await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "x", "stream": True}))
    assert "delta" in dict(told)
    assert (name, last["code"], last["status"]) == ("error", "generation_failed", 500)


async def test_a_client_that_leaves_frees_its_row(http, engine):
    handle = await made(http)
    runner = engine.loader.runner
    for stream in (False, True):
        runner.endless = True
        runner.gate.clear()
        steps = len(runner.steps)
        body = {"prompt": "abc", "max_tokens": 80, "stream": stream}
        call = asyncio.create_task(post(http, f"/v1/sessions/{handle}/generate", body))
        await until(lambda steps=steps: len(runner.steps) > steps)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await until(lambda: engine.thread._inbox)
        runner.gate.set()
        await until(lambda: engine.stats.rows == engine.stats.running == 0)
    assert (await http.get(f"/v1/sessions/{handle}")).json()["tokens"] == 9


async def test_a_call_that_takes_longer_than_it_may_is_fetched_later(http, engine):
    handle = await made(http)
    engine.loader.runner.gate.clear()
    begun = await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "hello", "wait_s": 0})
    assert (begun.status_code, begun.json()["status"]) == (202, "running")
    address = begun.headers["location"]
    assert address == f"/v1/results/{begun.json()['result_id']}"
    assert (await http.get(address)).json()["status"] == "running"
    assert [each["status"] for each in (await http.get("/v1/results")).json()["results"]] == ["running"]
    engine.loader.runner.gate.set()
    done = (await http.get(address, params={"wait_s": 10})).json()
    assert (done["status"], done["tool"], done["result"]["text"]) == ("done", "generate", "Be kind. hello")
    assert (await http.delete(address)).json() == {"result_id": done["result_id"], "status": "done"}
    assert (await http.get(address)).status_code == 404


async def test_a_result_that_is_deleted_ends_its_call_and_leaves_the_session_as_it_was(http, engine):
    handle = await made(http)
    runner = engine.loader.runner
    runner.gate.clear()
    steps = len(runner.steps)
    begun = (await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "hello", "wait_s": 0})).json()
    await until(lambda: len(runner.steps) > steps)
    ended = asyncio.create_task(http.delete(f"/v1/results/{begun['result_id']}"))
    await until(lambda: engine.thread._inbox)
    runner.gate.set()
    assert (await ended).json()["status"] == "cancelled"
    assert (await http.get("/v1/results")).json() == {"results": []}
    assert (await http.get(f"/v1/sessions/{handle}")).json()["tokens"] == 9


async def test_why_a_later_result_is_none_is_told_in_its_place(http, engine):
    handle = await made(http)
    body = {"prompt": "x" * 200, "wait_s": 0}
    begun = (await post(http, f"/v1/sessions/{handle}/generate", body)).json()
    failed = (await http.get(f"/v1/results/{begun['result_id']}", params={"wait_s": 10})).json()
    assert (failed["status"], failed["error"]["code"], failed["error"]["status"]) == ("failed", "prompt_too_long", 400)


async def test_a_repeat_with_the_same_key_gets_the_first_answer_and_is_done_once(http):
    handle = await made(http)
    fork = {"path": f"/v1/sessions/{handle}/fork", "body": {"count": 2}}
    first, again = [await post(http, **fork, **{"idempotency-key": "k1"}) for _ in range(2)]
    assert (first.status_code, first.json()) == (again.status_code, again.json()) == (201, first.json())
    assert (await post(http, **fork, **{"idempotency-key": "k2"})).json() != first.json()
    create = [await post(http, "/v1/sessions", {"system": "S"}, **{"idempotency-key": "k3"}) for _ in range(2)]
    assert create[0].json() == create[1].json()
    turn = {"path": f"/v1/sessions/{handle}/generate", "body": {"prompt": "hello"}}
    said = [await post(http, **turn, **{"idempotency-key": "k4"}) for _ in range(3)]
    assert len({each.text for each in said}) == 1
    assert (await http.get(f"/v1/sessions/{handle}")).json()["tokens"] == 9 + 5 + 14
    assert len((await http.get("/v1/sessions")).json()["sessions"]) == 1 + 2 + 2 + 1


async def test_a_key_of_another_call_is_refused(http):
    handle = await made(http)
    await post(http, f"/v1/sessions/{handle}/fork", {"count": 2}, **{"idempotency-key": "k"})
    for path, body in (("fork", {"count": 3}), ("generate", {"prompt": "x"})):
        other = problem(await post(http, f"/v1/sessions/{handle}/{path}", body, **{"idempotency-key": "k"}))
        assert (other["status"], other["code"]) == (400, "invalid_request")
        assert "was used for another call" in other["detail"]
    long = problem(await post(http, f"/v1/sessions/{handle}/fork", **{"idempotency-key": "k" * 256}))
    assert long["argument"] == "Idempotency-Key"


async def test_a_call_with_a_key_goes_on_when_its_client_leaves_and_its_repeat_has_the_answer(http, engine):
    handle = await made(http)
    runner = engine.loader.runner
    runner.gate.clear()
    steps = len(runner.steps)
    turn = {"path": f"/v1/sessions/{handle}/generate", "body": {"prompt": "hello"}, "idempotency-key": "k"}
    lost = asyncio.create_task(post(http, **turn))
    await until(lambda: len(runner.steps) > steps)
    lost.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await lost
    repeat = asyncio.create_task(post(http, **turn | {"body": {"prompt": "hello", "stream": True}}))
    runner.gate.set()
    told = events(await repeat)
    assert "".join(data["text"] for name, data in told if name == "delta") == "Be kind. hello"
    assert told[-1][1]["result"] == (await post(http, **turn)).json()
    assert (await http.get(f"/v1/sessions/{handle}")).json()["tokens"] == 9 + 5 + 14


async def test_a_call_that_failed_is_made_anew_with_its_key(http, engine):
    handle = await made(http)
    turn = {"path": f"/v1/sessions/{handle}/generate", "body": {"prompt": "hello"}, "idempotency-key": "k"}
    engine.loader.runner.explode = RuntimeError("boom")
    assert problem(await post(http, **turn))["code"] == "generation_failed"
    assert (await post(http, **turn)).json()["text"] == "Be kind. hello"


async def test_what_a_body_an_address_or_a_header_may_not_say_is_refused_by_its_name(http):
    handle = await made(http)
    for path, body, argument, words in (
        ("/v1/sessions", {"sistema": "x"}, "sistema", "Extra inputs are not permitted"),
        ("/v1/sessions", {"ttl_s": 0}, "ttl_s", "greater than 0"),
        ("/v1/sessions", {"pinned": "yes"}, "pinned", "valid boolean"),
        ("/v1/sessions?limit=1", {"system": "x"}, "limit", "Extra inputs"),
        (f"/v1/sessions/{handle}/fork", {"count": 65}, "count", "less than or equal to 64"),
        (f"/v1/sessions/{handle}/generate", {"prompt": "x", "temperature": 9}, "temperature", "less than or equal"),
        (f"/v1/sessions/{handle}/generate", {"prompt": "x", "messages": [{"role": "me"}]}, "messages.0.role", "Input"),
    ):
        told = problem(await post(http, path, body))
        assert (told["status"], told["argument"]) == (400, argument)
        assert words in told["detail"]
        assert told["detail"].endswith("See /openapi.json for what may be sent.")
    assert problem(await http.get("/v1/sessions?limit=0"))["argument"] == "limit"
    both = problem(await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "x", "stream": True, "wait_s": 1}))
    assert "leave out `wait_s` or `stream`" in both["detail"]
    several = problem(
        await post(http, f"/v1/sessions/{handle}/generate", {"prompt": "x", "regex": "a", "grammar": "b"})
    )
    assert "Give one of json_schema, regex and grammar" in several["detail"]


@pytest.mark.parametrize("body", [b"{", b"[1", b"\xff", b"[" * 100_000, b'{"system": NaN1}'])
async def test_a_body_that_is_no_json_is_refused(http, body):
    told = problem(await http.post("/v1/sessions", content=body))
    assert "Send one JSON object" in told["detail"]


async def test_null_stands_for_what_is_left_out(http):
    handle = await made(http, name=None, ttl_s=None, messages=None)
    body = {"prompt": "hello", "temperature": None, "stop": None, "json_schema": None, "max_tokens": None}
    assert (await post(http, f"/v1/sessions/{handle}/generate", body)).json()["text"] == "Be kind. hello"


async def test_a_session_that_is_busy_says_so_or_is_waited_for(http, engine):
    handle = await made(http)
    runner = engine.loader.runner
    runner.gate.clear()
    steps = len(runner.steps)
    path = f"/v1/sessions/{handle}/generate"
    first = asyncio.create_task(post(http, path, {"prompt": "one"}))
    await until(lambda: len(runner.steps) > steps)
    second = asyncio.create_task(post(http, path, {"prompt": "two"}))
    third = asyncio.create_task(post(http, path, {"prompt": "three", "queue": True}))
    await until(lambda: engine.thread._inbox)
    runner.gate.set()
    assert (await second).status_code == 409
    assert problem(await second)["code"] == "session_busy"
    assert (await first).json()["text"] == "Be kind. one"
    assert (await third).json()["text"] == "three"


async def test_a_dead_engine_is_a_503_in_this_apis_form(http, engine):
    engine.close()
    told = problem(await post(http, "/v1/sessions", {"system": "x"}))
    assert (told["status"], told["code"]) == (503, "engine_dead")
    assert str(EngineDead())[:20] in told["detail"]


async def test_a_foreign_handle_and_a_missing_one_are_answered_with_the_same_bytes(engine, tokens):
    async with (
        serving_all(engine, APIS) as address,
        httpx2.AsyncClient(base_url=address, headers=bearer(tokens.add("ann"))) as ann,
        httpx2.AsyncClient(base_url=address, headers=bearer(tokens.add("bob"))) as bob,
    ):
        theirs = {"session": await made(ann, name="notes"), "name": "notes"}
        begun = await post(ann, "/v1/sessions/notes/generate", {"prompt": "x", "wait_s": 0, "keep": False})
        theirs["result"] = begun.json()["result_id"]
        assert (await bob.get("/v1/sessions")).json() == {"sessions": []}
        assert (await bob.get("/v1/results")).json() == {"results": []}
        for what, handle in theirs.items():
            missing = handle[:-4] + "zzzz" if len(handle) > 8 else "zotes"
            for method, path, body in WITH_HANDLES:
                if ("/results/" in path) == (what == "result"):
                    foreign, none = [
                        await bob.request(method, path.replace("H", each), json=json.loads(body.replace("H", each)))
                        for each in (handle, missing)
                    ]
                    assert foreign.status_code == none.status_code == 404, (method, path)
                    assert foreign.text.replace(handle, "H") == none.text.replace(missing, "H")
        assert (await ann.get("/v1/sessions/notes")).json()["tokens"] == 9


async def test_a_key_is_its_callers_own(engine, tokens):
    async with serving_all(engine, APIS) as address, httpx2.AsyncClient(base_url=address) as http:
        made = [
            (await post(http, "/v1/sessions", {"system": "S"}, **bearer(tokens.add(name)) | {"idempotency-key": "k"}))
            for name in ("ann", "bob")
        ]
        assert len({each.json()["session"] for each in made}) == 2
