"""How a server ends: calls under way may end first, new ones hear why not, and what is to be kept is kept."""

import os
import signal
import subprocess
import sys

import httpx2
import pytest

from tests.process.windows import Window, state_folder, status, wait_until

COUNTS = {"prompt": "Count from 1 to 99.", "max_tokens": 300, "regex": "[0-9, ]{800}"}
SETTINGS = {  # a busy machine must not be what cuts the call off
    "MLX_MCP_MAX_SSD_BYTES": str(1 << 30),
    "MLX_MCP_AUTOSAVE_S": "3600",
    "MLX_MCP_SHUTDOWN_TIMEOUT_S": "60",
}


def saved(env, name):
    """Whether `mlx-mcp sessions list` shows it."""
    shown = subprocess.run([sys.executable, "-m", "mlx_mcp", "sessions", "list"], env=env, capture_output=True)
    return name.encode() in shown.stdout


ALONE = pytest.param(["--standalone"], id="standalone", marks=pytest.mark.long)


@pytest.mark.parametrize("arguments", [ALONE, pytest.param([], id="shared")])
def test_a_call_under_way_ends_and_what_has_changed_is_saved_before_the_server_does(arguments):
    with state_folder(**SETTINGS) as (place, env):
        env["MLX_MCP_STORE_DIR"] = os.path.join(place.folder, "store")
        with Window(env, *arguments) as window:
            window.ask("create_session", messages=[{"role": "user", "content": "Alice's badge is 771."}], name="kept")
            going = window.request("tools/call", name="generate", arguments=COUNTS, _meta={"progressToken": "p"})
            while window.lines.get(timeout=60)["method"] != "notifications/progress":  # until it has begun
                pass  # that there is a session more is told, too
            server = window.process.pid if arguments else status(place)["pid"]
            os.kill(server, signal.SIGTERM)
            assert window.answer(going)["result"]["structuredContent"]["finish_reason"]
            wait_until(lambda: saved(env, "kept"))


@pytest.mark.long
def test_health_says_degraded_while_nothing_can_be_kept_and_generations_go_on(tmp_path):
    (tmp_path / "store").write_text("in the way")
    env = os.environ | {"MLX_MCP_STORE_DIR": str(tmp_path / "store"), "MLX_MCP_MAX_SSD_BYTES": str(1 << 30)}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_mcp", "serve", "--standalone", "--http", "--port", "0"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        address = process.stderr.readline().split(" at ")[1].strip().removesuffix("/mcp")
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
        meta = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        arguments = {"prompt": "Alice's badge is 771. What is Alice's badge?"}
        headers = {
            "accept": "application/json, text/event-stream",
            "mcp-protocol-version": "2026-07-28",
            "mcp-method": "tools/call",
            "mcp-name": "generate",
        }
        params = {"name": "generate", "arguments": arguments, "_meta": meta}
        answer = httpx2.post(f"{address}/mcp", json=call | {"params": params}, headers=headers, timeout=60)
        assert '"771"' in answer.text.replace("\\", "")
        health = httpx2.get(f"{address}/health")
        assert health.status_code == 200
        assert health.json()["status"] == "degraded"
        assert "store" in health.json()["storage"]
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()
