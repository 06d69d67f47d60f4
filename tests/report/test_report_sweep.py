"""The page of a sweep: its figures hold the planted numbers, and say what is lost, alone or on an edge."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import msgspec
import pytest
import sweep_samples as samples

from rankwise.records import SweepRecord, SweepRun
from rankwise.report import render_page
from rankwise.report.drawing import Figure
from rankwise.report.page import figures_of
from rankwise.report.sweep_contents import sweep_facts, sweep_verdict
from rankwise.report.sweep_looks import legends, rate_label, rate_words, rates_axis
from rankwise.sweeping.recording import make_record

RECORD = samples.sweep()


def figure(record: SweepRecord, name: str) -> Figure:
    return next(f for f in figures_of(record) if f.name == name)


def made(rows: list[SweepRun]) -> SweepRecord:
    return make_record(
        tuple(rows), model="m", data="d", settings={}, digest="", command=("rankwise",), device="cpu", seconds=1.0
    )


def kept(**wanted: Any) -> SweepRecord:
    """Return the sample's sweep with only the runs whose fields are among those given."""
    rows = [c for c in RECORD.cells if all(getattr(c, field) in values for field, values in wanted.items())]
    return made(rows)


def test_the_answer_is_the_planted_score_at_the_planted_best_rate() -> None:
    """Bits are a parabola in log(rate): at the best rate of alpha / r, share = 0.3 + 0.15 log4(rank) over the seeds."""
    trace = figure(RECORD, "sweep-answer").data[0]
    assert trace["name"] == "alpha / r"
    # between the outer ranks lies a factor of 16: two rules stand 1.6 % of that apart in the logarithm, one to a side
    assert trace["x"] == pytest.approx([rank / 16**0.008 for rank in (4, 16, 64)], rel=1e-5)
    assert [told.split(":")[0] for told in trace["customdata"]] == ["rank 4", "rank 16", "rank 64"]
    planted = [(0.3 + 0.15 * k) * samples.BITS_POSSIBLE for k in (1, 2, 3)]
    assert trace["y"] == pytest.approx(planted, rel=1e-5)  # six digits are drawn
    # seeds lie 0.01 apart: a 95 % t-interval of three is 4.303 * 0.01 / sqrt(3), in shares
    half = 4.3026527 * 0.01 / math.sqrt(3) * samples.BITS_POSSIBLE
    assert trace["error_y"]["array"] == pytest.approx([half] * 3, rel=1e-4)


