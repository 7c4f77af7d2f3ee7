"""The page in a real browser: what it shows, and that it asks nobody for anything."""

import json

import pytest
from chromium import launch_options

from mulsched.cli import main

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("page") / "out"
    arguments = "--duration 10 --policy lmetric --policy vllm --sweep rate=1,2 --tune linear:weight=0,0.5,1"
    assert (
        main(
            [
                "replay",
                *arguments.split(),
                "--slo",
                "ttft=0.2,tpot=0.02",
                "--repeat",
                "2",
                "--out",
                str(directory),
            ]
        )
        == 0
    )
    assert main(["report", str(directory)]) == 0
    return directory


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        yield browser
        browser.close()


@pytest.fixture(params=[(1400, 900), (420, 800)], ids=["desk", "phone"])
def page(request, browser, results):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.told, page.asked = [], []
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto((results / "report.html").as_uri())
    yield page
    page.close()


def test_the_page_makes_no_requests_and_no_errors(page, results):
    page.wait_for_load_state("networkidle")
    asked = [url for url in page.asked if not url.startswith("data:")]
    assert asked == [(results / "report.html").as_uri()]
    assert page.told == []


def test_the_table_shows_the_numbers_of_the_results(page, results):
    document = json.loads((results / "results.json").read_text())
    rows = [row for row in document["results"] if row["role"] == "result"]
    rows.sort(key=lambda row: row["rate_scale"])
    heads = page.locator("#results thead th").all_inner_texts()
    column = {" ".join(head.split()): i for i, head in enumerate(heads)}
    lines = page.locator("#results tbody tr").all()
    assert len(lines) == len(rows) == 6
    for line, row in zip(lines, rows, strict=True):
        shown = [" ".join(text.split()) for text in line.locator("th, td").all_inner_texts()]
        assert shown[0] == row["label"]
        for head, figure, factor, decimals in (
            ("TPOT ms mean", "tpot_mean_s", 1000, 1),
            ("TPOT ms p99", "tpot_p99_s", 1000, 1),
            ("goodput req/s", "goodput_per_s", 1, 2),
            ("hit ratio", "hit_ratio", 1, 3),
        ):
            value, half = factor * row["figures"][figure], factor * row["half_widths"][figure]
            assert shown[column[head]] == f"{value:,.{decimals}f} ±{half:,.{decimals}f}"


def test_every_plot_is_drawn_inside_the_page(page):
    width = page.viewport_size["width"]
    images = page.locator("figure img").all()
    assert len(images) == 7
    for image in images:
        natural, box = (
            image.evaluate("i => [i.complete, i.naturalWidth, i.naturalHeight]"),
            image.bounding_box(),
        )
        assert natural[0] is True
        assert min(natural[1:]) > 100
        assert box["width"] > 200
        assert box["height"] > 40
        frame = image.locator("xpath=..").bounding_box()  # scrolls where the window is narrow
        assert frame["x"] + frame["width"] <= width


def test_nothing_but_tables_is_wider_than_the_window(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_headings_and_verdict_are_there_to_be_read(page, results):
    assert page.locator("h1").inner_text() == "Replay of synthetic:chat"
    assert page.locator("h2").all_inner_texts() == ["Summary", "Plots", "How it was made"]
    assert page.locator("#verdict p").first.is_visible()
    assert "lmetric" in page.locator("#verdict").inner_text()
    assert page.locator("#noise").inner_text().startswith("Noise floor: lmetric")
    command = json.loads((results / "results.json").read_text())["settings"]["command"]
    assert page.locator("pre").inner_text().strip() == command


def test_figures_are_named_for_screen_readers(page):
    for region in page.get_by_role("img").all():
        assert region.get_attribute("alt")
    assert page.get_by_role("region", name="Cache hits").count() == 1
    assert page.get_by_role("table").first.is_visible()


def test_trials_open_on_demand(page):
    trial = page.locator("details tbody tr").first
    assert not trial.is_visible()
    page.locator("summary").click()
    assert trial.is_visible()
