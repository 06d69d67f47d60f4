"""Energy captured against rank, for the planted updates.

In: a simulation record. Out: a figure, or None where the record holds no update.
"""

from __future__ import annotations

from itertools import accumulate

from rankwise.records import SimulatedUpdate, SimulationRecord
from rankwise.report.drawing import (
    Figure,
    Json,
    drawn,
    layout,
    marked_shares,
    plain,
    rank_axis,
    ranks_to_draw,
    share_axis,
)

LOOKS = (("@first", "circle", "solid"), ("@second", "diamond", "solid"), ("@third", "square", "solid"))
"""Colour, symbol and dash of the first, second and third update: told apart without colour too."""


def _traces(name: str, update: SimulatedUpdate, look: tuple[str, str, str]) -> list[Json]:
    color, symbol, dash = look
    sums = list(accumulate(v * v for v in update.singular_values))
    ranks = ranks_to_draw(len(sums), extra=(row.rank for row in update.rows))
    label = plain(name)
    line: Json = {
        "type": "scatter",
        "mode": "lines",
        "name": label,
        "legendgroup": label,
        "showlegend": False,
        "x": ranks,
        "y": [drawn(min(1.0, sums[r - 1] / update.energy)) if update.energy else None for r in ranks],
        "line": {"width": 2.5, "color": color, "dash": dash},
        "hovertemplate": "rank %{x}: %{y:.2%}<extra>%{fullData.name}</extra>",
    }
    points: Json = {
        "type": "scatter",
        "mode": "markers",
        "name": label,
        "legendgroup": label,
        "x": [row.rank for row in update.rows],
        "y": [drawn(row.energy_share) for row in update.rows],
        "marker": {"size": 9, "color": color, "symbol": symbol},
        "hovertemplate": "rank %{x}: %{y:.2%}<extra>%{fullData.name}</extra>",
    }
    return [line, points]


def draw(record: SimulationRecord) -> Figure | None:
    """Draw the energy captured against rank for each planted update."""
    drawable = {n: u for n, u in record.updates.items() if u.singular_values}
    if not drawable:
        return None
    traces: list[Json] = []
    for index, (name, update) in enumerate(drawable.items()):
        traces += _traces(name, update, LOOKS[index % len(LOOKS)])
    longest = max(len(u.singular_values) for u in drawable.values())
    planted = ", ".join(f"{name} as {update.planted}" for name, update in drawable.items())
    more = marked_shares((0.9, 0.99))
    return Figure(
        name="planted-energy",
        title="Energy captured against rank",
        alt=f"Share of the energy against rank for {', '.join(drawable)}.",
        data=tuple(traces),
        layout=layout(400, xaxis=rank_axis(longest), yaxis=share_axis("share of the energy"), showlegend=True, **more),
        caption=(
            f"Updates planted from known spectra ({planted}), each {record.size} × {record.size} plus noise, one draw "
            f"each; the marks are the ranks of the tables below. A point says which share of the squared "
            "Frobenius norm the largest directions up to that rank hold.",
            "An update with few directions is held by a small rank, one with many is not: that is the whole "
            "argument for more rank where facts are to be learnt.",
            "That style is narrow and facts are wide is planted here, not found: what your data needs has to be "
            "measured on your data.",
        ),
    )
