"""Numbers in the figures are those of the record, and plotly knows every key that is used."""

from __future__ import annotations

import json
import math
from typing import Any

import conversion_samples
import extraction_samples
import page_samples as samples
import plan_samples
import plotly.graph_objects as go
import probe_samples
import pytest
import run_samples
import stability_samples
import sweep_samples

from rankwise import criteria
from rankwise.records import Record, SpectraRecord
from rankwise.report.drawing import EVERY_RANK, Figure, drawn, rank_ticks, ranks_to_draw
from rankwise.report.figures import FIGURES, energy, heat_map, planted_energy, scaled_error, singular_values
from rankwise.simulation import simulate

RECORDS: dict[str, Record] = {
    "adapter": samples.adapter(4),
    "delta": samples.delta(3, 256),
    "one": samples.record([samples.module("w", [3.0, 1.0])]),
    "rank one": samples.record([samples.module("w", [3.0])]),
    "zero": samples.record([samples.module("w", [0.0, 0.0], energy=0.0)]),
    "nulls": samples.record([samples.unknown("a.0.b"), samples.module("a.1.b", [1.0])]),
    "simulation": simulate(command=("rankwise", "simulate")),
    **run_samples.RECORDS,
    **stability_samples.RECORDS,
    **conversion_samples.RECORDS,
    **extraction_samples.RECORDS,
    **probe_samples.RECORDS,
    "sweep": sweep_samples.sweep(),
    **{f"plan {name}": record for name, record in plan_samples.RECORDS.items()},
}


def shown(figure: Figure, index: int) -> list[dict[str, Any]]:
    """Return the traces while one entry of the selector is chosen."""
    return [a | b for a, b in zip(figure.data, figure.choices[index].data, strict=False)]


def coloured(value: Any) -> Any:
    """Put a colour where the page's script would."""
    if isinstance(value, dict):
        return {k: coloured(v) for k, v in value.items()}
    if isinstance(value, list):
        return [coloured(v) for v in value]
    return "#123456" if isinstance(value, str) and value.startswith("@") else value


def drawings() -> list[Any]:
    made = []
    for label, record in RECORDS.items():
        for name, row in FIGURES.items():
            if isinstance(record, row.record):
                made.append(pytest.param(record, name, id=f"{label}-{name}"))
    return made


@pytest.mark.parametrize(("record", "name"), drawings())
def test_plotly_accepts_every_figure_and_it_is_finite_json(record: Record, name: str) -> None:
    figure = FIGURES[name].draw(record)
    if figure is None:
        return
    assert figure.name == name
    assert figure.layout["height"] > 0
    assert 2 <= len(figure.caption) <= 5
    text = json.dumps(figure.spec(), allow_nan=False)
    assert json.loads(text) == figure.spec()
    go.Figure(coloured(list(figure.data)), coloured(figure.layout))
    for index, choice in enumerate(figure.choices):
        go.Figure(coloured(shown(figure, index)), coloured(figure.layout | choice.layout))


def test_every_figure_is_of_some_record_here() -> None:
    drawn_names = {name for r in RECORDS.values() for name, row in FIGURES.items() if isinstance(r, row.record)}
    assert drawn_names == set(FIGURES)


@pytest.mark.parametrize("name", ["adapter", "delta"])
def test_mean_curve_is_the_summary_of_the_record(name: str) -> None:
    """inspect writes the mean share at powers of two; the bold line passes through the same numbers."""
    record = RECORDS[name]
    assert isinstance(record, SpectraRecord)
    figure = energy.draw(record)
    assert figure is not None
    bold = figure.data[-1]
    assert bold["name"].startswith("mean of")
    curve = dict(zip(bold["x"], bold["y"], strict=True))
    assert len(record.summary.energy_by_rank) >= 5
    for rank, share in record.summary.energy_by_rank.items():
        assert curve[int(rank)] == pytest.approx(share, rel=1e-5), "six digits are drawn"


def test_thin_lines_are_the_energy_shares_of_their_modules() -> None:
    record = samples.adapter(2)
    figure = energy.draw(record)
    assert figure is not None
    lines = {trace["meta"]: trace for trace in figure.data if "meta" in trace}
    assert len(lines) == 14
    for m in record.modules:
        spectrum = criteria.Spectrum(m.module, m.shape, m.singular_values, m.energy or 0, m.complete)
        wanted = [criteria.energy_share(spectrum, r) for r in lines[m.module]["x"]]
        assert lines[m.module]["y"] == pytest.approx(wanted, rel=1e-5)


