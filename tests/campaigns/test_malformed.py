"""Messages that are not as they should be, by every transport and API: each is answered, and nothing breaks or hangs.

20 by each in `make test`, 10,000 in `make campaign`.
"""

import asyncio
import json
import random

import httpx2
import pytest

from tests.api.http.routes import serving_all
from tests.campaigns.calls import CALLS, RETRY, malformed
from tests.effort import drawn, seconds
from tests.fakes import fake_client
from tests.hosting.test_stdio import PING, call, request_id, serving

NUM = drawn(200)


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


@pytest.mark.timeout(seconds(120))
@pytest.mark.parametrize("call", CALLS, ids=lambda each: each.name)
async def test_whatever_is_sent_over_http_is_answered_and_breaks_nothing(engine, call, caplog):
    rng = random.Random(call.name)
    async with serving_all(engine) as address, httpx2.AsyncClient(headers=call.headers, timeout=20) as http:
        for number in range(NUM):
            body = malformed(rng, call.body)
            response = await http.post(address + call.path, content=body, headers={"content-type": "application/json"})
            assert response.status_code < 500 or response.status_code in RETRY, (number, body[:500], response.text)
            if call.name == "mcp" and (id_ := id_of(body)) is not None and response.status_code == 200:
                assert answers(response.text, id_), (number, body[:500], response.text)
        response = await http.post(address + call.path, json=call.body)
        assert response.status_code == 200
        assert engine.thread.dead is None
    assert raised(caplog) == []


def id_of(body):
    """The id of a request, if it is a sound one."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return None
    id_ = message.get("id") if isinstance(message, dict) else None
    return id_ if isinstance(id_, int | str) and not isinstance(id_, bool) else None


def answers(text, id_):
    """Whether an answer, JSON or events, has the id."""
    lines = [line.removeprefix("data:") for line in text.splitlines() if line.startswith(("data:", "{"))]
    return any(json.loads(line).get("id") == id_ for line in lines if line.strip())


@pytest.mark.timeout(seconds(120))
async def test_whatever_is_sent_over_stdio_is_answered_and_breaks_nothing(engine, caplog):
    rng = random.Random("stdio")
    async with serving(engine) as (wire, _):
        await wire.handshake()
        for number in range(NUM):
            line = malformed(rng, call(number + 1000)).replace(b"\n", b" ").replace(b"\r", b" ")
            await wire.send(line + b"\n", PING | {"id": f"ping {number}"})
            # Requests are answered in any order, but each line that names its id is answered under it.
            wanted = request_id(line)
            missing = {f"ping {number}"} | ({wanted} if wanted is not None else set())
            async with asyncio.timeout(20):
                while missing:
                    message = json.loads(await asyncio.to_thread(wire.from_server.readline))
                    missing.discard(message.get("id"))
    assert engine.thread.dead is None
    assert raised(caplog) == []


def raised(caplog):
    """What was logged as an exception: an error that nobody had thought of, whatever the caller was told."""
    return [record.exc_text or record.getMessage() for record in caplog.records if record.exc_info]
