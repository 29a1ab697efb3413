"""The chat templates that llama.cpp keeps: fetched out of a package of PyPI, and what becomes of each, as a table.

`python -m tests.formats.llama_templates` fetches them once, into build/, and writes the table into docs/models.md.
"""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import NO_EFFORTS, NO_OFF, NO_SWITCH, Prompt, Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.mlx_backend.template_variants import CALLS_AS_TEXT, FOLDED, RESULTS_AS_TEXT, TOLD
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from tests.mlx_backend.tokenizers_made import make_tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "templates"
PACKAGE = "llama-cpp-python==0.3.36"  # its sdist has llama.cpp under vendor/
WITHIN = "vendor/llama.cpp/models/templates/"
TABLE = re.compile(r"(<!-- templates -->\n).*?(<!-- end templates -->)", re.DOTALL)
# What reads as a control token in a template: a real tokenizer has them as added tokens.
CONTROL = re.compile(r"<[|｜/]?[A-Za-z_:|｜][^<>\n{}'\" ]{0,40}>|\[/?[A-Z_]{2,}\]|<\|[a-z_:]+\|?>")

PLACE = {"type": "object", "properties": {"place": {"type": "string", "description": "Where."}}, "required": ["place"]}
TOOLS = (
    {"type": "function", "function": {"name": "look", "description": "Look there.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "wait", "description": None}},
)
SYSTEM, USER = Message("system", "be brief"), Message("user", "hello you")
ANSWER, AGAIN = Message("assistant", "hm"), Message("user", "again")
CALLED = [
    USER,
    Message("assistant", tool_calls=(ToolCall("look", {"place": 'in the <b> "box"'}),)),
    Message("tool", "it is empty", name="look"),
]
SAID = {FOLDED: "system folded", CALLS_AS_TEXT: "calls as text", RESULTS_AS_TEXT: "results as text", TOLD: "told"}


@dataclass(frozen=True)
class Row:
    """What becomes of one template."""

    name: str
    prompt: str
    turns: str
    tools: str
    thoughts: str
    switches: str


def fetch() -> None:
    """Have the templates in build/, from the package's sdist, unless they are there."""
    if FOLDER.is_dir():
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*pip, PACKAGE], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        made = Path(folder) / "templates"
        made.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                if WITHIN in member.name and member.name.endswith(".jinja"):
                    file = tar.extractfile(member)
                    assert file is not None, "it is a file"
                    (made / Path(member.name).name).write_bytes(file.read())
        FOLDER.parent.mkdir(exist_ok=True)
        made.rename(FOLDER)


def templates() -> list[Path]:
    """The templates' files; none before they were fetched."""
    return sorted(FOLDER.glob("*.jinja"))


def make(path: Path, folder: Path) -> ChatTokenizer:
    """A tokenizer with a template, and with its control tokens."""
    template = path.read_text(encoding="utf-8")
    make_tokenizer(folder, template, special=sorted(set(CONTROL.findall(template))))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|endoftext|>"}))
    return ChatTokenizer(folder, None)


def judged(path: Path) -> Row:
    """What becomes of a template."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make(path, Path(folder))
        return Row(
            path.stem,
            outcome(lambda: tokenizer.encode_chat([SYSTEM, USER])),
            turns(tokenizer),
            tools(tokenizer),
            thoughts(tokenizer, path.read_text(encoding="utf-8")),
            switches(tokenizer),
        )


def outcome(encode: Callable[[], Prompt]) -> str:
    """Whether a prompt comes of it, with what was changed for it."""
    try:
        return ", ".join(["ok", *(SAID[note] for note in encode().notes)])
    except InvalidRequest:
        return "refused"


def turns(tokenizer: ChatTokenizer) -> str:
    """Whether a session is what the whole chat would be, to the token."""
    try:
        log = tokenizer.encode_context([SYSTEM, USER, ANSWER]).ids + tokenizer.encode_turn([AGAIN], "assistant").ids
    except InvalidRequest as error:
        return "the system prompt goes with the last turn" if "moves a part" in str(error) else "refused"
    return "exact" if log == tokenizer.encode_chat([SYSTEM, USER, ANSWER, AGAIN]).ids else "differ"


def tools(tokenizer: ChatTokenizer) -> str:
    """Whether tools can be given, and their results."""
    given = outcome(lambda: tokenizer.encode_chat([SYSTEM, USER], TOOLS))
    came = outcome(lambda: tokenizer.encode_chat(CALLED, TOOLS[:1]))
    return given if given in (came, "refused") else ", ".join(dict.fromkeys(f"{given}, {came}".split(", ")))


def thoughts(tokenizer: ChatTokenizer, text: str) -> str:
    """The markers of thoughts, and whether the template opens them."""
    marks = [f"`{marks.begin}`".replace("|", "\\|").replace("\n", " ") for marks in tokenizer.form.thoughts]
    if not marks:
        thinks = "reasoning_effort" in text or "reasoning_strength" in text
        return "in messages of their own" if tokenizer.form.headers and thinks else ""
    prompts = [tokenizer.encode_chat([USER]), *(tokenizer.encode_chat([USER], reasoning=kind) for kind in Reasoning)]
    opened = any(prompt.reasoning for prompt in prompts)
    return " ".join(marks) + (", opened" if opened else "")


def switches(tokenizer: ChatTokenizer) -> str:
    """What the template can be asked for."""
    noted = {kind: tokenizer.encode_chat([USER], reasoning=kind).notes for kind in Reasoning}
    if NO_SWITCH in noted[Reasoning.ON]:  # thoughts that the template opens can be closed all the same
        return "" if NO_SWITCH in noted[Reasoning.OFF] else "off"
    off = [] if NO_OFF in noted[Reasoning.OFF] else ["off"]
    efforts = [each.value for each in (Reasoning.LOW, Reasoning.MEDIUM, Reasoning.HIGH) if not noted[each]]
    return " ".join([*off, "on", *(efforts if NO_EFFORTS not in noted[Reasoning.LOW] else [])])


def table(rows: list[Row]) -> str:
    """The table of docs/models.md."""
    head = "| template | prompt | turns | tools | thoughts | switch |\n|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| {row.name} | {row.prompt} | {row.turns} | {row.tools} | {row.thoughts} | {row.switches} |\n" for row in rows
    )


def main() -> None:
    """Fetch the templates and write the table."""
    fetch()
    page = ROOT / "docs" / "models.md"
    made: Any = table([judged(path) for path in templates()])
    page.write_text(TABLE.sub(lambda found: f"{found[1]}\n{made}\n{found[2]}", page.read_text()))


if __name__ == "__main__":
    main()
