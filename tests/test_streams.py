"""No thread that ends leaves MLX streams behind: an exit of the process at that moment would abort it."""

import subprocess
import sys
import threading
from contextlib import suppress

import mlx.core as mx
import pytest

from mlx_mcp.config import Config
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.engine.io_thread import IoThread
from mlx_mcp.errors import ModelError
from mlx_mcp.models.registry import Registry
from mlx_mcp.wiring import LateLoader


def stream_is_left(stream):
    try:
        mx.eval(mx.add(mx.array([1.0]), 1, stream=stream))
    except RuntimeError:
        return False
    return True


def on_a_thread(function):
    """What it returns on a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(60)
    return results[0]


def used_stream():
    stream = mx.default_stream(mx.cpu)
    assert stream_is_left(stream)
    return stream


@pytest.mark.parametrize(
    "spec",
    [
        Registry(None).resolve(None),
        ModelSpec("x", "folder", "/nowhere"),
        ModelSpec("a/b", "hub", "a/b", may_fetch=True),
    ],
    ids=["embedded", "no model", "not here"],
)
def test_the_thread_that_prepares_a_model_leaves_none_whether_or_not_there_is_one(spec):
    def prepare():
        stream = used_stream()
        with suppress(ModelError):
            LateLoader(Config()).prepare(spec, lambda progress: None)
        return stream_is_left(stream)

    assert on_a_thread(prepare) is False


def test_the_thread_that_reads_and_writes_leaves_none():
    left, streams, io = [], [], IoThread(lambda command: None, LateLoader(Config()).close)
    at_end, io._at_end = io._at_end, lambda: (at_end(), left.append(stream_is_left(streams[0])))
    io.submit(lambda: streams.append(used_stream()), lambda outcome: None)
    assert io.close(lambda: None, 10)
    assert left == [False]


def test_a_model_that_is_not_here_is_refused_without_importing_mlx():
    program = """
import sys
from mlx_mcp.config import Config
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.errors import ModelError
from mlx_mcp.wiring import LateLoader
try:
    LateLoader(Config()).prepare(ModelSpec("a/b", "hub", "a/b", may_fetch=True), lambda progress: None)
except ModelError as error:
    assert "HF_HUB_OFFLINE" in str(error)
    print([name for name in ("mlx.core", "mlx_lm", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
