"""The page of a check: figures hold the record's numbers, the band is drawn in, hostile words stay words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import stability_samples as samples
from test_report_page import Reader

from rankwise.records import from_json, to_json
from rankwise.report import render_page
from rankwise.report.drawing import Figure
from rankwise.report.figures import stability
from rankwise.report.page import figures_of
from rankwise.report.stability_contents import group_table, rate_table, stability_verdict


def must(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)))


@pytest.mark.parametrize("name", samples.RECORDS)
def test_a_record_read_back_gives_the_same_page(name: str) -> None:
    record = samples.RECORDS[name]
    html = render_page(record)
    assert render_page(from_json(to_json(record), type(record))) == html
    reader = Reader(html)
    assert reader.open == []
    assert len(reader.of("h1")) == 1


@pytest.mark.parametrize("name", samples.RECORDS)
def test_every_figure_has_a_table_and_is_finite_json(name: str) -> None:
    figures = figures_of(samples.RECORDS[name])
    assert len(figures) == (0 if name == "check of nothing" else 2)
    for figure in figures:
        assert figure.fallback is not None
        assert figure.fallback.rows
        assert {len(row) for row in figure.fallback.rows} == {len(figure.fallback.head)}
        assert 2 <= len(figure.caption) <= 5
        json.dumps(figure.spec(), allow_nan=False)


def test_hostile_words_stay_words() -> None:
    record = samples.RECORDS["hostile check"]
    html = render_page(record)
    reader = Reader(html)
    assert reader.open == []
    assert not reader.of("img")
    assert not any(key.startswith("on") for _, attrs in reader.elements for key in attrs)
    assert "<script>window.hacked" not in html
    for figure in figures_of(record):
        assert "<script" not in json.dumps(figure.spec()).replace("\\u003c", "<")


def test_lines_are_the_branch_over_that_of_the_reference_rank() -> None:
    record = samples.check()
    figure = must(stability.draw_ranks(record))
    bold = [t for t in figure.data if t.get("line", {}).get("width") == 3]
    assert len(bold) == 2 * 3, "a line a rule and panel"
    for trace in bold:
        e = {"alpha / r": -0.31, "alpha / √r": 0.19}[trace["name"]]
        assert trace["x"] == [4, 16, 64]
        assert trace["y"] == pytest.approx([1, 4**e, 16**e], rel=1e-5)  # six digits are drawn
    thin = [t for t in figure.data if t.get("line", {}).get("width") == 1]
    assert len(thin) == 2 * 3 * 4
    assert {t["line"]["dash"] for t in thin} == {"dash", "dot"}
    assert [t["showlegend"] for t in bold] == [True, True, False, False, False, False]


def test_a_panel_a_step_and_the_band_in_each() -> None:
    figure = must(stability.draw_ranks(samples.check()))
    bands = [t for t in figure.data if t["name"] == "the band"]
    assert [t.get("yaxis", "y") for t in bands] == ["y", "y2", "y3"]
    for band in bands:
        assert band["x"] == [4, 16, 64, 64, 16, 4]
        assert band["y"] == pytest.approx([1, 4**0.1, 16**0.1, 16**-0.1, 4**-0.1, 1], rel=1e-5)
    heads = [a["text"] for a in figure.layout["annotations"]]
    assert heads == ["<b>after 1 step</b>", "<b>after 5 steps</b>", "<b>after 20 steps</b>"]
    many = must(stability.draw_ranks(samples.RECORDS["check of many steps"]))
    assert len(many.layout["annotations"]) == stability.MOST_PANELS
    assert many.detail == "6 of 12 steps have a panel"


def test_the_selector_changes_optimizer_and_keeps_the_traces() -> None:
    figure = must(stability.draw_ranks(samples.check()))
    assert [c.label for c in figure.choices] == [
        "adamw, default init, learning rate 0.001",
        "sgd, default init, learning rate 0.001",
    ]
    assert {len(c.data) for c in figure.choices} == {len(figure.data)}
    assert "alpha / √r: exponent −0.04 (−0.07 to −0.01), stable" in figure.choices[1].note
    assert must(stability.draw_ranks(samples.RECORDS["check of one step"])).choices == ()


def test_exponents_have_their_intervals_and_the_band() -> None:
    figure = must(stability.draw_steps(samples.check()))
    first = figure.data[0]
    assert first["x"] == [1, 5, 20]
    assert first["y"] == pytest.approx([-0.31] * 3)
    assert first["error_y"]["array"] == pytest.approx([0.03] * 3)
    (band,) = figure.layout["shapes"]
    assert (band["y0"], band["y1"]) == (-0.1, 0.1)
    low, high = figure.layout["yaxis"]["range"]
    assert low < -1.25 < 0.22 < high, "wide enough for every choice"


def test_diverged_runs_are_said_above_the_figure() -> None:
    figure = must(stability.draw_ranks(samples.RECORDS["diverged check"]))
    assert len(figure.marks) == 2
    assert "3 runs under alpha / √r, adamw, default init had diverged by step 20" in figure.marks[0]


def test_the_page_says_verdict_advice_groups_and_rates() -> None:
    record = samples.check()
    html = text_of(render_page(record))
    for there in (
        "adamw, default init, after 20 steps: alpha / r is collapsing (−0.31 (−0.34 to −0.28))",
        "alpha / √r is stable (−0.04 (−0.07 to −0.01))",
        "does not say that facts will be recalled",
        "r^−0.69",
        "187 tokens",
        "attention/early: alpha / r, adamw, default",
        "rank 64, tried",
        "1.69 → 1.03",
    ):
        assert there in html, there
    assert len(group_table(record).rows) == 2 * 2 * 5
    assert [row[-2] for row in rate_table(record).rows] == ["–", "rank 64, tried", "–", "rank 64, tried"]


def test_a_check_of_nothing_says_so() -> None:
    record: Any = samples.RECORDS["check of nothing"]
    assert stability_verdict(record) == (
        "adamw, default init, after 5 steps: alpha / r is undecided (–), alpha / √r is undecided (–)."
    )
    html = render_page(record)
    assert "15 of 15 runs diverged." in html
    assert '<h2 id="rates">' not in html
