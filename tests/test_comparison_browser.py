"""The comparison page in a real browser: tables sort and filter, curves are drawn and chosen, nothing is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.pages.page import Section, page
from eval.pages.sortable import Column, Row, SortableTable, number_cell, script, style, text_cell
from eval.report.comparison import write
from eval.report.comparison_curves import MOST_DRAWN
from eval.report.comparison_tables import setting_cell
from eval.report.metric_titles import title_of
from tests.browser import PHONE, Browser, Visit, overflow
from tests.made_runs import protocol, rows, write_run, write_sweep

NAMES = ["run10", "run2", "Run1", "run3", "run20"]
TOP1 = [0.5, None, 0.25, float("nan"), 0.5]
SETTINGS = ["cosine", "1e-3", None, "0.2", "30"]


@pytest.fixture(scope="module")
def table_page(tmp_path_factory) -> Path:
    """A page with one table of which each column tells something about sorting."""
    made = [
        Row(
            [text_cell(name), number_cell(top1), text_cell(None) if setting is None else setting_cell(setting)],
            key=name,
        )
        for name, top1, setting in zip(NAMES, TOP1, SETTINGS)
    ]
    table = SortableTable("t", "Made rows", [Column("name"), Column("top1"), Column("setting", ["mixed"])], made)
    text = page("Made", [Section("s", "Table", table.html())], scripts=[script()], styles=[style()], charts=False)
    path = tmp_path_factory.mktemp("table") / "table.html"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """The page of a sweep of 14 runs of two protocols, one of which failed."""
    home = tmp_path_factory.mktemp("home")
    jobs: list[dict[str, Any]] = []
    for number in range(14):
        lr, seed = 10.0 ** -(number // 2 % 4 + 1), number % 2
        how = protocol(k=[20 if number % 2 else 200])
        out = write_run(
            home / "runs" / f"run{number}",
            {"optim.base_lr": lr, "seed": seed, "model.args.depth": number // 2},
            lines=rows(80, every=1, lr=lr, knn_top1=number / 20, only_here=1.0) if number == 3 else rows(80, every=1),
            results={"knn": ({"top1": (14 - number) / 20}, how)},
        )
        words = [f"optim.base_lr={lr:g}", f"seed={seed}", f"model.args.depth={number // 2}"]
        jobs.append({"overrides": words, "out": str(out), "objective": number / 10})
    jobs.append({"overrides": ["optim.base_lr=9", "seed=0"], "state": "failed", "message": "error: <b>too large</b>"})
    return write([write_sweep(home / "swept", jobs)], home / "comparison.html")


@pytest.fixture
def visit(browser: Browser, comparison: Path) -> Iterator[Visit]:
    opened = browser.open(comparison)
    yield opened
    opened.check("file:")
    opened.page.context.close()


def column(visit: Visit, table: str, place: int) -> list[str]:
    """The texts of a column's visible rows."""
    cells = f"#{table} tbody tr:not([hidden]) > :nth-child({place + 1})"
    return visit.page.eval_on_selector_all(cells, "cells => cells.map(cell => cell.firstChild.textContent.trim())")


def sort_state(visit: Visit, place: int) -> str | None:
    return visit.page.get_attribute(f"#t thead th:nth-child({place + 1})", "aria-sort")


def drawn(visit: Visit, chart: str) -> dict[str, int]:
    """The curves that a chart's SVG has, by name, with the number of the points that each goes through."""
    return visit.page.evaluate(
        """(id) => {
            const plot = document.querySelector(`#${id} .plot`);
            const lines = [...plot.querySelectorAll(".scatterlayer .trace path.js-line")];
            return Object.fromEntries(plot.calcdata.map((points, i) =>
                [points[0].trace.name, (lines[i]?.getAttribute("d") || "").includes("L") ? points.length : 0]));
        }""",
        chart,
    )


def chart_of(visit: Visit, title: str) -> str:
    figure = visit.page.locator("figure.chart", has=visit.page.locator("figcaption b", has_text=title)).first
    found = figure.get_attribute("id")
    assert found is not None
    return found


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_click_sorts_both_ways_with_missing_values_last_and_equal_rows_as_they_were(browser, table_page):
    visit = browser.open(table_page)
    head = visit.page.locator("#t thead button", has_text="top1")
    assert sort_state(visit, 1) is None
    head.click()
    assert (sort_state(visit, 1), column(visit, "t", 0)) == ("ascending", ["Run1", "run10", "run20", "run2", "run3"])
    head.click()
    assert (sort_state(visit, 1), column(visit, "t", 0)) == ("descending", ["run10", "run20", "Run1", "run2", "run3"])
    assert column(visit, "t", 1) == ["0.5", "0.5", "0.25", "–", "–"]
    visit.check("file:")


