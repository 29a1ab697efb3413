"""A hub on loopback: the few endpoints that a download uses, for one repository, `someone/tiny`."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """Large files are named by their SHA-256, as the hub's are; small ones by something else.

    `server.cut` is after how many bytes an answer with the weights breaks off. With `server.stall` it is the byte of
    the file after which nothing comes, while the connection stays open until `server.go_on` is set.
    """

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
            return self.send(json.dumps([tree_entry(path) for path in files.values()]).encode(), body)
        if path.startswith("/someone/tiny/resolve/") and path.rpartition("/")[2] in files:
            return self.send_file(files[path.rpartition("/")[2]], body)
        return self.send(b"{}", body, status=404)

    def send(self, data, body, status=200):
        self.head(status, len(data), hashlib.sha1(data).hexdigest())
        if body:
            self.wfile.write(data)

    def send_file(self, path, body):
        data, weights = path.read_bytes(), path.suffix == ".safetensors"
        digest = (hashlib.sha256 if weights else hashlib.sha1)(data).hexdigest()
        if not body:
            return self.head(200, len(data), digest)
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
        return None

    def head(self, status, length, digest):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def tree_entry(path):
    data = path.read_bytes()
    return {"type": "file", "path": path.name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def serving(folder):
    """The hub, with the model in `folder` on it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.folder, server.asked, server.begun, server.sent_bytes = folder, [], [], 0
    server.ranges, server.cut, server.stall, server.damage = True, None, False, False
    server.go_on, server.counting = threading.Event(), threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        server.server_close()