def test_a_cut_off_list_ends_below_one_and_the_mean_with_it() -> None:
    """Of the energy 10 the two values on file hold 5: the share stops at 0.5, and nothing is made up past it."""
    cut = samples.module("cut", [2.0, 1.0], energy=10.0, complete=False, r=None, shape=(8, 8))
    whole = samples.module("whole", [1.0, 1.0, 1.0, 1.0])
    figure = energy.draw(samples.record([cut, whole]))
    assert figure is not None
    assert figure.data[0]["y"] == [0.4, 0.5]
    assert figure.data[-1]["x"] == [1, 2]
    assert figure.data[-1]["y"] == pytest.approx([(0.4 + 0.25) / 2, (0.5 + 0.5) / 2])


def test_modules_without_a_delta_are_left_out_of_the_mean() -> None:
    zero = samples.module("frozen", [0.0, 0.0], energy=0.0)
    figure = energy.draw(samples.record([zero, samples.unknown("x"), samples.module("w", [1.0, 1.0])]))
    assert figure is not None
    assert [t.get("meta") for t in figure.data if "meta" in t] == ["w"]
    assert "2 modules without a known, non-zero delta left out" in figure.detail


def test_many_modules_are_thinned_and_the_page_says_so() -> None:
    many = samples.record([samples.module(f"layers.{i}.w", [1.0, 0.5]) for i in range(energy.MOST_LINES + 100)])
    figure = energy.draw(many)
    assert figure is not None
    lines = [t for t in figure.data if "meta" in t]
    assert len(lines) <= energy.MOST_LINES
    assert f"{len(lines)} lines, evenly chosen, are drawn of 500; the mean is over all" in figure.detail
    assert figure.data[-1]["name"] == "mean of 500 modules"


def test_singular_values_are_drawn_as_recorded_with_the_edge_between() -> None:
    record = samples.delta(1, 256)
    figure = singular_values.draw(record)
    assert figure is not None
    for index, choice in enumerate(figure.choices):
        m = record.modules[index]
        assert choice.label == m.module
        above, below, edge = shown(figure, index)
        for trace in (above, below):
            wanted = [m.singular_values[r - 1] for r in trace["x"]]
            assert trace["y"] == pytest.approx(wanted, rel=1e-5)
        assert m.signal_rank is not None
        assert above["x"][-1] == m.signal_rank
        assert below["x"][0] == m.signal_rank + 1, "both sides of the edge are drawn whatever the thinning"
        assert set(edge["y"]) == {drawn(m.noise_edge)}
        assert f"{m.signal_rank} values above the noise edge" in choice.note


def test_an_adapter_has_no_noise_edge_and_the_page_says_why() -> None:
    figure = singular_values.draw(samples.adapter(1))
    assert figure is not None
    assert figure.choices[0].data[2] == {"x": [], "y": []}
    assert "no noise edge: this is an adapter" in figure.choices[0].note
    assert not figure.layout["showlegend"]


def test_values_of_zero_are_counted_not_drawn() -> None:
    figure = singular_values.draw(samples.record([samples.module("w", [1.0, 0.0, 0.0])]))
    assert figure is not None
    assert figure.choices[0].data[0] == {"x": [1], "y": [1]}
    assert "2 of them zero and not drawn" in figure.choices[0].note


@pytest.mark.parametrize("key", ["rank_90", "effective_rank", "stable_rank", "relative_norm", "signal_rank"])
def test_heat_map_cells_are_the_numbers_of_their_modules(key: str) -> None:
    record = samples.delta(3, 256)
    figure = heat_map.draw(record)
    assert figure is not None
    labels = ["rank for 90 % of the energy", "effective rank", "stable rank", "relative norm", "signal rank"]
    label = labels[["rank_90", "effective_rank", "stable_rank", "relative_norm", "signal_rank"].index(key)]
    index = [c.label for c in figure.choices].index(label)
    (trace,) = shown(figure, index)
    cells = {}
    for row, names in enumerate(trace["customdata"]):
        for column, name in enumerate(names):
            if name:
                cells[name] = trace["z"][row][column]
            else:
                assert trace["z"][row][column] is None, "a place without a module stays blank"
    assert cells == {m.module: drawn(getattr(m, key)) for m in record.modules}


