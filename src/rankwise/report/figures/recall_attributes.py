"""Recall by attribute: bits a fact of those possible, and how many answers are exact.

In: a run or recall record. Out: a figure, or None where recall was not measured by attribute.
"""

from __future__ import annotations

from rankwise.records import AttributeRecall, Recall, RecallRecord, RunRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, known, layout
from rankwise.report.looks import safe

MOST_ROWS = 40
"""Attributes drawn; the table has them all."""


def _follows(row: AttributeRecall) -> bool:
    """Return whether the answer follows from another one: it holds no bits, and its score is none of its own."""
    return row.bits_possible == 0


def _bits(row: AttributeRecall) -> float | None:
    return None if _follows(row) else known(row.bits_per_fact)


def _possible(row: AttributeRecall) -> float | None:
    return known(row.bits_possible)


def table(rows: tuple[AttributeRecall, ...]) -> Table:
    """Return the scores as a table."""
    head = ("attribute", "facts", "bits a fact", "possible", "exact")
    cells = tuple(
        (r.attribute, f"{r.facts:,}", words.number(_bits(r)), words.number(_possible(r)), words.share(r.exact_share))
        for r in rows
    )
    return Table("Recall by attribute", head, cells, named=True)


def _traces(rows: list[AttributeRecall]) -> tuple[Json, ...]:
    places = list(range(len(rows)))
    bars: Json = {
        "type": "bar",
        "orientation": "h",
        "name": "bits recalled",
        "x": [drawn(_bits(r)) for r in rows],
        "y": places,
        "width": 0.5,
        "marker": {"color": "@first", "line": {"width": 1, "color": "@first"}},
        "customdata": [safe(f"{r.attribute}: {words.share(r.exact_share)} exact") for r in rows],
        "hovertemplate": "%{customdata}<br>%{x:.3f} bits a fact<extra></extra>",
    }
    ends: Json = {
        "type": "scatter",
        "mode": "markers",
        "name": "all there is",
        "x": [None if _follows(r) else drawn(_possible(r)) for r in rows],
        "y": places,
        "marker": {"symbol": "line-ns-open", "size": 26, "color": "@ink", "line": {"width": 2.5, "color": "@ink"}},
        "cliponaxis": False,
        "hovertemplate": "%{x:.3f} bits a fact in all<extra></extra>",
    }
    return bars, ends


def _label(row: AttributeRecall) -> str:
    name = row.attribute if len(row.attribute) <= 24 else row.attribute[:23] + "…"
    unknown = ", no bits" if _follows(row) else ", bits unknown" if _bits(row) is None else ""
    return safe(f"{name}\n{words.share(row.exact_share)} exact{unknown}")


def _caption(recall: Recall) -> tuple[str, ...]:
    facts = sorted({r.facts for r in recall.by_attribute})
    n = f"{facts[0]:,}" if len(facts) == 1 else f"{facts[0]:,} to {facts[-1]:,}"
    pools = recall.kind == "pools"
    holds = "log2 of the number of values it may take" if pools else "what it would be at a loss of zero"
    sentences = [
        "A bar is the bits that the tuned model scores above the base on a fact of one attribute, asked in the words "
        f"of the training data, as a mean over n = {n} facts; the upright mark is all there is to recall, {holds}.",
        "A long bar is not an important attribute: it has more values to choose from.",
    ]
    if any(map(_follows, recall.by_attribute)):
        sentences.append("An attribute with no bits follows from another one: it counts for exact answers only.")
    return tuple(sentences)


def draw(record: RunRecord | RecallRecord) -> Figure | None:
    """Draw the bits a fact of every attribute, a row each."""
    rows = record.recall.by_attribute if record.recall is not None else ()
    if record.recall is None or not any(_bits(r) is not None for r in rows):
        return None
    shown = list(rows[:MOST_ROWS])
    values = [v for r in shown for v in (_bits(r), _possible(r)) if v is not None]
    low, high = min([0.0, *values]), max([0.0, *values]) or 1.0
    names = axis("", tickvals=list(range(len(shown))), ticktext=[_label(r) for r in shown], showgrid=False)
    names |= {
        "tickcolor": "@clear",
        "ticklen": 6,
        "range": [len(shown) - 0.4, -0.6],
        "showline": False,
        "tickfont": {"size": 11.5},
    }
    bits = axis("bits a fact", range=[drawn(1.05 * low), drawn(1.05 * high)])
    bits |= {"zeroline": True, "zerolinecolor": "@line"}
    return Figure(
        name="recall-attributes",
        title="Recall by attribute",
        alt="Bits recalled a fact, a bar an attribute, with what is possible.",
        data=_traces(shown),
        layout=layout(110 + 46 * len(shown), showlegend=True, xaxis=bits, yaxis=names, bargap=0.3),
        caption=_caption(record.recall),
        detail=f"the first {len(shown)} of {len(rows)} attributes are drawn" if len(shown) < len(rows) else "",
        fallback=table(rows),
    )
