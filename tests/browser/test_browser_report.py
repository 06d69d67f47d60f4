"""The page out of several records in a real Chromium, with the network off: light and dark, wide and narrow."""

from __future__ import annotations

import csv
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import page_samples
import plan_samples
import pytest
import run_samples
import stability_samples
import sweep_samples

import rankwise
from rankwise.records import SweepRecord
from rankwise.sweeping.grid import make_grid
from rankwise.sweeping.recording import make_record

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
WIDE: dict[str, Any] = {"viewport": {"width": 1400, "height": 900}}
SWEEP = sweep_samples.sweep()


@pytest.fixture
def open_report(chromium: Any, tmp_path: Path) -> Any:
    """Return a function that reports on records and opens the page; no error and no request may have been seen."""
    errors: list[str] = []
    contexts: list[Any] = []

    def open_it(*records: Any, **context: Any) -> Any:
        path = tmp_path / f"page{len(contexts)}.html"
        rankwise.report(*records, out=path)
        contexts.append(chromium.new_context(offline=True, accept_downloads=True, **context))
        page = contexts[-1].new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type in {"error", "warning"} else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("requestfailed", lambda r: errors.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_function("() => [...document.querySelectorAll('[data-plot]')].every(p => p._fullLayout)")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert errors == []


def mixed() -> list[Any]:
    one = run_samples.run()
    check = stability_samples.check()
    spectra = page_samples.adapter(2)
    plan = plan_samples.RECORDS["budget"]
    return [
        SWEEP, spectra, msgspec.structs.replace(spectra, seed=1), plan, msgspec.structs.replace(plan, seed=1),
        one, msgspec.structs.replace(one, seed=1), check, msgspec.structs.replace(check, seed=1),
        run_samples.RECORDS["recall"], run_samples.RECORDS["demo"],
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", ["wide", "phone"])
def test_every_figure_of_every_part_is_drawn(open_report: Any, scheme: str, width: str) -> None:
    page = open_report(*mixed(), color_scheme=scheme, **(PHONE if width == "phone" else WIDE))
    plots = page.locator("[data-plot]")
    assert plots.count() >= 25
    wide = PHONE["viewport"]["width"] if width == "phone" else WIDE["viewport"]["width"]
    assert page.evaluate("Math.max(document.documentElement.scrollWidth, innerWidth)") <= wide
    for index in range(plots.count()):
        inked = plots.nth(index).locator(".scatterlayer .trace path, .barlayer path, .heatmaplayer image")
        assert inked.count() >= 1
    surface = "rgb(22, 24, 26)" if scheme == "dark" else "rgb(255, 255, 255)"
    colours = page.evaluate(
        "() => [...document.querySelectorAll('.plot .main-svg:first-child')]"
        ".map(s => getComputedStyle(s).backgroundColor)"
    )
    assert set(colours) == {surface}


def large() -> SweepRecord:
    """Return a sweep over ten ranks up to 2048 and ten rates that are no round numbers."""
    rates = tuple(1e-5 * 10 ** (k / 3) for k in range(10))
    grid = make_grid(tuple(4 * 2**k for k in range(10)), ("lora", "rslora"), rates, (0, 1))
    return make_record(
        tuple(map(sweep_samples.row, grid.cells)),
        model="m", data="d", settings={}, digest="", command=("rankwise",), device="cpu", seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("width", ["wide", "phone"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_labels_legends_and_axes_of_a_sweep_do_not_cover_each_other(open_report: Any, width: str, size: str) -> None:
    """Ticks of one axis keep apart; the legends stand below the plots and inside their figure."""
    page = open_report(SWEEP if size == "small" else large(), **(PHONE if width == "phone" else WIDE))
    overlaps = page.evaluate(
        """() => {
            const found = [];
            const boxes = (root, query) => [...root.querySelectorAll(query)]
                .filter(e => e.textContent.trim()).map(e => [e.textContent, e.getBoundingClientRect()]);
            for (const plot of document.querySelectorAll(".plot")) {
                const groups = [
                    boxes(plot, ".xaxislayer-above .xtick text"),
                    boxes(plot, ".legendtext"),
                    [...boxes(plot, ".xtitle"), ...boxes(plot, ".legendtext")],
                ];
                const frame = plot.getBoundingClientRect();
                for (const group of groups) {
                    group.forEach(([a, x], i) => {
                        if (x.left < frame.left - 1 || x.right > frame.right + 1 || x.bottom > frame.bottom + 1)
                            found.push(`${plot.id}: ${a} is cut`);
                        group.slice(i + 1).forEach(([b, y]) => {
                            const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
                            const tall = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
                            if (wide > 1 && tall > 2) found.push(`${plot.id}: ${a} / ${b}`);
                        });
                    });
                }
            }
            return found;
        }"""
    )
    assert overlaps == []


def test_a_figure_is_saved_as_svg_png_and_csv(open_report: Any) -> None:
    page = open_report(SWEEP, **WIDE)
    for label, head in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with page.expect_download() as caught:
            page.locator('[data-save$="sweep-rates"]').get_by_role("button", name=label).click()
        assert caught.value.suggested_filename.endswith(f"sweep-rates.{label.lower()}")
        assert Path(caught.value.path()).read_bytes().startswith(head)
    with page.expect_download() as caught:
        page.locator('[data-save$="sweep-rates"]').get_by_role("button", name="CSV").click()
    saved = Path(caught.value.path()).read_bytes().decode("utf-8-sig")
    assert saved == rankwise.figures(SWEEP)["sweep-rates"].to_csv()


def test_pictures_are_drawn_without_a_page_that_anybody_opens(chromium: Any, tmp_path: Path) -> None:
    """Every figure of a mix, by the browser alone; a PNG has two pixels for each px of the figure."""
    sources = [SWEEP, page_samples.adapter(1)]
    browser = os.environ.get("RANKWISE_CHROMIUM", "/usr/bin/chromium")
    rankwise.report(*sources, out=tmp_path / "page.html", figures=tmp_path / "f", browser=browser)
    figures = rankwise.figures(*sources)
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        f"{n}.{e}" for n in figures for e in ("png", "svg", "csv")
    }
    for name, figure in figures.items():
        png, svg = ((tmp_path / "f" / f"{name}.{ending}").read_bytes() for ending in ("png", "svg"))
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">II", png[16:24]) == (2 * 760, 2 * figure.layout["height"])
        assert ElementTree.fromstring(svg).get("height") == str(figure.layout["height"])
        assert svg.count(b"<path") > 3
    dark = figures["energy"].to_image("svg", theme="dark", browser=browser).decode()
    assert "rgb(22, 24, 26)" in dark  # --surface of the dark theme


def test_the_numbers_of_a_figure_with_a_choice_follow_it(open_report: Any) -> None:
    """Singular values of one module are in no table of the page: they unfold under the figure, and change with it."""
    record = page_samples.adapter(2)
    page = open_report(record, **WIDE)
    place = page.locator('[data-drawn="singular-values"]')
    place.locator("summary").click()
    select = page.locator("#singular-values-choice")
    for label in (record.modules[0].module, record.modules[9].module):
        select.select_option(label=label)
        module = next(m for m in record.modules if m.module == label)
        first = "v => document.querySelector('[data-drawn=singular-values] td:last-child').textContent == v"
        page.wait_for_function(first, arg=f"{module.singular_values[0]:.6g}")
        shown = [float(text) for text in place.locator("td:last-child").all_inner_texts()]
        assert shown == pytest.approx(list(module.singular_values[: len(shown)]), rel=1e-5)
    assert "singular value" in place.locator("thead").inner_text()


def test_a_figure_without_a_table_is_saved_too(open_report: Any) -> None:
    page = open_report(page_samples.adapter(1), **WIDE)
    with page.expect_download() as caught:
        page.locator('[data-save="heat-map"]').get_by_role("button", name="CSV").click()
    rows = list(csv.reader(io.StringIO(Path(caught.value.path()).read_text(encoding="utf-8-sig"))))
    assert rows[0] == ["line", "x", "y", "value"]
    assert len(rows) == 8  # seven modules


def test_the_table_of_runs_is_sorted_filtered_and_saved(open_report: Any) -> None:
    page = open_report(SWEEP, **WIDE)
    table = page.locator("#run-table")
    page.fill("#run-filter", "rslora 64 3e-3")
    assert table.locator("tbody tr:not([hidden])").count() == 3  # a row a seed
    page.fill("#run-filter", "")
    table.get_by_role("button", name="bits", exact=True).click()
    with page.expect_download() as caught:
        page.locator('[data-table="run-table"]').get_by_role("button", name="CSV").click()
    rows = list(csv.reader(io.StringIO(Path(caught.value.path()).read_text(encoding="utf-8-sig"))))
    assert len(rows) == 109
    bits = rows[0].index("bits")
    known = sorted(cell.bits for cell in SWEEP.cells if cell.bits is not None)
    assert [float(row[bits]) for row in rows[1:] if row[bits]] == known  # in full, not as words


def test_a_click_in_one_part_changes_the_figure_of_that_part(open_report: Any) -> None:
    one = page_samples.adapter(2)
    page = open_report(one, msgspec.structs.replace(one, seed=1), **WIDE)
    chosen = "n => document.getElementById(`p${n}-singular-values-choice`).selectedIndex"
    before = page.evaluate(chosen, 2)
    page.locator("#p3-heat-map-plot").scroll_into_view_if_needed()
    box = page.locator("#p3-heat-map-plot .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 13.5 / 14, box["y"] + box["height"] * 7 / 8)
    page.wait_for_selector("#p3-heat-map-plot .hoverlayer .hovertext")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("() => document.getElementById('p3-singular-values-choice').selectedIndex === 13")
    assert page.evaluate(chosen, 2) == before


def test_without_scripts_the_answer_and_its_table_can_be_read(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    rankwise.report(*mixed(), out=path)
    context = chromium.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert "helps under alpha / r" in page.locator(".verdict").first.inner_text()
    assert page.locator("noscript table").first.is_visible()
    assert not page.locator(".save").first.is_visible()
    context.close()
