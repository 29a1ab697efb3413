"""What docs/openai.md shows is what happens, and it names all that is taken."""

import asyncio
import json
import re
from pathlib import Path

from mlx_mcp.api.openai.api import OPENAI
from mlx_mcp.api.openai.errors import CODES, CODES_OF_STATUS
from mlx_mcp.service.replies import MAX_BYTES, MAX_REPLIES
from tests.api.openai.house import http_client, serving

PAGE = (Path(__file__).parents[3] / "docs" / "openai.md").read_text()
URL = "http://127.0.0.1:8080"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def alike(shown, real):
    """The keys of an example, which are not values that differ from run to run."""
    if isinstance(shown, dict):
        return {key: alike(value, real[key]) for key, value in shown.items()} if shown.keys() == real.keys() else real
    if isinstance(shown, list):
        return [alike(*pair) for pair in zip(shown, real, strict=True)]
    return shown if isinstance(shown, int) or str(shown).endswith("…") else real


async def test_the_answer_that_is_shown_is_the_one_that_comes(embedded):
    body = re.search(r"-d '(.*?)'", blocks("sh")[0])[1]
    async with serving(embedded.engine, embedded) as address, http_client() as http:
        response = await http.post(f"{address}/v1/chat/completions", content=body)
    [shown] = map(json.loads, blocks("json"))
    assert alike(shown, response.json()) == shown


async def test_the_program_that_is_shown_prints_what_it_says(embedded, capsys):
    [program] = blocks("python")
    async with serving(embedded.engine, embedded) as address:
        await asyncio.to_thread(exec, program.replace(URL, address) + "client.close()\n", {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", program)


def test_every_route_member_and_code_is_on_the_page():
    words = {name for each in OPENAI.endpoints if each.takes for name in each.takes.model_fields}
    words |= {code for _, code, _ in CODES} | set(CODES_OF_STATUS.values())
    missing = [word for word in sorted(words) if not re.search(rf"`[^`\n]*\b{word}\b[^`\n]*`", PAGE)]
    assert missing == []
    for each in OPENAI.endpoints:
        assert re.sub(r"\{.*", "", each.path) in PAGE
    assert f"{MAX_REPLIES} of them, and {MAX_BYTES >> 20} MiB" in PAGE