def test_every_line_of_the_rate_figure_is_the_mean_of_its_points_and_breaks_where_a_seed_was_lost() -> None:
    drawn = figure(RECORD, "sweep-rates")
    points = {(p.scaling, p.rank, p.learning_rate): p for p in RECORD.points}
    lines = [t for t in drawn.data if t["mode"] == "lines+markers"]
    assert len(lines) == 6
    for place, trace in enumerate(lines):
        rule, rank = RECORD.config.scaling[place // 3], int(trace["name"].removeprefix("rank "))
        assert trace["x"] == list(samples.RATES)
        for rate, y in zip(trace["x"], trace["y"], strict=True):
            p = points[rule, rank, rate]
            if p.diverged or p.failed:
                assert y is None
            else:
                assert y == pytest.approx(p.score.mean, rel=1e-5, abs=1e-9)


def test_lost_seeds_are_crosses_and_best_rates_are_ringed() -> None:
    drawn = figure(RECORD, "sweep-rates")
    crosses = [t for t in drawn.data if t["marker"].get("symbol") == "x" and t["x"] != [None]]
    broken = {(p.scaling, p.learning_rate) for p in RECORD.points if p.diverged or p.failed}
    found = {(RECORD.config.scaling[k], x) for k, t in enumerate(crosses) for x in t["x"]}
    assert found == broken
    rings = [t for t in drawn.data if t["name"] == "best rate of its rank" and t["x"] != [None]]
    assert [sorted(t["x"]) for t in rings] == [
        sorted(b.learning_rate for b in RECORD.best if b.scaling == rule and not b.on_edge)
        for rule in RECORD.config.scaling
    ]
    assert any("a seed diverged" in mark for mark in drawn.marks)
    assert any("1 run failed" in mark for mark in drawn.marks)


def test_means_of_fewer_seeds_are_open_and_off_the_lines() -> None:
    """ASHA gives a bad rate no further seeds: its mean of one may be the highest, and is not called best."""
    low, high = 1e-4, 1e-3  # the best rate of alpha / r at rank 16 is 3e-3
    lifted = [
        msgspec.structs.replace(c, bits=1800.0) if (c.scaling, c.rank, c.learning_rate) == ("lora", 16, low) else c
        for c in RECORD.cells
    ]
    record = made([c for c in lifted if c.seed == 0 or (c.scaling, c.rank) != ("lora", 16) or c.learning_rate >= high])
    drawn = figure(record, "sweep-rates")
    mine = [p for p in record.points if (p.scaling, p.rank) == ("lora", 16)]
    assert max(mine, key=lambda p: p.score.mean or 0.0).learning_rate == low
    line = next(t for t in drawn.data if t["mode"] == "lines+markers" and t["name"] == "rank 16")
    assert dict(zip(line["x"], line["y"], strict=True))[low] is None
    (open_,) = [t for t in drawn.data if t["name"] == "fewer seeds than its rivals" and t["x"] not in ([None], [])]
    assert open_["x"] == [low, 3e-4]
    assert open_["y"][0] == 1800
    assert open_["marker"]["symbol"] == ["diamond-open"] * 2
    rings = [t for t in drawn.data if t["name"] == "best rate of its rank" and t["x"] != [None]]
    assert low not in rings[0]["x"]
    assert drawn.marks[-1].startswith("Open marks, off the lines: 2 settings with fewer seeds than other rates")
    assert "as many are done as at any such rate of the rank" in drawn.caption[1]
    assert drawn.fallback is not None
    short = [row[:3] for row in drawn.fallback.rows if row[-1] == "fewer seeds"]
    assert short == [("alpha / r", "16", "1e-4"), ("alpha / r", "16", "3e-4")]
    whole = figure(RECORD, "sweep-rates")
    assert not any("Open marks" in mark for mark in whole.marks)
    assert sum(t["name"] == "fewer seeds than its rivals" for t in whole.data if t["x"] == [None]) == 0


def test_an_interval_that_is_not_drawn_takes_no_room() -> None:
    """A seed of three diverges and the two others lie far apart: the cross stands at their mean, without a bar."""
    wild = {0: 100.0, 1: -100.0}
    rows = [
        msgspec.structs.replace(c, bits=wild[c.seed]) if c.learning_rate == 1e-4 and c.seed in wild else c
        for c in RECORD.cells
    ]
    rows = [
        msgspec.structs.replace(c, status="diverged", bits=None) if c.learning_rate == 1e-4 and c.seed == 2 else c
        for c in rows
    ]
    low, high = figure(made(rows), "sweep-rates").layout["yaxis"]["range"]
    # a 95 % interval of two seeds 200 bits apart reaches 12.7 * 100 to both sides
    assert -1000 < low < 0 < 1400 < high


def test_a_best_rate_on_the_edge_is_a_square_and_said_in_words() -> None:
    record = kept(learning_rate=(1e-4, 3e-4, 1e-3))
    assert all(b.on_edge for b in record.best)
    rates = figure(record, "sweep-rates")
    squares = [t for t in rates.data if t["marker"]["symbol"] == "square-open" and t["x"] != [None]]
    assert sum(len(t["x"]) for t in squares) == len(record.best)
    assert any("Squares" in mark for mark in rates.marks)
    answer = figure(record, "sweep-answer")
    assert answer.data[0]["marker"]["symbol"] == ["circle-open"] * 3
    assert any("Open marks" in mark for mark in answer.marks)
    assert "lies on the grid’s edge" in sweep_verdict(record)
    exponents = figure(record, "sweep-exponents")
    assert all("no power law is fitted" in mark for mark in exponents.marks)
    assert not any(t["mode"] == "lines" for t in exponents.data)


def test_one_rate_alone_is_said_in_the_answer() -> None:
    said = sweep_verdict(kept(learning_rate=(1e-3,), scaling=("lora",)))
    assert said.endswith(
        "only one rate was tried at rank 4 and 64), each rank at its own best learning rate and over 3 seeds."
    )
    assert "edge" not in said


def test_one_seed_has_no_interval_and_says_so() -> None:
    record = kept(seed=(0,))
    answer = figure(record, "sweep-answer")
    assert answer.data[0]["error_y"]["array"] == [0, 0, 0]
    assert any("one seed: no interval" in mark for mark in answer.marks)
    assert "undecided" in sweep_verdict(record)
    assert "one seed and no interval" in sweep_verdict(record)
    assert next(row[5:] for row in answer.fallback.rows) == ("–", "–", "1")  # type: ignore[union-attr]


def test_the_verdict_names_every_rule_with_its_figures() -> None:
    """From rank 4 to 64 at the best rates the planted share rises by 0.3 under alpha / r, at every seed."""
    said = sweep_verdict(RECORD)
    one = "recalled bits 840 → 1,400; +560, 95 % interval +560 to +560"
    assert said.startswith(f"Raising the rank from 4 to 64 helps under alpha / r ({one}) and under alpha / √r (")
    assert said.endswith("each rank at its own best learning rate and over 3 seeds.")
    assert "alpha / √r" in said
    assert said.count(". ") == 0  # one sentence


def test_forgetting_has_every_eligible_setting_and_its_front() -> None:
    drawn = figure(RECORD, "sweep-forgetting")
    eligible = [p for p in RECORD.points if p.eligible]
    clouds = [t for t in drawn.data if t["mode"] == "markers" and t["x"] != [None]]
    assert sum(len(t["x"]) for t in clouds) == len(eligible)
    front = next(t for t in drawn.data if t["mode"] == "lines+text")
    wanted = sorted(p.forgetting.mean for p in eligible if p.on_front)
    assert front["x"] == pytest.approx(wanted, rel=1e-5)
    assert drawn.fallback is not None
    assert sum(row[3] == "yes" for row in drawn.fallback.rows) == len(wanted)


def test_forgetting_over_more_than_a_factor_of_20_is_on_a_log_axis() -> None:
    """Broken settings forget a hundred times as much; on a linear axis the front would be a vertical line."""
    linear = figure(kept(learning_rate=(3e-4, 1e-3)), "sweep-forgetting")
    assert linear.layout["xaxis"].get("type") != "log"
    assert "logarithmic" not in " ".join(linear.caption)
    spread = {1e-4: (0.05, 0.03), 1e-3: (1.0, 0.01), 3e-3: (5.0, 0.1)}  # rate -> mean and step from seed to seed
    rows = [
        msgspec.structs.replace(c, forgetting=spread[c.learning_rate][0] + spread[c.learning_rate][1] * (c.seed - 1))
        for c in RECORD.cells
        if c.learning_rate in spread and c.status == "done"
    ]
    drawn = figure(made(rows), "sweep-forgetting")
    across = drawn.layout["xaxis"]
    assert across["type"] == "log"
    low, high = (10**end for end in across["range"])
    assert 0 < low < 0.05 < 5.0 < high
    assert any("logarithmic" in sentence for sentence in drawn.caption)
    clouds = [t for t in drawn.data if t["mode"] == "markers" and t["x"] != [None]]
    clipped = 0
    for trace in clouds:
        bars = trace["error_x"]
        assert not bars["symmetric"]
        for x, above, below in zip(trace["x"], bars["array"], bars["arrayminus"], strict=True):
            assert x - below >= low * (1 - 1e-5)  # six digits are drawn
            assert below == pytest.approx(min(above, x - low), rel=1e-5)
            clipped += above >= x
    assert clipped, "4.303 * 0.03 / sqrt(3) is more than 0.05"
    below_zero = [msgspec.structs.replace(c, forgetting=-0.1) if c.learning_rate == 1e-4 else c for c in rows]
    assert figure(made(below_zero), "sweep-forgetting").layout["xaxis"].get("type") != "log"


def test_the_dashed_line_has_the_exponent_of_the_record() -> None:
    drawn = figure(RECORD, "sweep-exponents")
    lines = [t for t in drawn.data if t["mode"] == "lines"]
    for found, line in zip([e for e in RECORD.exponents if e.exponent is not None], lines, strict=True):
        (x0, x1), (y0, y1) = line["x"], line["y"]
        assert math.log(y1 / y0) / math.log(x1 / x0) == pytest.approx(found.exponent, abs=1e-4)  # six digits drawn


def test_no_rule_hides_another_where_both_have_the_same_best_rate() -> None:
    """At rank 16 both rules are best at 3e-3: the marks stand 3.2 % of the axis apart, in the logarithm of the rank."""
    drawn = figure(RECORD, "sweep-exponents")
    lora, rslora = (t for t in drawn.data if t["mode"] == "markers")
    (low,), (high,) = (
        [x for x, y in zip(t["x"], t["y"], strict=True) if y == 3e-3 and 15 < x < 17] for t in (lora, rslora)
    )
    assert math.log(high / low) / math.log(64 / 4) == pytest.approx(0.016, rel=1e-4)
    assert math.sqrt(low * high) == pytest.approx(16, rel=1e-5)


def test_why_no_power_law_was_fitted_is_said_with_the_rank_that_is_missing() -> None:
    assert figure(RECORD, "sweep-exponents").marks == (
        "alpha / r: no power law is fitted: that takes three ranks whose best rate is known and lies inside the grid, "
        "and there are 2 (left out: rank 16: seeds are missing at 0.0003).",
    )


def test_names_on_the_front_stand_clear_of_marks_and_intervals() -> None:
    """The topmost name stood on the interval of its own point."""
    from rankwise.report.looks import label_places

    bar = ((0.3, 0.8), (0.3, 1.0))
    assert label_places([(0.3, 0.9)], ["rank 64"], lines=[((0.3, 0.9), (0.3, 0.9))]) == ["top center"]
    assert label_places([(0.3, 0.9)], ["rank 64"], lines=[bar]) == ["middle right"]
    front = next(t for t in figure(RECORD, "sweep-forgetting").data if t["mode"] == "lines+text")
    assert [text for text in front["text"] if text][-1].strip("\u00a0") == "rank 64, 3e-3"
    assert not front["textposition"][-1].endswith("center")


def test_the_best_setting_is_the_first_key_number() -> None:
    """The highest planted share is that of rank 64 under alpha / r at 3e-3: 0.75 of 1866 bits."""
    name, setting, remark = sweep_facts(RECORD)[0]
    assert (name, setting) == ("best mean: recalled bits", "rank 64, alpha / r at 3e-\u20603")
    assert remark == "1,400 (1,353 to 1,446, 3 seeds)"
    bare = [msgspec.structs.replace(c, bits=None, bits_possible=None, exact_share=None) for c in RECORD.cells]
    by_loss = made([msgspec.structs.replace(c, bits_per_param=None, paraphrased_exact_share=None) for c in bare])
    assert sweep_facts(by_loss)[0][1] == setting  # the lowest loss is where the share is highest
    edge = kept(learning_rate=(1e-4, 3e-4, 1e-3))
    assert "the rate lies on the grid’s edge" in sweep_facts(edge)[0][2]


def test_the_page_writes_a_rule_in_one_way_and_says_which_name_it_has() -> None:
    html = render_page(RECORD)
    assert "sqrt(r)" not in html.split("<main")[1].split("</main>")[0]
    assert "alpha / r is <code>lora</code>; alpha / √r is <code>rslora</code>" in html


def test_the_selector_has_every_quantity_and_every_rate() -> None:
    drawn = figure(RECORD, "sweep-ranks")
    labels = [choice.label for choice in drawn.choices]
    assert labels[0] == "recalled bits, each rank at its best rate"
    assert drawn.choices[drawn.chosen].label == "bits a parameter, each rank at its best rate"
    assert "recalled bits, all at 1e-3" in labels
    at_one = drawn.choices[labels.index("recalled bits, all at 3e-4")]
    assert "rank 16 under alpha / r" in at_one.note  # its failed seed
    assert all(len(choice.data) == len(drawn.data) for choice in drawn.choices)
    points = {(p.scaling, p.rank, p.learning_rate): p for p in RECORD.points}
    for rule, trace in zip(RECORD.config.scaling, at_one.data, strict=True):
        ranks = [int(told.removeprefix("rank ").split(":")[0]) for told in trace["customdata"]]
        means = [points[rule, rank, 3e-4].score.mean for rank in ranks]
        assert trace["y"] == pytest.approx(means, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", ["sweep-answer", "sweep-ranks", "sweep-rates", "sweep-forgetting", "sweep-exponents"])
def test_every_figure_has_its_numbers_as_csv(name: str) -> None:
    drawn = figure(RECORD, name)
    assert drawn.fallback is not None
    rows = list(csv.reader(io.StringIO(drawn.to_csv())))
    assert len(rows) == len(drawn.fallback.rows) + 1
    assert {len(row) for row in rows} == {len(drawn.fallback.head)}


def test_a_score_of_exact_answers_or_of_loss_is_named_and_the_better_way_said() -> None:
    without = [msgspec.structs.replace(c, bits=None, bits_per_param=None, bits_possible=None) for c in RECORD.cells]
    exact = made(without)
    assert exact.config.score == "exact_share"
    assert figure(exact, "sweep-answer").layout["yaxis"]["title"]["text"] == "exact answers"
    assert "Higher is better." in figure(exact, "sweep-answer").caption
    assert not any("bits a parameter" in c.label for c in figure(exact, "sweep-ranks").choices)
    bare = made([msgspec.structs.replace(c, exact_share=None, forgetting=None) for c in without])
    assert bare.config.score == "loss"
    assert "Lower is better." in figure(bare, "sweep-answer").caption
    assert "sweep-forgetting" not in {f.name for f in figures_of(bare)}
    assert "not measured" not in render_page(bare)


def test_a_sweep_in_which_nothing_was_done_still_has_a_page() -> None:
    lost = made([msgspec.structs.replace(c, status="failed", bits=None, loss=None, error="x") for c in RECORD.cells])
    assert "None of 108 runs came to its end" in sweep_verdict(lost)
    html = render_page(lost)
    assert "sweep-answer-plot" not in html
    assert 'id="run-table"' in html


def test_one_rank_one_rate_one_seed_is_drawn() -> None:
    record = kept(rank=(16,), learning_rate=(1e-3,), seed=(0,), scaling=("lora",))
    assert "One rank was tried, 16" in sweep_verdict(record)
    assert "only" in {b.edge for b in record.best}
    assert "sweep-exponents" not in {f.name for f in figures_of(record)}
    render_page(record)


def test_many_ranks_are_thinned_in_the_drawing_and_whole_in_the_table() -> None:
    ranks = range(1, 31)
    rows = [msgspec.structs.replace(c, rank=r) for r in ranks for c in RECORD.cells if c.rank == 16 and c.seed == 0]
    record = made(rows)
    drawn = figure(record, "sweep-rates")
    lines = [t for t in drawn.data if t["mode"] == "lines+markers"]
    assert len(lines) == 16  # eight a rule
    assert "8 of 30 ranks" in drawn.detail
    assert drawn.fallback is not None
    assert {row[1] for row in drawn.fallback.rows} == {str(r) for r in ranks}


def test_rates_are_short_and_labels_keep_apart() -> None:
    assert [rate_words(r) for r in (1e-4, 0.003, 0.01, 2.5e-5, 1.0)] == ["1e-4", "3e-3", "0.01", "2.5e-5", "1"]
    assert rate_label(2.15443469e-4) == "2.2e-4"
    labels = rates_axis([1e-3, 3e-3, 5e-3, 1e-2, 1e-1])["ticktext"]
    assert labels[0] == "1e-3"
    assert "" in labels  # 5e-3 stands too near to 3e-3
    assert len(labels) == 5


def test_legends_stand_one_above_the_other() -> None:
    keys, room = legends(400, 8, 3)
    assert keys["legend2"]["y"] == 0
    # three rows of marks lie below the ranks, in px
    assert keys["legend"]["y"] * (400 + room) >= 3 * 19


def test_hostile_words_stay_words() -> None:
    hostile = "</script><b onmouseover=alert(1)>"
    rows = [msgspec.structs.replace(c, scaling=hostile, error=hostile) for c in RECORD.cells if c.scaling == "lora"]
    html = render_page(made(rows))
    assert hostile not in html
    assert "<b onmouseover" not in html
