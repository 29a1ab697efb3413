"""The log: its form, its file, and that nothing of what a caller wrote is in it."""

import json
import logging
import os
import re
import stat
import threading

import pytest

from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError, InvalidRequest, StorageError
from mlx_mcp.hosting.logs import RotatedLog, configure_logs, log_generations
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.service import Service
from tests.fakes import fake_client
from tests.service.house import CALLER, asked, unheard

own = logging.getLogger("mlx_mcp.test")


@pytest.fixture
def lines(tmp_path):
    """Configures the log by settings; what comes back reads its lines."""
    root, package, hook = logging.getLogger(), logging.getLogger("mlx_mcp"), threading.excepthook
    before = root.handlers[:], root.level, package.level
    root.handlers[:] = []

    def configured(**settings):
        configure_logs(Config.load(log_file=tmp_path / "log", **settings))
        return lambda: (tmp_path / "log").read_text().splitlines()

    yield configured
    for handler in root.handlers:
        handler.close()
    (root.handlers[:], root.level, level), threading.excepthook = before, hook
    package.setLevel(level)


def raised(error):
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_line_is_key_and_value_with_time_level_and_logger(lines):
    read = lines()
    own.warning("a model could not be loaded: %s", "x y")
    [line] = read()
    assert re.fullmatch(
        r'timestamp=20\d\d-\S+Z level=warning logger=mlx_mcp.test event="a model could not be loaded: x y"', line
    )


def test_a_line_can_be_json(lines):
    read = lines(log_format="json")
    own.error("two\nlines", exc_info=raised(StorageError("The disk is full. Free some of it.")))
    [line] = read()
    told = json.loads(line)
    assert {key: told[key] for key in ("event", "level", "error", "text")} == {
        "event": "two\nlines",
        "level": "error",
        "error": "StorageError",
        "text": "The disk is full. Free some of it.",
    }
    assert told["at"].startswith("test_logs.py:")


def test_an_exception_is_told_by_its_kind_and_place_alone(lines):
    read = lines(log_level="debug")
    own.error("failed", exc_info=raised(ValueError("canary")))
    own.warning("not done: %s", InvalidRequest("canary"))
    own.warning("not done: %(why)s", {"why": KeyError("canary")})
    own.warning("not kept: %s", StorageError("the disk is full"))
    told = read()
    assert "canary" not in "".join(told)
    assert "error=ValueError" in told[0]
    assert [line.partition("event=")[2] for line in told[1:]] == [
        '"not done: InvalidRequest"',
        '"not done: KeyError"',
        '"not kept: the disk is full"',
    ]


def test_of_other_packages_only_warnings_are_kept_and_no_words(lines):
    read = lines(log_level="debug")
    for name in ("sse_starlette.sse", "httpx", "mcp.server", "asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).debug("chunk: %s", "canary")
        logging.getLogger(name).info("canary")
    logging.getLogger("mcp.server").warning("canary")
    logging.getLogger("asyncio").error("canary %s", "canary", exc_info=raised(ValueError("canary")))
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    told = read()
    assert "canary" not in "".join(told)
    assert len(told) == 3
    assert 'event="another package warns, in test_logs.py, line' in told[0]
    assert "Invalid HTTP request received." in told[2]


def test_a_thread_that_fails_is_logged_without_the_text_of_its_exception(lines):
    read = lines()
    thread = threading.Thread(target=lambda: int("canary"))
    thread.start()
    thread.join()
    [line] = read()
    assert "error=ValueError" in line
    assert "canary" not in line


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_says_what_is_kept(lines, level, count):
    read = lines(log_level=level)
    for each in ("debug", "info", "warning", "error"):
        getattr(own, each)("told")
    assert len(read()) == count


async def test_a_generation_has_a_line_with_its_counts_at_the_level_info(lines):
    read = lines(log_level="info")
    engine = fake_client()
    service = Service(engine, Registry(None))
    log_generations(service.observer)
    await generate(service, CALLER, asked("canary"), Options(model="tiny"), unheard)
    engine.close()
    [line] = read()
    assert "event=generation" in line
    assert "outcome=stop tokens=6" in line
    assert "model=tiny prompt=6" in line
    assert "canary" not in line


def test_a_file_that_has_become_long_is_renamed_and_three_are_kept(lines, tmp_path):
    lines(max_log_bytes=4096)
    for i in range(1000):
        own.warning("line %d of a log", i)
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2", "log.3"]
    assert all(os.stat(tmp_path / name).st_size <= 4096 for name in os.listdir(tmp_path))
    assert "line 999" in (tmp_path / "log").read_text().splitlines()[-1]
    assert {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)} == {0o600}


def test_what_a_process_prints_goes_to_the_new_file_after_that(tmp_path):
    path = tmp_path / "engine.log"
    stderr = os.dup(2)
    try:
        log = RotatedLog(str(path), 4096)
        os.dup2(log.stream.fileno(), 2)
        for _ in range(100):
            log.emit(logging.makeLogRecord({"msg": "x" * 100}))
        os.write(2, b"printed")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        log.close()
    assert path.read_text().endswith("printed")


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"log_file to a file that can be"):
        configure_logs(Config.load(log_file=tmp_path / "nowhere" / "log"))


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("")
    (tmp_path / "log").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="cannot be written"):
        configure_logs(Config.load(log_file=tmp_path / "log"))
