"""The whole server, killed at random moments while it keeps a session: what it acknowledged is there, and right."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading

import pytest
from mcp import Client

from tests.effort import drawn

KILLS = 20
NAMES = ("Alice", "Bob", "Carol", "Dana", "Erin", "Frank", "Grace", "Heidi")


class Server:
    """`mlx-mcp serve --http` in a process of its own."""

    def __init__(self, store):
        env = os.environ | {"MLX_MCP_STORE_DIR": str(store), "MLX_MCP_MAX_SSD_BYTES": str(1 << 30)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_mcp", "serve", "--standalone", "--http", "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        line = self.process.stderr.readline()
        self.url = re.search(r"http://\S+/mcp", line)[0]
        self.reader = threading.Thread(target=self.process.stderr.read, daemon=True)  # a full pipe would stop it
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join(60)
        self.process.stderr.close()


async def call(client, tool, **arguments):
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content[0].text
    return result.structured_content


def fact(name, number):
    return f"{name}'s badge is {number}."


@pytest.mark.long
@pytest.mark.timeout(600)
def test_no_kill_loses_what_was_acknowledged_or_changes_it(tmp_path):
    store, draw = tmp_path / "store", random.Random(1)
    acknowledged = {}  # session → the badges that it was told of when it was last acknowledged

    async def life(url, kill_after_s, server):
        async with Client(url) as client:
            listed = {s["session"]: s for s in (await call(client, "list_sessions"))["sessions"]}
            assert set(acknowledged) <= set(listed), "an acknowledged session is gone"
            for session in list(acknowledged):
                badges = acknowledged[session]
                name = draw.choice(list(acknowledged[session]))
                answer = await call(client, "generate", session=session, prompt=f"What is {name}'s badge?", keep=False)
                assert answer["text"] == badges[name]
            await call(client, "generate", prompt="Hello.", max_tokens=1)  # loads the model
            timer = threading.Timer(kill_after_s, server.kill)
            if acknowledged:  # the first life ends after something was
                timer.start()
            while True:
                badges = {name: str(draw.randrange(100, 1000)) for name in draw.sample(NAMES, 3)}
                told = [{"role": "user", "content": " ".join(fact(*each) for each in badges.items())}]
                session = (await call(client, "create_session", messages=told))["session"]
                await call(client, "persist_session", session=session)
                acknowledged[session] = badges
                if timer.ident is None:
                    timer.start()
                while len(acknowledged) > 4:
                    closing = next(iter(acknowledged))
                    del acknowledged[closing]
                    await call(client, "close_session", sessions=[closing], confirm=True)

    for _ in range(drawn(KILLS, least=2)):
        with Server(store) as server:
            with pytest.raises(BaseException) as ended:  # noqa: PT011  # whatever a client makes of a dead server
                asyncio.run(life(server.url, draw.uniform(0.0, 0.4), server))
            failed = found(ended.value, AssertionError)
            if failed is not None:
                raise failed
            assert server.process.wait(10) == -signal.SIGKILL, ended.value
    assert acknowledged
    with Server(store) as server:
        num_sessions = asyncio.run(recall(server.url, acknowledged))
    # Each has its file, its blocks and its tail; then there are the lock and the key.
    assert len(list(store.iterdir())) <= 3 * num_sessions + 2


async def recall(url, acknowledged):
    async with Client(url) as client:
        for session, badges in acknowledged.items():
            for name, badge in badges.items():
                answer = await call(client, "generate", session=session, prompt=f"What is {name}'s badge?", keep=False)
                assert answer["text"] == badge
        return len((await call(client, "list_sessions"))["sessions"])


def found(error, kind):
    """An error of a kind in a group of them."""
    if isinstance(error, BaseExceptionGroup):
        return next((each for e in error.exceptions if (each := found(e, kind)) is not None), None)
    return error if isinstance(error, kind) else None
