"""Answers what the server says of itself, before there is an engine: the handshake, the lists, and ping.

The answers come from assets/surface: a file for each era of MCP, which `make surface` makes from the server itself. A
test compares them with what the server answers, as JSON values. Whatever is not certainly answered there as here is
left to the engine: other methods, errors, and requests that are not of the usual form.

In one era the client begins with `initialize`, in the other every request says its version. The first request decides,
as it does in the SDK. Imported by the relay: standard library only, and little of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib

from mlx_mcp.process.lines import ACKNOWLEDGED, SUBSCRIPTION, Envelope

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "surface")
HANDSHAKE, MODERN = "handshake", "modern"  # the eras; each has a file of that name

META = "io.modelcontextprotocol/"
VERSION, CLIENT_INFO, CAPABILITIES = f"{META}protocolVersion", f"{META}clientInfo", f"{META}clientCapabilities"
OPENING_ID = "mlx-mcp/opening"
LONGEST = 1 << 16  # bytes of a line that is answered here

# A shape is a type, a list of a shape, or members by name, of which those in REQUIRED must be there. Others may be.
REQUIRED = frozenset(("name", "version", "src"))
CLIENT = {
    "name": str,
    "version": str,
    "title": str,
    "description": str,
    "websiteUrl": str,
    "icons": [{"src": str, "mimeType": str, "sizes": [str]}],
}
CAN = {
    "roots": {"listChanged": bool},
    "sampling": {"context": dict, "tools": dict},
    "elicitation": {"form": dict, "url": dict},
    "tasks": {
        "list": dict,
        "cancel": dict,
        "requests": {"elicitation": {"create": dict}, "sampling": {"createMessage": dict}},
    },
}
WANTED = {
    "toolsListChanged": bool,
    "promptsListChanged": bool,
    "resourcesListChanged": bool,
    "resourceSubscriptions": [str],
}


class Front:
    """One host's conversation, as far as it needs no engine. One thread at a time uses it."""

    def __init__(self, folder: str = FOLDER) -> None:
        self._folder = folder
        self._era = ""
        self._results: dict[str, dict[str, object]] = {}  # by method, once the host has shaken hands
        self._meta: dict[str, object] | None = None  # of the first request that was answered in the modern era

    @property
    def opening(self) -> bytes | None:
        """A request that tells an engine which era the host speaks; None if it has seen, or will see, the host's own.

        Its answer, which has OPENING_ID, is not for the host.
        """
        if self._meta is None:
            return None
        request = {"jsonrpc": "2.0", "id": OPENING_ID, "method": "server/discover", "params": {"_meta": self._meta}}
        return json.dumps(request).encode() + b"\n"

    def answer(self, line: bytes, seen: Envelope) -> dict[str, object] | None:
        """The answer to a request, or None if only an engine can give it."""
        params = params_of(line)
        if params is None:
            return None
        meta = params.get("_meta", {})
        modern = isinstance(meta, dict) and VERSION in meta and seen.method != "initialize"
        era = MODERN if modern else HANDSHAKE
        self._era = self._era or era
        if era != self._era or not isinstance(meta, dict) or type(meta.get("progressToken", "")) not in (str, int):
            return None
        result = self._modern(seen.method, params, meta) if modern else self._handshake(seen.method, params, meta)
        return None if result is None else {"jsonrpc": "2.0", "id": seen.id, "result": result}

    def acknowledge(self, line: bytes, seen: Envelope) -> dict[str, object] | None:
        """The acknowledgement of `subscriptions/listen`, for which hosts wait before they ask for lists.

        None if only the engine can give it. Everything else that the host listens for comes from the engine.
        """
        params = params_of(line) or {}
        wanted, meta = params.get("notifications"), params.get("_meta")
        if self._era != MODERN or not isinstance(meta, dict) or not self._modern_results(meta):
            return None
        if params.keys() != {"_meta", "notifications"} or not fits(wanted, WANTED):
            return None
        assert isinstance(wanted, dict)
        if not wanted.keys() <= WANTED.keys():
            return None
        honored = {"_meta": {SUBSCRIPTION: seen.id}, "notifications": {name: it for name, it in wanted.items() if it}}
        return {"jsonrpc": "2.0", "method": ACKNOWLEDGED, "params": honored}

    def _modern(self, method: str, params: dict[str, object], meta: dict[str, object]) -> object:
        """The result of a request that says its version; None if only an engine can give it."""
        result = self._modern_results(meta).get(method) if is_plain(method, params) else None
        if result is not None:
            self._meta = self._meta or meta
        return result

    def _modern_results(self, meta: dict[str, object]) -> dict[str, dict[str, object]]:
        """The results for a client that says this of itself; none if that is not of the usual form."""
        client = CLIENT_INFO not in meta or fits(meta[CLIENT_INFO], CLIENT)
        if not client or not fits(meta.get(CAPABILITIES), CAN) or reserved(meta) - {VERSION, CLIENT_INFO, CAPABILITIES}:
            return {}
        versions, results = read_surface(self._folder, MODERN)
        return results if meta.get(VERSION) in versions else {}

    def _handshake(self, method: str, params: dict[str, object], meta: dict[str, object]) -> object:
        """The result of `initialize` or of a request after it; None if only an engine can give it."""
        if reserved(meta):
            return None
        if method != "initialize":
            return self._results.get(method) if is_plain(method, params) else None
        asked, can, client = (params.get(name) for name in ("protocolVersion", "capabilities", "clientInfo"))
        if self._results or not (isinstance(asked, str) and fits(can, CAN) and fits(client, CLIENT)):
            return None
        versions, self._results = read_surface(self._folder, HANDSHAKE)
        if not versions:
            return None
        return self._results["initialize"] | {"protocolVersion": asked if asked in versions else versions[-1]}


