"""Effective rank and coherence of the gradient at the base, a point a module.

In: a probe record. Out: a figure, or None where every gradient is zero.
"""

from __future__ import annotations

from rankwise.records import ProbeRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, drawn, layout, log_axis
from rankwise.report.looks import safe


def draw(record: ProbeRecord) -> Figure | None:
    """Draw effective rank against coherence."""
    known = [g for g in record.gradient if g.effective_rank is not None and g.coherence]
    if not known:
        return None
    ranks = [float(g.effective_rank or 1.0) for g in known]
    together = [float(g.coherence or 0.0) for g in known]
    points: Json = {
        "type": "scatter",
        "mode": "markers",
        "x": [drawn(c) for c in together],
        "y": [drawn(r) for r in ranks],
        "marker": {"color": "@first", "size": 8},
        "customdata": [safe(g.module) for g in known],
        "hovertemplate": "%{customdata}<br>coherence %{x:.3g}, effective rank %{y:.3g}<extra></extra>",
    }
    cells = tuple((g.module, words.number(g.effective_rank), words.number(g.coherence)) for g in known)
    return Figure(
        name="probe-gradient",
        title="How wide the data pull, and how far together",
        alt="Effective rank of the gradient against the coherence of the rows, a point a module.",
        data=(points,),
        layout=layout(
            340,
            showlegend=False,
            xaxis=log_axis("coherence of the rows (log scale)", together),
            yaxis=log_axis("effective rank of the gradient (log scale)", ranks),
        ),
        caption=(
            f"A point is one of n = {len(known)} modules; the gradient is summed over "
            f"{words.count(record.gradient_examples, 'row')} at the base.",
            "Coherence is 1 where all rows pull the same way, and "
            f"{words.number(1 / max(1, record.gradient_examples))} where they have nothing in common.",
            "Effective rank here is no rank to train at: it says how the first step points.",
        ),
        fallback=Table("Gradient by module", ("module", "effective rank", "coherence"), cells, named=True),
    )
