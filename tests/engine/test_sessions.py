"""What sessions and single calls share, step by step, over a runner whose keys and values are its tokens."""

import itertools
import re
import sys

import pytest

from mlx_mcp.core.cache.blocks import walk
from mlx_mcp.core.cache.misses import MissReason
from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.layout import Layout
from mlx_mcp.core.origin import Origin
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.session import MAX_FORKS, SessionOptions
from mlx_mcp.core.slots import KvCost
from mlx_mcp.engine.messages import (
    Cancel,
    Close,
    EncodeAgain,
    Encoded,
    Finish,
    Finished,
    ListSessions,
)
from mlx_mcp.engine.turns import MAX_QUEUE
from mlx_mcp.errors import (
    CapacityError,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    RequestTooLarge,
    SessionBusy,
    UnknownSession,
)
from tests.engine.house import KEEP, House, words

# Turns


def test_a_turn_goes_on_where_the_last_one_ended_and_computes_nothing_again():
    house = House()
    session = house.open(words(50))
    computed = house.runner.num_computed
    turn = house.say("|and then", session)
    house.run()
    assert turn.text == "and then"
    assert house.log(session) == words(50) + words(50) + "|and then" + "and then"
    assert turn.cached == 100
    assert house.runner.num_computed - computed == 9 + 8


def test_a_turn_that_is_not_kept_leaves_the_session_as_it_was():
    house = House()
    session = house.open("abc")
    asides = [house.say(f"|aside{i}", session, keep=False) for i in range(5)]
    house.run()
    assert [a.text for a in asides] == [f"aside{i}" for i in range(5)]
    assert all(a[-1].session is None for a in asides)
    assert house.log(session) == "abcabc"


def test_a_context_is_primed_once_and_nothing_is_said():
    house = House()
    session = house.prime(words(40))
    assert house.log(session) == words(40)
    turn = house.say("|hi", session, after="user")
    house.run()
    assert (turn.cached, turn.text) == (40, "hi")


def test_a_cancelled_turn_leaves_the_session_as_it_was():
    house = House()
    house.runner.endless = True
    session = house.open("abc")
    turn = house.say("|more", session, max_tokens=90)
    for _ in range(20):
        house.engine.step()
    house.engine.handle(Cancel(turn.sequence_id))
    assert house.log(session) == "abc" + ("abc" * 20)
    again = house.say("|more", session)
    house.run()
    assert again.session == session


def test_a_first_turn_that_comes_to_nothing_leaves_no_session():
    house = House()
    events = house.say("abc", opens=SessionOptions("mine"))
    house.engine.handle(Cancel(events.sequence_id))
    assert house.ask(ListSessions, "ann") == ()
    house.open("abc", name="mine")


def origins(house, session):
    return house.engine.sessions.sessions[session].origins


def test_a_session_knows_who_asked_for_each_of_its_turns_and_when():
    house = House()
    opened = house.say("abc", opens=KEEP, context="user", max_tokens=1, origin=Origin("ann", 10.0))
    house.run()
    session = opened.session
    house.say("|x", session, after="user", origin=Origin("bob", 11.0))
    house.run()
    house.say("|aside", session, keep=False, origin=Origin("eve", 12.0))
    house.run()
    house.runner.endless = True
    cancelled = house.say("|more", session, origin=Origin("eve", 13.0))
    for _ in range(8):
        house.engine.step()
    house.engine.handle(Cancel(cancelled.sequence_id))
    assert origins(house, session) == (Origin("ann", 10.0, 0), Origin("bob", 11.0, 3))


def test_a_turn_that_is_shortened_after_its_end_is_one_turn_all_the_same():
    house = House()
    session = house.open("abc")
    turn = house.say("|0123456789", session, origin=Origin("ann", 10.0))
    house.run()
    house.engine.handle(Finish(turn.sequence_id, 4))
    house.say("|x", session, origin=Origin("bob", 11.0))
    house.run()
    assert origins(house, session)[1:] == (Origin("ann", 10.0, 6), Origin("bob", 11.0, 21))


def test_a_turn_whose_prompt_is_encoded_again_was_asked_for_once():
    house = House()
    session = house.prime("abc")
    turn = house.say("|x", session, after="assistant", origin=Origin("ann", 10.0))
    assert isinstance(turn[-1], EncodeAgain)
    house.engine.handle(Encoded(turn.sequence_id, tuple(map(ord, "|y")), SamplingParams(9), None, "user"))
    house.run()
    assert origins(house, session)[1:] == (Origin("ann", 10.0, 3),)


