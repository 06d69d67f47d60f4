"""Runs, or measured adapters, beside each other: their losses, and what is recalled of each attribute.

In: run or recall records. Out: an `Extra`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rankwise.records import LossPoint, RecallRecord, RunRecord
from rankwise.report import words
from rankwise.report.comparing.common import Compared, Extra
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, evenly, known, layout, log_axis, plain, value_axis

MOST_POINTS: Final = 1000
MOST_ROWS: Final = 25
LOG_FROM: Final = 20.0
"""Largest loss over the smallest from which on the axis is logarithmic."""

These = Sequence[Compared[Any]]


def _losses(these: These) -> Figure | None:
    shown: list[tuple[Compared[Any], list[LossPoint]]] = []
    for one in these:
        points = [p for p in getattr(one.record, "losses", ()) if known(p.loss) is not None]
        if points:
            shown.append((one, [points[place] for place in evenly(len(points), MOST_POINTS)]))
    if not shown:
        return None
    traces: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [p.step for p in points],
            "y": [drawn(p.loss) for p in points],
            "hovertemplate": "step %{x}: %{y:.4f} nats a token<extra>%{fullData.name}</extra>",
        }
        | one.look()
        for one, points in shown
    ]
    losses = [p.loss for _, points in shown for p in points if p.loss is not None]
    wide = min(losses) > 0 and max(losses) / min(losses) >= LOG_FROM
    title = "loss, nats a token"
    upward = log_axis(f"{title} (log scale)", losses) if wide else value_axis(title, losses)
    return Figure(
        name="compare-loss",
        title="Loss over the steps, laid over each other",
        alt=f"Training loss over the steps of {words.count(len(shown), 'run')}.",
        data=tuple(traces),
        layout=layout(400, showlegend=True, xaxis=axis("optimizer steps", tickformat=",d", nticks=8), yaxis=upward),
        caption=(
            "Training loss in nats per token that is trained on, each point a mean over the steps since the one "
            "before.",
            "A low training loss does not say what was kept, and runs on other data have other losses.",
        ),
        fallback=_loss_table(shown),
    )


def _loss_table(shown: Sequence[tuple[Compared[Any], list[LossPoint]]]) -> Table:
    steps = sorted({p.step for _, points in shown for p in points})
    kept = [steps[place] for place in evenly(len(steps), MOST_ROWS)]
    at = [{p.step: p.loss for p in points} for _, points in shown]
    rows = tuple((f"{step:,}", *(words.number(mine.get(step)) for mine in at)) for step in kept)
    few = "" if len(kept) == len(steps) else f", {len(kept)} of {len(steps):,} steps"
    return Table(f"Loss (nats a token){few}", ("step", *(one.letter for one, _ in shown)), rows)


def _attributes(these: These) -> Figure | None:
    found = []
    for one in these:
        recall = one.record.recall
        rows = {} if recall is None else {a.attribute: a for a in recall.by_attribute if a.bits_per_fact is not None}
        found.append(rows)
    names = list(dict.fromkeys(name for rows in found for name in rows))
    if not names or not all(found):
        return None
    traces: list[Json] = [
        {
            "type": "bar",
            "name": one.label,
            "x": [plain(name) for name in names],
            "y": [drawn(rows[name].bits_per_fact) if name in rows else None for name in names],
            "marker": {"color": one.color, "opacity": 1 if one.place < 3 else 0.55},
            "hovertemplate": "%{x}: %{y:.3g} bits a fact<extra>%{fullData.name}</extra>",
        }
        for one, rows in zip(these, found, strict=True)
    ]
    values = [known(row.bits_per_fact) or 0.0 for rows in found for row in rows.values()]
    possible = [known(a.bits_possible) for rows in found[:1] for a in rows.values()]
    cells = tuple(
        (name, *(words.number(rows[name].bits_per_fact) if name in rows else words.UNKNOWN for rows in found))
        for name in names
    )
    held = f" The data hold {words.span(possible)} bits a fact." if any(possible) else ""
    return Figure(
        name="compare-attributes",
        title="Recall by attribute, beside each other",
        alt=f"Bits a fact of {len(names)} attributes, a bar a record.",
        data=tuple(traces),
        layout=layout(
            400,
            showlegend=True,
            barmode="group",
            xaxis=axis("", tickangle=-35),
            yaxis=value_axis("bits a fact above the base", values),
        ),
        caption=(f"Mean bits a fact, the base’s taken off.{held}",),
        fallback=Table("Bits a fact by attribute", ("attribute", *(one.letter for one in these)), cells, named=True),
    )


def _score(one: Compared[Any]) -> str:
    record: RunRecord | RecallRecord = one.record
    ended = f" ({record.status})" if isinstance(record, RunRecord) and record.status != "done" else ""
    if record.recall is None:
        loss = words.number(record.loss) if isinstance(record, RunRecord) else words.UNKNOWN
        return f"{one.letter} ends at a loss of {loss}{ended}"
    return f"{one.letter} recalls {words.number(record.recall.bits)} bits{ended}"


def _model(record: RunRecord | RecallRecord) -> tuple[str, str]:
    return (record.config.model, record.config.data) if isinstance(record, RunRecord) else (record.model, record.data)


def extra(these: These) -> Extra:
    """Return what runs and measured adapters add to their comparison."""
    found = [figure for figure in (_losses(these), _attributes(these)) if figure is not None]
    places = [_model(one.record) for one in these]
    rows = [("model", *(model for model, _ in places)), ("data", *(data for _, data in places))]
    runs = [one.record for one in these if isinstance(one.record, RunRecord)]
    if len(runs) == len(these):
        rows.append(("digest of the data", *(run.config.data_digest for run in runs)))
    return Extra(
        verdict=f"{'; '.join(map(_score, these))}: one run each, so that no interval says what a seed alone would do.",
        rows=tuple(rows),
        figures=tuple(found),
    )
