"""Loss and learning rate over the steps of one run.

In: a run record. Out: a figure, or None where no loss was written down.
"""

from __future__ import annotations

from typing import Final

from rankwise.records import LossPoint, RunRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, evenly, known, layout, log_axis, plain

MOST_POINTS: Final = 2000
"""Points drawn: past what a plot 1,000 px wide can show."""

MOST_ROWS: Final = 25
"""Rows of the table."""

LOG_FROM: Final = 20.0
"""Largest loss over the smallest from which on the axis is logarithmic: the end would else lie on the floor."""


def kept_line(record: RunRecord) -> tuple[list[Json], list[Json]]:
    """Return shapes and annotations that mark the step of the adapter kept, where the run did not finish."""
    if record.status == "done":
        return [], []
    stroke = {"color": "@ink", "width": 1.5, "dash": "dot"}
    x = {"x0": record.steps, "x1": record.steps}
    line: Json = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "line": stroke}
    late = record.steps > record.config.steps / 2
    text: Json = {"x": record.steps, "y": 1, "xref": "x", "yref": "paper", "yanchor": "top", "showarrow": False}
    side = {"xanchor": "right" if late else "left", "xshift": -4 if late else 4}
    look = {"font": {"size": 11, "color": "@ink"}, "bgcolor": "@surface"}
    return [line | x], [text | side | look | {"text": f"{plain(record.status)}: adapter of step {record.steps:,}"}]


def steps_axis(record: RunRecord, last: int) -> Json:
    """Return the axis over steps: as far as the run was asked to go, so that one cut short looks so."""
    end = max(last, record.config.steps, 1)
    return axis("optimizer steps", range=[drawn(-0.02 * end), drawn(1.02 * end)], tickformat=",d", nticks=8)


def _loss_axis(losses: list[float]) -> Json:
    title = {"domain": [0.36, 1]}
    if losses and min(losses) > 0 and max(losses) / min(losses) >= LOG_FROM:
        return log_axis("loss, nats a token (log scale)", losses) | title
    high = max([0.0, *losses])
    return axis("loss, nats a token", range=[0, drawn(1.06 * high or 1.0)]) | title


def _line(points: list[LossPoint], values: list[float | None], more: Json) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(points) <= 60 else "lines",
        "x": [p.step for p in points],
        "y": [drawn(v) for v in values],
        "marker": {"size": 4, "color": "@first"},
        "line": {"width": 2, "color": "@first"},
        "showlegend": False,
    } | more


def _table(points: list[LossPoint]) -> Table:
    rows = []
    for place in evenly(len(points), MOST_ROWS):
        p = points[place]
        rows.append((f"{p.step:,}", words.number(p.loss), words.number(p.learning_rate)))
    few = "" if len(rows) == len(points) else f", {len(rows)} of {len(points):,} points"
    return Table(f"Loss (nats a token) and learning rate{few}", ("step", "loss", "learning rate"), tuple(rows))


def _detail(points: list[LossPoint], shown: list[LossPoint]) -> str:
    parts = []
    if len(shown) < len(points):
        parts.append(f"{len(shown):,} points, evenly chosen, are drawn of {len(points):,}")
    lost = sum(known(p.loss) is None for p in points)
    if lost:
        parts.append(f"{words.count(lost, 'point')} without a finite loss {'is' if lost == 1 else 'are'} a gap")
    return "; ".join(parts)


def draw(record: RunRecord) -> Figure | None:
    """Draw the loss above the learning rate, over the same steps."""
    points = list(record.losses)
    if not any(known(p.loss) is not None for p in points):
        return None
    shown = [points[place] for place in evenly(len(points), MOST_POINTS)]
    rates = [p.learning_rate for p in shown]
    losses = [p.loss for p in shown if p.loss is not None and known(p.loss) is not None]
    loss = {"name": "loss", "hovertemplate": "step %{x}: %{y:.4f} nats a token<extra></extra>"}
    rate = {"name": "learning rate", "yaxis": "y2", "hovertemplate": "step %{x}: rate %{y:.3g}<extra></extra>"}
    grey = {"line": {"width": 2, "color": "@thin"}, "marker": {"size": 4, "color": "@thin"}}
    high = max((r for r in rates if r is not None and known(r) is not None), default=0.0)
    shapes, notes = kept_line(record)
    scale = _loss_axis(losses)
    batch = words.count(record.config.batch_size, "example")
    more = {
        "xaxis": steps_axis(record, points[-1].step) | {"anchor": "y2"},
        "yaxis": scale,
        "yaxis2": axis("rate", domain=[0, 0.24], range=[0, drawn(1.15 * high or 1.0)], nticks=3),
        "shapes": shapes,
        "annotations": notes,
        "margin": {"l": 62, "r": 24, "t": 16, "b": 50},
    }
    return Figure(
        name="loss",
        title="Loss over the steps",
        alt=f"Training loss and learning rate over {record.steps:,} steps.",
        data=(
            _line(shown, [p.loss for p in shown], loss),
            _line(shown, rates, rate | grey),
        ),
        layout=layout(440, showlegend=False, **more),
        caption=(
            f"Above: the training loss in nats per token that is trained on, each point a mean over the steps since "
            f"the one before ({batch} a step, n = {len(points):,} points). Below: the learning rate.",
            "A low training loss does not say what was kept: recall is measured apart, in this page where it was "
            "asked for.",
        ),
        detail=_detail(points, shown),
        fallback=_table(points),
    )
