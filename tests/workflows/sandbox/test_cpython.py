"""What is CPython's own behind the port: what is around it, what it refuses, and what outlives a run."""

import asyncio
import importlib.util
import json
import pickle
import shutil
import socket
import struct
import sys
from pathlib import Path

import pytest

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox import isolation
from mlx_mcp.workflows.sandbox.cpython import CPythonRuntime, packages_beside, this_python
from mlx_mcp.workflows.sandbox.journal import replay
from mlx_mcp.workflows.sandbox.monty import MontyRuntime
from mlx_mcp.workflows.sandbox.opening import open_runtime
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits
from tests.process.windows import is_alive, wait_until
from tests.service.house import CALLER
from tests.workflows.sandbox.processes import process
from tests.workflows.sandbox.running import MOMENT, encloses_cpython, pid_of, run, runtime, started
from tests.workflows.sandbox.snippets import CONTEXT, FILES, printed_by_cpython, read_snippets
from tests.workflows.sandbox.test_isolation import executable

SNIPPETS = read_snippets()
# Host functions that are awaited, a package that is not installed, and the form of a log.
OTHERWISE = {"asking: asyncio gather", "asking: gather at the top level", "data: pandas habit", "flow: logging habit"}
enclosed = pytest.mark.skipif(not encloses_cpython(), reason="nothing encloses CPython here")
SMALL = Limits(seconds=30, memory_bytes=64 << 20, output_chars=20_000)


def worker_with(limits=SMALL):
    return started(limits, python="cpython")


async def test_without_bubblewrap_it_is_refused_and_nothing_else_is_taken_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(SandboxFailed, match=r"install bubblewrap 0.8 or later.* MLX_MCP_SANDBOX_PYTHON=monty"):
        await open_runtime(tmp_path, "cpython")
    assert isinstance(await open_runtime(tmp_path), MontyRuntime)


async def test_bubblewrap_that_does_not_work_is_no_reason_to_run_without_it(tmp_path, monkeypatch):
    broken = executable(tmp_path / "bwrap", "#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(SandboxFailed, match=r"does not run here \(exit status 1\)"):
        await open_runtime(tmp_path / "scripts", "cpython")


async def test_a_missing_cloudpickle_is_told_with_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SandboxFailed, match=r"pip install 'mlx-mcp\[cpython\]'"):
        await open_runtime(tmp_path, "cpython")


def test_bubblewrap_binds_what_python_reads_and_lets_nothing_of_it_be_written():
    interpreter = this_python(packages_beside(Path(pytest.__file__).parents[1]))
    words = isolation._bubblewrap("bwrap", interpreter)
    assert {"--unshare-all", "--die-with-parent", "--clearenv", "--new-session", "--remount-ro"} <= set(words)
    assert not {"--bind", "--bind-try", "--share-net", "--proc", "--dev"} & set(words)
    bound = {words[at + 1] for at, word in enumerate(words) if word in ("--ro-bind", "--ro-bind-try")}
    assert bound == {*isolation.LIBRARIES, *map(str, interpreter.reads)}
    assert words.index("--tmpfs") < words.index("--ro-bind")  # packages may lie under /tmp
    assert "/usr" not in bound
    assert str(Path.home()) not in bound


def test_seatbelt_gets_the_files_of_python_and_no_network():
    interpreter = this_python([])
    profile = isolation._seatbelt_profile(interpreter)
    assert "(deny default)" in profile
    assert "network" not in profile
    assert "process-fork" not in profile
    assert f'(subpath "{interpreter.reads[-1]}")' in profile


@enclosed
async def test_it_is_named_with_the_versions_that_its_dumps_depend_on():
    assert isinstance(runtime("cpython"), CPythonRuntime)
    assert runtime("cpython").version.startswith(f"cpython {sys.version.split()[0]}, cloudpickle ")
    around = [f"{name}, around CPython" for name in (isolation.BUBBLEWRAP, isolation.SEATBELT)]
    assert runtime("cpython").isolation in around


