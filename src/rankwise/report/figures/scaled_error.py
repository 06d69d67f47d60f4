"""Error of a truncated SVD, plain and multiplied by each rule's scaling, beside its closed form.

In: a simulation record. Out: a figure, or None where the record holds no rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from rankwise.records import SimulatedUpdate, SimulationRecord, SimulationRow
from rankwise.report.drawing import Figure, Json, axis, drawn, known, layout, log_axis, plain, rank_ticks

PANEL: Final = 300
"""Height of one panel in px."""

GAP: Final = 78
"""Height between two panels in px: an axis title and the next heading."""

LEAST: Final = 1e-4
"""Smallest error the log axis reaches down to."""


class _Series(NamedTuple):
    name: str
    color: str
    symbol: str
    measured: Callable[[SimulationRow], float]
    closed: Callable[[SimulationRow], float] | None


SERIES: Final = (
    _Series("truncated SVD", "@first", "circle", lambda r: r.truncation_error, None),
    _Series("× alpha / r", "@second", "diamond", lambda r: r.scaled_error.lora, lambda r: r.closed_form.lora),
    _Series("× alpha / √r", "@third", "square", lambda r: r.scaled_error.rslora, lambda r: r.closed_form.rslora),
)


def largest_gap(record: SimulationRecord) -> float | None:
    """Return the largest distance between a measured scaled error and its closed form."""
    gaps = [
        abs(s.measured(row) - s.closed(row))
        for update in record.updates.values()
        for row in update.rows
        for s in SERIES
        if s.closed is not None
    ]
    return known(max(gaps)) if gaps else None


def _traces(update: SimulatedUpdate, panel: int) -> list[Json]:
    axes = {} if panel == 0 else {"xaxis": f"x{panel + 1}", "yaxis": f"y{panel + 1}"}
    ranks = [row.rank for row in update.rows]
    traces: list[Json] = []
    for series in SERIES:
        common: Json = {"type": "scatter", "x": ranks, "legendgroup": series.name} | axes
        line = series.closed or series.measured
        dash = "solid" if series.closed is None else "dash"
        traces.append(
            common
            | {
                "mode": "lines",
                "name": series.name + " closed form",
                "y": [drawn(line(row)) for row in update.rows],
                "line": {"width": 1.5, "color": series.color, "dash": dash},
                "showlegend": False,
                "hoverinfo": "skip",
            }
        )
        traces.append(
            common
            | {
                "mode": "markers",
                "name": series.name,
                "y": [drawn(series.measured(row)) for row in update.rows],
                "marker": {"size": 8, "color": series.color, "symbol": series.symbol},
                "showlegend": panel == 0,
                "hovertemplate": "rank %{x}: %{y:.4f}<extra>%{fullData.name}</extra>",
            }
        )
    return traces


def _panels(record: SimulationRecord, names: list[str]) -> Json:
    """Return axes, headings and lines at error 1 for one panel an update, from top to bottom."""
    inner = len(names) * PANEL + (len(names) - 1) * GAP
    ranks = sorted({row.rank for n in names for row in record.updates[n].rows})
    errors = [known(s.measured(row)) for n in names for row in record.updates[n].rows for s in SERIES]
    heights = [1.0, *(max(e, LEAST) for e in errors if e is not None)]
    ticks = ranks if len(ranks) <= 8 else rank_ticks(ranks[-1])
    keys: Json = {"annotations": [], "shapes": []}
    for index, name in enumerate(names):
        n = "" if index == 0 else str(index + 1)
        high = 1 - index * (PANEL + GAP) / inner
        domain = [round(max(0.0, high - PANEL / inner), 6), round(high, 6)]
        keys[f"xaxis{n}"] = axis("rank (log scale)", type="log", anchor=f"y{n}", tickvals=ticks) | {
            "ticktext": [str(t) for t in ticks]
        }
        keys[f"yaxis{n}"] = log_axis("relative error (log scale)", heights) | {
            "domain": domain,
            "anchor": f"x{n}",
        }
        heading = {"text": f"<b>{plain(name)}</b>", "showarrow": False, "xref": "paper", "yref": "paper"}
        where = {"x": 1, "y": domain[1], "xanchor": "right", "yanchor": "bottom", "font": {"size": 13, "color": "@ink"}}
        keys["annotations"].append(heading | where)
        zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": f"y{n}", "y0": 1, "y1": 1, "layer": "below"}
        keys["shapes"].append(zero | {"line": {"color": "@line", "width": 1, "dash": "dash"}})
    return keys


def draw(record: SimulationRecord) -> Figure | None:
    """Draw plain and scaled truncation errors of each update against rank."""
    names = [name for name, update in record.updates.items() if update.rows]
    if not names:
        return None
    traces = [t for panel, name in enumerate(names) for t in _traces(record.updates[name], panel)]
    gap = largest_gap(record)
    agreement = "" if gap is None else f" The two differ by at most {gap:.1g}.".replace("-", "\u2011")
    height = len(names) * PANEL + (len(names) - 1) * GAP + 120
    margin = {"l": 58, "r": 18, "t": 70, "b": 50}
    plot = layout(height, showlegend=True, margin=margin, **_panels(record, names))
    plot["legend"] = plot["legend"] | {"y": 1 + 26 / (height - 120)}
    return Figure(
        name="scaled-error",
        title="The “scaled error”, and why it is no property of LoRA",
        alt="Relative error against rank: plain truncated SVD, and multiplied by the two scalings.",
        data=tuple(traces),
        layout=plot,
        caption=(
            "Relative error (Frobenius, no unit) of the best rank-r approximation: plain, and after multiplying it by "
            f"alpha / r and alpha / √r with alpha = {record.lora_alpha:g}; one draw of each update.",
            "Marks are measured on the matrices; dashed lines join the closed form err² = 1 − E s (2 − s) from the "
            f"captured energy E and the factor s alone.{agreement}",
            "An error of 1 (the dashed level) is what leaving the update out would cost; s = 2 gives exactly 1 for "
            "every matrix, and only s = 1 gives the plain error.",
            "It does not say how well a LoRA of that rank would learn: a trained B A absorbs the factor.",
        ),
    )