def test_a_turn_that_races_another_is_told_that_the_session_is_busy():
    house = House()
    session = house.open("abc")
    first, second = house.say("|one", session), house.say("|two", session)
    assert isinstance(second.error, SessionBusy)
    assert re.match(r"session_busy: .* cannot be used now: another turn .* queue=true", str(second.error))
    house.run()
    assert first.text == "one"


def test_turns_that_ask_to_queue_follow_in_order():
    house = House()
    session = house.open("abc")
    turns = [house.say(f"|{i}", session, queue=True) for i in range(4)]
    house.run()
    assert [t.text for t in turns] == list("0123")
    assert house.log(session) == "abcabc|00|11|22|33"


def test_a_queued_turn_can_be_cancelled_and_the_next_goes_on():
    house = House()
    session = house.open("abc")
    turns = [house.say(f"|{i}", session, queue=True) for i in range(3)]
    house.engine.step()
    house.engine.handle(Cancel(turns[1].sequence_id))
    assert house.engine.stats.waiting == 1
    house.run()
    assert house.log(session) == "abcabc|00|22"


def test_when_the_turn_under_way_is_cancelled_the_one_that_waits_begins():
    house = House()
    session = house.open("abc")
    turns = [house.say(f"|{i}", session, queue=True) for i in range(2)]
    house.engine.step()
    house.engine.handle(Cancel(turns[0].sequence_id))
    house.run()
    assert turns[1].text == "1"
    assert house.log(session) == "abcabc|11"


def test_so_many_turns_wait_for_a_session_and_no_more():
    house = House()
    session = house.open("abc")
    turns = [house.say("|x", session, queue=True) for _ in range(MAX_QUEUE + 2)]
    assert isinstance(turns[-1].error, CapacityError)
    assert re.fullmatch(r"\d+ turns wait for this session already\. Retry in 5 s\.", str(turns[-1].error))
    house.run()
    assert all(isinstance(t[-1], Finished) for t in turns[:-1])


def test_a_turn_encoded_for_another_end_of_the_session_waits_to_be_encoded_again():
    house = House()
    session = house.prime("abc")
    turn = house.say("|hi", session)
    assert turn == [EncodeAgain(loaded=True)]
    following = house.say("|after", session, after="user", queue=True)
    house.run()
    assert turn == [EncodeAgain(loaded=True)]
    house.engine.handle(Encoded(turn.sequence_id, tuple(map(ord, "hi")), SamplingParams(60), None, "user"))
    house.run()
    assert house.log(session) == "abc" + "hi" + turn.text
    assert following[-1] == EncodeAgain(loaded=True)  # it has its turn, and the session ends otherwise by now
    house.engine.handle(Encoded(following.sequence_id, tuple(map(ord, "|x")), SamplingParams(60), None, "assistant"))
    house.run()
    assert house.log(session) == "abc" + "hi" + turn.text + "|x" + "x"


def test_a_turn_whose_prompt_does_not_come_is_told_to_try_again():
    house = House(max_wait_s=60)
    session = house.prime("abc")
    turn = house.say("|hi", session)
    assert turn == [EncodeAgain(loaded=True)]
    house.engine.check_time()
    house.now += 61
    house.engine.check_time()
    assert re.fullmatch(r"The call waited 61 s for its prompt\. Retry in \d+ s\.", str(turn.error))


def test_a_turn_that_is_cancelled_while_it_is_encoded_again_lets_the_next_one_begin():
    house = House()
    session = house.prime("abc")
    turn, following = house.say("|hi", session), house.say("x", session, after="user", queue=True)
    house.engine.handle(Cancel(turn.sequence_id))
    house.run()
    assert following.text
    house.engine.handle(Encoded(turn.sequence_id, (1,), SamplingParams(60), None, "user"))
    house.engine.check_integrity()
    assert not house.engine.calls