@enclosed
async def test_what_pydantic_monty_lacks_is_there():
    program = """
from collections import OrderedDict
from contextlib import contextmanager
from enum import Enum

class Base(dict):
    @property
    def size(self):
        return len(self)

class Derived(Base):
    def __lt__(self, other):
        return self.size < other.size

class Colour(Enum):
    RED = 1
    def low(self):
        return self.name.lower()

def counted():
    n = 0
    while True:
        yield n
        n += 1

@contextmanager
def within():
    yield 1

numbers = counted()
with within() as one:
    found = next(numbers), next(numbers), one
found, Colour.RED.low(), min(Derived(a=1, b=2), Derived(a=1)).size, eval("1 + 1"), sorted([3, 1], key=lambda x: -x)
"""
    async with worker_with() as worker:
        assert await run(worker, program) == Ended(value=((0, 1, 1), "red", 1, 2, [3, 1]))


@enclosed
async def test_installed_packages_are_there_and_their_numbers_cross_as_numbers():
    async with worker_with() as worker:
        program = "import numpy as np\na = np.arange(4).reshape(2, 2)\na, a.sum(), np.float32(0.5)"
        assert await run(worker, program) == Ended(value=([[0, 1], [2, 3]], 6, 0.5))
        assert await worker.variables() == {"a": "ndarray, shape (2, 2)"}


@enclosed
async def test_host_functions_can_be_called_from_anywhere_one_after_the_other():
    async with worker_with() as worker:
        assert await run(worker, "sorted(['aaa', 'bb'], key=lambda x: llm_query(x))") == Ended(value=["bb", "aaa"])
        threads = (
            "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
            "    got = list(pool.map(llm_query, ['a', 'bb', 'ccc']))\ngot"
        )
        assert await run(worker, threads) == Ended(value=["yes 1", "no 2", "yes 3"])


@enclosed
async def test_files_of_a_run_are_opened_by_name_and_the_helpers_are_there():
    program = "with open('a.txt') as f:\n    text = f.read()\ntext, chunks(text, 3), grep('b', text), lines(text, 1, 1)"
    async with worker_with() as worker:
        ended = await run(worker, program, {"files": {"a.txt": "ab\ncd"}})
        assert ended == Ended(value=("ab\ncd", ["ab\n", "cd"], [(1, "ab")], ["ab"]))
        assert "text: str, 5 characters" in (await run(worker, "show_vars()")).value


# What a program may try, which must say "no": nothing of it may come to anything.
REACHES = {
    "a file": "open({canary!r}).read()",
    "a file by the system": "import os\nos.open({canary!r}, os.O_RDONLY)",
    "this file": "open({here!r}).read()",
    "a file of the system": "open('/etc/passwd').read()",
    "a process's memory": "open('/proc/self/mem')",
    "writing to packages": "import json\nopen(json.__file__, 'a').write('x')",
    "writing to the root": "open('/x', 'w')",
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    "the network by a library": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
    "a process": "import subprocess\nsubprocess.run(['/bin/true'])",
    "a fork": "import os\nos.fork()",
    "another fork": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "another program": "import os, sys\nos.execv(sys.executable, ['python', '-c', ''])",
    "memory in files": "import os\nos.memfd_create('x')",
    "a higher limit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "memory that is shared": "import mmap\nmmap.mmap(-1, 8 << 30)",
}


