"""The page of a check in a real Chromium, with the network off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import stability_samples as samples

from rankwise.report.page import figures_of

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("name", samples.RECORDS)
def test_every_figure_is_drawn_without_errors_or_requests(open_page: Open, name: str) -> None:
    page = open_page(samples.RECORDS[name])
    plots = page.locator("[data-plot]")
    assert plots.count() == len(figures_of(samples.RECORDS[name]))
    for index in range(plots.count()):
        assert plots.nth(index).locator(".scatterlayer .trace path").count() >= 2
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("name", samples.RECORDS)
def test_a_phone_shows_the_page_without_scrolling_sideways(open_page: Open, name: str) -> None:
    page = open_page(samples.RECORDS[name], color_scheme="dark", **PHONE)
    assert page.evaluate("Math.max(document.documentElement.scrollWidth, innerWidth)") <= 390


def test_the_selector_draws_the_other_optimizer(open_page: Open) -> None:
    page = open_page(samples.check())
    read = "document.getElementById('stability-steps-plot').data[0].y[0]"
    assert page.evaluate(read) == -0.31
    page.select_option("#stability-steps-choice", "1")
    page.wait_for_function(f"() => {read} === -1.25")
    assert "alpha / √r: exponent −0.04" in page.locator("#stability-steps-note").inner_text()
