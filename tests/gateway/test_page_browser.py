"""The live page in a real browser."""

import pytest
from chromium import launch_options
from fake_engine import answers
from gateway_harness import run

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)>"


def browse(look, *engine_answers, expected="401", **options):
    """Open the page of a gateway and run ``look(page, front)``; the console may say what is ``expected`` only."""
    from playwright.async_api import async_playwright

    async def scenario(front):
        for _ in range(3):
            await front.post("/v1/completions", {"prompt": "x" * 200}, Authorization="Bearer one")
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(**launch_options())
            page = await browser.new_page(viewport={"width": 420, "height": 800})
            told, asked = [], []
            page.on("console", lambda message: told.append(message.text))
            page.on("pageerror", lambda error: told.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            await page.goto(f"http://127.0.0.1:{front.port}/")
            await look(page, front)
            own = f"http://127.0.0.1:{front.port}/"
            assert {url for url in asked if not url.startswith("data:")} == {own, own + "instances"}
            assert [line for line in told if expected not in line] == []
            await browser.close()

    run(scenario, *engine_answers, **options)


def test_instances_and_decisions_are_shown_inside_the_window():
    async def look(page, front):
        cells = page.locator("#instances tbody tr").first.locator("td")
        await cells.first.wait_for()
        texts = await cells.all_inner_texts()
        assert texts == [front.engines[0].name, "healthy", "0", "3", "0", "64.0 %", "–"]
        assert await page.locator("#alarms").inner_text() == "None."
        assert "lmetric" in await page.locator("#status").inner_text()
        assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert await page.locator("#decisions details").count() == 3

    browse(look, answers(), answers())


def test_a_decision_opens_and_stays_open():
    async def look(page, front):
        latest = page.locator("#decisions details").first
        await latest.locator("summary").click()
        chosen = latest.locator("tr.chosen td")
        assert (await chosen.all_inner_texts())[0] == front.engines[0].name
        for _ in range(2):  # the page draws itself anew
            async with page.expect_response("**/instances"):
                pass
        assert await latest.locator("table").is_visible()

    browse(look, answers(), answers())


def test_an_alarm_is_shown_when_an_engine_fails():
    async def look(page, front):
        front.engines[1].healthy = False
        for _ in range(3):
            await front.gateway.fleet.check()
        alarm = page.locator("#alarms li")
        await alarm.wait_for()
        assert await alarm.inner_text() == f"{front.engines[1].name}: failed, and gets no requests"

    browse(look, answers(), answers())


def test_what_a_client_names_itself_is_text():
    async def look(page, front):
        front.gateway.records.recent[-1] = (0.0, HOSTILE, front.gateway.records.recent[-1][2])
        summary = page.locator("#decisions summary", has_text=HOSTILE)
        await summary.wait_for()
        assert await page.locator("img").count() == 0

    browse(look, answers())


def test_the_page_asks_for_the_key():
    async def look(page, front):
        await page.locator("#key").fill("one")
        await page.get_by_role("button").click()
        await page.locator("#instances tbody tr").first.wait_for()
        assert not await page.locator("#login").is_visible()

    browse(look, answers(), api_keys=("one",))


def test_a_gateway_that_is_gone_is_told():
    async def look(page, front):
        await page.locator("#instances tbody tr").first.wait_for()
        await front.gateway.stop()
        await page.get_by_text("The gateway does not answer.").wait_for()

    browse(look, answers(), expected="ERR_CONNECTION_REFUSED")