@enclosed
@pytest.mark.parametrize("reach", REACHES)
async def test_a_program_reaches_no_file_no_network_and_no_process(reach, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        code = REACHES[reach].format(canary=str(canary), here=__file__, port=listening.getsockname()[1])
        async with worker_with() as worker:
            ended = await run(worker, code)
            assert ended.error is not None, ended
            assert ended.error.type in ("FileNotFoundError", "PermissionError", "OSError", "URLError", "ValueError")
            assert "secret" not in worker.take_output() + ended.error.message
            assert await run(worker, "1") == Ended(value=1)
        with pytest.raises(BlockingIOError):
            listening.accept()


@enclosed
@pytest.mark.skipif(sys.platform != "linux", reason="looks at system calls of Linux")
async def test_system_calls_for_processes_and_sockets_are_refused_without_the_library():
    program = """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
first = platform.machine() == "x86_64"
CALLS = {"unshare": (272, 97), "clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "setns": (308, 268),
         "mount": (165, 40), "io_uring_setup": (425, 425), "shmget": (29, 194), "ptrace": (101, 117)}
[name for name, (x86, arm) in CALLS.items() if libc.syscall(x86 if first else arm, 0, 0, 0, 0) != -1]
"""
    async with worker_with() as worker:
        assert await run(worker, program) == Ended(value=[])


@enclosed
async def test_a_program_sees_no_environment_and_no_other_process(monkeypatch):
    monkeypatch.setenv("CANARY", "secret")
    async with worker_with() as worker:
        ended = await run(
            worker, "import os\n'secret' in str(dict(os.environ)), os.getpid() < 10, os.path.exists('/proc')"
        )
        assert ended == Ended(value=(False, True, False))


@enclosed
async def test_a_program_that_fills_the_memory_is_ended_and_the_last_dump_is_as_before():
    async with worker_with() as worker:
        await run(worker, "x = 1")
        dump = await worker.dump()
        ended = await run(worker, "kept = []\nwhile True:\n    kept.append('x' * 10 ** 6 + str(len(kept)))")
        assert (ended.error.type, ended.spoiled) == ("MemoryError", True)
        assert "needed more than 64 MiB" in ended.error.message
        await worker.load(dump)
        assert await run(worker, "x") == Ended(value=1)


@enclosed
async def test_threads_and_open_files_are_bounded_and_the_next_run_goes_on():
    threads = (
        "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nn = 0\ntry:\n    while True:\n"
        "        _thread.start_new_thread(lock.acquire, ())\n        n += 1\nexcept RuntimeError:\n    pass\n"
        "16 < n < 1000"
    )
    files = (
        "import os\nn = 0\ntry:\n    while True:\n        os.pipe()\n        n += 1\nexcept OSError:\n    pass\n"
        "5 < n < 64"
    )
    async with worker_with() as worker:
        assert await run(worker, threads) == Ended(value=True)
        assert await run(worker, files) == Ended(value=True)
        assert await run(worker, "n > 1") == Ended(value=True)


@enclosed
async def test_variables_may_not_take_more_than_the_memory_of_a_program():
    async with worker_with() as worker:
        ended = await run(worker, "x = bytes(80 << 20)")
        assert (ended.error.type, ended.spoiled) == ("MemoryError", True)


@enclosed
async def test_what_is_written_to_tmp_is_bounded_and_gone_after_the_run():
    program = """
import errno
written = 0
try:
    for number in range(100):
        with open(f"/tmp/{number}", "wb") as file:
            written += file.write(bytes(4 << 20))
except OSError as error:
    full = errno.errorcode[error.errno]
full, written <= 64 << 20
"""
    async with worker_with() as worker:
        mounted = await run(worker, "import os\nos.listdir('/tmp')")  # Python's own files may lie there
        assert await run(worker, program) == Ended(value=("ENOSPC", True))
        assert await run(worker, "os.listdir('/tmp')") == mounted


def frame(message):
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">I", len(data)) + data


MANY = [0] * 300_000
FORGED = {
    "no message": b"\xff\xff\xff\xff" + b"x" * 100,
    "too long a message": struct.pack(">I", (16 << 20) + 1),
    "no JSON": frame(b"nonsense"),
    "no object": frame([1]),
    "a pickle": frame(pickle.dumps({"kind": "ended"})),
    "too deep": frame(b"[" * 100_000),
    "an unknown kind": frame({"kind": "what"}),
    "another turn's answer": frame({"kind": "loaded"}),
    "an unknown function": frame({"kind": "call", "name": "unheard_of", "arguments": [{"list": []}, {"dict": []}]}),
    "arguments that are none": frame({"kind": "call", "name": "llm_query", "arguments": 3}),
    "a tag that is none": frame({"kind": "ended", "value": {"a": 1, "b": 2}}),
    "a key that is none": frame({"kind": "ended", "value": {"dict": [[[], 1]]}}),
    "too many values": frame({"kind": "ended", "value": MANY}),
    "an exception that is none": frame({"kind": "ended", "error": {"type": 1, "message": [], "line": "x"}}),
    "output that is none": frame({"kind": "printed", "text": 3}),
    "too much output": frame({"kind": "printed", "text": "x" * 30_000}),
}


