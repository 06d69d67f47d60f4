"""The page of a plan: every number from the record, and the comparison with one rank for all before everything."""

from __future__ import annotations

import json
import re

import pytest
from plan_samples import RECORDS
from test_report_page import Reader

from rankwise.records import PlanRecord, from_json, to_json
from rankwise.report import render_page
from rankwise.report.drawing import Figure
from rankwise.report.figures import plan_curve, plan_ranks
from rankwise.report.page import figures_of
from rankwise.report.plan_contents import comparison, plan_facts, plan_table, plan_verdict


def must(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_read_back_gives_the_same_page(name: str) -> None:
    record = RECORDS[name]
    assert render_page(from_json(to_json(record), PlanRecord)) == render_page(record)


@pytest.mark.parametrize("name", RECORDS)
def test_every_figure_has_its_table_and_says_n(name: str) -> None:
    figures = figures_of(RECORDS[name])
    html = render_page(RECORDS[name])
    assert html.count('<details class="numbers">') == len(figures)
    for figure in figures:
        assert figure.fallback is not None
        assert figure.fallback.rows
        assert {len(row) for row in figure.fallback.rows} == {len(figure.fallback.head)}
        assert "n = " in " ".join(figure.caption)
        assert json.dumps(figure.spec(), allow_nan=False)


def test_hostile_words_stay_words() -> None:
    html = render_page(RECORDS["hostile"])
    reader = Reader(html)
    assert reader.open == []
    assert not reader.of("img")
    assert not any(key.startswith("on") for _, attrs in reader.elements for key in attrs)
    assert "49" not in re.findall(r"\{\{7\*7\}\}|onerror=window.hacked=1>(\d+)", html)


def test_both_errors_stand_at_the_head_and_in_the_first_table() -> None:
    record = RECORDS["budget"]
    flat, same = record.uniform, record.uniform_same_error
    assert flat is not None
    assert same is not None
    verdict = plan_verdict(record)
    assert f"{record.params:,} parameters" in verdict
    assert f"rank {flat.r}, {flat.params:,} parameters" in verdict
    rows = {row[0]: row for row in comparison(record).rows}
    assert list(rows) == ["this plan", f"uniform rank {flat.r}", f"uniform rank {same.r}"]
    assert rows["this plan"][1:3] == (f"{record.params:,}", "1.00")
    assert float(rows["this plan"][3]) == pytest.approx(record.relative_error, rel=1e-2)  # three digits
    html = render_page(record)
    assert (
        html.index(verdict.split(".")[0]) < html.index("Beside one rank for all") < html.index('<h2 id="plan-curve">')
    )
    assert record.why.split(":")[0] in text_of(html)


def test_a_uniform_plan_is_compared_with_nothing() -> None:
    record = RECORDS["uniform"]
    assert [row[0] for row in comparison(record).rows] == ["this plan"]
    assert plan_verdict(record).startswith("Rank 4 in 14 modules")
    assert plan_curve.draw(record) is None


def test_the_curve_holds_every_point_and_the_plan_itself() -> None:
    record = RECORDS["budget"]
    figure = must(plan_curve.draw(record))
    flat, chosen, star = figure.data
    known = [p for p in record.curve if p.uniform_error]
    assert flat["x"] == [p.params for p in known]
    assert flat["y"] == pytest.approx([p.uniform_error for p in known], rel=1e-5)  # six digits are drawn
    assert all(a <= b * (1 + 1e-5) for a, b in zip(chosen["y"], flat["y"], strict=False))
    assert (star["x"], star["y"]) == ([record.params], [pytest.approx(record.relative_error, rel=1e-5)])
    assert figure.fallback is not None
    assert len(figure.fallback.rows) == len(record.curve)
    assert (flat["line"]["dash"], chosen["line"]["dash"]) == ("dash", "solid"), "told apart without colour"


def test_the_map_holds_every_module_and_what_was_left_out_by_choice() -> None:
    record = RECORDS["energy"]
    figure = must(plan_ranks.draw(record))
    named = {
        name: value
        for names, values in zip(figure.data[0]["customdata"], figure.choices[0].data[0]["z"], strict=True)
        for name, value in zip(names, values, strict=True)
        if name
    }
    assert named == {m.module: m.r for m in record.modules} | {i.module: 0 for i in record.left_out if i.counted}
    labels = [choice.label for choice in figure.choices]
    assert labels[:2] == ["rank", "energy kept"]
    assert "ranks past the noise edge" in labels
    assert all(choice.data[0]["zmin"] == 0 < choice.data[0]["zmax"] for choice in figure.choices)
    assert figure.fallback is not None
    params = sum(int(row[4].replace(",", "")) for row in figure.fallback.rows)
    assert params == record.params


def test_the_table_leaves_out_what_is_not_known() -> None:
    heads = [c.head for c in plan_table(RECORDS["budget"]).columns]
    assert "signal rank" not in heads
    assert "shared rank" not in heads
    assert "signal rank" in [c.head for c in plan_table(RECORDS["energy"]).columns]
    assert len(plan_table(RECORDS["budget"]).rows) == len(RECORDS["budget"].modules)


def test_a_plan_without_spectra_has_a_page_without_figures_of_error() -> None:
    record = RECORDS["bare"]
    assert [f.name for f in figures_of(record)] == ["plan-ranks"]
    html = text_of(render_page(record))
    assert "24 parameters in 1 module." in html
    assert "planted" in html
    assert ("learning rate", "0.001", "") in plan_facts(record)
    assert not any(name == "chosen by" for name, _, _ in plan_facts(record))
