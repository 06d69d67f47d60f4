"""The pages in a real Chromium, with the network off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import page_samples as samples
import pytest

from rankwise.simulation import simulate

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
SPECTRA_FIGURES = ("energy", "singular-values", "heat-map")


def column(page: Any, head: str) -> list[str]:
    """Return the words of the visible cells of one column, from top to bottom."""
    return page.evaluate(
        """head => {
            const table = document.getElementById("module-table");
            const at = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === head);
            return [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[at].textContent);
        }""",
        head,
    )


def background(page: Any, name: str) -> str:
    """Return the colour behind a plot, as drawn."""
    return page.evaluate(
        "id => getComputedStyle(document.querySelector(`#${id}-plot .main-svg`)).backgroundColor", name
    )


def overflow(page: Any) -> int:
    """Return how far the page is wider than the phone; innerWidth itself grows with what sticks out."""
    width: int = page.evaluate("Math.max(document.documentElement.scrollWidth, innerWidth)")
    return width - PHONE["viewport"]["width"]


RECORDS = {
    "adapter": lambda: samples.adapter(8),
    "delta": lambda: samples.delta(8, 256),
    "nulls": lambda: samples.record([samples.unknown("a.0.b"), samples.module("c", [1.0, 0.5])]),
    "empty": lambda: samples.record([]),
    "simulation": lambda: simulate(command=("rankwise", "simulate")),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_figure_is_drawn_without_errors_or_requests(open_page: Open, name: str) -> None:
    page = open_page(RECORDS[name]())
    plots = page.locator("[data-plot]")
    assert plots.count() == (0 if name == "empty" else 3)
    for index in range(plots.count()):
        plot = plots.nth(index)
        assert plot.locator("svg.main-svg").count() >= 1
        inked = plot.locator(".scatterlayer .trace path, .heatmaplayer image, .heatmaplayer .hm")
        assert inked.count() >= 1
        assert plot.bounding_box()["height"] >= 200


@pytest.mark.parametrize("name", RECORDS)
def test_a_phone_shows_the_page_without_scrolling_sideways(open_page: Open, name: str) -> None:
    page = open_page(RECORDS[name](), **PHONE)
    assert overflow(page) <= 0
    boxes = page.locator("[data-plot]")
    for index in range(boxes.count()):
        assert boxes.nth(index).bounding_box()["width"] <= 390


def test_sorting_orders_numbers_as_numbers_and_unknown_last(open_page: Open) -> None:
    """As words 10 comes before 9; as numbers it does not. A dash is last both ways."""
    sizes = [3, 10, 9, 100]
    modules = [samples.module(f"layers.{n}.w", [1.0] * n) for n in sizes]
    page = open_page(samples.record([modules[0], samples.unknown("layers.5.broken"), *modules[1:]]))
    assert column(page, "rank 90\u00a0%") == ["3", "–", "9", "9", "90"]
    head = page.locator("th", has=page.get_by_role("button", name="energy", exact=True))
    button = head.get_by_role("button")
    assert head.get_attribute("aria-sort") == "none"
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "energy") == ["3", "9", "10", "100", "–"]
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "energy") == ["100", "10", "9", "3", "–"]
    names = page.locator("th", has=page.get_by_role("button", name="module", exact=True))
    names.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert names.get_attribute("aria-sort") == "ascending"
    assert head.get_attribute("aria-sort") == "none"
    assert [n.split(".")[1] for n in column(page, "module")] == ["3", "5", "9", "10", "100"]


def test_filter_keeps_the_rows_that_hold_every_word(open_page: Open) -> None:
    page = open_page(samples.adapter(12))
    page.fill("#filter", "layers.1. PROJ mlp")
    assert column(page, "module") == [f"model.layers.1.mlp.{k}_proj" for k in ("gate", "up", "down")]
    assert page.locator("#filtered").inner_text() == "3 of 84 modules"
    page.fill("#filter", "")
    assert len(column(page, "module")) == 84


def test_module_selector_changes_the_plot_and_its_note(open_page: Open) -> None:
    record = samples.delta(2, 128)
    page = open_page(record)
    values = "() => [...document.getElementById('singular-values-plot').data[0].y]"
    path = page.locator("#singular-values-plot .scatterlayer .trace path.js-line").first
    note = page.locator("#singular-values-note")
    before = (page.evaluate(values), path.get_attribute("d"), note.inner_text())
    assert before[0][0] == pytest.approx(record.modules[0].singular_values[0], rel=1e-5)
    page.select_option("#singular-values-choice", label="model.layers.1.mlp.up_proj")
    page.wait_for_function(
        "d => document.querySelector('#singular-values-plot path.js-line').getAttribute('d') !== d", arg=before[1]
    )
    chosen = next(m for m in record.modules if m.module == "model.layers.1.mlp.up_proj")
    assert page.evaluate(values)[0] == pytest.approx(chosen.singular_values[0], rel=1e-5)
    assert f"{chosen.signal_rank} values above" in note.inner_text()
    assert note.inner_text() != before[2]


def test_quantity_selector_changes_the_heat_map(open_page: Open) -> None:
    page = open_page(samples.adapter(3))
    cells = "() => document.getElementById('heat-map-plot').data[0].z[0][0]"
    before = page.evaluate(cells)
    page.select_option("#heat-map-choice", label="stable rank")
    assert page.evaluate(cells) != before
    assert "largest direction" in page.locator("#heat-map-note").inner_text()


def test_no_button_sends_a_figure_anywhere(open_page: Open) -> None:
    """plotly.js 4 has one by default that uploads the figure to its makers."""
    page = open_page(samples.delta(1, 64))
    names = page.locator(".modebar-btn").evaluate_all("buttons => buttons.map((b) => b.dataset.title)")
    assert set(names) == {"Download plot as a PNG", "Zoom", "Reset axes"}
    assert page.evaluate("document.getElementById('energy-plot')._context.plotlyServerURL") == ""


def test_a_click_on_a_cell_shows_the_values_of_its_module(open_page: Open) -> None:
    page = open_page(samples.adapter(4))
    box = page.locator("#heat-map-plot .nsewdrag").bounding_box()
    page.locator("#heat-map").scroll_into_view_if_needed()
    box = page.locator("#heat-map-plot .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 13.5 / 14, box["y"] + box["height"] * 7 / 8)
    page.wait_for_selector("#heat-map-plot .hoverlayer .hovertext")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("() => document.getElementById('singular-values-choice').selectedIndex === 27")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_and_the_button(open_page: Open, scheme: str) -> None:
    page = open_page(samples.delta(1, 64), color_scheme=scheme)
    light, dark = "rgb(255, 255, 255)", "rgb(22, 24, 26)"
    first, second = (light, dark) if scheme == "light" else (dark, light)
    body = "() => getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(body) == first
    assert {background(page, name) for name in SPECTRA_FIGURES} == {first}
    text = "() => getComputedStyle(document.querySelector('#energy-plot .xtick text')).fill"
    ink = page.evaluate(text)
    page.click("#theme")
    assert page.evaluate(body) == second
    assert {background(page, name) for name in SPECTRA_FIGURES} == {second}
    assert page.evaluate(text) != ink
    page.click("#theme")
    assert {background(page, name) for name in SPECTRA_FIGURES} == {first}


def test_a_change_of_the_system_theme_reaches_the_figures(open_page: Open) -> None:
    page = open_page(samples.adapter(1), color_scheme="light")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "() => getComputedStyle(document.querySelector('#energy-plot .main-svg')).backgroundColor === 'rgb(22, 24, 26)'"
    )


def test_every_text_has_the_contrast_of_wcag_aa(open_page: Open) -> None:
    """Ink, muted text, levels and series colours against the page: 4.5 to 1 for text, 3 to 1 for lines."""
    page = open_page(samples.delta(1, 64))
    ratio = """names => {
        const style = getComputedStyle(document.documentElement);
        const luminance = (name) => {
            const hex = style.getPropertyValue("--" + name).trim().slice(1);
            const parts = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);
            const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const against = luminance("surface");
        return names.map((name) => {
            const own = luminance(name);
            return (Math.max(own, against) + 0.05) / (Math.min(own, against) + 0.05);
        });
    }"""
    for _ in range(2):
        assert min(page.evaluate(ratio, ["ink", "muted", "error", "warning", "info"])) >= 4.5
        assert min(page.evaluate(ratio, ["first", "second", "third", "thin", "line"])) >= 3
        page.click("#theme")


def test_hostile_names_do_nothing_but_show(open_page: Open) -> None:
    record = samples.record([samples.module(HOSTILE, [1.0, 0.5]), samples.module(f"layers.0.{HOSTILE}", [1.0])])
    page = open_page(record)
    page.locator("#energy").scroll_into_view_if_needed()
    box = page.locator("#energy-plot .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 8)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert column(page, "module")[0] == HOSTILE
    assert page.locator("#singular-values-choice option").first.inner_text() == HOSTILE
    assert page.locator("img").count() == 0


def test_without_scripts_findings_and_tables_can_be_read(open_page: Open) -> None:
    page = open_page(samples.delta(2, 64), java_script_enabled=False)
    assert page.locator(".finding").count() == 2
    assert page.locator("#module-table tbody tr").count() == 15
    assert page.locator("#module-table").is_visible()
    table = page.locator("noscript table", has=page.locator("caption"))  # mean share by rank, in place of a figure
    assert table.locator("tbody tr").count() == 7
    assert table.is_visible()
    assert not page.locator("#theme").is_visible()
    assert not page.locator("#filter").is_visible()
    assert not page.locator("#energy-plot").is_visible()


def test_print_is_light_and_leaves_the_controls_out(open_page: Open) -> None:
    page = open_page(samples.adapter(2), color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert background(page, "energy") == "rgb(255, 255, 255)"
    page.emulate_media(media="print")
    assert not page.locator("#theme").is_visible()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert background(page, "energy") == "rgb(22, 24, 26)"
    assert len(page.pdf()) > 10_000


@pytest.mark.slow
def test_600_modules_answer(open_page: Open) -> None:
    page = open_page(samples.delta(90, 256))
    assert len(column(page, "module")) == 631
    page.get_by_role("button", name="energy", exact=True).click()
    numbers = [float(text) for text in column(page, "energy")]
    assert numbers == sorted(numbers)
