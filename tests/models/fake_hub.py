"""A hub on loopback: the few endpoints that a download uses, for one repository, `someone/tiny`."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class HubServer(ThreadingHTTPServer):
    """What a test sets, and what was asked."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []  # paths
        self.begun: list[int] = []  # where each answer with the weights began
        self.sent_bytes, self.counting = 0, threading.Lock()
        self.ranges, self.stall, self.damage = True, False, False
        self.cut: int | None = None
        self.go_on = threading.Event()


class Hub(BaseHTTPRequestHandler):
    """Large files are named by their SHA-256, as the hub's are; small ones by something else.

    `server.cut` is after how many bytes an answer with the weights breaks off. With `server.stall` it is the byte of
    the file after which nothing comes, while the connection stays open until `server.go_on` is set.
    """

    server: HubServer

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        files = {p.name: p for p in self.server.folder.iterdir()}
        if path.startswith("/api/models/someone/tiny/revision/") or path == "/api/models/someone/tiny":
            listing = [{"rfilename": name} for name in files]
            self.send(json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": listing}).encode(), body)
        elif path.startswith("/api/models/someone/tiny/tree/"):
            self.send(json.dumps([tree_entry(path) for path in files.values()]).encode(), body)
        elif path.startswith("/someone/tiny/resolve/") and path.rpartition("/")[2] in files:
            self.send_file(files[path.rpartition("/")[2]], body)
        else:
            self.send(b"{}", body, status=404)

    def send(self, data: bytes, body: bool, status: int = 200) -> None:
        self.head(status, len(data), hashlib.sha1(data).hexdigest())
        if body:
            self.wfile.write(data)

    def send_file(self, path: Path, body: bool) -> None:
        data, weights = path.read_bytes(), path.suffix == ".safetensors"
        digest = (hashlib.sha256 if weights else hashlib.sha1)(data).hexdigest()
        if not body:
            self.head(200, len(data), digest)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.server.ranges else 0
        sent = data[start:]
        self.head(206 if start else 200, len(sent), digest)
        if weights:
            self.server.begun.append(start)
            cut = self.server.cut if not (self.server.cut and self.server.stall) else max(0, self.server.cut - start)
            if cut is not None and cut < len(sent):
                sent, self.close_connection = sent[:cut], True
        if weights and self.server.damage:
            sent = bytes(len(sent))
        with self.server.counting:
            self.server.sent_bytes += len(sent)
        self.wfile.write(sent)
        self.wfile.flush()
        if self.close_connection and self.server.stall:
            self.server.go_on.wait(60)

    def head(self, status: int, length: int, digest: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def tree_entry(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    entry = {"type": "file", "path": path.name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.suffix == ".safetensors":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return entry


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    """The hub, with the model in `folder` on it."""
    server = HubServer(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        server.server_close()