def test_a_turn_ended_by_a_stop_string_is_kept_to_there():
    house = House()
    house.runner.endless = True
    session = house.open("abc")
    turn = house.say("|0123456789", session, max_tokens=90)
    while len(turn.text) < 15:
        house.engine.step()
    house.engine.handle(Finish(turn.sequence_id, 12))
    assert turn.session == session
    assert house.log(session).endswith("|0123456789" + "012345678901")
    following = house.say("|x", session)
    house.run()
    assert following.cached == 3 + 60 + 11 + 12


def test_a_turn_that_ended_before_its_stop_string_was_found_is_cut_all_the_same():
    house = House()
    session = house.open("abc")
    turn = house.say("|0123456789", session)
    house.run()
    house.engine.handle(Finish(turn.sequence_id, 4))
    house.engine.check_integrity()
    assert house.log(session) == "abcabc|0123456789" + "0123"
    following = house.say("|x", session)
    house.run()
    assert following.cached == 21
    house.engine.handle(Finish(turn.sequence_id, 2))
    assert house.log(session) == "abcabc|01234567890123|xx"


def test_a_session_that_outgrew_the_context_says_so_and_is_kept():
    house = House(context_tokens=120)
    session = house.open("abc")
    turn = house.say("|" + "x" * 80, session)
    assert isinstance(turn.error, PromptTooLong)
    assert house.log(session) == "abcabc"


def test_a_turn_whose_length_was_not_asked_for_is_cut_to_what_the_session_leaves_after_others():
    house = House(context_tokens=120)
    session = house.open("abc")
    house.say("|" + "x" * 40, session, max_tokens=20)
    turn = house.say("|" + "y" * 30, session, queue=True, shorten=True)
    house.run()
    assert turn.text == "y" * 22  # 120 - 6 - 41 - 20 - 31
    refused = house.say("|z", session, shorten=True).error
    assert isinstance(refused, PromptTooLong)
    assert "max_tokens" not in str(refused)  # nobody gave one


def test_a_session_belongs_to_its_model():
    house = House()
    session = house.open("abc")
    house.load("other")
    assert isinstance(house.say("|x", session, model="other").error, InvalidRequest)
    house.load("tiny")
    turn = house.say("|x", session)
    house.run()
    assert turn.cached == 6  # what it had was kept while the other model was in memory


# Forks


