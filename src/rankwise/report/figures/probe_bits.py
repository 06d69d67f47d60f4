"""Bits to learn: where the loss of the base goes, and how the bits lie over the rows.

In: a probe record. Out: figures.
"""

from __future__ import annotations

from rankwise.records import ProbeRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, evenly, layout, log_axis

MOST_POINTS = 400
"""Rows drawn, evenly chosen by rank."""


def draw_parts(record: ProbeRecord) -> Figure | None:
    """Draw the three parts of the base's loss as bars."""
    names = ("form and style", "said by other rows", "to learn")
    values = (record.form_bits, record.repeated_bits, record.bits_to_learn)
    bars: Json = {
        "type": "bar",
        "orientation": "h",
        "x": [drawn(v / record.examples) for v in values],
        "y": [0, 1, 2],
        "width": 0.55,
        "marker": {"color": ["@second", "@second", "@first"]},
        "hovertemplate": "%{x:.3f} bits a row<extra></extra>",
    }
    places = axis("", tickvals=[0, 1, 2], ticktext=list(names), showgrid=False)
    places |= {"range": [2.6, -0.6], "showline": False, "tickcolor": "@clear"}
    low, high = min(0.0, *bars["x"]), max(0.0, *bars["x"]) or 1.0
    cells = tuple((n, words.number(v), words.number(v / record.examples)) for n, v in zip(names, values, strict=True))
    return Figure(
        name="probe-parts",
        title="Where the loss of the base goes",
        alt="Bits a row of the base's loss: form and style, said by other rows, to learn.",
        data=(bars,),
        layout=layout(230, showlegend=False, xaxis=axis("bits a row", range=[1.08 * low, 1.08 * high]), yaxis=places),
        caption=(
            f"The bars add up to what a row costs the base, a mean over n = {record.examples:,} rows: "
            f"{words.number(record.base_bits / record.examples)} bits. Form is what an adapter of rank "
            f"{record.adaptation_rank} saved on rows that it had not seen.",
            "The last bar is what has to be stored to know the rows by heart. It does not say that knowing them by "
            "heart is what you want.",
        ),
        fallback=Table("Parts of the base's loss", ("part", "bits", "bits a row"), cells, named=True),
    )


def draw_rows(record: ProbeRecord) -> Figure | None:
    """Draw the bits of the rows, in order of size."""
    if not record.rows:
        return None
    count = len(record.rows)
    kept = evenly(count, MOST_POINTS)
    traces: list[Json] = []
    kinds = (("base", "base_bits", "@second"), ("to learn", "news_bits", "@first"))
    for name, field, colour in kinds:
        ordered = sorted((max(0.0, getattr(row, field)) for row in record.rows), reverse=True)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [drawn((i + 1) / count) for i in kept],
                "y": [drawn(ordered[i]) for i in kept],
                "line": {"color": colour, "width": 2},
                "hovertemplate": "%{y:.3g} bits or more: %{x:.0%} of the rows<extra></extra>",
            }
        )
    top = max((row.base_bits for row in record.rows), default=1.0)
    cells = tuple(
        (f"{float(q):.0%}", words.number(record.base_bits_by_example[q]), words.number(bits))
        for q, bits in record.bits_by_example.items()
    )
    return Figure(
        name="probe-rows",
        title="Bits by row",
        alt="Bits of each row for the base and to learn, largest first.",
        data=tuple(traces),
        layout=layout(
            330,
            xaxis=axis("share of the rows", range=[0, 1.02], tickformat=".0%"),
            yaxis=axis("bits a row", range=[0, drawn(1.05 * max(top, 1e-9))]),
        ),
        caption=(
            f"n = {count:,} rows, each line sorted for itself, largest first: how many rows cost so much or more.",
            "Where the lower line lies near zero, the rows say what the base or an earlier row says already.",
        ),
        detail=f"{len(kept)} of {count:,} rows are drawn, evenly chosen" if len(kept) < count else "",
        fallback=Table("Quantiles of the bits of a row", ("quantile", "base", "to learn"), cells),
    )


def draw_rates(record: ProbeRecord) -> Figure | None:
    """Draw the ramp of learning rates."""
    points = [p for p in record.rates if p.loss is not None and p.smoothed is not None]
    if len(points) < 2:
        return None
    rates = [p.learning_rate for p in points]
    losses: Json = {
        "type": "scatter",
        "mode": "markers",
        "name": "of one batch",
        "x": [drawn(r) for r in rates],
        "y": [drawn(p.loss) for p in points],
        "marker": {"color": "@second", "size": 6},
        "hovertemplate": "%{x:.2g}: %{y:.3f}<extra></extra>",
    }
    line: Json = {
        "type": "scatter",
        "mode": "lines",
        "name": "smoothed",
        "x": [drawn(r) for r in rates],
        "y": [drawn(p.smoothed) for p in points],
        "line": {"color": "@first", "width": 2},
        "hovertemplate": "%{x:.2g}: %{y:.3f}<extra></extra>",
    }
    plan = record.recommendation
    chosen = "" if plan.learning_rate is None else f" The rate to start with is {words.number(plan.learning_rate)}."
    cells = tuple((words.number(p.learning_rate), words.number(p.loss), words.number(p.smoothed)) for p in points)
    high = max(p.loss or 0.0 for p in points)
    return Figure(
        name="probe-rates",
        title="Where the learning rate breaks",
        alt="Loss of each step while the learning rate rises.",
        data=(losses, line),
        layout=layout(
            330,
            xaxis=log_axis("learning rate (log scale)", rates),
            yaxis=axis("loss, nats a token", range=[0, drawn(1.05 * high)]),
        ),
        caption=(
            f"One run of n = {len(points)} steps at rank {max(m.r for m in plan.modules)}, {plan.rule}, whose rate "
            "rises from step to step: the loss of each batch before its step.",
            f"A third of the rate at the lowest smoothed loss is taken.{chosen} It is where the first few dozen "
            "steps break; a long run with a schedule may bear more or less.",
        ),
        fallback=Table("Loss by learning rate", ("learning rate", "loss", "smoothed"), cells),
    )