@enclosed
@pytest.mark.parametrize("forged", FORGED)
async def test_what_a_program_writes_in_place_of_the_child_ends_the_process_and_nothing_else(forged):
    program = (
        "import os\nfor number in range(3, 64):\n    try:\n        os.write(number, bytes.fromhex(sent))\n"
        "    except OSError:\n        pass\nwhile True: pass"
    )
    async with worker_with() as worker:
        await run(worker, "x = 1")
        dump = await worker.dump()
        ended = await run(worker, program, {"sent": FORGED[forged].hex()})
        assert (ended.error.type, ended.spoiled) == ("RuntimeError", True)
        assert "process has ended" in ended.error.message
        await worker.load(dump)
        assert await run(worker, "x") == Ended(value=1)


@enclosed
async def test_state_is_read_in_the_child_alone(tmp_path):
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return open, (str(canary), "w")

    async with worker_with() as worker:
        head = (await worker.dump()).partition(b"\n")[0]
        with pytest.raises(SandboxFailed, match="state of this sandbox is damaged"):
            await worker.load(head + b"\n" + pickle.dumps(Attack()))
    assert not canary.exists()


@enclosed
async def test_what_is_printed_around_the_limit_of_output_does_not_come_back():
    async with worker_with() as worker:
        await run(
            worker,
            "import os, sys\nos.write(1, b'one')\nos.write(2, b'two')\nsys.__stdout__.write('three')\nprint('four')",
        )
        assert worker.take_output() == "four\n"


@enclosed
async def test_what_was_printed_before_the_time_ran_out_is_there():
    async with worker_with(Limits(seconds=1)) as worker:
        assert (await run(worker, "print('begun')\nwhile True: pass")).error.type == "TimeoutError"
        assert worker.take_output() == "begun\n"


@enclosed
async def test_large_inputs_cross_whole():
    inputs = {"context": "é\n" * (8 << 20), "files": {"a": "x" * (16 << 20)}}
    async with worker_with(Limits()) as worker:
        ended = await run(worker, "len(context), context[-2:], len(files['a'])", inputs)
        assert ended == Ended(value=(16 << 20, "é\n", 16 << 20))


@enclosed
async def test_time_within_host_calls_does_not_count():
    async with worker_with(Limits(seconds=1)) as worker:
        step = await worker.run("for _ in range(3):\n    llm_query('q')\n1")
        for _ in range(3):
            assert isinstance(step, HostCall)
            await asyncio.sleep(0.5)
            step = await worker.answer("a")
        assert step == Ended(value=1)


@enclosed
async def test_a_value_longer_than_a_message_becomes_a_text_and_a_call_with_one_fails():
    async with worker_with(Limits(memory_bytes=256 << 20)) as worker:
        ended = await run(worker, "x = 'a' * (17 << 20)\nx")
        assert ended.value == "<str: the value is longer than 16 MiB. Use a part of it>"
        ended = await run(worker, "llm_query(x)")
        assert (ended.error.type, ended.error.line) == ("ValueError", 1)
        ended = await run(worker, "llm_query(list(range(300_000)))")
        assert (ended.error.type, ended.spoiled) == ("ValueError", False)
        assert await run(worker, "len(x)") == Ended(value=17 << 20)
        assert await run(worker, "llm_query('é' * (6 << 20))") == Ended(value=f"no {6 << 20}")


@enclosed
async def test_what_cannot_be_kept_is_told_once_and_gone():
    program = "import threading\nlock = threading.Lock()\ng = (n for n in [1])\nx = [1]\ny = x\ndef f(): return next(g)"
    async with worker_with() as worker:
        await run(worker, program)
        shown = await worker.variables()
        assert shown["lock"] == "lock, does not outlive its run"
        assert shown["g"] == "generator, does not outlive its run"
        assert (await run(worker, "f()")).error.type == "NameError"
        assert (await worker.variables()).keys() == {"x", "y", "f"}
        await worker.load(await worker.dump())
        assert await run(worker, "x is y") == Ended(value=True)


