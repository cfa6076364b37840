"""The page of a run in a real browser, opened from the disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup

from eval.pages.charts import Series, line_chart
from eval.pages.page import Section, write_page
from eval.pages.page import page as made_page
from eval.pages.pictures import embedded
from eval.report.gather import gather
from eval.report.run_page import run_page
from ssl.pretrain import run
from tests.browser import PHONE, Browser, Visit, overflow
from tests.test_pretrain import METHODS, SHORT, composed
from tests.test_report import hostile_run

LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 27)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that a run of MAE writes, which was continued once."""
    out = tmp_path_factory.mktemp("mae") / "run"
    for steps in (3, 6):
        run(composed(*METHODS["mae"], *SHORT, f"trainer.steps={steps}", "trainer.eval_every_epochs=1"), out=out)
    return out / "report.html"


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a folder whose texts try to be a part of it."""
    folder = tmp_path_factory.mktemp("hostile")
    write_page(folder / "page.html", run_page(gather(hostile_run(folder))))
    return folder / "page.html"


@pytest.fixture
def visit(browser: Browser, page: Path) -> Iterator[Visit]:
    """The page on a desktop; whatever a test does there, nothing may go wrong and nothing be asked for."""
    visit = browser.open(page)
    yield visit
    visit.check(page.as_uri())
    visit.page.context.close()


def lines(visit: Visit, chart: str) -> list[str]:
    """The drawn curves of a chart, as the SVG paths that the browser has."""
    return visit.page.locator(f"#{chart} path.js-line").evaluate_all(
        "paths => paths.map(path => path.getAttribute('d'))"
    )


def test_every_chart_is_drawn_with_its_points(visit: Visit):
    charts = visit.page.locator("figure.chart").evaluate_all("charts => charts.map(chart => chart.id)")
    assert {"chart-loss", "chart-lr", "chart-images-5f-per-5f-second", "chart-rankme"} <= set(charts)
    for chart in charts:
        (path,) = lines(visit, chart)
        count = visit.page.evaluate(
            "id => JSON.parse(document.getElementById(id + '-data').textContent).series[0].y.length", chart
        )
        assert len(re.findall("[ML,]", path)) >= count
    assert visit.page.locator("#chart-loss .shapelayer path").count() == 1  # the resume at step 3


def test_every_picture_is_shown(visit: Visit):
    shown = visit.page.locator("figure.picture img")
    assert shown.count() >= 3
    assert all(shown.evaluate_all("all => all.map(each => each.complete && each.naturalWidth > 10 && each.alt !== '')"))


def test_the_log_scale_the_axis_and_the_table_are_worked_by_the_keyboard(visit: Visit):
    scale = "document.querySelector('#chart-loss .plot')._fullLayout.yaxis.type"
    button = visit.page.locator("#chart-loss button.log")
    button.focus()
    visit.page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert visit.page.evaluate(scale) == "log"
    visit.page.keyboard.press("Space")
    assert visit.page.evaluate(scale) == "linear"
    epoch = visit.page.locator("button[data-x=epoch]")
    epoch.focus()
    visit.page.keyboard.press("Enter")
    assert visit.page.locator("#chart-lr .xtitle").text_content() == "epoch"
    assert epoch.get_attribute("aria-pressed") == "true"
    summary = visit.page.locator("#chart-loss summary")
    summary.focus()
    visit.page.keyboard.press("Enter")
    rows = visit.page.locator("#chart-loss tbody tr")
    rows.first.wait_for()  # a browser tells the script later that the part was opened
    assert rows.count() == 6
    assert rows.first.locator("td").first.text_content() == "0.333333"  # in epochs, as was chosen


def test_the_first_key_leads_past_the_links_to_the_content(visit: Visit):
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.className") == "skip"
    assert visit.page.locator("a.skip").bounding_box()["x"] >= 0
    visit.page.keyboard.press("Enter")
    assert visit.page.evaluate("document.activeElement.id") == "main"
    outlined = "getComputedStyle(document.activeElement).outlineStyle"
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate(outlined) == "solid"


def test_dark_and_light_follow_the_system_and_the_switch(browser: Browser, page: Path):
    for dark, own, other in ((False, LIGHT, DARK), (True, DARK, LIGHT)):
        visit = browser.open(page, dark=dark)
        colour = "getComputedStyle(document.body).backgroundColor"
        stroke = "document.querySelector('#chart-loss path.js-line').style.stroke"
        before = visit.page.evaluate(stroke)
        assert visit.page.evaluate(colour) == own
        visit.page.locator("#theme").click()
        assert visit.page.evaluate(colour) == other
        assert visit.page.evaluate(stroke) != before
        visit.page.reload()
        assert visit.page.evaluate(colour) == other  # it was kept
        visit.check(page.as_uri())
        visit.page.context.close()


def test_texts_and_curves_stand_out_from_the_ground_in_dark_and_light(browser: Browser, page: Path):
    for dark in (False, True):
        visit = browser.open(page, dark=dark)
        names = ["--text", "--soft", "--link", "--warn", "--bad", "--good", *(f"--c{number}" for number in range(8))]
        values = visit.page.evaluate(
            "names => names.map(name => getComputedStyle(document.documentElement).getPropertyValue(name).trim())",
            ["--back", *names],
        )
        back, *others = map(luminance, values)
        for name, value in zip(names, others, strict=True):
            contrast = (max(back, value) + 0.05) / (min(back, value) + 0.05)
            assert contrast >= (3 if name.startswith("--c") else 4.5), name  # WCAG 2.2, 1.4.11 and 1.4.3
        visit.page.context.close()


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_phone_shows_it_without_scrolling_sideways(browser: Browser, page: Path, hostile_page: Path):
    for path in (page, hostile_page):
        visit = browser.open(path, viewport=PHONE, touch=True)
        assert overflow(visit) == 0
        visit.check(path.as_uri())
        visit.page.context.close()


def test_a_wide_picture_has_a_row_of_its_own_and_narrow_ones_share_one(browser: Browser, tmp_path: Path):
    figures = [embedded(np.zeros((60, width, 3), np.uint8), f"{width}") for width in (300, 301, 1160)]
    body = Markup('<div class="pair">') + Markup("").join(figures) + Markup("</div>")
    write_page(tmp_path / "page.html", made_page("Pictures", [Section("p", "Pictures", body)], charts=False))
    for viewport, least, row in ((None, 1100, 1100), (PHONE, 600, 320)):
        visit = browser.open(tmp_path / "page.html", viewport=viewport)
        first, second, wide = (visit.page.locator("img").nth(place).bounding_box() or {} for place in range(3))
        assert (first["y"] == second["y"]) == (viewport is None)
        assert wide["y"] > second["y"]
        assert wide["width"] >= least
        assert (visit.page.locator("figure").nth(2).bounding_box() or {})["width"] >= row
        assert overflow(visit) == 0
        visit.page.context.close()


def test_a_single_value_is_a_large_point_over_an_axis_from_zero(browser: Browser, tmp_path: Path):
    drawn = [
        line_chart(
            name, [Series("a", ys, {"step": range(len(ys))})], x={"step": "step"}, y="a", percent=name == "share"
        )
        for name, ys in {"one": [2.04], "share": [0.5], "two": [2.04, 2.05]}.items()
    ]
    write_page(tmp_path / "page.html", made_page("Charts", [Section("a", "A", Markup("").join(drawn))]))
    visit = browser.open(tmp_path / "page.html")
    shown = {
        name: visit.page.evaluate(
            f"(plot => [plot._fullLayout.yaxis.range[0], plot._fullData[0].marker.size])"
            f"(document.querySelector('#{name} .plot'))"
        )
        for name in ("one", "share", "two")
    }
    visit.page.context.close()
    assert shown["one"][0] == shown["share"][0] == 0
    assert shown["two"][0] > 1
    assert shown["one"][1] > 2 * shown["two"][1]


def test_the_command_is_copied(visit: Visit):
    button = visit.page.locator("button[data-copy=again]")
    button.click()
    visit.until("() => document.querySelector('button[data-copy=again]').textContent !== 'Copy'")
    assert button.text_content() == "Copied"


def test_hostile_texts_run_nothing_and_are_shown_as_they_are(browser: Browser, hostile_page: Path):
    visit = browser.open(hostile_page)
    dialogs = []
    visit.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    for summary in visit.page.locator("summary").all():
        summary.click()
    visit.page.mouse.move(300, 900)
    assert visit.page.locator("img").count() == 0
    assert dialogs == []
    assert "<img src=x onerror=alert(1)>" in visit.page.locator("h1").text_content()
    visit.check(hostile_page.as_uri())
    visit.page.context.close()


def test_the_page_refuses_requests_that_anything_in_it_would_make(browser: Browser, page: Path):
    visit = browser.open(page)
    refused = visit.page.evaluate("fetch('https://example.org/').then(() => false, () => true)")
    assert refused
    assert any("Content Security Policy" in said for said in visit.console)
    assert [url for url in visit.requests if not url.startswith("file:")] == []
    visit.page.context.close()
