import pytest

from mlx_mcp.chat.message import Message
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.errors import InvalidRequest, StorageError, UnknownSession
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.health import health
from mlx_mcp.service.models import EMBEDDED_NOTE, list_models
from mlx_mcp.service.sessions import (
    UNPINNED_NOTE,
    close_sessions,
    create_session,
    fork_session,
    list_sessions,
    persist_session,
)
from tests.service.house import CALLER, asked, make_service, unheard


@pytest.fixture
def service():
    service = make_service()
    yield service
    assert service.engine.close()


async def create(service, context, model="tiny", caller=CALLER, **options):
    return await create_session(service, caller, context, model, (), SessionOptions(**options), unheard)


async def test_a_context_that_ends_with_the_user_is_gone_on_with_in_the_same_message(service):
    made = await create(service, Context("S.", (), (Message("user", "U."),)))
    assert (made.result.session.num_tokens, made.note) == (len("S.U.\n\n"), "")
    session = made.result.session.session_id
    answered = await generate(service, CALLER, asked("q"), Options(session=session), unheard)
    assert answered.result.prompt_tokens == len("S.U.\n\nq")
    closed = await create(service, Context("S.", (), (Message("user", "U."), Message("assistant", "A."))))
    assert closed.result.session.num_tokens == len("S.U.A.")


async def test_a_session_that_there_is_no_room_to_pin_says_so_beside_the_built_in_models_note():
    service = make_service(max_kv_bytes=2000)
    try:
        first = await create(service, Context("a" * 600), pinned=True)
        second = await create(service, Context("b" * 600), model="", pinned=True)
    finally:
        assert service.engine.close()
    assert first.note == ""
    assert second.note == f"{EMBEDDED_NOTE} {UNPINNED_NOTE}"


async def test_as_many_forks_as_were_asked_for_or_one_for_each_name_or_one(service):
    session = (await create(service, Context("S."))).result.session.session_id
    for count, names, made in ((None, (), 1), (3, (), 3), (None, ("a", "b"), 2)):
        forks = await fork_session(service, CALLER, session, count, names, "")
        assert len(forks) == made
        assert {fork.session_id for fork in forks} <= CALLER.activity.sessions


async def test_sessions_are_listed_with_those_used_last_first_and_only_to_their_tenant(service):
    first = (await create(service, Context("S."))).result.session.session_id
    second = (await create(service, Context("T."))).result.session.session_id
    await generate(service, CALLER, asked("q"), Options(session=first), unheard)
    assert [info.session_id for info in await list_sessions(service, CALLER)] == [first, second]
    them = Caller("them")
    assert await list_sessions(service, them) == []
    with pytest.raises(UnknownSession):
        await fork_session(service, them, first, None, (), "")
    with pytest.raises(UnknownSession):
        await close_sessions(service, them, (first,), False)


async def test_closing_needs_names_or_all_and_not_both(service):
    session = (await create(service, Context("S."))).result.session.session_id
    for sessions, everything in (((), False), ((session,), True)):
        with pytest.raises(InvalidRequest, match="or all=true to close all of yours"):
            await close_sessions(service, CALLER, sessions, everything)
    assert [info.session_id for info in await close_sessions(service, CALLER, (), True)] == [session]


async def test_a_session_cannot_be_persisted_where_nothing_is_kept_on_disk(service):
    session = (await create(service, Context("S."))).result.session.session_id
    with pytest.raises(StorageError):
        await persist_session(service, CALLER, session, "")


async def test_models_are_listed_with_whether_they_are_loaded(service):
    assert [(model.entry.spec.name, model.loaded) for model in await list_models(service)][:1] == [("embedded", False)]


async def test_health_is_ok_until_the_engine_is_gone(service):
    assert health(service) == "ok"
    service.engine.close()
    assert health(service) == "dead"