@enclosed
async def test_functions_that_were_loaded_use_the_variables_of_the_worker():
    program = (
        "n = 1\nclass A:\n    def get(self): return n\n    def twice(self): return double(self.get())\n"
        "def double(x): return 2 * x + len(llm_query('ab'))\na = A()\nask = llm_query"
    )
    async with worker_with() as worker, worker_with() as other:
        await run(worker, program)
        await other.load(await worker.dump())
        await other.load(await other.dump())
        assert await run(other, "n = 5\na.get(), A().get(), a.twice(), isinstance(a, A)") == Ended(
            value=(5, 5, 14, True)
        )
        assert await run(other, "ask('bc')") == Ended(value="no 2")
        ended = await run(other, "def double(x):\n    return x / 0\n\na.twice()")
        assert (ended.error.type, ended.error.line) == ("ZeroDivisionError", 2)


@enclosed
async def test_what_has_a_name_of_the_program_alone_is_kept_as_what_it_is_or_not_at_all():
    program = """
from functools import cached_property, lru_cache
from typing import NewType

@lru_cache(maxsize=10)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)

class Circle:
    def __init__(self, r): self.r = r
    @property
    def area(self): return 3 * self.r
    @staticmethod
    def unit(): return Circle(1)
    @classmethod
    def of(cls, r): return cls(r)
    @cached_property
    def twice(self): return Circle(self.r * 2)
    @lru_cache
    def plus(self, n): return self.r + n

Name = NewType("Name", str)
circle = Circle(2)
fib(5)
"""
    async with worker_with() as worker:
        assert await run(worker, program) == Ended(value=5)
        assert {name for name, line in (await worker.variables()).items() if "outlive" in line} == {"Name"}
        await worker.load(await worker.dump())
        used = "fib(9), fib.cache_info().maxsize, circle.area, Circle.unit().r, circle.of(3).twice.r, circle.plus(1)"
        assert await run(worker, used) == Ended(value=(34, 10, 6, 1, 6, 3))


@enclosed
@pytest.mark.long
@pytest.mark.parametrize(
    "snippet", [each for each in SNIPPETS if each.name not in OTHERWISE], ids=lambda each: each.name
)
async def test_programs_as_models_write_them_print_what_they_should_and_can_be_kept(snippet):
    expected = printed_by_cpython(snippet.code) if snippet.printed is None else snippet.printed
    async with worker_with(Limits()) as worker:
        ended = await run(worker, snippet.code, {"context": CONTEXT, "files": FILES})
        assert (ended.error, worker.take_output()) == (None, expected)
        kept = await worker.variables()
        await worker.load(await worker.dump())
        there = {name for name, line in kept.items() if "does not outlive" not in line}
        assert (await worker.variables()).keys() == there


@enclosed
async def test_awaiting_a_host_function_is_told_with_what_to_write():
    async with worker_with() as worker:
        ended = await run(worker, "import asyncio\nasync def f():\n    return await llm_query('a')\nasyncio.run(f())")
        assert (ended.error.line, "are called without await" in ended.error.hint) == (3, True)


@enclosed
async def test_a_program_that_waits_cannot_be_kept():
    async with worker_with() as worker:
        await worker.run("llm_query('q')")
        with pytest.raises(SandboxFailed, match="Let it end first"):
            await worker.dump()
        assert await worker.answer("a") == Ended(value="a")


@enclosed
async def test_clock_random_numbers_and_hashes_depend_on_the_moment_alone():
    program = (
        "import random, time\ntime.sleep(100)\ntime.time(), random.random(), hash('a'), list({'a', 'b', 'c', 'd'})"
    )
    seen = []
    for moment in (MOMENT, MOMENT, MOMENT + 1):
        async with worker_with() as worker:
            seen.append((await worker.run(program, moment=moment)).value)
    assert seen[0] == seen[1]
    assert seen[0][:2] != seen[2][:2]
    assert seen[0][0] == pytest.approx(MOMENT, abs=0.1)
    assert seen[0][2:] == seen[2][2:]


