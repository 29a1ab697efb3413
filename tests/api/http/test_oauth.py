"""Access tokens of an authorization server: all of it that a server like this one sees, metadata and keys over HTTP."""

import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from mlx_mcp.api.http.oauth import ASK_S, KEYS_S, OAuth, read_json
from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError
from mlx_mcp.hosting.access import access_of
from tests.api.http.routes import routes, serving_all
from tests.api.http.test_auth import bearer, client_of, engine, tokens
from tests.api.mcp.test_tools import generate

__all__ = ["engine", "tokens"]
AUDIENCE = "https://studio.example.com/mcp"
RSA = rsa.generate_private_key(65537, 2048)
KEYS = {
    "RS256": RSA,
    "PS256": RSA,
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


class Issuer:
    """An authorization server: what it answers by path, and how often it was asked."""

    def __init__(self, url):
        self.url, self.asked, self.broken = url, [], False
        self.keys = {"k1": ("RS256", RSA)}
        self.metadata = "/.well-known/oauth-authorization-server"
        self.says = {"issuer": url, "jwks_uri": f"{url}/keys"}

    def answer(self, path):
        self.asked.append(path)
        if self.broken:
            return None
        if path == self.metadata:
            return self.says
        return {"keys": [jwk(*key, kid) for kid, key in self.keys.items()]} if path == "/keys" else None

    def token(self, kid="k1", algorithm="RS256", key=RSA, header=(), **claims):
        now = int(time.time())
        said = {"iss": self.url, "aud": AUDIENCE, "sub": "ann", "exp": now + 600, "iat": now} | claims
        said = {name: value for name, value in said.items() if value is not None}
        return jwt.encode(said, key, algorithm=algorithm, headers=({"kid": kid} if kid else {}) | dict(header))


def jwk(algorithm, key, kid):
    shown = jwt.algorithms.get_default_algorithms()[algorithm].to_jwk(key.public_key())
    return (json.loads(shown) if isinstance(shown, str) else shown) | {"kid": kid, "use": "sig"}


@pytest.fixture
def issuer():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            said = made.answer(self.path)
            data = json.dumps(said).encode()
            self.send_response(404 if said is None else 200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    made = Issuer(f"http://127.0.0.1:{server.server_port}")
    yield made
    server.shutdown()
    server.server_close()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("algorithm", KEYS)
async def test_a_token_that_the_issuer_signed_for_this_server_stands_for_issuer_and_subject(issuer, algorithm):
    issuer.keys = {"k1": (algorithm, KEYS[algorithm])}
    found = await OAuth(issuer.url, AUDIENCE).verify_token(
        issuer.token("k1", algorithm, KEYS[algorithm], aud=["other", AUDIENCE], scope="read write")
    )
    assert (found.client_id, found.scopes) == (f"{issuer.url} ann", ["read", "write"])


def wrong_tokens(issuer):
    stranger = rsa.generate_private_key(65537, 2048)
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    good = issuer.token()
    head, body, signature = good.split(".")
    now = int(time.time())
    claims = json.dumps({"iss": issuer.url, "aud": AUDIENCE, "sub": "ann", "exp": now + 600}).encode()
    forged = jwt.utils.base64url_encode(json.dumps({"alg": "HS256", "kid": "k1", "typ": "JWT"}).encode())
    signed = forged + b"." + jwt.utils.base64url_encode(claims)
    by_public_key = signed + b"." + jwt.utils.base64url_encode(hmac.new(public, signed, hashlib.sha256).digest())
    return {
        "another audience": issuer.token(aud="https://elsewhere.example.com"),
        "no audience": issuer.token(aud=None),
        "the audience and more": issuer.token(aud=AUDIENCE + "/x"),
        "another issuer": issuer.token(iss="https://evil.example.com"),
        "no issuer": issuer.token(iss=None),
        "expired": issuer.token(exp=now - 120),
        "endless": issuer.token(exp=None),
        "not yet": issuer.token(nbf=now + 120),
        "no subject": issuer.token(sub=None),
        "empty subject": issuer.token(sub=""),
        "long subject": issuer.token(sub="x" * 256),
        "a subject that no text can be": issuer.token(sub="\ud800"),
        "a subject with lines": issuer.token(sub="a\nb"),
        "unsigned": jwt.encode({"iss": issuer.url, "aud": AUDIENCE, "sub": "ann", "exp": now + 600}, None, "none"),
        "signed by a stranger": issuer.token(key=stranger),
        "signed with the public key as a secret": by_public_key.decode(),
        "another algorithm than the key's": issuer.token(algorithm="ES256", key=KEYS["ES256"]),
        "an unknown key": issuer.token(kid="k9"),
        "a key of another form": issuer.token(header={"kid": "k1", "crit": ["x"], "x": 1}),
        "a changed body": f"{head}.{issuer.token(sub='bob').split('.')[1]}.{signature}",
        "no signature": f"{head}.{body}.",
        "two parts": f"{head}.{body}",
        "no JSON": "a.b.c",
        "empty": "",
        "no ASCII": "ünï.ünï.ünï",
    }


async def test_every_other_token_lets_nobody_in(issuer):
    oauth = OAuth(issuer.url, AUDIENCE)
    assert await oauth.verify_token(issuer.token()) is not None
    for what, token in wrong_tokens(issuer).items():
        assert (what, await oauth.verify_token(token)) == (what, None)


async def test_every_route_refuses_tokens_for_others(issuer, engine, tokens):
    settings = {"oauth_issuer": issuer.url, "oauth_audience": AUDIENCE, "oauth_scopes": ["use"]}
    good, wrong = issuer.token(scope="use"), wrong_tokens(issuer)
    async with serving_all(engine, **settings) as address, httpx2.AsyncClient() as http:
        for method, path in routes():
            for what in ("another audience", "another issuer", "expired", "unsigned"):
                response = await http.request(method, address + path, headers=bearer(wrong[what]))
                assert (method, path, what, response.status_code) == (method, path, what, 401)
            assert (await http.request(method, f"{address}{path}?access_token={good}")).status_code == 401
            few = await http.request(method, address + path, headers=bearer(issuer.token(scope="other")))
            assert few.status_code == 403
            assert "does not have the scopes use" in few.text
            assert 'error="insufficient_scope", scope="use"' in few.headers["www-authenticate"]
            assert (await http.request(method, address + path, headers=bearer(good))).status_code not in (401, 403)


async def test_a_client_finds_the_authorization_server_and_is_known_by_issuer_and_subject(issuer, engine, tokens):
    heard = []
    for_real = engine.generate

    def noting(request):
        heard.append(request.tenant)
        return for_real(request)

    engine.generate = noting
    named = tokens.add("ann")
    settings = {"oauth_issuer": issuer.url, "oauth_audience": AUDIENCE}
    async with serving_all(engine, **settings) as address, httpx2.AsyncClient() as http:
        refused = await http.get(f"{address}/mcp")
        where = "/.well-known/oauth-protected-resource/mcp"
        assert f'resource_metadata="https://studio.example.com{where}"' in refused.headers["www-authenticate"]
        metadata = (await http.get(address + where)).json()
        assert metadata["resource"] == AUDIENCE
        assert [url.rstrip("/") for url in metadata["authorization_servers"]] == [issuer.url]
        for token in (issuer.token(), named):
            async with client_of(address, token) as client:
                await generate(client)
    assert heard == [f"{issuer.url} ann", "ann"]


async def test_keys_are_read_again_for_a_new_one_but_not_more_often_than_that(issuer):
    clock = Clock()
    oauth = OAuth(issuer.url, AUDIENCE, f"{issuer.url}/keys", clock)
    assert await oauth.verify_token(issuer.token()) is not None
    for _ in range(50):
        assert await oauth.verify_token(issuer.token(kid="k9")) is None
    assert issuer.asked == ["/keys"]
    issuer.keys = {"k2": ("ES256", KEYS["ES256"])}
    new = issuer.token("k2", "ES256", KEYS["ES256"])
    assert await oauth.verify_token(new) is None
    clock.now += ASK_S
    assert await oauth.verify_token(new) is not None
    assert await oauth.verify_token(issuer.token()) is None  # whose key was withdrawn
    assert len(issuer.asked) == 2


async def test_keys_stay_in_use_while_the_issuer_cannot_be_reached(issuer, caplog):
    clock = Clock()
    oauth = OAuth(issuer.url, AUDIENCE, None, clock)
    assert await oauth.verify_token(issuer.token()) is not None
    issuer.broken = True
    clock.now += KEYS_S
    assert await oauth.verify_token(issuer.token()) is not None
    assert "cannot be read" in caplog.text
    assert "answers; set oauth_jwks_url" in caplog.text
    issuer.broken, issuer.keys = False, {"k2": ("RS256", RSA)}
    clock.now += ASK_S
    assert await oauth.verify_token(issuer.token()) is None


async def test_a_token_without_a_key_id_is_checked_with_the_only_key_that_fits(issuer):
    oauth = OAuth(issuer.url, AUDIENCE)
    assert await oauth.verify_token(issuer.token(kid=None)) is not None
    issuer.keys["k2"] = ("RS256", rsa.generate_private_key(65537, 2048))
    assert await OAuth(issuer.url, AUDIENCE).verify_token(issuer.token(kid=None)) is None


async def test_metadata_of_another_issuer_is_not_taken(issuer, caplog):
    issuer.says["issuer"] = "https://evil.example.com"
    assert await OAuth(issuer.url, AUDIENCE).verify_token(issuer.token()) is None
    assert "is about https://evil.example.com" in caplog.text


@pytest.mark.parametrize("says", [{}, [], {"keys": 1}, {"keys": [1, {}, {"kty": "RSA", "kid": "k1"}]}, "x"])
async def test_keys_that_are_none_let_nobody_in(issuer, says):
    issuer.metadata, issuer.says = "/keys", says
    assert await OAuth(issuer.url, AUDIENCE, f"{issuer.url}/keys").verify_token(issuer.token()) is None


def test_only_web_servers_are_asked(issuer):
    with pytest.raises(ValueError, match="is no URL of a web server"):
        read_json("file:///etc/passwd")
    issuer.metadata, issuer.says = "/x", []
    with pytest.raises(ValueError, match="is no JSON object"):
        read_json(f"{issuer.url}/x")


async def test_openid_configuration_serves_as_well(issuer):
    issuer.metadata = "/.well-known/openid-configuration"
    assert await OAuth(issuer.url, AUDIENCE).verify_token(issuer.token()) is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"oauth_issuer": "https://a"}, "belong together: set both, or unset both"),
        ({"oauth_issuer": "a", "oauth_audience": AUDIENCE}, "oauth_issuer must be a URL, as https://auth.example.com"),
        ({"oauth_issuer": "https://a", "oauth_audience": "mcp"}, "oauth_audience must be a URL"),
        ({"oauth_issuer": "http://a", "oauth_audience": AUDIENCE}, "must be an https URL: keys that come over"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Config.load(**settings)


def test_an_authorization_server_is_enough_to_serve_others(tokens):
    settings = {"oauth_issuer": "https://a", "oauth_audience": AUDIENCE}
    assert access_of(Config.load(host="0.0.0.0", **settings)).required
