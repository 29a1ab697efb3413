"""The chat templates that llama.cpp keeps; `make formats` fetches them, and without them nothing is tried."""

import re

import pytest

from mlx_mcp.chat.prompt import Reasoning
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from tests.formats.llama_templates import ROOT, TABLE, USER, Row, judged, make, templates
from tests.mlx_backend.tokenizers_made import read

pytestmark = pytest.mark.skipif(not templates(), reason="`make formats` fetches the templates")

# Made for models that do not think, or that think without any marker.
WITHOUT_THOUGHTS = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "GigaChat3-10B-A1.8B",
    "GigaChat3.1-10B-A1.8B",
    "Kimi-K2-Instruct",
    "LFM2-8B-A1B",
    "MiMo-VL",
    "MiniMax-M1",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen3-Coder",
    "fireworks-ai-llama-3-firefunction-v2",
    "google-gemma-2-2b-it",
    "ibm-granite-granite-4.0",
    "ibm-granite-granite-4.1",
    "meetkai-functionary-medium-v3.1",
    "meetkai-functionary-medium-v3.2",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "moonshotai-Kimi-K2",
    "unsloth-mistral-Devstral-Small-2507",
}


def listed() -> list[Row]:
    """The rows of the table in docs/models.md."""
    found = TABLE.search((ROOT / "docs" / "models.md").read_text())
    assert found, "docs/models.md has no place for the table"
    lines = found[0].splitlines()[4:-2]
    return [Row(*(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])) for line in lines]


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_the_table_says_what_becomes_of_a_template(path):
    assert [row for row in listed() if row.name == path.stem] == [judged(path)], "run `make formats`"


def test_all_render_turns_are_exact_and_few_refuse_tools():
    rows = listed()
    assert [row.name for row in rows] == [path.stem for path in templates()]
    assert [row.name for row in rows if not row.prompt.startswith("ok")] == []
    assert [row.name for row in rows if row.turns != "exact"] == ["mistralai-Mistral-Nemo-Instruct-2407"]
    assert len([row.name for row in rows if "refused" in row.tools]) <= 6
    assert {row.name for row in rows if not row.thoughts} == WITHOUT_THOUGHTS


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_thoughts_come_apart_from_the_answer_whoever_opened_them(tmp_path, path):
    tokenizer: ChatTokenizer = make(path, tmp_path)
    for marks in tokenizer.form.thoughts:
        pieces, _ = read(tokenizer, f"{marks.begin}hm{marks.end}\n\nyes")
        assert [(kind, text.strip()) for kind, text in pieces] == [("reasoning", "hm"), ("answer", "yes")]
    for kind in (None, *Reasoning):
        prompt = tokenizer.encode_chat([USER], reasoning=kind)
        if prompt.reasoning:
            opened = tokenizer.form.opened_thoughts(tokenizer.decode(prompt.ids))
            assert opened is not None
            pieces, _ = read(tokenizer, f"hm{opened.end}yes", reasoning=True)
            assert pieces[0] == ("reasoning", "hm")