@enclosed
async def test_a_name_of_the_clock_that_was_kept_shows_the_run_that_looks():
    async with worker_with() as worker:
        await worker.run("from time import time", moment=MOMENT)
        await worker.load(await worker.dump())
        assert (await worker.run("time()", moment=MOMENT + 100)).value == pytest.approx(MOMENT + 100, abs=0.1)


@enclosed
async def test_exceptions_of_every_kind_are_told():
    told = {
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E": ("E", 3, ""),
        "class E(BaseException): pass\nraise E('x')": ("E", 2, ""),
        "import not_there": ("ModuleNotFoundError", 1, "not_there is not installed beside mlx-mcp"),
        "raise KeyboardInterrupt": ("KeyboardInterrupt", 1, ""),
        "\n\nundefined": ("NameError", 3, "Define undefined first"),
        "[" * 300: ("SyntaxError", 1, ""),
    }
    async with worker_with() as worker:
        for program, (type_, line, hint) in told.items():
            ended = await run(worker, program)
            assert (ended.error.type, ended.error.line, ended.spoiled) == (type_, line, False), ended
            assert hint in ended.error.hint
        slept = await run(worker, "import time\ntime.sleep(-1)")
        assert slept.error.message == "sleep length must be non-negative"
        assert (await run(worker, "import ctypes\nctypes.string_at(0)")).spoiled


@enclosed
async def test_a_worker_that_is_killed_leaves_the_state_of_the_last_run_and_forks_go_their_own_ways():
    async with process(runtime("cpython"), None) as server:
        sandbox = await server.sandboxes.create(server.service, CALLER)
        await server.run(sandbox, "class A:\n    n = 1\na = A()\na.n = 2")
        [fork] = await server.sandboxes.fork(server.service, CALLER, sandbox.sandbox_id, 1, ())
        await server.run(fork, "a.n += 5")
        ran = await server.run(sandbox, "a.n = 9\nimport os\nos.kill(os.getpid(), 9)")
        assert ran.ended.spoiled
        assert (await server.run(sandbox, "a.n, type(a) is A")).ended.value == (2, True)
        assert (await server.run(fork, "a.n")).ended.value == 7
        assert (await server.run(sandbox, "submit(a.n)\na.n = 0")).ended.value == 2


@enclosed
async def test_a_replay_gives_the_same_variables_again_and_asks_nobody():
    async with process(runtime("cpython"), None) as server:
        sandbox = await server.sandboxes.create(server.service, CALLER)
        await server.run(sandbox, "import random, time\nx = random.random(), time.time()\ng = (n for n in x)", y=(1, 2))
        await server.run(sandbox, "z = llm_query('q')\ntry:\n    next(g)\nexcept NameError:\n    z += '!'")
        await server.run(sandbox, "z += 'a'\n1 / 0")
        kept = (await server.run(sandbox, "x, y, z")).ended.value
        asked = server.num_asked
        async with worker_with(Limits()) as worker:
            await replay(sandbox.state.journal, worker)
            assert await run(worker, "x, y, z") == Ended(value=kept)
        assert server.num_asked == asked


@enclosed
async def test_nothing_is_left_of_a_worker_that_was_closed_at_work():
    worker = await runtime("cpython").start(Limits(), ())
    pid = pid_of(worker)
    inside = asyncio.ensure_future(worker.run("import threading\nwhile True: threading.Thread(target=print).start()"))
    await asyncio.sleep(0)
    await worker.close()
    assert (await asyncio.wait_for(inside, 30)).spoiled
    wait_until(lambda: not is_alive(pid))


@enclosed
async def test_a_state_with_an_object_that_cannot_be_made_again_is_rebuilt_from_the_runs():
    program = """
class Refused(Exception):
    def __init__(self, name, amount):
        super().__init__(name)
        self.amount = amount

answers = [llm_query("How much?")]
kept = Refused("Ann", 7)
"""
    async with process(runtime("cpython"), None) as server:
        sandbox = await server.sandboxes.create(server.service, CALLER)
        await server.run(sandbox, program)
        asked = server.num_asked
        await sandbox.release()
        assert (await server.run(sandbox, "kept.amount, len(answers)")).ended.value == (7, 1)
        assert server.num_asked == asked
