"""Answers that can be asked for again."""

import pytest

from mlx_mcp.errors import UnknownReply
from mlx_mcp.service import replies as replies_module
from mlx_mcp.service.replies import Replies, Reply, new_reply_id

SESSIONS = {f"s_{name}" for name in "abcde"}


def reply(name, tenant="us", **members):
    return Reply(name, tenant, f"answer {name}", **{"session_id": f"s_{name}", "num_bytes": 10} | members)


def test_a_reply_is_there_for_its_tenant_alone():
    replies = Replies()
    replies.keep(reply("a"), SESSIONS)
    assert replies.get("us", "a", SESSIONS).answer == "answer a"
    for tenant, name in (("them", "a"), ("us", "b")):
        with pytest.raises(UnknownReply, match="Response not found"):
            replies.get(tenant, name, SESSIONS)


def test_a_reply_ends_with_its_session():
    replies = Replies()
    replies.keep(reply("a"), SESSIONS)
    with pytest.raises(UnknownReply):
        replies.get("us", "a", SESSIONS - {"s_a"})
    assert replies.keep(reply("b"), SESSIONS - {"s_a"}) == []
    assert list(replies._of["us"]) == ["b"]


def test_the_oldest_go_where_there_are_too_many():
    replies, kept = Replies(max_replies=2), [reply(name) for name in "abc"]
    assert [replies.keep(each, SESSIONS) for each in kept] == [[], [], kept[:1]]


def test_the_oldest_go_where_there_are_too_many_bytes_and_the_newest_stays_in_any_case():
    replies, kept = Replies(max_bytes=25), [reply(name) for name in "abc"]
    assert [replies.keep(each, SESSIONS) for each in kept] == [[], [], kept[:1]]
    huge = reply("d", num_bytes=1000)
    assert replies.keep(huge, SESSIONS) == kept[1:]
    assert replies.get("us", "d", SESSIONS) is huge


def test_a_bound_is_each_tenants_own():
    replies = Replies(max_replies=1)
    assert replies.keep(reply("a"), SESSIONS) == replies.keep(reply("b", "them"), SESSIONS) == []


def test_a_reply_without_a_session_is_kept_for_a_time(monkeypatch):
    replies = Replies()
    replies.keep(reply("a", session_id=""), SESSIONS)
    assert replies.get("us", "a", SESSIONS)
    monkeypatch.setattr(replies_module, "SESSIONLESS_TTL_S", 0.0)
    with pytest.raises(UnknownReply):
        replies.get("us", "a", SESSIONS)


def test_a_reply_that_is_forgotten_is_gone():
    replies, one = Replies(), reply("a")
    replies.keep(one, SESSIONS)
    replies.forget(one)
    replies.forget(one)
    with pytest.raises(UnknownReply):
        replies.get("us", "a", SESSIONS)


def test_what_was_asked_for_last_goes_last():
    replies, kept = Replies(max_replies=2), [reply(name) for name in "abc"]
    for each in kept[:2]:
        replies.keep(each, SESSIONS)
    replies.get("us", "a", SESSIONS)
    assert replies.keep(kept[2], SESSIONS) == [kept[1]]


def test_answers_without_sessions_are_in_nobodys_way():
    replies, kept = Replies(), [reply(name) for name in "abc"]
    for each in (*kept, reply("d", session_id="")):
        replies.keep(each, SESSIONS)
    assert (replies.num_kept("us"), replies.num_kept("them")) == (3, 0)
    assert replies.shrink("us", 2) == kept[:1]
    assert replies.shrink("us", 2) == replies.shrink("them", 0) == []
    assert replies.get("us", "d", SESSIONS)


def test_an_id_can_be_a_sessions_name():
    from mlx_mcp.core.session_names import SessionNames

    made = new_reply_id("resp_")
    SessionNames().check("us", [made])
    assert made != new_reply_id("resp_")
