"""Singular values of the planted updates.

In: a simulation record. Out: a figure, or None where no value is above zero.
"""

from __future__ import annotations

from rankwise.records import SimulationRecord
from rankwise.report.drawing import Figure, Json, drawn, known, layout, log_axis, plain, rank_axis, ranks_to_draw
from rankwise.report.figures.planted_energy import LOOKS


def draw(record: SimulationRecord) -> Figure | None:
    """Draw the singular values of each planted update."""
    traces: list[Json] = []
    values: list[float] = []
    longest = 1
    for index, (name, update) in enumerate(record.updates.items()):
        color, symbol, dash = LOOKS[index % len(LOOKS)]
        sigma = update.singular_values
        points = [(r, v) for r in ranks_to_draw(len(sigma)) if known(v := sigma[r - 1]) and v > 0]
        values += [v for _, v in points]
        longest = max(longest, len(sigma))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(name),
                "x": [r for r, _ in points],
                "y": [drawn(v) for _, v in points],
                "line": {"width": 1.5, "color": color, "dash": dash},
                "marker": {"size": 6, "color": color, "symbol": symbol},
                "hovertemplate": "value %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            }
        )
    if not values:
        return None
    return Figure(
        name="planted-values",
        title="Singular values",
        alt=f"Singular values of {', '.join(record.updates)} on logarithmic axes.",
        data=tuple(traces),
        layout=layout(
            380,
            xaxis=rank_axis(longest, "index of the singular value (log scale)"),
            yaxis=log_axis("singular value (log scale)", values),
            showlegend=True,
        ),
        caption=(
            "Singular values of each update with its noise, largest first; no unit, both axes logarithmic. What "
            f"lies at the level of the noise (iid, standard deviation {record.noise:g}) was not planted.",
            "The planted values are a choice, not a measurement of any model.",
        ),
    )
