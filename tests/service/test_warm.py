import asyncio

import pytest

from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError, InvalidRequest
from mlx_mcp.hosting.warm import warm_of
from mlx_mcp.models.registry import Registry
from mlx_mcp.service import warm as warm_module
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.models import load_model
from mlx_mcp.service.service import Service
from mlx_mcp.service.sessions import close_sessions, fork_session, list_sessions
from tests.fakes import FakeLoader, fake_client
from tests.service.house import CALLER, asked, unheard


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Makes a service whose config.toml is this text, which may name {notes}."""
    (tmp_path / "notes.txt").write_text("The port is 8931.")
    monkeypatch.setenv("MLX_MCP_CONFIG", str(tmp_path / "config.toml"))
    made = []

    def make(text):
        (tmp_path / "config.toml").write_text(text.replace("{notes}", str(tmp_path / "notes.txt")))
        registry, client = Registry(None, tmp_path), fake_client(FakeLoader(context_tokens=2000), block_tokens=16)
        client.registry = registry
        made.append(client)
        return Service(client, registry, warm=warm_of(Config.load()))

    yield make
    for client in made:
        assert client.close()


NOTES = '[[warm]]\nname = "notes"\nsystem = "Be brief. "\nfiles = ["{notes}"]\n'


async def names(service, caller=CALLER):
    return {info.name: info.pinned for info in await list_sessions(service, caller) if info.name}


async def until_there(service, name):
    async with asyncio.timeout(10):
        while name not in await names(service):
            await asyncio.sleep(0.001)
        while any(info.busy for info in await list_sessions(service, CALLER)):
            await asyncio.sleep(0.001)


async def test_a_warm_context_is_computed_when_its_model_has_answered_its_first_call(serve):
    service = serve(NOTES)
    await generate(service, CALLER, asked("hi"), Options(), unheard)
    await until_there(service, "notes")
    assert await names(service) == {"notes": True}
    turn = await generate(service, CALLER, asked("|And?"), Options(session="notes", keep=False), unheard)
    assert turn.result.cached_tokens > 40
    _, _, [origin] = await service.engine.transcript(CALLER.tenant, "notes")
    assert origin.who == "warm context"


async def test_a_warm_context_is_there_after_its_model_was_loaded_by_name(serve):
    service = serve(NOTES + "pinned = false\n")
    await load_model(service, CALLER, "", unheard)
    await until_there(service, "notes")
    assert await names(service) == {"notes": False}


async def test_who_names_a_warm_context_first_waits_for_it_and_each_tenant_has_its_own(serve):
    service = serve(NOTES)
    other = Caller("them")
    calls = [
        generate(service, who, asked("|And?"), Options(session="notes", keep=False), unheard) for who in (CALLER, other)
    ]
    answers = await asyncio.gather(
        *calls, generate(service, CALLER, asked("|So?"), Options(session="notes", keep=False), unheard)
    )
    assert [answer.result.text for answer in answers] == ["And?", "And?", "So?"]
    assert await names(service) == await names(service, other) == {"notes": True}


async def test_a_warm_context_that_was_closed_is_made_again_when_it_is_named(serve):
    service = serve(NOTES)
    forks = await fork_session(service, CALLER, "notes", 2, (), "")
    await close_sessions(service, CALLER, ("notes",), everything=False)
    assert await names(service) == {}
    assert len(forks) == 2
    assert (await generate(service, CALLER, asked("|x"), Options(session="notes"), unheard)).result.text == "x"


async def test_a_context_whose_file_is_gone_says_so_to_who_names_it_and_may_be_named_again(serve, tmp_path):
    service = serve(NOTES)
    (tmp_path / "notes.txt").rename(tmp_path / "away.txt")
    with pytest.raises(InvalidRequest, match=r"notes\.txt"):
        await generate(service, CALLER, asked("|x"), Options(session="notes"), unheard)
    (tmp_path / "away.txt").rename(tmp_path / "notes.txt")
    assert (await generate(service, CALLER, asked("|x"), Options(session="notes"), unheard)).result.text == "x"


async def test_who_waits_for_a_warm_context_is_told_so(serve, monkeypatch):
    monkeypatch.setattr(warm_module, "TELL_S", 0.01)
    service, lines = serve(NOTES), []
    hold = service.engine.loader.hold
    hold.clear()

    async def report(meters):
        lines.append(meters[0].line)
        hold.set()

    await generate(service, CALLER, asked("|x"), Options(session="notes"), report)
    assert lines[0] == "computing the context notes first"
    assert lines[-1] != lines[0]


async def test_contexts_of_other_models_are_not_computed(serve):
    service = serve(NOTES + 'model = "other/model"\n')
    await generate(service, CALLER, asked("hi"), Options(), unheard)
    assert not service.warm._tasks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[warm]]\nname = "x"', "give `system` or `files`"),
        ('[[warm]]\nname = "a b"\nsystem = "x"', r"warm\.0\.name"),
        ('[[warm]]\nname = "x"\nfiles = ["notes.md"]', "must be a whole path"),
        ('[[warm]]\nname = "x"\nfileset = []\nsystem = "x"', r"warm\.0\.fileset is no setting; did you mean files\?"),
    ],
)
def test_a_context_that_cannot_be_is_refused_at_start(serve, text, words):
    with pytest.raises(ConfigError, match=words):
        serve(text)
