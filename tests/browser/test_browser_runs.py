"""The pages of runs, measured adapters and demos in a real Chromium, with the network off."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import run_samples as samples

from rankwise.report.page import figures_of

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
INK = ".scatterlayer .trace path, .barlayer .trace path"


def shades(png: bytes) -> int:
    """Return how many different bytes the rows of a picture hold: a blank one has a handful."""
    place, data = 8, b""
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + length]
        place += 12 + length
    return len(set(zlib.decompress(data)))


@pytest.mark.parametrize("name", samples.RECORDS)
def test_every_figure_is_drawn_without_errors_or_requests(open_page: Open, name: str) -> None:
    page = open_page(samples.RECORDS[name])
    plots = page.locator("[data-plot]")
    assert plots.count() == len(figures_of(samples.RECORDS[name]))
    for index in range(plots.count()):
        plot = plots.nth(index)
        assert plot.bounding_box()["height"] >= 200
        ink = plot.locator(INK).count()
        lost = name in {"recall of nothing", "hostile demo"}
        assert ink >= 1 or lost, plot.get_attribute("id")
        assert lost or shades(plot.screenshot()) > 20
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("name", samples.RECORDS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(open_page: Open, name: str, scheme: str) -> None:
    page = open_page(samples.RECORDS[name], color_scheme=scheme, **PHONE)
    assert page.evaluate("Math.max(document.documentElement.scrollWidth, innerWidth)") <= 390
    wanted = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 26)"}[scheme]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == wanted
    backs = (
        "[...document.querySelectorAll('.plot .main-svg:first-child')].map((s) => getComputedStyle(s).backgroundColor)"
    )
    assert set(page.evaluate(backs)) <= {wanted}


@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("figure", ["recalled-bits", "recall-forgetting"])
def test_labels_of_the_demo_cover_neither_each_other_nor_a_mark(open_page: Open, figure: str, width: int) -> None:
    page = open_page(samples.demo(), viewport={"width": width, "height": 900})
    boxes = page.evaluate(
        """id => {
            const of = (what) => [...document.querySelectorAll(`#${id}-plot ${what}`)].map((e) => {
                const b = e.getBoundingClientRect();
                return [b.left + 1, b.top + 1, b.right - 1, b.bottom - 1];
            });
            return [of(".scatterlayer .textpoint text"), of(".scatterlayer .points path")];
        }""",
        figure,
    )
    labels, marks = boxes
    assert len(labels) == 5
    for place, (left, top, right, bottom) in enumerate(labels):
        for other in labels[place + 1 :] + marks:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (labels[place], other)


@pytest.mark.parametrize("name", ["run", "recall", "demo"])
def test_without_scripts_the_numbers_of_every_figure_can_be_read(open_page: Open, name: str) -> None:
    record = samples.RECORDS[name]
    page = open_page(record, java_script_enabled=False)
    tables = page.locator("noscript table")
    assert tables.count() == len(figures_of(record))
    for index in range(tables.count()):
        assert tables.nth(index).is_visible()
    assert not page.locator(".plot").first.is_visible()
    assert not page.locator("details.numbers").first.is_visible()


def test_the_numbers_of_a_figure_unfold(open_page: Open) -> None:
    page = open_page(samples.demo())
    details = page.locator("section[aria-labelledby='recalled-bits'] details")
    assert not details.locator("table").is_visible()
    details.locator("summary").click()
    assert details.locator("table").is_visible()
    assert details.locator("tbody tr").count() == 5


def test_print_holds_figures_and_tables(open_page: Open) -> None:
    page = open_page(samples.demo(), color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.evaluate(
        "getComputedStyle(document.querySelector('#recalled-bits-plot .main-svg')).backgroundColor"
    ) == ("rgb(255, 255, 255)")
    assert not page.locator("details.numbers").first.is_visible()
    assert len(page.pdf()) > 20_000
