import asyncio
import contextlib
import gc
import itertools
import threading
import time
import weakref
from contextlib import aclosing
from dataclasses import replace

import pytest

from mlx_mcp.chat.answer import Piece, TextKind
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import NO_BUDGET, Grammar, GrammarKind, Prompt, Reasoning
from mlx_mcp.core.ports import LoadedModel, LoadProgress
from mlx_mcp.core.sampling import PARAMETERS, Sampling
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams, TokenLogprobs
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine import mailbox as mailbox_module
from mlx_mcp.engine.answer import ONLY_THOUGHTS, Answer
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.mailbox import Mailbox
from mlx_mcp.engine.messages import Find, Load, Loaded, Submit, Token, Unloaded
from mlx_mcp.engine.requests import Delta, GenerateRequest, Progress, Result, TokenChoice
from mlx_mcp.errors import Abandoned, EngineDead, InvalidRequest, ModelError, PromptTooLong, UnknownModel
from tests.fakes import FakeConstraint, FakeFlight, FakeLoader, FakeRegistry, FakeRunner, FakeTokenizer, fake_client

LOOK = ({"type": "function", "function": {"name": "look", "parameters": {}}},)
NAN = float("nan")
YES = Grammar(GrammarKind.REGEX, "yes")


def asking(text, **options):
    drawn = {name: options.pop(name) for name in PARAMETERS if name in options}
    return GenerateRequest((Message("user", text),), sampling=Sampling(**drawn), **options)


async def collect(client, request):
    return [update async for update in client.generate(request)]


async def answer(client, request):
    return (await collect(client, request))[-1]


@pytest.fixture
def client():
    client = fake_client()
    yield client
    assert client.close()