def test_heat_map_shares_of_the_energy_sum_to_one() -> None:
    figure = heat_map.draw(samples.adapter(3))
    assert figure is not None
    index = [c.label for c in figure.choices].index("share of the update's energy")
    assert math.fsum(v for row in shown(figure, index)[0]["z"] for v in row) == pytest.approx(1, rel=1e-5)


def test_heat_map_starts_with_the_signal_rank_where_rounding_misleads() -> None:
    limited, clean = heat_map.draw(samples.delta(2, 256)), heat_map.draw(samples.delta(2, 256, limited=0.0))
    assert limited is not None
    assert clean is not None
    assert limited.choices[limited.chosen].label == "signal rank"
    assert clean.choices[clean.chosen].label == "rank for 90 % of the energy"


def test_heat_map_orders_layers_as_numbers_and_puts_the_rest_last() -> None:
    names = ["h.10.a", "h.2.a", "lm_head", "h.2.b[1]", "h.2.b[0]"]
    figure = heat_map.draw(samples.record([samples.module(n, [1.0]) for n in names]))
    assert figure is not None
    assert figure.data[0]["y"] == ["2", "10", "none"]
    assert figure.data[0]["x"] == ["a", "lm_head", "b[1]", "b[0]"]


def test_labels_that_would_meet_when_shortened_stay_apart() -> None:
    names = ["encoder.layers.0.w", "decoder.layers.0.w", "encoder.layers.0.v"]
    figure = heat_map.draw(samples.record([samples.module(n, [1.0]) for n in names]))
    assert figure is not None
    assert len(set(figure.data[0]["x"])) == 3


def test_simulation_points_are_its_rows() -> None:
    record = simulate(command=("x",))
    figure = planted_energy.draw(record)
    assert figure is not None
    for index, update in enumerate(record.updates.values()):
        line, points = figure.data[2 * index : 2 * index + 2]
        assert points["x"] == [row.rank for row in update.rows]
        assert points["y"] == pytest.approx([row.energy_share for row in update.rows], rel=1e-5)
        curve = dict(zip(line["x"], line["y"], strict=True))
        for row in update.rows:
            assert curve[row.rank] == pytest.approx(row.energy_share, rel=1e-5)


def test_scaled_error_marks_lie_on_the_closed_form() -> None:
    """err^2 = 1 - E s (2 - s): marks are measured on matrices, lines follow from E and s alone."""
    record = simulate(command=("x",))
    figure = scaled_error.draw(record)
    assert figure is not None
    gap = scaled_error.largest_gap(record)
    assert gap is not None
    assert gap < 1e-12
    lines, marks = figure.data[0::2], figure.data[1::2]
    assert len(marks) == 3 * len(record.updates)
    for line, mark in zip(lines, marks, strict=True):
        assert mark["y"] == pytest.approx(line["y"], rel=1e-5)
    style = record.updates["style"]
    assert marks[1]["y"] == pytest.approx([row.scaled_error.lora for row in style.rows], rel=1e-5)


@pytest.mark.parametrize("longest", [0, 1, 2, 15, 16, 17, 100, 1000, 4096, 16384])
def test_ranks_drawn_hold_the_ends_and_every_power_of_two(longest: int) -> None:
    ranks = ranks_to_draw(longest, extra=(37, 10**9))
    assert ranks == sorted(set(ranks))
    assert set(range(1, min(longest, EVERY_RANK) + 1)) <= set(ranks)
    assert {2**k for k in range(20) if 2**k <= longest} <= set(ranks)
    assert len(ranks) <= 110
    if longest:
        assert ranks[-1] == longest
    assert (37 in ranks) == (longest >= 37)
    assert len(rank_ticks(longest)) <= 9


def test_numbers_keep_six_digits_and_lose_what_json_cannot_say() -> None:
    assert drawn(1 / 3) == 0.333333
    assert drawn(2.0) == 2
    assert isinstance(drawn(2.0), int)
    assert drawn(float("nan")) is None
    assert drawn(float("inf")) is None
    assert drawn(None) is None
    assert drawn(1.23456789e-30) == 1.23457e-30
