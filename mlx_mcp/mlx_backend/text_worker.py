"""Renders a model's chat template and encodes with its tokenizer, in a process that can be killed.

The program of the process that `text_processes` starts. It reads requests from stdin and answers on stdout, and imports
no more than it needs: jinja2 and tokenizers, a tenth of transformers' time. Knows nothing of MLX.
"""

from __future__ import annotations

import array
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, BinaryIO

from mlx_mcp.mlx_backend.template_proof import Proved, proved
from mlx_mcp.mlx_backend.template_variables import read_variables

MAX_BYTES = 2 << 30  # of memory
MAX_TEXT = 16 << 20  # characters of a rendered prompt
SAMPLE = "a \n1 <b> é 漢 😀"


def write(stream: BinaryIO, header: dict[str, Any], blob: bytes = b"") -> None:
    """Send a message: JSON, and bytes."""
    data = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(struct.pack("<QQ", len(data), len(blob)) + data + blob)
    stream.flush()


def read(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None at the end of the stream."""
    head = stream.read(16)
    if len(head) < 16:
        return None
    length, blob_length = struct.unpack("<QQ", head)
    header: dict[str, Any] = json.loads(stream.read(length).decode("utf-8", "surrogatepass"))
    return header, stream.read(blob_length)


class Worker:
    """One tokenizer and the templates it was asked to render."""

    def __init__(self) -> None:
        self._tokenizer: Any = None
        self._templates: dict[str, Any] = {}
        self._environment = environment()

    def answer(self, header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Do what a message asks for."""
        match header["do"]:
            case "try":
                with open(header["path"], "rb") as file:
                    self._use(file.read())
            case "use" if blob:
                self._use(blob)
            case "render":
                rendered = self.rendered(header["template"], header["given"], header["marks"])
                answer = vars(rendered)
                with suppress(BaseException):  # Rust's panics, too; who asks for the ids alone hears what is wrong
                    if header["encode"] and not rendered.lost:
                        found, ids = self._encode([rendered.text], special=False)
                        return found | answer, ids
                return answer, b""
            case "inspect":
                return {"variables": self.variables(header["template"])}, b""
            case "encode":
                return self._encode(header["texts"], header["special"])
        return {}, b""

    def rendered(self, template: str, given: dict[str, Any], marks: str) -> Proved:
        """What a template makes of what it is given, and what it leaves out; see template_proof."""
        return proved(partial(self._render, template), given, marks)

    def variables(self, template: str) -> dict[str, list[Any]]:
        """What a template can be given; see template_variables."""
        return read_variables(self._environment, template)

    def _encode(self, texts: list[str], special: bool) -> tuple[dict[str, Any], bytes]:
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)]
        return {"lengths": [len(each) for each in ids]}, b"".join(array.array("I", each) for each in ids)

    def _use(self, data: bytes) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_buffer(data)
        # A tokenizer that fails at one of its tokens, or at some text, must fail here first.
        self._tokenizer.encode_batch_fast([SAMPLE], add_special_tokens=True)
        self._tokenizer.decode(list(range(self._tokenizer.get_vocab_size())), skip_special_tokens=False)

    def _render(self, template: str, given: dict[str, Any]) -> str:
        if template not in self._templates:
            self._templates[template] = self._environment.from_string(template)
        text: str = self._templates[template].render(**given)
        if len(text) > MAX_TEXT:
            raise ValueError(f"it makes {len(text)} characters, more than {MAX_TEXT}")
        return text


def environment() -> Any:
    """The environment that templates are written for, as in transformers, which takes two seconds to import.

    tests/mlx_backend/test_text_worker.py compares it with transformers' own.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers, for training; here its content is shown."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

        def _shown(self, caller: Any) -> Any:
            return caller()

    class Dict:
        """`dict` without attributes to break out by."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> Any:
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        """`namespace` without names that Python keeps for itself."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
                    "Please rename the attribute."
                )

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        x = list(x) if isinstance(x, Iterator) else x  # of a filter such as map, as llama.cpp has it
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


def limit_cpu(seconds: float) -> None:
    """Have the system end this process after so much more work: whoever would kill it may be gone."""
    with suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 2, hard))


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    with suppress(ValueError, OSError):  # macOS knows no RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    wire_in, wire_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    worker = Worker()
    while (message := read(wire_in)) is not None:
        header, blob = message
        limit_cpu(header["limit_s"])
        try:
            answer = worker.answer(header, blob)
        except MemoryError:
            answer = {"error": f"it takes more than {MAX_BYTES >> 30} GiB of memory"}, b""
        except BaseException as error:  # such code raises errors of every kind, and Rust panics as BaseException
            answer = {"error": str(error) or type(error).__name__}, b""
        write(wire_out, *answer)


if __name__ == "__main__":
    main()
