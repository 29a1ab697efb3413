"""The hello of a process, and the environment variables that an engine inherits from the process that starts it.

Imported by the relay: standard library only, and little of that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib

from mlx_mcp import __version__
from mlx_mcp.process.place import Place, project_folder, user_folder

# The environment variables that an engine inherits from the process that starts it. It outlives that process and serves
# others, so it must not get a host's keys, tokens and sockets.
HANDED_ON = frozenset(
    "PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TMP TEMP VIRTUAL_ENV LD_LIBRARY_PATH LD_PRELOAD "
    "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy "
    "SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NO_COLOR TOKENIZERS_PARALLELISM".split()
)
HANDED_ON_PREFIXES = (
    *("LC_", "XDG_", "HF_", "MLX_", "OPENBLAS_", "OMP_", "GOTO_", "PYTHON", "DYLD_", "MALLOC_"),
    *("MTL_", "METAL_", "CUDA_", "NVIDIA_", "NCCL_"),
)

OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# The settings of a listener, and those that belong to a window or a listener; all others belong to the engine.
OF_LISTENER = (
    *("host", "port", "token", "allowed_hosts", "allowed_origins", "tls_cert", "tls_key", "trusted_proxies"),
    *("oauth_issuer", "oauth_audience", "oauth_jwks_url", "oauth_scopes"),
)
PER_WINDOW = frozenset(f"MLX_MCP_{name.upper()}" for name in ("model", "file_roots", "wait_s", *OF_LISTENER))
PLACES = frozenset(("MLX_MCP_CONFIG", "MLX_MCP_STATE_DIR"))
HUB = frozenset(("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"))


def engine_settings() -> dict[str, str]:
    """Those settings of this process that belong to the whole engine, for comparison with those of others."""
    settings = {
        name: value
        for name, value in os.environ.items()
        if value and ((name.startswith("MLX_MCP_") and name not in PER_WINDOW | PLACES) or name in HUB)
    }
    file = os.environ.get("MLX_MCP_CONFIG") or os.path.join(
        user_folder("XDG_CONFIG_HOME", ".config"), "mlx-mcp", "config.toml"
    )
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        settings["config.toml"] = f"{zlib.crc32(opened.read()):08x}"
    return settings


def window_hello(kind: str, model: str | None) -> dict[str, object]:
    """The hello of a process that joins as a window (`stdio`) or as a listener (`http`)."""
    return {
        "kind": kind,
        "version": __version__,
        "settings": engine_settings(),
        "model": absolute(model or os.environ.get("MLX_MCP_MODEL") or "") or None,
        "file_roots": os.pathsep.join(map(absolute, os.environ.get("MLX_MCP_FILE_ROOTS", "").split(os.pathsep)))
        or None,
        "wait_s": os.environ.get("MLX_MCP_WAIT_S") or None,
        "folder": project_folder(),
        "parent": os.getppid(),
    }


def engine_environment(place: Place) -> dict[str, str]:
    """The environment of an engine that this process starts."""
    env = {
        name: value
        for name, value in os.environ.items()
        if (name in HANDED_ON or name.startswith(HANDED_ON_PREFIXES)) and name not in PER_WINDOW
    }
    if os.environ.get("MLX_MCP_TRACES"):  # else these are a host's, for its own traces
        env |= {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
    # The engine runs in another folder, where relative paths would mean something else.
    env["MLX_MCP_STATE_DIR"] = place.folder
    if env.get("MLX_MCP_CONFIG"):
        env["MLX_MCP_CONFIG"] = os.path.abspath(env["MLX_MCP_CONFIG"])
    given = env.get("PYTHONPATH", "")
    if os.path.abspath(sys.path[0] or ".") == OWN_FOLDER and OWN_FOLDER not in given.split(os.pathsep):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (OWN_FOLDER, given)))  # run from a checkout
    return env


def absolute(folder: str) -> str:
    """The absolute path of a folder. A text that is not a folder, such as a hub id, is returned unchanged."""
    path = os.path.expanduser(folder)
    return os.path.abspath(path) if os.path.isdir(path) else folder