def test_names_are_sorted_by_the_numbers_in_them_and_the_keyboard_does_it(browser, table_page):
    visit = browser.open(table_page)
    visit.page.locator("#t thead button", has_text="name").focus()
    visit.page.keyboard.press("Enter")
    assert column(visit, "t", 0) == ["Run1", "run2", "run3", "run10", "run20"]
    assert "sorted by name, ascending" in visit.page.inner_text("#t [role=status]")
    visit.page.keyboard.press("Space")
    assert column(visit, "t", 0) == ["run20", "run10", "run3", "run2", "Run1"]
    assert (sort_state(visit, 0), sort_state(visit, 1)) == ("descending", None)
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Enter")
    assert (sort_state(visit, 0), sort_state(visit, 1)) == (None, "ascending")
    visit.check("file:")


def test_numbers_stand_before_words_in_a_column_of_both(browser, table_page):
    visit = browser.open(table_page)
    head = visit.page.locator("#t thead button", has_text="setting")
    head.click()
    assert column(visit, "t", 2) == ["1e-3", "0.2", "30", "cosine", "–"]
    head.click()
    assert column(visit, "t", 2) == ["cosine", "30", "0.2", "1e-3", "–"]
    visit.check("file:")


def test_only_rows_with_all_words_of_the_filter_stay(browser, table_page):
    visit = browser.open(table_page)
    search = visit.page.locator("#t input[type=search]")
    search.fill("RUN 0.5")
    assert column(visit, "t", 0) == ["run10", "run20"]
    assert visit.page.inner_text("#t [role=status]") == "2 of 5 rows"
    search.fill("")
    assert len(column(visit, "t", 0)) == 5
    visit.check("file:")


def test_columns_are_hidden_and_shown_by_their_boxes(visit):
    heads = "#runs-table thead th"
    before = visit.page.locator(f"{heads}:visible").count()
    visit.page.locator("#runs-table summary").click()
    box = visit.page.get_by_label("folder", exact=True)
    assert not box.is_checked()
    box.check()
    assert visit.page.locator(f"{heads}:visible").count() == before + 1
    assert visit.page.locator("#runs-table tbody tr").first.locator("td:visible").last.inner_text().endswith("run0")
    box.uncheck()
    assert visit.page.locator(f"{heads}:visible").count() == before


def test_a_row_is_not_pulled_apart_by_sorting(visit):
    def values() -> dict[str, str]:
        names, places = column(visit, "runs-table", 0), [4, 5]
        rest = [column(visit, "runs-table", place) for place in places]
        return dict(zip(names, zip(*rest)))

    before = values()
    visit.page.locator("#runs-table thead button", has_text="optim.base_lr").click()
    assert list(values()) != list(before)
    assert values() == before
    assert column(visit, "runs-table", 2)[-1] == "9"


def test_results_of_two_protocols_are_in_two_columns_on_the_screen(visit):
    heads = visit.page.locator("#runs-table thead th:visible", has_text="eval.knn top1").all_inner_texts()
    assert ["k [20]" in head for head in heads].count(True) == 1
    assert ["k [200]" in head for head in heads].count(True) == 1
    assert len(heads) == 2


# ---- curves --------------------------------------------------------------------------------------------------------


def test_curves_of_the_first_runs_are_drawn_with_all_their_points(visit):
    lines = drawn(visit, chart_of(visit, title_of("loss")))
    assert list(lines) == [f"run{number}" for number in range(MOST_DRAWN)]
    assert set(lines.values()) == {80}
    assert drawn(visit, chart_of(visit, title_of("knn_top1"))).keys() == {"run3"}


def test_a_run_that_is_unticked_leaves_every_chart_and_makes_room_for_another(visit):
    def box(name: str) -> Any:
        return visit.page.locator(f"#drawn input[value='{name}']")

    assert box("run13").is_disabled()
    box("run3").uncheck()
    for title in (title_of("loss"), title_of("images_per_second")):
        assert "run3" not in drawn(visit, chart_of(visit, title))
    assert drawn(visit, chart_of(visit, title_of("knn_top1"))) == {}
    box("run13").check()
    assert list(drawn(visit, chart_of(visit, title_of("loss"))))[3] == "run13"
    assert box("run12").is_disabled()
    colours = visit.page.eval_on_selector_all(
        "#drawn .swatch:not([hidden])", "all => all.map(each => each.style.borderTopColor + each.style.borderTopStyle)"
    )
    assert len(set(colours)) == MOST_DRAWN


