"""Downloading from a hub: the real client code against a hub of this test's own on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.models_made import make_model

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """The few endpoints that a snapshot download uses, for one repository, `someone/tiny`."""

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        files = {p.name: p for p in self.server.folder.iterdir()}
        if path.startswith("/api/models/someone/tiny/revision/") or path == "/api/models/someone/tiny":
            listing = [{"rfilename": name} for name in files]
            return self.send(json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": listing}).encode(), body)
        if path.startswith("/api/models/someone/tiny/tree/"):
            listing = [tree_entry(path) for path in files.values()]
            return self.send(json.dumps(listing).encode(), body)
        if path.startswith("/someone/tiny/resolve/") and path.rpartition("/")[2] in files:
            return self.send(files[path.rpartition("/")[2]].read_bytes(), body)
        return self.send(b"{}", body, status=404)

    def send(self, data, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def tree_entry(path):
    return {
        "type": "file",
        "path": path.name,
        "size": path.stat().st_size,
        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
    }


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = make_model(tmp_path / "origin"), []
    (server.folder / "evil.py").write_text("raise SystemExit")
    (server.folder / "pytorch_model.bin").write_bytes(b"pickle")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, home, *arguments, offline="0"):
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": offline,
    }
    command = [sys.executable, "-m", "mlx_mcp", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=90)


def test_a_hub_model_is_downloaded_once_and_then_serves_offline(hub, tmp_path):
    asked = ("run", "hi", "--max-tokens", "4", "--model", "someone/tiny")
    first = run(hub, tmp_path / "home", *asked)
    assert first.returncode == 0, first.stderr
    assert "4 generated" in first.stderr
    fetched = " ".join(hub.asked)
    assert "model.safetensors" in fetched
    assert "evil.py" not in fetched.replace("/tree/", "")
    assert "pytorch_model.bin" not in fetched
    hub.asked.clear()
    again = run(hub, tmp_path / "home", *asked, offline="1")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert hub.asked == []
    assert "someone/tiny" in run(hub, tmp_path / "home", "models").stdout


def test_a_repository_that_the_hub_does_not_have_is_named(hub, tmp_path):
    done = run(hub, tmp_path / "home", "run", "hi", "--model", "someone/else")
    assert done.returncode == 2
    assert "someone/else" in done.stderr
    assert "Traceback" not in done.stderr


def test_listing_and_serving_the_embedded_model_ask_the_hub_nothing(hub, tmp_path):
    assert run(hub, tmp_path / "home", "models").returncode == 0
    assert run(hub, tmp_path / "home", "run", "Hello.", "--max-tokens", "4").returncode == 0
    assert hub.asked == []
