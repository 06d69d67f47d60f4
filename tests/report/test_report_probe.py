"""The pages of a probe and of a counter-test: caveats first, figures with their numbers, nothing that is not known."""

from __future__ import annotations

import math

import pytest
from probe_samples import counter_record, probe_record

from rankwise.records import (
    from_json,
    to_json,
)
from rankwise.report import render_page
from rankwise.report.figures import FIGURES


def test_caveats_stand_before_every_figure() -> None:
    page = render_page(probe_record())
    body = page[page.index("<main") :]
    assert body.index("A caveat that comes first.") < body.index("bits to learn")
    assert body.index("A caveat that comes first.") < body.index('class="figure"')
    counter = render_page(counter_record())
    assert counter.index("rows the adapter was trained on") < counter.index('class="figure"')


def test_the_page_says_what_was_found_and_escapes_names() -> None:
    page = render_page(probe_record())
    for words in ("9.5 bits to learn of the 30", "rank 8", "the evidence does not decide", "the best guess", "2 to 6"):
        assert words in page
    assert "<b>.jsonl" not in page
    assert "<code>rankwise check</code>" in page


def test_figures_carry_their_numbers() -> None:
    record = probe_record()
    parts = FIGURES["probe-parts"].draw(record)
    assert parts is not None
    assert math.fsum(parts.data[0]["x"]) == pytest.approx(record.base_bits / record.examples, rel=1e-4)
    rows = FIGURES["probe-rows"].draw(record)
    assert rows is not None
    assert rows.data[1]["y"] == [8, 1, 0.5]
    gradient = FIGURES["probe-gradient"].draw(record)
    assert gradient is not None
    assert gradient.data[0]["y"] == [2.5], "a gradient of zero has no point"
    moves = FIGURES["counter-moves"].draw(counter_record())
    assert moves is not None
    assert moves.data[0]["x"] == [0.85], "a move that diverged has no gain"


def test_what_is_not_there_is_not_drawn() -> None:
    bare = probe_record(rates=(), gradient=(), rows=(), decided=True, sweep=())
    page = render_page(bare)
    assert FIGURES["probe-rates"].draw(bare) is None
    assert FIGURES["probe-gradient"].draw(bare) is None
    assert FIGURES["probe-rows"].draw(bare) is None
    assert "does not decide" not in page


def test_records_come_back_from_json() -> None:
    for record in (probe_record(), counter_record()):
        assert from_json(to_json(record), type(record)) == record
    assert "9 bits" not in repr(probe_record(bits_to_learn=1234.0))
    assert "1,234 bits to learn" in repr(probe_record(bits_to_learn=1234.0))
    assert "starved by rank" in repr(counter_record())