def test_a_run_keeps_its_colour_while_others_come_and_go(visit):
    def colour() -> str:
        script = "(id) => document.querySelector(`#${id} .plot`).data.find((each) => each.name === 'run5').line.color"
        return visit.page.evaluate(script, chart_of(visit, title_of("loss")))

    before = colour()
    visit.page.locator("#drawn input[value='run1']").uncheck()
    assert colour() == before


def test_the_rows_of_the_table_choose_the_curves(visit):
    visit.page.locator("#runs-table input[type=search]").fill("run1")
    visit.page.get_by_role("button", name="The first 12 rows of the table").click()
    expected = [f"run{number}" for number in (1, 10, 11, 12, 13)]
    assert sorted(drawn(visit, chart_of(visit, title_of("loss")))) == sorted(expected)
    visit.page.get_by_role("button", name="None", exact=True).click()
    assert drawn(visit, chart_of(visit, title_of("loss"))) == {}
    assert "0 of 14" in visit.page.inner_text("#drawn [role=status]")


def test_the_x_axis_of_all_charts_is_switched(visit):
    def last_x(title: str) -> float:
        script = "(id) => document.querySelector(`#${id} .plot`).data[0].x.at(-1)"
        return visit.page.evaluate(script, chart_of(visit, title))

    assert last_x(title_of("loss")) == 80
    visit.page.get_by_role("button", name="images seen").click()
    assert [last_x(title) for title in (title_of("loss"), title_of("images_per_second"))] == [80 * 32, 80 * 32]
    visit.page.get_by_role("button", name="hours of training").click()
    assert last_x(title_of("loss")) == pytest.approx(80 * 32 / 320 / 3600, rel=1e-4)
    visit.page.get_by_role("button", name="epoch", exact=True).click()
    assert last_x(title_of("loss")) == 8


def test_charts_that_were_folded_have_their_size_when_they_are_opened(visit):
    visit.page.locator(".more-curves > summary").click()
    chart = chart_of(visit, "only_here")
    width = "document.querySelector(`#${id} .plot`).clientWidth"
    visit.until(f"(id) => {width} > 300", chart)
    drawn_width = "document.querySelector(`#${id} .plot .main-svg`).clientWidth"
    visit.until(f"(id) => Math.abs({drawn_width} - {width}) <= 2", chart)  # drawn again once the browser tells its size


def test_a_swept_setting_that_spans_decades_is_drawn_over_a_logarithmic_axis(visit):
    kinds = visit.page.eval_on_selector_all(
        "figure[data-kind=scatter] .plot", "all => all.map(each => [each.layout.xaxis.type, each.data[0].x.length])"
    )
    assert kinds == [["log", 14], ["linear", 14], ["linear", 14]]


# ---- how it reads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_the_tables_and_not_the_page(browser, comparison, dark):
    visit = browser.open(comparison, viewport=PHONE, dark=dark)
    assert overflow(visit) == 0
    box = visit.page.locator("#runs-table .sortable-box")
    box.evaluate("each => { each.scrollLeft = 300; }")
    assert box.evaluate("each => each.scrollLeft") == 300
    left = box.evaluate("each => each.getBoundingClientRect().left")
    first = visit.page.locator("#runs-table tbody th").first
    assert first.evaluate("each => each.getBoundingClientRect().left") == pytest.approx(left + 1, abs=1)
    visit.check("file:")


def test_texts_differ_from_their_ground_in_dark_and_light(browser, comparison):
    for dark in (False, True):
        visit = browser.open(comparison, dark=dark)
        for place in (
            "#runs-table thead button",
            "#runs-table thead small",
            "#runs-table tbody th",
            ".differences .marked",
        ):
            assert contrast(visit, place) >= 4.5, (place, dark)


def contrast(visit: Visit, place: str) -> float:
    """The ratio of luminances (WCAG 2) of a text and what is behind it."""
    text, ground = visit.page.locator(place).first.evaluate(
        """(element) => {
            const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
            let behind = element;
            const alpha = (each) => channels(getComputedStyle(each).backgroundColor)[3];
            while (alpha(behind) < 1) behind = behind.parentElement;
            return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(channels);
        }"""
    )

    def luminance(colour: list[float]) -> float:
        linear = [(c / 255 / 12.92) if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    bright, dim = sorted((luminance(text), luminance(ground)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
