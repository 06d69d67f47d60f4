"""The page of a conversion: the figures of the record, nothing claimed exact that is not."""

from __future__ import annotations

import re

import conversion_samples as samples
import pytest
from test_report_page import Reader

from rankwise.records import from_json, to_json
from rankwise.report import render_page
from rankwise.report.conversion_contents import COLUMNS, conversion_facts, conversion_verdict, runtime_table
from rankwise.report.page import figures_of


@pytest.mark.parametrize("name", samples.RECORDS)
def test_a_record_read_back_gives_the_same_page(name: str) -> None:
    record = samples.RECORDS[name]
    assert render_page(from_json(to_json(record), type(record))) == render_page(record)


def test_exact_is_said_only_of_what_is() -> None:
    assert "bit for bit" in conversion_verdict(samples.RECORDS["exact conversion"])
    said = conversion_verdict(samples.RECORDS["rounded conversion"])
    assert "0.002" in said
    assert "1 of them is the same bit for bit" in said


def test_a_figure_is_drawn_where_something_was_lost() -> None:
    assert figures_of(samples.RECORDS["exact conversion"]) == []
    (figure,) = figures_of(samples.RECORDS["conversion"])
    best, written = figure.data
    modules = samples.RECORDS["conversion"].modules
    assert written["y"] == pytest.approx([m.relative_error for m in modules], rel=1e-5)
    assert best["y"] == pytest.approx([m.error_before_cast for m in modules], rel=1e-5)
    (rounded,) = figures_of(samples.RECORDS["rounded conversion"])
    assert [t["name"] for t in rounded.data] == ["in the file"]
    assert rounded.data[0]["y"] == [None, 0.002]  # what is exact has no place on a log scale, and the caption says so
    assert any("no place on a log scale" in sentence for sentence in rounded.caption)


def test_runtimes_and_left_out_are_on_the_page() -> None:
    table = runtime_table(samples.RECORDS["hostile conversion"])
    assert table is not None
    assert table.rows == (("llama.cpp", "0.25 to 2 ×", "1 of 1"),)
    assert runtime_table(samples.RECORDS["rounded conversion"]) is None


def test_the_table_has_a_row_a_module_and_a_cell_a_column() -> None:
    reader = Reader(render_page(samples.RECORDS["conversion"]))
    assert reader.open == []
    html = render_page(samples.RECORDS["conversion"])
    body = html.partition('id="module-table"')[2].partition("</table>")[0]
    rows = re.findall(r"<tr><th scope=\"row\">", body)
    assert len(rows) == 60
    assert body.count('<th scope="col"') == len(COLUMNS)


def test_key_numbers_name_the_worst_module() -> None:
    facts = {name: (value, remark) for name, value, remark in conversion_facts(samples.RECORDS["conversion"])}
    assert facts["worst module"] == ("0.218", "model.layers.59.q_proj")
    assert facts["rank"] == ("8", "before: 16")