def operations(function):
    """How many lines of Python a call takes."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


def test_a_fork_takes_as_many_operations_and_no_bytes_whatever_the_length():
    counts = {}
    for n in (80, 8000):
        house = House(limits={"prefill_tokens_idle": 4096, "prefill_tokens_busy": 4096, "chunk_tokens": 4096})
        session = house.prime(words(n))
        used, store = house.engine.ledger.used_bytes, house.engine.sessions
        parent = store.sessions[session]
        assert parent.leaf.end == n
        counts[n] = operations(lambda s=store, p=parent: s.fork(p, 1, ()))
        (child,) = (s for s in store.sessions.values() if s is not parent)
        assert child.log is parent.log
        assert child.leaf is parent.leaf
        assert house.engine.ledger.used_bytes == used
    assert counts[80] == counts[8000]


def test_forks_go_their_own_ways_from_one_past():
    house = House()
    parent = house.prime(words(50))
    children = house.fork(parent, 10)
    turns = [house.say(f"|child {i}", child, after="user") for i, child in enumerate(children)]
    house.run()
    assert [t.text for t in turns] == [f"child {i}" for i in range(10)]
    assert all(t.cached >= 50 for t in turns)
    assert [house.log(c) for c in children] == [words(50) + f"|child {i}child {i}" for i in range(10)]
    assert house.log(parent) == words(50)


def test_a_fork_while_the_parent_generates_begins_where_its_last_turn_ended():
    house = House()
    parent = house.open("abc")
    turn = house.say("|going on", parent)
    for _ in range(4):
        house.engine.step()
    (child,) = house.fork(parent)
    branch = house.say("|other way", child)
    house.run()
    assert (turn.text, branch.text) == ("going on", "other way")
    assert house.log(child) == "abcabc|other wayother way"


def test_a_fork_outlives_its_parent():
    house = House()
    parent = house.open("abc")
    (child,) = house.fork(parent)
    house.ask(Close, "ann", (parent,))
    turn = house.say("|x", child)
    house.run()
    assert turn.cached == 6


def test_a_context_that_is_still_being_primed_cannot_be_forked():
    house = House()
    house.say(words(50), opens=SessionOptions("early"), context="user", max_tokens=1)
    with pytest.raises(SessionBusy, match="still being computed"):
        house.fork("early")


@pytest.mark.parametrize("count", [0, MAX_FORKS + 1])
def test_forks_are_made_a_few_at_a_time(count):
    house = House()
    session = house.open("abc")
    with pytest.raises(InvalidRequest, match="1 to 64"):
        house.fork(session, count)
    assert len(house.ask(ListSessions, "ann")) == 1


def test_a_tail_is_shared_until_the_last_who_goes_on_from_it_has_moved():
    house = House()
    parent = house.prime(words(50))
    tail = house.engine.sessions.sessions[parent].leaf
    assert len(tail.tokens) == 2
    (child,) = house.fork(parent)
    house.say("|x", parent, after="user")
    house.run()
    assert tail.resident
    house.say("|y", child, after="user")
    house.run()
    assert not tail.resident


# Names, owners, ends


def test_handles_cannot_be_guessed():
    house = House()
    handles = {house.prime("ab") for _ in range(20)}
    assert len(handles) == 20
    assert all(re.fullmatch(r"s_[0-9a-f]{32}", handle) for handle in handles)  # 128 bits


def test_a_name_stands_for_the_handle_of_its_tenant():
    house = House()
    session = house.open("abc", name="work")
    turn = house.say("|x", "work")
    house.run()
    assert turn.session == session
    assert isinstance(house.say("|x", "work", tenant="bob").error, UnknownSession)
    assert isinstance(house.say("|x", session, tenant="bob").error, UnknownSession)
    with pytest.raises(UnknownSession):
        house.fork(session, tenant="bob")
    assert house.ask(ListSessions, "bob") == ()


def test_a_name_is_taken_once_per_tenant():
    house = House()
    house.open("abc", name="work")
    assert isinstance(house.say("abc", opens=SessionOptions("work")).error, InvalidRequest)
    for name in ("a b", "s_" + "0" * 32, "ä", "x" * 65):
        refused = house.say("abc", opens=SessionOptions(name)).error
        assert isinstance(refused, InvalidRequest)
        told = r"handles begin with s_ or x-: take another|session's name: take 1 to 64 letters"
        assert re.search(told, str(refused))
    house.say("abc", opens=SessionOptions("work"), tenant="bob")
    house.run()
    with pytest.raises(InvalidRequest, match="named 'x'"):
        house.fork("work", 2, ("x", "x"))
    with pytest.raises(InvalidRequest, match="names"):
        house.fork("work", 2, ("x",))


def test_a_closed_session_is_gone_with_its_turn_and_its_queue():
    house = House()
    session = house.open("abc")
    turn, queued = house.say("|one", session), house.say("|two", session, queue=True)
    house.engine.step()
    house.ask(Close, "ann", (session,))
    assert isinstance(turn.error, UnknownSession)
    assert isinstance(queued.error, UnknownSession)
    assert house.runner.rows == {}
    gone = house.say("|x", session).error
    assert isinstance(gone, UnknownSession)
    assert "It was closed, has expired, or ended with the server. list_sessions shows" in str(gone)
    house.run()


def test_of_several_to_be_closed_none_is_if_one_is_unknown():
    house = House()
    session = house.open("abc")
    with pytest.raises(UnknownSession):
        house.ask(Close, "ann", (session, "s_nothing"))
    assert len(house.ask(Close, "ann", ())) == 1


def test_a_session_ends_when_it_is_not_used_for_its_time():
    house = House(session_ttl_s=100)
    brief, usual = house.open("abc", ttl_s=10), house.open("abd")
    house.now = 9
    house.say("|x", brief)
    house.run()
    house.now = 18
    assert len(house.ask(ListSessions, "ann")) == 2
    house.now = 30
    assert [i.session_id for i in house.ask(ListSessions, "ann")] == [usual]
    house.now = 131
    assert house.ask(ListSessions, "ann") == ()


def test_a_running_turn_keeps_its_session_from_ending():
    house = House(session_ttl_s=10)
    session = house.open("abc")
    turn = house.say("|hello", session)
    house.engine.step()
    house.now = 100
    house.run()
    assert turn.session == session


def test_there_are_so_many_sessions_and_no_more():
    house = House(max_sessions=3)
    session = house.open("abc")
    house.fork(session, 2)
    with pytest.raises(CapacityError, match="close some"):
        house.fork(session)
    assert isinstance(house.say("abc", opens=KEEP).error, CapacityError)


def test_asking_without_keeping_counts_as_use():
    house = House(session_ttl_s=10)
    session = house.prime("abc")
    for _ in range(3):
        house.now += 8
        house.say("|x", session, keep=False, after="user")
        house.run()
    assert len(house.ask(ListSessions, "ann")) == 1


def test_an_ephemeral_session_leaves_nothing_behind_and_others_their_blocks():
    house = House()
    kept = house.prime(words(40))
    (child,) = house.fork(kept)
    before = house.pool.used_bytes
    brief = house.open(words(40, "A"), ephemeral=True)
    assert house.pool.used_bytes > before
    house.ask(Close, "ann", (brief,))
    assert house.pool.used_bytes == before
    house.ask(Close, "ann", (kept, child))
    assert house.pool.used_bytes == 40  # to be found by prompts that begin alike, until memory is needed


# Prefixes of single calls


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("length", [1, 4, 48, 50])
@pytest.mark.parametrize("first", [1, 20])
def test_a_prompt_that_comes_again_gets_its_first_token_without_a_pass(length, first, ahead):
    house = House()
    house.runner.ahead, house.runner.endless = ahead, True
    house.say(words(length), max_tokens=first)
    house.run()
    computed = house.runner.num_computed
    again = house.say(words(length), max_tokens=1)
    house.run()
    assert (again.cached, again.text) == (length, "a")
    assert house.runner.num_computed == computed
    longer = house.say(words(length), max_tokens=9)
    house.run()
    assert longer.text == (words(length) * 9)[:9]
    assert house.runner.num_computed <= computed + 8 + ahead


def test_a_turn_that_is_asked_again_gets_its_first_token_without_a_pass():
    house = House()
    session = house.open(words(50))
    house.say("|and then", session, keep=False, max_tokens=1)
    house.run()
    computed = house.runner.num_computed
    again = house.say("|and then", session, keep=False, max_tokens=1)
    house.run()
    assert again.text == "a"
    assert house.runner.num_computed == computed


def test_a_prompt_that_ends_elsewhere_in_what_is_kept_computes_its_last_token():
    house = House()
    house.say(words(50), max_tokens=20)
    house.run()
    for length in (49, 48, 47):
        other = house.say(words(length), max_tokens=1)
        house.run()
        assert (other.cached, other.text) == (length - 1, "a")


def test_a_context_keeps_no_logits_since_it_was_no_prompt():
    house = House()
    house.prime(words(40))
    assert house.pool.used_bytes == 40
    assert all(block.prompt_end is None for root in house.pool.roots.values() for block in walk(root))


def test_rows_of_states_repeat_from_where_a_prompt_ended_if_that_was_kept():
    house = House(layout=Layout(states=True))
    for most, cached in ((9, 0), (1, 16), (9, 18)):  # the first goes past the end and keeps states at 16 and at 26
        call = house.say(words(18), max_tokens=most)
        house.run()
        assert (call.cached, call.text) == (cached, words(most))


def test_logits_are_kept_until_their_block_goes_and_no_longer():
    house = House()
    house.say(words(50), max_tokens=1)
    house.run()
    assert house.pool.used_bytes == 50 + 3
    assert house.pool.reclaim(1)
    assert house.pool.used_bytes == house.engine.ledger.used_bytes == 48
    again = house.say(words(50), max_tokens=1)
    house.run()
    assert again.cached == 48


def test_logits_without_room_are_not_kept_and_nothing_is_lost():
    house = House(max_kv_bytes=300)
    house.runner.endless = True
    calls = [house.say(words(100 + i), max_tokens=20) for i in range(6)]
    house.run()
    assert [c.text for c in calls] == [words(20)] * 6
    assert house.engine.ledger.used_bytes == house.pool.used_bytes <= 300


def test_a_repeat_whose_step_breaks_fails_alone_and_the_next_repeats():
    house = House()
    house.say(words(50), max_tokens=1)
    house.run()
    broken = house.say(words(50), max_tokens=1)
    house.runner.explode = RuntimeError("no memory")
    house.run()
    assert isinstance(broken.error, GenerationFailed)
    again = house.say(words(50), max_tokens=1)
    house.run()
    assert (again.cached, again.text) == (50, "a")


def test_a_repeat_that_is_cancelled_before_its_step_leaves_all_as_it_was():
    house = House()
    house.say(words(50), max_tokens=1)
    house.run()
    before = house.engine.ledger.used_bytes
    house.engine.handle(Cancel(house.say(words(50), max_tokens=1).sequence_id))
    house.engine.check_integrity()
    assert house.engine.ledger.used_bytes == before


def test_logits_give_way_to_the_end_of_their_own_prompt():
    house = House(max_kv_bytes=128 + 52)
    call = house.say(words(50), max_tokens=1)
    house.run()
    assert call.text == "a"
    assert house.pool.used_bytes == 50
    again = house.say(words(50), max_tokens=1)
    house.run()
    assert again.cached == 49


def test_a_prompt_that_is_cancelled_leaves_no_logits_on_the_ledger():
    house = House()
    house.runner.endless = True
    call = house.say(words(50), max_tokens=60)
    while not call.text:
        house.engine.step()
    house.engine.check_integrity()
    house.engine.handle(Cancel(call.sequence_id))
    house.engine.check_integrity()
    assert house.engine.ledger.used_bytes == house.pool.used_bytes == 48


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_new_prefix_that_several_need_at_once_is_computed_once_whatever_their_order(order):
    house = House()
    texts = [words(64) + tail for tail in ("", "xyzzy", "q" * 20)]
    calls = [house.say(texts[i], max_tokens=2) for i in order]
    house.run()
    assert [c.text for c in calls] == [texts[i][:2] for i in order]
    assert house.runner.num_computed <= 64 + 5 + 20 + 3 * 4 + 3


def test_those_that_wait_for_a_prefix_take_no_place_and_others_pass():
    house = House(limits={"max_running": 2})
    leader, *waiting = [house.say(words(160), max_tokens=1) for _ in range(4)]
    other = house.say("zzz", max_tokens=1)
    house.engine.step()
    house.engine.step()
    assert other.ended
    assert not leader.ended
    assert house.engine.stats.running == 1
    house.run()
    assert all(w.cached == 160 for w in waiting)


def test_when_the_one_that_computes_is_cancelled_another_goes_on_from_there():
    house = House()
    first, second, third = [house.say(words(160) + str(i), max_tokens=1) for i in range(3)]
    for _ in range(4):
        house.engine.step()
    done = house.runner.num_computed
    assert 0 < done < 160
    house.engine.handle(Cancel(first.sequence_id))
    house.run()
    assert second.cached == done
    assert third.cached == 160
    assert house.runner.num_computed <= 162


def test_two_tenants_share_nothing():
    house = House()
    house.say(words(50), max_tokens=1)
    house.run()
    other = house.say(words(50), max_tokens=1, tenant="bob")
    house.run()
    assert other.cached == 0
    assert other.miss is None


def test_a_preempted_call_takes_up_what_was_kept_of_it():
    house = House(max_kv_bytes=700, limits={"max_running": 4})
    house.runner.endless = True
    calls = [house.say(words(20, chr(65 + i)), max_tokens=200) for i in range(3)]
    house.run()
    assert house.engine.stats.preemptions > 0
    for i, call in enumerate(calls):
        assert call.text == (words(20, chr(65 + i)) * 10)[:200]


# States and windows


def test_states_are_kept_where_prompts_part_and_the_third_goes_on_from_there():
    house = House(layout=Layout(states=True))
    for i in range(2):
        house.say(words(40) + chr(65 + i) * 40, max_tokens=1)
        house.run()
    third = house.say(words(40) + "Z" * 40, max_tokens=1)
    house.run()
    assert third.cached == 40


def test_states_are_kept_where_waiting_prompts_part_and_each_goes_on_from_there():
    house = House(layout=Layout(states=True))
    calls = [house.say(words(40) + chr(65 + i) * 40, max_tokens=1) for i in range(4)]
    house.run()
    assert [c.cached for c in calls] == [0, 40, 40, 40]


def test_with_states_a_session_goes_on_to_the_token_and_a_prompt_again_from_its_last_chunk():
    house = House(layout=Layout(states=True))
    session = house.open(words(50))
    turn = house.say("|x", session)
    house.run()
    assert turn.cached == 100
    again = house.say(words(50))
    house.run()
    assert again.cached == 48


# Shared prefixes


def test_rows_share_one_copy_of_a_prefix_that_enough_begin_with():
    house = House(sharing=Sharing(min_rows=3, min_tokens=100), limits={"prefill_tokens_busy": 64})
    house.runner.endless = True
    parent = house.prime(words(120))
    alone = house.say("|x", parent, keep=False, after="user", max_tokens=40)
    house.engine.step()
    assert house.engine.stats.kv_reserved_bytes >= 256
    house.engine.handle(Cancel(alone.sequence_id))
    calls = [house.say(f"|{i}", parent, keep=False, after="user", max_tokens=40) for i in range(8)]
    house.engine.step()
    assert house.engine.stats.running == 8
    assert house.engine.stats.kv_reserved_bytes <= 120 + 8 * (128 + 3)  # with the logits after their prompts
    house.run()
    assert [c.text for c in calls] == [str(i) * 40 for i in range(8)]
    assert house.engine.stats.kv_reserved_bytes == 0


def test_rows_that_share_a_prefix_are_charged_for_their_own_windows_of_it():
    house = House(max_kv_bytes=6000, sharing=Sharing(2, 100), cost=KvCost(token_bytes=1, windows=((200, 1),)))
    parent = house.prime(words(200))
    calls = [house.say(f"|{i}", parent, keep=False, after="user", max_tokens=40) for i in range(4)]
    house.engine.step()
    assert house.engine.stats.running == 4
    assert house.engine.stats.kv_reserved_bytes >= 200 + 4 * (128 + 200)
    house.run()
    assert [c.text for c in calls] == list("0123")
    assert house.engine.stats.kv_reserved_bytes == 0


def test_prefixes_whose_hashes_collide_are_not_shared():
    house = House(sharing=Sharing(min_rows=2, min_tokens=8), hash_bytes=1, limits={"max_running": 64})
    house.runner.endless = True
    texts = [words(20, chr(0x100 + 40 * i)) for i in range(40)]
    for tenant in ("ann", "bob"):
        calls = [house.say(text + tail, max_tokens=9, tenant=tenant) for text in texts for tail in "xyz"]
        house.run()
        assert [c.text for c in calls] == [text[:9] for text in texts for _ in range(3)]
    assert house.engine.models.by_name["tiny"].scheduler.cache.shared.num_made


# Memory


def test_sessions_make_room_for_calls_and_are_computed_again():
    house = House(max_kv_bytes=400)
    session = house.prime(words(100))
    house.say(words(200, "A"), max_tokens=1)
    house.run()
    turn = house.say("|x", session, after="user", max_tokens=20)
    house.run()
    assert turn.cached < 100
    assert (turn.miss.reason, turn.miss.index) == (MissReason.EVICTED, turn.cached)
    assert turn.text == "x"


def test_a_pinned_session_stays_and_calls_that_lack_its_room_wait_and_are_told():
    house = House(max_kv_bytes=300, max_wait_s=60)
    session = house.open(words(60), pinned=True)
    assert house.pool.protected_bytes == 60 + 60 - 1 + 3  # the logits after its prompt
    call = house.say(words(180, "A"), max_tokens=50)
    for _ in range(10):
        assert not house.engine.step()
        house.now += 5
    assert not call.ended
    for _ in range(4):
        house.engine.step()
        house.now += 5
    assert isinstance(call.error, CapacityError)
    assert re.search(r"waited \d+ s .* pinned sessions 0\.0.* Retry in", str(call.error))
    assert call.error.retry_after_s > 0
    assert house.ask(ListSessions, "ann")[0].num_cached == 119
    house.ask(Close, "ann", (session,))
    house.say(words(180, "A"), max_tokens=50)
    house.run()


def test_a_call_that_follows_another_through_a_long_prompt_is_not_told_to_come_again():
    house = House(max_wait_s=60)
    calls = [house.say(words(400) + end, max_tokens=1) for end in "xy"]
    while house.engine.has_work:
        house.engine.step()
        house.now += 5
    assert house.now > 120
    assert [c.text for c in calls] == [words(1)] * 2


def test_a_call_that_waits_for_pins_to_go_holds_up_no_other():
    house = House(max_kv_bytes=300)
    house.open(words(60), pinned=True)
    large = house.say(words(180, "A"), max_tokens=50)
    small = house.say(words(50, "P"), max_tokens=50)
    for _ in range(100):
        house.engine.step()
    assert small.ended
    assert not large.ended


def test_pins_take_at_most_half_of_all_memory():
    house = House(max_kv_bytes=600)
    for first in "aAP":
        house.open(words(60, first), pinned=True)
    assert house.pool.protected_bytes == 2 * (119 + 3)
    assert [info.pinned for info in house.ask(ListSessions, "ann")] == [True, True, False]


def test_what_can_never_fit_is_refused_at_once():
    house = House(max_kv_bytes=400)
    assert isinstance(house.say(words(390), max_tokens=60).error, RequestTooLarge)
    session = house.open("abc")
    turn = house.say("|" + words(390), session)
    assert isinstance(turn.error, RequestTooLarge)
    assert house.log(session) == "abcabc"


def test_a_full_pool_serves_all_who_wait_one_after_another():
    house = House(max_kv_bytes=300)
    calls = [house.say(words(100, chr(65 + i)), max_tokens=20, opens=KEEP) for i in range(12)]
    house.run()
    assert all(isinstance(c[-1], Finished) for c in calls)


def test_what_a_row_computed_or_began_with_is_forgotten_when_its_logits_are_no_numbers():
    house = House()
    kept = house.prime(words(40, "A"))
    house.say(words(40), max_tokens=1)
    house.run()
    before = house.pool.num_blocks
    house.runner.broken.add(ord(words(1)))
    call = house.say(words(60), max_tokens=5)
    house.run()
    assert isinstance(call.error, GenerationFailed)
    assert house.pool.num_blocks == before - 10
    assert house.engine.sessions.sessions[kept].leaf.resident


def test_a_step_that_breaks_takes_back_what_it_was_to_keep():
    house = House()
    house.say(words(60), max_tokens=1)
    house.engine.step()
    before = house.pool.used_bytes
    house.runner.explode = RuntimeError("out of memory")
    house.engine.step()
    house.engine.check_integrity()
    assert house.pool.used_bytes == before
    again = house.say(words(60), max_tokens=1)
    house.run()
    assert again.text == words(1)


def test_a_row_that_cannot_be_cut_leaves_nothing_on_the_ledger(monkeypatch):
    house = House()
    monkeypatch.setattr(house.runner, "cut", lambda *args: 1 / 0)
    session = house.open("abc")
    assert house.engine.ledger.used_bytes == house.pool.used_bytes == 4
    monkeypatch.undo()
    turn = house.say("|x", session)
    house.run()
    assert turn.text == "x"


# Misses


def test_a_nonce_in_the_system_prompt_is_shown_with_the_text_around_it():
    house = House()
    text = words(300)
    house.say("You: id=aaaa; " + text, max_tokens=1)
    house.run()
    call = house.say("You: id=bbbb; " + text, max_tokens=1)
    house.run()
    miss = call.miss
    assert (miss.reason, miss.index) == (MissReason.DIVERGED, 8)
    shown = ["".join(map(chr, tokens)) for tokens in (miss.before, miss.after, miss.earlier)]
    assert shown == ["You: id=", "bbbb; " + text[:18], "aaaa; " + text[:18]]


def test_an_evicted_prompt_that_comes_again_says_why_it_is_computed():
    house = House()
    house.say(words(100), max_tokens=1)
    house.run()
    house.pool.reclaim(house.pool.used_bytes)
    again = house.say(words(100), max_tokens=1)
    house.run()
    assert (again.cached, again.miss.reason) == (0, MissReason.EVICTED)


def test_prompts_that_have_nothing_to_do_with_each_other_are_no_misses():
    house = House()
    for text in (words(100), words(100, "A"), words(30) + words(70, "P"), words(100)):
        call = house.say(text, max_tokens=1)
        house.run()
        assert call.miss is None


def test_a_model_of_which_nothing_is_reused_serves_sessions_all_the_same():
    house = House(layout=Layout(refused="it cannot be cut"))
    session = house.open("abc")
    turn = house.say("|x", session)
    house.run()
    assert (turn.cached, turn.text, turn.miss.reason) == (0, "x", MissReason.NOT_REUSABLE)
