"""The edges of HTTP, the same on every route: length, time, readers that do not read, TLS, proxies, the end."""

import asyncio
import contextlib
import datetime
import json
import socket
import ssl

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mlx_mcp.api.http import arrival
from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError
from mlx_mcp.hosting.access import access_of
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.hosting.tls import tls_context
from mlx_mcp.process.listener import listen
from tests.api.http.routes import posted_paths, routes, serving_all
from tests.api.http.test_arrival import connected, said, trickle
from tests.engine.test_client import until
from tests.fakes import FakeLoader, fake_client

POSTS = posted_paths()
HEAD = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture
def engine():
    engine = fake_client(FakeLoader(context_tokens=1 << 20))
    yield engine
    engine.close()


def request(path, **body):
    data = json.dumps(body).encode()
    return HEAD % path + b"content-length: %d\r\n\r\n" % len(data) + data


async def test_every_route_refuses_a_body_that_is_too_long_in_its_own_form(engine):
    async def pieces():
        for _ in range(20):
            yield b"x" * 1000

    async with serving_all(engine, max_request_bytes=5000) as address, httpx2.AsyncClient() as http:
        for path in POSTS:
            for content in (b"x" * 5001, pieces()):
                response = await http.post(
                    address + path, content=content, headers={"content-type": "application/json"}
                )
                assert (path, response.status_code) == (path, 413)
        response = await http.post(f"{address}/echo/x", content=b"x" * 5001)
        assert "The body is longer than the 5000 bytes that one may have" in response.json()["oops"]
        fits = await http.post(f"{address}/echo/x", json={"text": "a" * 4900})
        assert fits.status_code == 200


async def test_every_route_refuses_foreign_names_and_pages_before_it_looks_at_tokens(engine):
    async with serving_all(engine, token="s3cret") as address, httpx2.AsyncClient() as http:
        for method, path in [*routes(), ("GET", "/"), ("GET", "/health/live")]:
            for headers, status in (({"host": "evil.example"}, 421), ({"origin": "http://evil.example"}, 403)):
                response = await http.request(method, address + path, headers=headers)
                assert (method, path, response.status_code) == (method, path, status)


async def test_every_route_gives_up_a_body_that_comes_too_slowly(engine):
    async def answer_to_a_slow_one(address, path):
        async with connected(address) as (reader, writer):
            writer.write(HEAD % path.encode() + b"content-length: 100000\r\n\r\n")
            slow = asyncio.create_task(trickle(writer, b" " * 10_000))
            heard = await said(reader)
            slow.cancel()
        return path, heard[:12]

    async with serving_all(engine, request_timeout_s=0.5) as address:
        heard = await asyncio.gather(*(answer_to_a_slow_one(address, path) for path in POSTS))
    assert heard == [(path, b"HTTP/1.1 408") for path in POSTS]


async def test_a_connection_serves_one_request_after_another(engine):
    async with serving_all(engine) as address, connected(address) as (reader, writer):
        for _ in range(3):
            writer.write(request(b"/echo/x", text="hello"))
            heard = b""
            async with asyncio.timeout(20):
                while not heard.endswith(b"}"):
                    heard += await reader.read(65536)
            assert heard.startswith(b"HTTP/1.1 200")


async def test_a_reader_that_does_not_read_is_cut_off_and_the_others_go_on_meanwhile(engine, monkeypatch):
    monkeypatch.setattr(arrival, "STALL_S", 0.5)
    engine.loader.runner.endless = True
    async with serving_all(engine) as address, httpx2.AsyncClient(timeout=30) as http:
        with socket.socket() as stubborn:
            stubborn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stubborn.connect(("127.0.0.1", int(address.rpartition(":")[2])))
            stubborn.sendall(request(b"/echo/x/events", text="a" * 100, max_tokens=1_000_000, width=20_000))
            await until(lambda: engine.stats.rows == 1)
            num_served = 0
            async with asyncio.timeout(60):
                while engine.stats.rows:  # which it has until it is cut off
                    other = await http.post(f"{address}/echo/y", json={"text": "b", "max_tokens": 1})
                    assert other.status_code == 200
                    num_served += 1
            assert num_served > 0


async def test_an_answer_that_nobody_reads_does_not_keep_its_connection(engine, monkeypatch):
    monkeypatch.setattr(arrival, "STALL_S", 0.3)

    async def large(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * 50_000_000})

    async with raw(large) as (server, address), connected(address) as (_, writer):
        writer.transport.pause_reading()
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await until(lambda: server.server_state.connections)
        await until(lambda: not server.server_state.connections)


