"""The log of a process: one form for all that is logged in it, by whatever package, and nothing that a caller wrote.

Guarantees:
    - A line has a time, a level, the logger, what happened, and values by name: as key=value, or as JSON.
    - Of an exception a line has the kind and the places in the code, never its text, which may quote a prompt. Only
      the texts of errors that are written for whoever runs the server are shown (SHOWN).
    - Other packages log what they are given: of their lines only warnings are kept, and of most (but PLAIN) no words.
    - A file is renamed when it has become long, and the three latest of those are kept. It is this user's alone.

The packages below log by `logging`; structlog gives their lines their form.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
import traceback
from collections.abc import Mapping, MutableMapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import structlog

from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError, ModelError, StorageError
from mlx_mcp.service.observing import Observer, Watched

OWN = "mlx_mcp"
# Packages whose warnings are about the network and the system alone.
PLAIN = ("uvicorn", "huggingface_hub", "opentelemetry")
SHOWN = (StorageError, ConfigError, ModelError)
KEPT_FILES = 3
KEYS = ["timestamp", "level", "logger", "event"]


def configure_logs(config: Config, file: str | None = None) -> None:
    """Have all that is logged in this process written to `log_file`, or else to `file`, or else to stderr.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = file if config.log_file is None else str(config.log_file)
    handler = logging.StreamHandler(sys.stderr) if path is None else opened(path, config.max_log_bytes)
    handler.setFormatter(ContentFree(config.log_format))
    handler.addFilter(Kept(config.log_level))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(OWN).setLevel(config.log_level.upper())
    threading.excepthook = log_ended_thread
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def opened(path: str, max_bytes: int) -> RotatedLog:
    """A log file that is open.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        return RotatedLog(path, max_bytes)
    except OSError as error:
        raise ConfigError(
            f"The log {path} cannot be written ({error.strerror}). Set log_file to a file that can be, or unset it."
        ) from error


class Kept(logging.Filter):
    """Keeps this package's lines of a level, and other packages' warnings, whatever levels their loggers have."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self._level = logging.getLevelNamesMapping()[level.upper()]

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        return record.levelno >= (self._level if is_of(record, OWN) else max(self._level, logging.WARNING))


class ContentFree(structlog.stdlib.ProcessorFormatter):
    """Gives a record its form, and leaves out what a caller may have written."""

    def __init__(self, log_format: str) -> None:
        last: Any = structlog.processors.JSONRenderer()
        if log_format == "text":
            last = structlog.processors.LogfmtRenderer(key_order=KEYS, drop_missing=True)
        super().__init__(
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name],
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                without_texts,
                last,
            ],
        )

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        its = copy.copy(record)  # other handlers get it as it was
        if isinstance(its.msg, dict):  # structlog's own
            return super().format(its)
        if is_of(its, OWN):
            its.args = shown_args(its.args)
        elif not is_of(its, *PLAIN):
            its.msg, its.args = f"another package warns, in {its.module}.py, line {its.lineno}", None
        return super().format(its)


def is_of(record: logging.LogRecord, *packages: str) -> bool:
    """Whether a record is of one of these packages."""
    return record.name.partition(".")[0] in packages


def shown_args(args: Any) -> Any:
    """The arguments of a record, with errors by their kinds, except those whose texts are SHOWN."""

    def shown(value: Any) -> Any:
        return type(value).__name__ if isinstance(value, BaseException) and not isinstance(value, SHOWN) else value

    if isinstance(args, Mapping):
        return {key: shown(value) for key, value in args.items()}
    return tuple(shown(value) for value in args) if args else args


def without_texts(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put the kind of an exception, and where in the code it was, in its place; this is a processor of structlog."""
    told = event.pop("exc_info", None)
    error = (sys.exc_info() if told is True else told or (None, None))[1]
    event.pop("stack_info", None)
    if isinstance(error, BaseException):
        frames = traceback.extract_tb(error.__traceback__)
        event["error"] = type(error).__name__
        event["at"] = " < ".join(f"{Path(f.filename).name}:{f.lineno}:{f.name}" for f in reversed(frames))
        if isinstance(error, SHOWN):
            event["text"] = str(error)
    return event


def log_ended_thread(args: threading.ExceptHookArgs) -> None:
    """Log that a thread has ended with an exception, which would be printed with its text otherwise."""
    if args.exc_value is not None:
        logging.getLogger(__name__).error("a thread failed", exc_info=args.exc_value)


def log_generations(observer: Observer) -> None:
    """Have a line at the level `info` for each generation that ends."""
    logger = structlog.stdlib.get_logger(f"{OWN}.generations")

    def log(watched: Watched) -> None:
        result, first = watched.result, watched.first_at
        known: dict[str, Any] = {} if result is None else {"model": result.model, "prompt": result.prompt_tokens}
        if result is not None:
            known |= {"cached": result.cached_tokens, "restored": result.restored_tokens}
        if first is not None:
            known["first_token_s"] = round(first - watched.began_at, 4)
        seconds = round(watched.ended_at - watched.began_at, 4)
        logger.info("generation", outcome=watched.outcome, tokens=watched.num_tokens, seconds=seconds, **known)

    observer.ending.append(log)


class RotatedLog(RotatingFileHandler):
    """A log file that is renamed when it has become long.

    If stdout and stderr of this process go to it, as an engine's do, they go to the new file then.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=KEPT_FILES, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(self.baseFilename, flags, 0o600), "a", encoding=self.encoding, errors=self.errors)

    def doRollover(self) -> None:
        """Rename the file, and begin another."""
        following = [fd for fd in (1, 2) if is_same(fd, self.stream)]
        super().doRollover()
        if self.stream is not None:
            for fd in following:
                os.dup2(self.stream.fileno(), fd)


def is_same(fd: int, stream: Any) -> bool:
    """Whether a descriptor is of the same file as a stream."""
    try:
        return stream is not None and os.path.samestat(os.fstat(fd), os.fstat(stream.fileno()))
    except OSError:
        return False
