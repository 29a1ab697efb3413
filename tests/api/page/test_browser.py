"""The page in a real browser: `make test-page`. Skipped where there is no Chromium, or no playwright.

Pictures of every state go to build/page, to be looked at.
"""

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

import pytest

from mlx_mcp.errors import EngineDead
from mlx_mcp.service.generate import Options, generate
from tests.api.page.scenes import US, PacedRunner, busy, server
from tests.service.house import asked, unheard

playwright = pytest.importorskip("playwright.async_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(not os.environ.get("TEST_PAGE"), reason="a browser takes seconds a test: make test-page"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
PICTURES = Path(__file__).parents[3] / "build" / "page"
LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 400, "height": 800}},
    "narrow-dark": {"color_scheme": "dark", "viewport": {"width": 400, "height": 800}},
}


@contextlib.asynccontextmanager
async def browser(**look):
    """A page of a browser; whatever it complains of fails the test."""
    faults = []
    async with playwright.async_playwright() as driver:
        chromium = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = await chromium.new_context(**look)
        page = await context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type in ("error", "warning") else None)
        page.faults = faults
        yield page
        await chromium.close()


async def picture(page, name):
    PICTURES.mkdir(parents=True, exist_ok=True)
    await page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


async def text(page, selector):
    return " ".join((await page.inner_text(selector)).split())


async def comes(page, condition):
    """Wait until something holds in the page, whose policy lets playwright wait for nothing of the kind."""
    async with asyncio.timeout(30):
        while not await page.evaluate(condition):
            await asyncio.sleep(0.05)


async def fits(page):
    """Whether nothing is wider than the window."""
    return await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("look", LOOKS)
async def test_a_server_with_nothing_to_do(look):
    async with server() as (address, _), browser(**LOOKS[look]) as page:
        await page.goto(address)
        await page.wait_for_selector("#status.ok")
        assert await text(page, "#no-calls") == "Nothing runs and nothing waits."
        await picture(page, f"empty-{look}")
        assert await fits(page)
        assert page.faults == []


@pytest.mark.parametrize("look", LOOKS)
async def test_a_server_with_five_calls_that_run_and_twenty_sessions(look):
    async with server(PacedRunner()) as (address, service), busy(service), browser(**LOOKS[look]) as page:
        await page.goto(address)
        await comes(page, "samples.length >= 5")
        await picture(page, f"busy-{look}")
        assert await page.locator(".call").count() == 9
        assert await page.locator(".call.waits").count() == 4
        assert "waits for a place in the batch" in await text(page, ".call.waits >> nth=0")
        assert await page.locator(".session").count() == 20
        depth = (
            "element => { let n = 0; while ((element = element.parentElement.closest('ul.tree ul'))) n++; return n; }"
        )
        depths = await page.locator(".session").evaluate_all(f"all => all.map({depth})")
        assert [depths.count(n) for n in range(4)] == [3, 12, 3, 2]
        assert await page.evaluate("samples[samples.length - 1].output") > 0
        assert (await page.locator("#plot-output .curve").get_attribute("d")).count("L") >= 4
        assert "handbook" in await text(page, "#sessions")
        assert await fits(page)
        assert page.faults == []


@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
async def test_an_engine_that_has_died(look, monkeypatch):
    async with server() as (address, service), browser(**LOOKS[look]) as page:
        await generate(service, US, asked("hello"), Options(model="tiny"), unheard)
        await page.goto(address)
        await page.wait_for_selector("#status.ok")
        monkeypatch.setattr("mlx_mcp.engine.engine.Engine.check_time", lambda engine: 1 / 0)
        with contextlib.suppress(EngineDead):
            await generate(service, US, asked("hello"), Options(model="tiny"), unheard)
        await page.wait_for_selector("#status.dead")
        await picture(page, f"dead-{look}")
        assert "Start the server again" in await text(page, "#notice")
        assert await page.title() == "dead · mlx-mcp"


async def test_a_server_that_is_gone_is_said_to_be():
    async with browser(**LOOKS["light"]) as page:
        async with server() as (address, _):
            await page.goto(address)
            await page.wait_for_selector("#status.ok")
        await page.wait_for_selector("#status.away")
        assert "does not answer" in await text(page, "#notice")
        await picture(page, "away-light")


async def test_the_page_asks_for_the_token_once_and_sends_it_as_a_header():
    sent = []
    async with server(token="right") as (address, _), browser(**LOOKS["light"]) as page:
        page.on("request", lambda request: sent.append((request.url, request.headers.get("authorization"))))
        await page.goto(address)
        await page.wait_for_selector("#auth:visible")
        assert await page.is_hidden("#columns")  # what is not known must not look like nothing
        await picture(page, "token-light")
        await page.keyboard.type("wrong")  # the field has the focus
        await page.keyboard.press("Enter")
        await comes(page, "document.getElementById('notice').textContent === 'The token was refused.'")
        await page.keyboard.type("right")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#status.ok")
        assert await page.is_hidden("#auth")
        await page.reload()
        await page.wait_for_selector("#status.ok")
        await picture(page, "known-light")
    asked = [token for url, token in sent if url.endswith("/page/state")]
    assert list(dict.fromkeys(asked)) == [None, "Bearer wrong", "Bearer right"]
    assert not any("right" in url or "wrong" in url for url, _ in sent)


async def test_nothing_that_a_name_may_hold_becomes_part_of_the_page():
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    async with server() as (address, service), browser(**LOOKS["narrow"]) as page:
        await generate(service, US, asked("hello"), Options(model="tiny", keep=True), unheard)

        async def put_in(route):
            response = await route.fetch()
            state = await response.json()
            state["sessions"][0]["name"] = hostile
            state["models"][0]["name"] = hostile + "x" * 300
            state["errors"] = {hostile: 1}
            call = {"number": 1, "connection": hostile, "model": hostile, "session": hostile, "does": hostile}
            call |= {"runs": True, "done": 5, "total": 9, "tokens": 5, "tokens_per_s": 1.5, "since_s": 3}
            await route.fulfill(json=state | {"calls": [call], "num_calls": 1, "reasons": [hostile]})

        await page.route("**/page/state", put_in)
        await page.goto(address)
        await page.wait_for_selector(".call")
        await picture(page, "hostile-narrow")
        assert await page.locator("img").count() == 0
        assert await page.locator("script").count() == 1
        assert await page.title() == "mlx-mcp"
        assert hostile in await text(page, "#sessions")
        assert await fits(page)
        assert page.faults == []


async def test_the_policy_lets_no_other_script_run_and_no_other_host_be_asked():
    async with server() as (address, _), browser(**LOOKS["light"]) as page:
        await page.goto(address)
        await page.wait_for_selector("#status.ok")
        await page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<p id=p onclick=\"document.title=1\">p</p>')"
        )
        await page.click("#p")
        assert await page.title() == "mlx-mcp"
        asked = await page.evaluate("fetch('http://example.invalid/').then(() => 'asked', () => 'refused')")
        assert asked == "refused"
        assert any("Content Security Policy" in fault for fault in page.faults)


async def test_the_page_can_be_paused_by_keyboard_alone():
    async with server() as (address, _), browser(**LOOKS["light"]) as page:
        await page.goto(address)
        await page.wait_for_selector("#status.ok")
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.id") == "pause"
        assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        await page.keyboard.press("Enter")
        assert await page.get_attribute("#pause", "aria-pressed") == "true"
        count = await page.evaluate("samples.length")
        assert await page.evaluate("new Promise(done => setTimeout(() => done(samples.length), 2200))") == count
        await page.keyboard.press("Enter")
        await comes(page, f"samples.length > {count}")
