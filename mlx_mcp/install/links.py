"""Links that have a host register a server when they are opened."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote, urlencode

from mlx_mcp.errors import InstallError
from mlx_mcp.install.hosts import Entry, Host
from mlx_mcp.install.server import PACKAGE, Remote, Server

LINKED = ("cursor", "vscode", "goose", "lm-studio")


def link_of(host: Host, name: str, server: Server | Remote) -> str:
    """The link that registers a server with a host.

    Raises:
        InstallError: the host has no links, or none for such a server.
    """
    if host.name == "cursor":
        return f"cursor://anysphere.cursor-deeplink/mcp/install?{urlencode(packed(host, name, server))}"
    if host.name == "lm-studio":
        return f"lmstudio://add_mcp?{urlencode(packed(host, name, server))}"
    if host.name == "vscode":
        entry = json.dumps({"name": name, **host.entry(name, server)}, separators=(",", ":"))
        return f"vscode:mcp/install?{quote(entry)}"
    if host.name == "goose":
        return f"goose://extension?{urlencode(goose_words(name, server))}"
    raise InstallError(
        f"{host.title} has no links that register a server. Leave out --link; these have: {', '.join(LINKED)}."
    )


def packed(host: Host, name: str, server: Server | Remote) -> dict[str, str]:
    """The entry as one word, as Cursor and LM Studio take it."""
    entry: Entry = host.entry(name, server)
    return {"name": name, "config": base64.b64encode(json.dumps(entry).encode()).decode()}


def goose_words(name: str, server: Server | Remote) -> list[tuple[str, str]]:
    """What Goose is told. Its links start uvx and a few programs more, and no other: so uvx starts this one.

    Raises:
        InstallError: the server has settings or a token, which a link of Goose cannot carry.
    """
    known = [("id", name), ("name", name), ("timeout", "600")]
    if isinstance(server, Remote):
        if server.token_variable:
            raise InstallError("A link of Goose carries no token. Use `mlx-mcp install goose` without --link.")
        return [("type", "streamable_http"), ("url", server.url), *known]
    if server.env:
        raise InstallError("A link of Goose carries no settings. Use `mlx-mcp install goose` without --link.")
    arguments = server.args[server.args.index("serve") :]
    return [("cmd", "uvx"), *(("arg", word) for word in (PACKAGE, *arguments)), *known]