@contextlib.asynccontextmanager
async def raw(app, **settings):
    """A server of an app of the test's own."""
    config = Config.load(port=0, **settings)
    listener = listen(config.host, config.port)
    server = HttpServer(app, config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.hang_up()
        await task


async def test_a_stream_that_is_under_way_at_the_end_is_told_why_it_ends(engine):
    engine.loader.runner.endless = True
    async with asyncio.timeout(30):
        async with serving_all(engine, drained=True, shutdown_timeout_s=0.2) as address:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
            writer.write(request(b"/echo/x/events", text="a", max_tokens=1_000_000))
            reading = asyncio.create_task(said(reader))
            await until(lambda: engine.stats.rows == 1)
        heard = await reading
        writer.close()
    *_, last, end = heard.rstrip(b"\r\n0").split(b"event: error")
    assert b"oops" in end
    assert b"shutdown_timeout_s" in end
    assert b"data: a" in b"".join([*_, last])
    assert heard.endswith(b"0\r\n\r\n")
    assert engine.stats.rows == 0


async def test_a_stream_that_ends_in_time_loses_nothing_at_the_end(engine):
    async with serving_all(engine, drained=True, shutdown_timeout_s=20) as address:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        engine.loader.runner.gate.clear()
        writer.write(request(b"/echo/x/events", text="hello"))
        reading = asyncio.create_task(said(reader))
        await until(lambda: engine.loader.runner.steps)
        asyncio.get_running_loop().call_later(0.1, engine.loader.runner.gate.set)
    heard = await reading
    writer.close()
    assert (
        "".join(line[6:] for line in heard.decode().splitlines() if line.startswith("data: ") and len(line) == 7)
        == "hello"
    )


# TLS


def make_certificate(folder, password=None):
    """A certificate of localhost that signs itself, and its key."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    hidden = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(pem)
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize("together", [False, True])
async def test_https_is_served_with_a_certificate_and_a_key_in_one_file_or_two(engine, tmp_path, together):
    cert, key = make_certificate(tmp_path)
    settings = {"tls_cert": cert, "tls_key": key}
    if together:
        cert.write_bytes(cert.read_bytes() + key.read_bytes())
        settings = {"tls_cert": cert}
    trusting = ssl.create_default_context(cafile=str(cert))
    async with serving_all(engine, **settings) as address, httpx2.AsyncClient(verify=trusting) as https:
        https_address = address.replace("http://127.0.0.1", "https://localhost")
        response = await https.post(f"{https_address}/echo/x", json={"text": "hello"})
        assert response.json()["text"] == "hello"
        with pytest.raises(httpx2.TransportError):
            await https.post(f"{address}/echo/x", json={"text": "hello"})


def test_a_certificate_that_cannot_be_used_is_told_before_anything_is_served(tmp_path):
    cert, key = make_certificate(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    _, foreign = make_certificate(other)
    for wrong in (foreign, cert):
        with pytest.raises(ConfigError, match=r"HTTPS cannot be served with .*chain and its key, both PEM"):
            tls_context(Config.load(tls_cert=cert, tls_key=wrong))
    cert, key = make_certificate(tmp_path, b"secret")
    with pytest.raises(ConfigError, match="the key has a password"):
        tls_context(Config.load(tls_cert=cert, tls_key=key))
    with pytest.raises(ConfigError, match="tls_key is set and tls_cert is not"):
        Config.load(tls_key=key)
    assert tls_context(Config.load()) is None


# Proxies


@pytest.mark.parametrize(
    ("trusted", "client"),
    [((), "127.0.0.1"), (("10.0.0.1",), "127.0.0.1"), (("127.0.0.1",), "1.2.3.4"), (("127.0.0.0/8",), "1.2.3.4")],
)
async def test_what_a_proxy_says_of_its_client_is_believed_only_if_the_proxy_was_named(trusted, client):
    seen = []

    async def app(scope, receive, send):
        if scope["type"] == "http":
            seen.append((scope["client"][0], scope["scheme"]))
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    said_by_proxy = {"x-forwarded-for": "1.2.3.4", "x-forwarded-proto": "https"}
    async with raw(app, trusted_proxies=trusted) as (_, address), httpx2.AsyncClient() as http:
        await http.get(address, headers=said_by_proxy)
    assert seen == [(client, "http" if client == "127.0.0.1" else "https")]


def test_whoever_comes_through_a_proxy_needs_a_token_also_on_loopback():
    with pytest.raises(ConfigError, match="Serving a proxy lets others in"):
        access_of(Config.load(trusted_proxies=("127.0.0.1",)))
    assert access_of(Config.load(trusted_proxies=("127.0.0.1",), token="x")).required


async def test_a_body_that_is_no_json_is_refused_in_the_form_of_its_api(engine):
    async with serving_all(engine) as address, httpx2.AsyncClient() as http:
        for content in (b"{", b"\xff", b"[" * 100_000):
            response = await http.post(f"{address}/echo/x", content=content)
            assert response.status_code == 400
            assert "Send one JSON object" in response.json()["oops"]
