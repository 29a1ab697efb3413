"""What the documents show is what the code does."""

import asyncio
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from docs import made
from docs.http_page import http_page
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.engine.messages import Close
from mlx_mcp.hosting.faces import APIS
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from tests.api.http.routes import serving_all
from tests.engine.house import House
from tests.fakes import fake_client

ROOT = Path(__file__).parent.parent
DESIGN = ROOT / "docs" / "design" / "kv-cache.md"


def picture(house):
    """The trees of blocks, one line each, in order of the tokens; sessions by name at the block where they are."""
    lines = []
    at = {}
    for session in house.engine.sessions.sessions.values():
        at.setdefault(session.leaf, []).append(session.options.name)

    def draw(block, depth):
        names = ", ".join(at.get(block, ()))
        if block.parent is not None:
            text = "".join(map(chr, block.tokens))
            tail = " tail" if len(block.tokens) < house.pool.block_tokens else ""
            ended = f" prompt to {block.prompt_end.num_tokens}" if block.prompt_end is not None else ""
            where = f"  <- {names}" if names else ""
            lines.append(f"{'  ' * depth}[{block.start},{block.end}) {text!r}{tail}{ended}{where}")
        for child in sorted(block.children.values(), key=lambda b: b.tokens):
            draw(child, depth + (block.parent is not None))

    for root in house.pool.roots.values():
        draw(root, 0)
    lines.append(f"{house.pool.used_bytes} bytes cached, {house.engine.stats.kv_reserved_bytes} in rows")
    return "\n".join(lines)


def story():
    """What the document tells, step by step."""
    house = House(max_kv_bytes=330, limits={"prefill_tokens_busy": 16})
    house.prime("You fix bugs. ", name="base")
    yield picture(house)
    house.fork("base", 2, ("ann", "bob"))
    yield picture(house)
    house.say("Red?", "ann", after="user", max_tokens=4)
    house.say("Blue?", "bob", after="user", max_tokens=4)
    house.engine.step()
    yield picture(house)
    house.run()
    yield picture(house)
    again = house.say("You fix bugs. Red?", max_tokens=1)
    house.run()
    yield f"{again.cached} of 18 tokens cached"
    house.ask(Close, "ann", ("base",))
    yield picture(house)
    house.pool.reclaim(14)
    yield picture(house)
    turn = house.say("|Go on", "ann", max_tokens=1)
    house.run()
    yield f"{turn.cached} of 28 tokens cached, {turn.miss.reason} from token {turn.miss.index} on\n{picture(house)}"


def test_the_worked_example_of_the_cache_is_what_happens():
    shown = re.findall(r"```text\n(.*?)\n```", DESIGN.read_text(), re.S)
    assert shown == list(story())


async def test_every_resource_and_prompt_with_its_arguments_is_in_the_guide():
    server = build_server(Service(fake_client(), Registry(None)))
    words = [str(each.uri) for each in await server.list_resources()]
    words += [each.uri_template for each in await server.list_resource_templates()]
    for prompt in await server.list_prompts():
        words += [prompt.name, *(argument.name for argument in prompt.arguments)]
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert len(words) > 10
    assert [word for word in words if f"`{word}`" not in guide] == []


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("tools.md", made.tools_page),
        ("cli.md", made.cli_page),
        ("http-api.md", http_page),
        ("watching.md", made.watching_page),
    ],
)
def test_the_reference_is_what_the_code_says(name, make):
    assert (made.DOCS / name).read_text() == make(), "run `make docs-made`"


def test_the_site_has_every_page_and_every_picture_that_it_shows():
    site = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(made.DOCS).as_posix() for path in made.DOCS.rglob("*.md")]
    assert [page for page in pages if not re.search(rf"[-:] {re.escape(page)}$", site, re.M)] == []
    steps = (made.DOCS / "five-minutes.md").read_text()
    assert set(re.findall(r"pictures/([\w-]+)\.svg", steps)) == made.PICTURES.keys()
    for name, commands in made.PICTURES.items():
        drawn = html.unescape(re.sub(r"<[^>]*>", "", (made.DOCS / "pictures" / f"{name}.svg").read_text()))
        for command in commands:
            assert "".join(command.split()) in "".join(drawn.split()), f"run `make docs-made` for {name}.svg"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_the_worked_example_of_the_http_api_answers_what_it_shows():
    engine, _ = wire(Config.load())
    async with serving_all(engine, APIS) as address:
        ran = await asyncio.create_subprocess_exec(
            "sh", str(made.DOCS / "http_sessions.sh"), stdout=subprocess.PIPE, env=os.environ | {"SERVER": address}
        )
        told, _ = await ran.communicate()
    engine.close()
    assert ran.returncode == 0
    answers = [json.loads(line.removeprefix("data: ")) for line in told.decode().splitlines() if "{" in line]
    answers = [each for each in answers if each.get("type") not in ("progress", "delta")]
    steps = (made.DOCS / "http_sessions.sh").read_text().split("\nask ")[1:]
    assert len(answers) == len(steps)
    for step, answer in zip(steps, answers, strict=True):
        for shown in re.findall(r"# → (.*)", step):
            assert answer | json.loads(shown) == answer
    assert answers[4]["results"][0]["text"] == "4096"
