"""Many calls at once, many one after another, and abusers beside a client that does no harm.

The server is a process of its own, so that its memory, descriptors and threads can be looked at, and its calls go by
raw sockets. Little of it in `make test`; `make campaign` has 1,000 at once, 5,000 in a row, and 64 abusers.
"""

import asyncio
import contextlib
import json
import random
import socket
import sys
import time

import pytest

from mlx_mcp.process.place import Place
from mlx_mcp.storage.token_file import TokenFile
from tests.campaigns.calls import CALLS, RETRY
from tests.campaigns.server import serving
from tests.effort import THOROUGH, drawn, seconds

pytestmark = [
    pytest.mark.long,  # a server of its own; shorter than this it would show nothing
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]
MIB = 1 << 20


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    state = tmp_path_factory.mktemp("campaign") / "state"
    Place(str(state)).prepare()
    file = TokenFile(state)
    return state, {name: file.add(name, limits=limits) for name, limits in PRINCIPALS.items()}


PRINCIPALS = {"healthy": {}, "abuser": {"requests_per_minute": 600, "calls_at_once": 16}, "crowd": {"calls_at_once": 0}}


@pytest.fixture(scope="module")
def server(token):
    state, _ = token
    with serving(MLX_MCP_STATE_DIR=str(state), MLX_MCP_REQUEST_TIMEOUT_S="10") as server:
        yield server


def request(call, token, **changed):
    body = json.dumps(call.body | changed).encode()
    headers = {
        "host": "localhost",
        "content-type": "application/json",
        "authorization": f"Bearer {token}",
    } | call.headers
    lines = [f"POST {call.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body


class Connection:
    """One connection that is kept alive."""

    def __init__(self, server):
        self.port = int(server.address.rpartition(":")[2])
        self.streams = None

    async def ask(self, data):
        """The status and the body of the answer to a request."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        status, lower = int(head.split(b" ", 2)[1]), head.lower()
        if b"transfer-encoding: chunked" in lower:
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(int(lower.split(b"content-length:")[1].split(b"\r\n")[0]))
        if b"connection: close" in lower:
            self.close()
        return status, body

    def close(self):
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


@contextlib.asynccontextmanager
async def connected(server):
    connection = Connection(server)
    try:
        yield connection
    finally:
        connection.close()


async def once(server, data):
    async with connected(server) as connection:
        return await connection.ask(data)


@pytest.mark.timeout(seconds(120))
@pytest.mark.parametrize("call", CALLS, ids=lambda each: each.name)
async def test_of_many_calls_at_once_each_has_a_result_or_is_told_to_retry(server, token, call):
    crowd = token[1]["crowd"]
    assert (await once(server, request(call, crowd)))[0] == 200
    before = server.rss_bytes
    statuses = await asyncio.gather(*(once(server, request(call, crowd)) for _ in range(drawn(20, least=60))))
    assert {status for status, _ in statuses} <= {200, *RETRY}
    assert [status for status, _ in statuses].count(200) > len(statuses) / 2
    assert server.rss_bytes - before < 200 * MIB


@pytest.mark.timeout(seconds(240))
@pytest.mark.parametrize("call", CALLS, ids=lambda each: each.name)
async def test_one_call_after_another_leaves_nothing_behind(server, token, call):
    data, num = request(call, token[1]["healthy"]), drawn(100, least=40)
    async with connected(server) as connection:
        for _ in range(num // 2):  # until everything that is kept once is there
            assert (await connection.ask(data))[0] == 200
        before = server.rss_bytes, server.num_fds, server.num_threads
        for _ in range(num):
            assert (await connection.ask(data))[0] == 200
        after = server.rss_bytes, server.num_fds, server.num_threads
    # The system gives memory in pages, and Python in arenas of 256 KiB or 1 MiB: few requests show nothing.
    assert after[0] - before[0] < max(4 * MIB, 1024 * num)
    assert after[1:] == before[1:]


# Abusers: each a coroutine that goes on until it is cancelled.


@contextlib.asynccontextmanager
async def writing(server):
    """The sending end of a new connection."""
    _, writer = await asyncio.open_connection("127.0.0.1", server_port(server))
    try:
        yield writer
    finally:
        writer.close()


async def trickle(server, head, rest):
    while True:
        with contextlib.suppress(ConnectionError):
            async with writing(server) as writer:
                writer.write(head)
                for each in rest:
                    writer.write(bytes((each,)))
                    await writer.drain()
                    await asyncio.sleep(0.05)


async def slow_head(server, token, rng):
    await trickle(server, b"POST /mcp HTTP/1.1\r\nx: ", b"x" * 1000)


async def slow_body(server, token, rng):
    head = f"POST /mcp HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\ncontent-length: 1000\r\n\r\n"
    await trickle(server, head.encode(), b" " * 1000)


async def never_reading(server, token, rng):
    while True:
        with socket.socket() as stubborn:
            stubborn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stubborn.setblocking(False)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_connect(stubborn, ("127.0.0.1", server_port(server)))
                call = next(each for each in CALLS if each.name == "echo")
                data = request(call, token, text="x" * 1000, max_tokens=2000).replace(b"/echo/x ", b"/echo/x/events ")
                await asyncio.get_running_loop().sock_sendall(stubborn, data)
            await asyncio.sleep(2)


async def flooding(server, token, rng):
    async with connected(server) as connection:
        while True:
            try:
                await connection.ask(request(rng.choice(CALLS), token))
            except (ConnectionError, asyncio.IncompleteReadError):
                connection.close()


async def leaving(server, token, rng):
    while True:
        with contextlib.suppress(ConnectionError):
            async with writing(server) as writer:
                writer.write(request(rng.choice(CALLS), token, max_tokens=2000))
                await asyncio.sleep(rng.random() * 0.1)


ABUSERS = (slow_head, slow_body, never_reading, flooding, leaving)


def server_port(server):
    return int(server.address.rpartition(":")[2])


async def times_of(server, data, num):
    """How long each of some calls takes, with a pause between."""
    taken = []
    async with connected(server) as connection:
        for _ in range(num):
            began = time.perf_counter()
            status, _ = await connection.ask(data)
            assert status == 200
            taken.append(time.perf_counter() - began)
            await asyncio.sleep(0.005)
    return sorted(taken)


@pytest.mark.figures
@pytest.mark.timeout(seconds(120))
async def test_abusers_of_every_kind_do_not_spoil_the_day_of_a_client_that_does_no_harm(server, token):
    names, rng, num = token[1], random.Random(1), drawn(40, least=20)
    call = next(each for each in CALLS if each.name == "mcp")
    data = request(call, names["healthy"])
    await times_of(server, data, 10)
    idle = await times_of(server, data, num)
    abusers = [
        asyncio.create_task(ABUSERS[i % len(ABUSERS)](server, names["abuser"], rng))
        for i in range(64 if THOROUGH else 10)
    ]
    await asyncio.sleep(0)
    busy = await times_of(server, data, num)
    for each in abusers:
        each.cancel()
    ended = await asyncio.gather(*abusers, return_exceptions=True)
    assert [each for each in ended if not isinstance(each, asyncio.CancelledError)] == []
    if THOROUGH:  # a few calls on a busy machine tell nothing of times
        p99 = [times[int(len(times) * 0.99)] for times in (idle, busy)]
        print(f"p99 idle {p99[0] * 1e3:.1f} ms, beside abusers {p99[1] * 1e3:.1f} ms")
        assert p99[1] <= 3 * p99[0]
