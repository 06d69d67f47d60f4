"""The page of a plan in a real Chromium, with the network off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from plan_samples import RECORDS

from rankwise.report.page import figures_of

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("name", RECORDS)
def test_every_figure_is_drawn_without_errors_or_requests(open_page: Open, name: str) -> None:
    page = open_page(RECORDS[name])
    plots = page.locator("[data-plot]")
    assert plots.count() == len(figures_of(RECORDS[name]))
    for index in range(plots.count()):
        ink = ".scatterlayer .trace path, .heatmaplayer image"
        assert plots.nth(index).locator(ink).count() >= 1
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["budget", "hostile"])
def test_a_phone_shows_the_page_without_scrolling_sideways(open_page: Open, name: str, scheme: str) -> None:
    page = open_page(RECORDS[name], color_scheme=scheme, **PHONE)
    assert page.evaluate("Math.max(document.documentElement.scrollWidth, innerWidth)") <= 390


def test_the_map_changes_its_quantity_and_its_scale(open_page: Open) -> None:
    page = open_page(RECORDS["budget"])
    read = "() => { const d = document.getElementById('plan-ranks-plot').data[0]; return [d.zmin, d.zmax]; }"
    assert page.evaluate(read) == [0, max(m.r for m in RECORDS["budget"].modules)]
    page.select_option("#plan-ranks-choice", label="energy kept")
    low, high = page.evaluate(read)
    assert low == 0
    assert 0.5 < high <= 1
    assert "own energy" in page.inner_text("#plan-ranks-note")


def test_the_table_of_modules_sorts_by_rank(open_page: Open) -> None:
    page = open_page(RECORDS["budget"])
    page.locator("#module-table thead th").nth(2).click()
    column = page.locator("#module-table td:nth-child(3)").all_inner_texts()
    ranks = [int(text) for text in column]
    assert ranks in (sorted(ranks), sorted(ranks, reverse=True))
    assert len(ranks) == len(RECORDS["budget"].modules)
