import pytest

from mlx_mcp.chat.message import Message
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.models import EMBEDDED_NOTE
from tests.service.house import CALLER, asked, make_service, requests_of, unheard


@pytest.fixture
def service():
    service = make_service()
    yield service
    assert service.engine.close()


async def test_the_answer_comes_with_the_built_in_models_note_where_nothing_was_configured_or_named(service):
    assert (await generate(service, CALLER, asked("hi"), Options(), unheard)).note == EMBEDDED_NOTE
    answered = await generate(service, CALLER, asked("hi"), Options("tiny"), unheard)
    assert (answered.result.text, answered.note) == ("hi", "")
    configured = make_service("embedded")
    assert (await generate(configured, CALLER, asked("hi"), Options(), unheard)).note == ""
    assert configured.engine.close()


@pytest.mark.parametrize(("keep", "opens", "goes_on"), [(None, False, True), (True, True, True), (False, False, False)])
async def test_an_answer_is_kept_by_default_only_where_there_is_a_session(service, keep, opens, goes_on):
    first = (await generate(service, CALLER, asked("a"), Options(keep=keep), unheard)).result.session
    assert (first is not None) == opens
    session = (await generate(service, CALLER, asked("a"), Options(keep=True), unheard)).result.session
    turn = await generate(service, CALLER, asked("b"), Options(session=session.session_id, keep=keep), unheard)
    assert (turn.result.session is not None) == goes_on


async def test_a_session_is_its_tenants_and_noted_with_its_connection(service, monkeypatch):
    caller = Caller("me")
    got = requests_of(service, monkeypatch)
    answered = await generate(service, caller, asked("a"), Options(keep=True), unheard)
    assert caller.activity.sessions == {answered.result.session.session_id}
    assert got[0].tenant == answered.result.session.tenant == "me"
    assert caller.activity.calls == {}


async def test_files_come_before_the_users_first_message(service, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    reader = Caller(files=FileReader((tmp_path,), 100, 100))
    got = requests_of(service, monkeypatch)
    await generate(service, reader, asked("What?", "Be brief.", ["a.txt"]), Options(), unheard)
    system, user = got[0].messages
    assert (system.role, system.content) == ("system", "Be brief.")
    assert user.content == '<file path="a.txt">\ntext\n</file>\n\nWhat?'
    with pytest.raises(InvalidRequest, match="reads no files"):
        await generate(service, CALLER, asked("What?", files=["a.txt"]), Options(), unheard)


async def test_files_of_a_turn_come_after_the_results_that_it_begins_with(service, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    reader = Caller(files=FileReader((tmp_path,), 100, 100))
    session = (await generate(service, reader, asked("{f}"), Options(keep=True), unheard)).result.session.session_id
    result = Message("tool", "r", name="f")
    got = requests_of(service, monkeypatch)
    for more in ((), (Message("user", "What?"),)):
        context = Context(files=("a.txt",), messages=(result, *more))
        await generate(service, reader, context, Options(session=session), unheard)
        first, user = got[-1].messages
        assert first == result
        assert user.content == '<file path="a.txt">\ntext\n</file>\n\n' + "".join(message.text for message in more)


async def test_how_far_a_generation_is_is_reported(service):
    seen = []

    async def report(meters):
        (meter,) = meters
        seen.append((meter.phase, meter.done, meter.ended))

    await generate(service, CALLER, asked("abc"), Options(sampling=Sampling(max_tokens=50)), report)
    assert seen[-1] == ("decode", 6, False)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