async def until(condition, timeout_s=20.0):
    """Wait for what another thread will make true; asyncio has no event for it."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


async def test_text_comes_in_deltas_and_the_result_holds_all_of_it(client):
    updates = await collect(client, asking("hello"))
    assert "".join(u.text for u in updates if isinstance(u, Delta)) == "hello"
    assert updates[-1] == Result("hello", "stop", "tiny", 5, 5)


async def test_a_raw_prompt_is_given_as_it_is_and_all_of_its_answer_is_text(client):
    result = await answer(client, GenerateRequest((), raw="[hm]yes{look}"))
    assert result == Result("[hm]yes{look}", "stop", "tiny", 13, 13)


async def test_progress_is_told_in_every_phase(client):
    phases = [u.phase for u in await collect(client, asking("hello")) if isinstance(u, Progress)]
    assert list(dict.fromkeys(phases)) == ["loading", "queued", "prefill"]
    # A token that lets no text be shown is told as progress: here the marker of reasoning.
    phases = [u.phase for u in await collect(client, asking("[hm]")) if isinstance(u, Progress)]
    assert list(dict.fromkeys(phases)) == ["queued", "prefill", "decode"]


async def test_a_load_is_told_in_bytes_while_files_are_fetched_and_weights_are_read(client):
    client.loader.hold.clear()
    told = []
    async with aclosing(client.generate(asking("hello"))) as updates:
        async for update in updates:
            told.append(update)
            client.loader.hold.set()
    assert told[0] == Progress("loading", "loading tiny: fetching 120 of 500 MB", 120_000_000, 500_000_000, "bytes")
    loading = [u for u in told if isinstance(u, Progress) and u.phase == "loading"]
    assert Progress("loading", "loading tiny: reading 0.0 of 0.0 MB", 50, 100, "bytes") in loading
    assert {u.unit for u in told if isinstance(u, Progress) and u not in loading} == {"tokens"}


async def test_a_load_that_nobody_waits_for_any_more_is_stopped(client):
    stopped = threading.Event()

    def prepare(spec, report):
        try:
            while True:
                report(LoadProgress("fetching"))
                client.loader.prepared.append(spec.name)
                time.sleep(0.001)
        except Abandoned:
            stopped.set()
            raise

    usual, client.loader.prepare = client.loader.prepare, prepare
    calls = [asyncio.create_task(answer(client, asking("hello"))) for _ in range(2)]
    await until(lambda: len(client.loader.prepared) > 9)
    calls[0].cancel()
    seen = len(client.loader.prepared)
    await until(lambda: len(client.loader.prepared) > seen + 9)
    assert not stopped.is_set()  # the other one still waits
    calls[1].cancel()
    await until(stopped.is_set)
    client.loader.prepare = usual
    await until(lambda: not client._models.preparations._by_name)
    assert (await answer(client, asking("hello"))).text == "hello"


async def test_who_comes_when_a_load_is_being_stopped_has_it_go_on(client):
    stopping, come, usual = threading.Event(), threading.Event(), client.loader.prepare
    rounds = []

    def prepare(spec, report):
        rounds.append(spec.name)
        if len(rounds) > 1:
            return usual(spec, report)
        while True:
            try:
                report(LoadProgress("fetching"))
            except Abandoned:
                stopping.set()
                assert come.wait(10)
                raise
            time.sleep(0.001)

    client.loader.prepare = prepare
    first = asyncio.create_task(answer(client, asking("hello")))
    await until(lambda: rounds)
    first.cancel()
    await until(stopping.is_set)  # one that came before would find a load that goes on
    second = asyncio.create_task(answer(client, asking("hello")))
    await until(lambda: any(p.num_waiting for p in client._models.preparations._by_name.values()))
    come.set()
    assert (await second).text == "hello"
    assert len(rounds) == 2


async def test_a_loaded_model_is_not_loaded_again(client):
    await answer(client, asking("a"))
    sent, send = [], client.thread.send
    client.thread.send = lambda command: sent.append(type(command)) or send(command)
    updates = await collect(client, asking("b"))
    assert all(u.phase != "loading" for u in updates if isinstance(u, Progress))
    assert client.loader.prepared == ["tiny"]
    assert sent == [Submit]  # nor is the engine asked, which would cost a step


async def test_a_load_has_another_id_than_the_question_before_it_which_the_engine_may_be_about_to_forget(client):
    sent, send = [], client.thread.send
    client.thread.send = lambda command: sent.append(command) or send(command)
    await answer(client, asking("a"))
    find, load, submit = sent
    assert [type(command) for command in sent] == [Find, Load, Submit]
    assert find.call_id != load.call_id == submit.hold


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


async def test_reasoning_answer_and_tool_calls_are_told_apart(client):
    updates = await collect(client, asking("[let me see]I look.{look}", tools=LOOK))
    result = updates[-1]
    assert (result.text, result.reasoning, result.tool_calls) == ("I look.", "let me see", (ToolCall("look", {}),))
    assert result.finish_reason == "tool_calls"
    deltas = [u for u in updates if isinstance(u, Delta)]
    texts = {kind: "".join(d.text for d in deltas if d.kind is kind) for kind in TextKind}
    assert texts == {"answer": "I look.", "reasoning": "let me see", "tool_call": "look"}


async def test_an_answer_that_was_cut_off_says_so_whatever_calls_it_made(client):
    result = await answer(client, asking("{look}and", tools=LOOK, max_tokens=7))
    assert (result.text, result.finish_reason, result.tool_calls) == ("a", "length", (ToolCall("look", {}),))


async def test_stop_strings_end_the_answer_and_neither_reasoning_nor_calls(client):
    result = await answer(client, asking("[a END b]c{END}d END e", stop=("END",)))
    assert (result.reasoning, result.text, result.finish_reason) == ("a END b", "cd ", "stop")
    assert result.tool_calls == (ToolCall("END", {}),)


async def test_a_stop_string_is_found_though_a_call_stands_in_its_midst(client):
    updates = await collect(client, asking("one EN{look}D two", stop=("END",)))
    assert (updates[-1].text, updates[-1].finish_reason) == ("one ", "stop")
    assert "".join(u.text for u in updates if isinstance(u, Delta) and u.kind == "answer") == "one "


async def test_nothing_of_a_token_is_shown_or_called_after_the_stop_string_in_it():
    class Reader:
        tool_calls = notes = ()

        def add(self, token_id):
            return [
                Piece(TextKind.ANSWER, "yes END"),
                Piece(TextKind.TOOL_CALL, "look"),
                Piece(TextKind.ANSWER, "more"),
            ]

    class Tokenizer(FakeTokenizer):
        def reader(self, prompt, tools=(), plain=False):
            return Reader()

    model = LoadedModel("tiny", None, Tokenizer(), frozenset(), 9, 100, 0, b"")
    so_far = Answer(model, Prompt((1,)), 0, asking("a", stop=("END",)), ())
    assert [delta.text for delta in so_far.add(Token(1))] == ["yes "]
    assert so_far.stopped


async def test_a_stop_string_is_found_in_what_was_held_back_to_the_end(client):
    result = await answer(client, asking("one {END two", stop=("END",), max_tokens=9))
    assert (result.text, result.finish_reason) == ("one {", "stop")


async def test_what_only_began_like_a_stop_string_is_shown_at_last(client):
    updates = await collect(client, asking("one EN", stop=("END",)))
    assert "".join(u.text for u in updates if isinstance(u, Delta)) == updates[-1].text == "one EN"


async def test_reasoning_may_be_declined(client):
    assert (await answer(client, asking("[hm]yes", reasoning=Reasoning.OFF))).reasoning == ""


async def test_a_grammar_reaches_the_engine_compiled_and_the_answer_is_read_as_it_stands(client):
    result = await answer(client, asking("[hm]{yes}", grammar=YES))
    assert (result.text, result.reasoning, result.tool_calls, result.finish_reason) == ("{yes}", "", (), "stop")
    (constraint,) = client.loader.runner.constrained
    assert isinstance(constraint, FakeConstraint)


async def test_a_budget_of_thoughts_that_cannot_be_kept_is_noted(client):
    result = await answer(client, asking("hi", reasoning_budget=3))
    assert result.notes == (NO_BUDGET,)
    assert (await answer(client, asking("hi"))).notes == ()


async def test_slow_grammars_hold_up_no_call_without_one(client, monkeypatch):
    await collect(client, asking("a"))
    held = threading.Event()

    def compile_slowly(self, prompt, holding, vocab_size, gone):
        if holding.grammar is None:
            return None
        assert held.wait(10)
        return FakeConstraint()

    monkeypatch.setattr(FakeTokenizer, "hold", compile_slowly)
    grammar = Grammar(GrammarKind.REGEX, "a")
    slow = [asyncio.create_task(answer(client, asking("slow", grammar=grammar))) for _ in range(50)]
    assert (await answer(client, asking("quick"))).text == "quick"
    held.set()
    assert {result.text for result in await asyncio.gather(*slow)} == {"slow"}


@pytest.mark.parametrize("work", ["encode_chat", "hold"])
async def test_what_a_cancelled_call_waited_for_is_told_that_nobody_does_any_more(client, monkeypatch, work):
    await collect(client, asking("a"))
    begun, told = threading.Event(), threading.Event()

    def work_for_ever(self, *args):
        begun.set()
        while not args[-1]():
            time.sleep(0.001)
        told.set()
        raise Abandoned

    monkeypatch.setattr(FakeTokenizer, work, work_for_ever)
    call = asyncio.create_task(answer(client, asking("b", grammar=Grammar(GrammarKind.REGEX, "a"))))
    await until(begun.is_set)
    assert not told.is_set()
    call.cancel()
    await until(told.is_set)


async def test_a_grammar_that_cannot_be_compiled_is_refused_before_anything_is_queued(client):
    with pytest.raises(InvalidRequest, match="malformed"):
        await answer(client, asking("yes", grammar=Grammar(GrammarKind.REGEX, "malformed")))
    assert client.loader.runner.steps == []


async def test_the_engine_gets_the_lane_and_every_sampling_parameter(client, monkeypatch):
    params = SamplingParams(
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=2,
        logit_bias=((97, -100), (98, 1.5)),
        logprobs=2,
        seed=7,
    )
    options = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    sent, send = [], client.thread.send
    monkeypatch.setattr(client.thread, "send", lambda command: (sent.append(command), send(command)))
    await answer(client, asking("abc", lane="mine", **options))
    (row,) = client.loader.runner.steps[0].admitted
    assert row.params == params
    assert [command.lane for command in sent if isinstance(command, Submit)] == ["mine"]


async def test_logprobs_come_with_the_text_of_each_token():
    class Flight(FakeFlight):
        def collect(self):
            result = super().collect()
            for sequence_id, token_id in result.tokens.items():
                result.logprobs[sequence_id] = TokenLogprobs(-0.5, ((token_id, -0.5), (ord("x"), -1.0)))
            return result

    class Runner(FakeRunner):
        def launch(self, step):
            super().launch(step)
            return Flight(self, step)

    client = fake_client(FakeLoader(Runner()))
    result = await answer(client, asking("ab", logprobs=2))
    assert result.logprobs == (
        TokenChoice(97, "a", -0.5, ((97, "a", -0.5), (120, "x", -1.0))),
        TokenChoice(98, "b", -0.5, ((98, "b", -0.5), (120, "x", -1.0))),
    )
    assert client.close()


async def test_what_reads_an_answer_is_told_whether_max_tokens_cut_it_off_and_its_notes_are_passed_on(client):
    assert (await answer(client, asking("hello", max_tokens=2))).notes == ("cut off",)
    assert (await answer(client, asking("hello", max_tokens=90))).notes == ()


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
    (doomed_row,) = first.admitted
    assert doomed_row.prompt_ids == (97, 98, 99)
    assert all(doomed_row.sequence_id not in step.decoding for step in later)


async def test_a_call_that_is_cancelled_while_it_waits_leaves_its_place_to_the_next():
    client, steps = fake_client(limits=Limits(max_running=1, max_waiting=1)), threading.Semaphore(100)
    try:
        await answer(client, asking("warm"))
        runner = client.loader.runner
        runner.endless, runner.steps, runner.gate.wait = True, [], lambda seconds: steps.acquire(timeout=seconds)
        while steps.acquire(blocking=False):
            pass
        running = asyncio.create_task(answer(client, asking("abc", max_tokens=9)))
        await until(lambda: runner.steps)  # its first step is being computed
        doomed = aclosing(client.generate(asking("xyz", max_tokens=9)))
        async with doomed as updates:
            hearing = asyncio.create_task(anext(updates))
            await until(lambda: client.thread._inbox)
            steps.release()
            assert "queued" in (await hearing).message
        third = asyncio.create_task(answer(client, asking("end", max_tokens=9)))
        await until(lambda: len(client.thread._inbox) == 2)  # the cancel, and the third call
        steps.release(100)
        assert [(await call).completion_tokens for call in (running, third)] == [9, 9]
    finally:
        steps.release(100)
        assert client.close()
    admitted = ["".join(map(chr, row.prompt_ids)) for step in runner.steps for row in step.admitted]
    assert admitted == ["abc", "end"]


async def test_a_call_cancelled_while_its_model_loads_leaves_nothing_behind(client):
    client.loader.hold.clear()
    call = asyncio.create_task(answer(client, asking("abc")))
    await until(lambda: client.loader.prepared)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    client.loader.hold.set()
    assert (await answer(client, asking("abc"))).text == "abc"


async def test_looking_after_the_engine_is_no_sign_of_life(client, monkeypatch):
    monkeypatch.setattr(mailbox_module, "CHECK_S", 0.002)
    begin = asyncio.get_running_loop().time()
    assert await Mailbox(client.thread, 1).get(0.05) is None
    assert asyncio.get_running_loop().time() - begin >= 0.05


async def test_a_long_wait_shows_signs_of_life(client, monkeypatch):
    monkeypatch.setattr(mailbox_module, "KEEPALIVE_S", 0.01)
    await answer(client, asking("a"))
    client.loader.runner.gate.clear()
    signs = []
    async for update in client.generate(asking("abc")):
        signs += [update.message] if isinstance(update, Progress) else []
        if len(signs) == 5:
            client.loader.runner.gate.set()
    assert len(signs) >= 5
    assert "the engine's current step has taken" in signs[4]
    assert signs[4].count(";") == 1


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
        (asking("a", temperature=NAN), InvalidRequest, "temperature"),
        (asking("a", top_p=0), InvalidRequest, "top_p"),
        (asking("a", stop=("",)), InvalidRequest, "stop string is empty"),
        (asking("a", top_k=-1), InvalidRequest, "top_k is -1; it must be 0"),
        (asking("a", min_p=1.1), InvalidRequest, "min_p is 1.1; it must be from 0 to 1"),
        (asking("a", min_p=NAN), InvalidRequest, "min_p"),
        (asking("a", top_p=NAN), InvalidRequest, "top_p"),
        (asking("a", repetition_penalty=0), InvalidRequest, "repetition_penalty"),
        (asking("a", repetition_penalty=float("inf")), InvalidRequest, "from 0.01 to 10"),
        (asking("a", repetition_penalty=NAN), InvalidRequest, "repetition_penalty"),
        (asking("a", presence_penalty=-2.5), InvalidRequest, "presence_penalty is -2.5; it must be from -2 to 2"),
        (asking("a", presence_penalty=NAN), InvalidRequest, "presence_penalty"),
        (asking("a", frequency_penalty=2.5), InvalidRequest, "frequency_penalty"),
        (asking("a", frequency_penalty=NAN), InvalidRequest, "frequency_penalty"),
        (asking("a", logprobs=-1), InvalidRequest, "logprobs"),
        (asking("a", logprobs=21), InvalidRequest, "from 0 to 20"),
        (asking("a", logit_bias=((-1, 1.0),)), InvalidRequest, "ids must be 0 or more"),
        (asking("a", logit_bias=((1, 101.0),)), InvalidRequest, "from -100 to 100"),
        (asking("a", logit_bias=((1, NAN),)), InvalidRequest, "from -100 to 100"),
        (asking("a", logit_bias=((1, 1.0), (1, 2.0))), InvalidRequest, "token id twice"),
        (
            asking("a", logit_bias=tuple((i, 1.0) for i in range(1025))),
            InvalidRequest,
            "has 1025 entries; it may have 1024",
        ),
        (asking("a", logit_bias=((0x110000, 1.0),)), InvalidRequest, "the ids of 'tiny' go up to 1114111"),
        (asking("a", grammar=YES, tools=LOOK), InvalidRequest, "`tools` and a grammar .* leave one out"),
        (asking("a", grammar=YES, stop=("b",)), InvalidRequest, "`stop` and a grammar .* leave one out"),
        (asking("a", tools=LOOK * 2), InvalidRequest, "Two tools are named 'look'"),
        (
            asking("a", tools=({"function": {"name": "f", "parameters": "x"}},)),
            InvalidRequest,
            "'f' are no JSON schema",
        ),
        (asking("a", tools=({"name": "look"},)), InvalidRequest, "no function name; write"),
        (asking("a", tools=({"function": {"name": 1}},)), InvalidRequest, "no function name; write"),
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
    assert all("Call again" in str(r) for r in results)
    client.loader.fail = None
    assert (await answer(client, asking("a"))).text == "a"


async def test_a_model_that_was_unloaded_meanwhile_is_loaded_again(client):
    await answer(client, asking("a"))
    client.loader.weights_bytes = 950
    await answer(client, asking("b", model="other"))
    assert list(client._models.loaded) == ["other"]  # nobody keeps the weights of the other
    assert (await answer(client, asking("c"))).text == "c"
    assert client.loader.materialised == ["tiny", "other", "tiny"]


async def test_twenty_calls_that_alternate_between_two_models_with_room_for_one_are_answered_by_few_loads():
    client = fake_client(max_weights_bytes=150)
    try:
        calls = [collect(client, asking(f"call {i}", model=("tiny", "other")[i % 2])) for i in range(20)]
        updates = await asyncio.gather(*calls)
        assert [each[-1].text for each in updates] == [f"call {i}" for i in range(20)]
        assert [each[-1].model for each in updates] == ["tiny", "other"] * 10
        assert len(client.loader.materialised) <= 4
        told = {update.message for each in updates for update in each if isinstance(update, Progress)}
        assert any("waits for" in line and "to make room for" in line for line in told)
    finally:
        assert client.close()


async def test_a_call_that_waits_for_its_model_to_come_back_does_not_keep_its_weights():
    client = fake_client(max_weights_bytes=150)
    try:
        await answer(client, asking("a"))
        stale = client._models.loaded["tiny"]
        await answer(client, asking("b", model="other"))
        client._models.loaded["tiny"] = stale  # as another caller would have found it a moment ago
        client.loader.hold.clear()
        again = asyncio.create_task(answer(client, asking("c")))
        await until(lambda: client.loader.prepared == ["tiny", "other", "tiny"])
        weights = weakref.ref(stale)
        del stale
        gc.collect()
        assert weights() is None
        client.loader.hold.set()
        assert (await again).text == "c"
    finally:
        assert client.close()


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


class SilentThread:
    """An engine thread that answers some commands, and dies without a word."""

    def __init__(self, answers):
        self.answers, self.sent, self.dead, self.ids = answers, [], None, itertools.count()

    def listen(self, call_id, sink, loop=None):
        self.sink = sink

    def unlisten(self, call_id):
        pass

    def send(self, command):
        self.sent.append(type(command))
        if type(command) in self.answers:
            self.sink(self.answers[type(command)])


async def test_whoever_waits_hears_within_two_seconds_that_the_engine_died():
    model = Loaded(LoadedModel("tiny", None, FakeTokenizer(), frozenset(), 0x110000, 100, 0, b""))
    finding, preparing, loading, running = threads = [
        SilentThread({}),
        SilentThread({Find: Unloaded()}),
        SilentThread({Find: Unloaded()}),
        SilentThread({Find: model}),
    ]
    held = FakeLoader()
    held.hold.clear()
    clients = [EngineClient(t, FakeRegistry(), held if t is preparing else FakeLoader()) for t in threads]
    calls = [asyncio.create_task(answer(client, asking("abc"))) for client in clients]
    await until(lambda: Find in finding.sent and held.prepared and Load in loading.sent and Submit in running.sent)
    for thread in threads:
        thread.dead = EngineDead("gone")
    async with asyncio.timeout(2):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(r) for r in results} == {EngineDead}
    held.hold.set()


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


async def test_what_the_makers_recommend_holds_where_a_call_says_nothing():
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    client = fake_client(FakeLoader(defaults=defaults))
    submitted = []
    send = client.thread.send
    client.thread.send = lambda command: submitted.append(command) or send(command)
    try:
        await answer(client, asking("abc"))
        await answer(client, asking("abc", temperature=0, top_k=0, min_p=0.1))
        await answer(client, replace(asking("abc"), drawn=True))
    finally:
        client.close()
    drawn = [command.params for command in submitted if isinstance(command, Submit)]
    assert [(each.temperature, each.top_p, each.top_k, each.min_p) for each in drawn] == [
        (0.6, 0.9, 20, 0.0),
        (0, 0.9, 0, 0.1),
        (0.6, 0.9, 20, 0.0),
    ]


async def test_several_answers_of_a_greedy_model_are_refused(client):
    with pytest.raises(InvalidRequest, match="all n answers are the same"):
        await answer(client, replace(asking("abc"), drawn=True))


async def test_an_answer_that_ends_within_its_thoughts_says_what_to_raise(client):
    cut = await answer(client, asking("[hm hm]yes", max_tokens=4))
    assert (cut.text, cut.finish_reason, cut.notes) == ("", "length", ("cut off", ONLY_THOUGHTS))
    assert (await answer(client, asking("[hm]yes", max_tokens=6))).notes == ("cut off",)


async def test_a_generation_that_is_ended_early_keeps_what_it_wrote_and_its_session_goes_on(client):
    client.loader.runner.endless = True
    request = asking("hello", opens=SessionOptions(), max_tokens=60)
    text = ""
    async with aclosing(client.generate(request)) as updates:
        async for update in updates:
            text += update.text if isinstance(update, Delta) else ""
            if text == "he":
                request.ending.end()
    assert isinstance(update, Result)
    assert (update.text, update.finish_reason, update.completion_tokens) == ("he", "length", 2)
    assert update.session.num_tokens == len("hello" + "he")
    client.loader.runner.endless = False
    on = await answer(client, asking("x", session=update.session.session_id))
    assert (on.text, on.prompt_tokens) == ("x", len("hello" + "he" + "|x"))


def wait_for_rows_to_end(client):
    """Hold the event loop until the engine has ended all rows, so that no token is read before."""
    while client.stats.running:
        time.sleep(0.001)


async def test_a_session_that_ended_by_itself_before_it_could_be_cut_is_told_as_it_was_cut(client):
    client.loader.runner.endless = True
    cut = []
    for stop in ((), ("he",)):
        request = asking("hello", opens=SessionOptions(), max_tokens=60, stop=stop)
        async with aclosing(client.generate(request)) as updates:
            async for update in updates:
                wait_for_rows_to_end(client)
                if not stop and isinstance(update, Delta):
                    request.ending.end()
        cut.append((update.text, update.session.num_tokens, update.completion_tokens))
    assert cut == [("h", len("hello" + "h"), 1), ("", len("hello" + "he"), 2)]


async def test_a_generation_that_waits_for_its_row_can_be_ended_too(client):
    await answer(client, asking("a"))
    runner = client.loader.runner
    runner.gate.clear()  # the engine is held in the step of another generation
    other = asyncio.create_task(answer(client, asking("other")))
    await until(lambda: len(runner.steps) > 2)
    request = asking("hello", opens=SessionOptions())
    waiting = asyncio.create_task(answer(client, request))
    await asyncio.sleep(0)
    request.ending.end()
    runner.gate.set()
    ended = await waiting
    assert (ended.text, ended.finish_reason, ended.completion_tokens) == ("", "length", 0)
    assert (await other).text == "other"
    assert (await answer(client, asking("x", session=ended.session.session_id))).text == "x"