def read_surface(folder: str, era: str) -> tuple[list[str], dict[str, dict[str, object]]]:
    """The versions of an era, and the results of methods there; none of them if they are not installed."""
    try:
        with open(os.path.join(folder, f"{era}.json"), encoding="utf-8") as file:
            surface = json.load(file)
    except OSError:
        return [], {}
    return surface["versions"], surface["results"]


def reserved(meta: dict[str, object]) -> set[str]:
    """Those names in `_meta` that MCP gives a meaning."""
    return {name for name in meta if name.startswith(META)}


def is_plain(method: str, params: dict[str, object]) -> bool:
    """Whether the parameters of a request are such that its answer does not depend on them."""
    known = {"_meta", "cursor"} if method.endswith("/list") else {"_meta"}
    return params.keys() <= known and isinstance(params.get("cursor", ""), str)


def surface_digest(folder: str = FOLDER) -> str:
    """A checksum of the files: two processes with the same one say the same of themselves."""
    checksum = 0
    for era in (HANDSHAKE, MODERN):
        with contextlib.suppress(OSError), open(os.path.join(folder, f"{era}.json"), "rb") as file:
            checksum = zlib.crc32(file.read(), checksum)
    return f"{checksum:08x}"


def params_of(line: bytes) -> dict[str, object] | None:
    """The parameters of a JSON-RPC request; None if it is not certain that others would take it for one."""
    if len(line) > LONGEST or b"\\ud" in line.lower():  # it has half a character, perhaps
        return None
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=int)  # which refuses NaN
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        return None
    params = message.get("params", {})
    return {} if params is None else params if isinstance(params, dict) else None


def fits(value: object, shape: object) -> bool:
    """Whether a value has a shape; objects may have more members than it names."""
    if isinstance(shape, type):
        return isinstance(value, shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    assert isinstance(shape, dict)
    if not isinstance(value, dict) or not (REQUIRED & shape.keys()) <= value.keys():
        return False
    return all(fits(value[name], inner) for name, inner in shape.items() if name in value) and all(
        isinstance(inner, dict) and all(isinstance(item, dict) for item in inner.values())
        for name, inner in value.items()
        if name in ("experimental", "extensions")
    )
