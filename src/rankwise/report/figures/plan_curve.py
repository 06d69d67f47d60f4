"""Relative error over parameters: ranks chosen by module, and one rank for all.

In: a plan record. Out: a figure, or None where the record holds no curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rankwise.records import CurvePoint, PlanRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, known, layout, log_axis

STEPS: Final = ((1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0,))
"""Leading digits of ticks: where the axis is of some decades, of less than one, of many."""


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two: few enough for a phone.

    >>> _ticks(230e3, 1.85e6), _ticks(5e4, 9e4)
    ([500000.0, 1000000.0], [50000.0, 70000.0])
    """
    decades = math.log10(high / low)
    leading = STEPS[1] if decades < 0.8 else STEPS[0] if decades < 2.2 else STEPS[2]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for p in powers for digit in leading if low <= (tick := digit * 10.0**p) <= high]


def _params_axis(values: Sequence[float]) -> Json:
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(0.04 * (high - low), 0.08)
    ticks = _ticks(10 ** (low - pad), 10 ** (high + pad))
    more: Json = {"range": [round(low - pad, 4), round(high + pad, 4)], "tickvals": [round(t) for t in ticks]}
    return axis("parameters (log scale)", type="log", tickformat="~s", **more)


def _line(name: str, color: str, symbol: str, points: list[tuple[CurvePoint, float]], dash: str) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [p.params for p, _ in points],
        "y": [drawn(error) for _, error in points],
        "customdata": [p.r for p, _ in points],
        "line": {"width": 2.5, "color": color, "dash": dash},
        "marker": {"size": 7, "color": color, "symbol": symbol},
        "hovertemplate": "%{x:,} parameters, those of uniform rank %{customdata}<br>relative error %{y:.4f}"
        "<extra>%{fullData.name}</extra>",
    }


def _star(record: PlanRecord, error: float) -> Json:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "this plan",
        "x": [record.params],
        "y": [drawn(error)],
        "marker": {"size": 15, "symbol": "star", "color": "@third", "line": {"width": 1, "color": "@ink"}},
        "hovertemplate": "%{x:,} parameters<br>relative error %{y:.4f}<extra>this plan</extra>",
    }


def table(points: Sequence[CurvePoint]) -> Table:
    """Return the numbers of both curves."""
    rows = tuple(
        (
            str(p.r),
            f"{p.params:,}",
            words.number(p.uniform_error),
            words.number(p.planned_error),
            _saved(p),
        )
        for p in points
    )
    head = ("uniform rank", "parameters", "uniform error", "chosen error", "chosen / uniform")
    return Table("Relative error at the parameters of each uniform rank", head, rows)


def _saved(point: CurvePoint) -> str:
    planned, flat = known(point.planned_error), known(point.uniform_error)
    return f"{planned / flat:.3f}" if planned is not None and flat else words.UNKNOWN


def draw(record: PlanRecord) -> Figure | None:
    """Draw both errors over the parameters, and the plan as a star."""
    flat = [(p, e) for p in record.curve if (e := known(p.uniform_error)) is not None and e > 0]
    chosen = [(p, e) for p in record.curve if (e := known(p.planned_error)) is not None and e > 0]
    if len(flat) + len(chosen) < 2:
        return None
    error = known(record.relative_error)
    star = error if error is not None and error > 0 else None
    errors = [e for _, e in (*flat, *chosen)] + ([star] if star else [])
    params = [float(p.params) for p, _ in (*flat, *chosen)] + ([float(record.params)] if star else [])
    tall = max(errors) / min(errors) > 20
    upward = log_axis("relative error (log scale)", errors) if tall else axis("relative error", range=[0, 1.04])
    traces = [
        _line("one rank for all", "@second", "circle", flat, "dash"),
        _line("ranks chosen by module", "@first", "diamond", chosen, "solid"),
    ] + ([_star(record, star)] if star else [])
    exact = len(record.curve) - min(len(flat), len(chosen))
    return Figure(
        name="plan-curve",
        title="Error against parameters",
        alt="Relative error over parameters: ranks chosen by module below one rank for all.",
        data=tuple(traces),
        layout=layout(420, showlegend=True, xaxis=_params_axis(params), yaxis=upward),
        caption=(
            f"Each mark is a uniform rank, n = {len(record.curve)}; the chosen ranks at the same place cost no more "
            "and obey the same options as this plan. Both are best approximations of these very updates (Frobenius, no "
            "unit).",
            "Read it across: how many parameters less the lower curve needs for the same error; the star is this plan.",
            "Curves that lie on each other say that energy is spread evenly over the modules: one rank for all does "
            "as well. It does not say what a training at these ranks would reach.",
        ),
        detail=f"{words.count(exact, 'mark')} with an error of zero, or one that is not known, not drawn"
        if exact
        else "",
        fallback=table(record.curve),
    )
