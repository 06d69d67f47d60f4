"""The score over the learning rate: a panel a rule, a line a rank; what diverged and what lies on the edge is marked.

In: a sweep record. Out: a figure, or None where there is no run at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rankwise.records import SweepBest, SweepPoint, SweepRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, drawn, evenly, known, layout, plain
from rankwise.report.looks import BROKEN, hue, rule_words, symbols
from rankwise.report.sweep_looks import (
    ESTIMATE_HEAD,
    Quantity,
    bars,
    estimate_cells,
    estimate_words,
    legends,
    named,
    quantity_axis,
    rate_words,
    rates_axis,
    score_of,
)

PANEL: Final = 290
"""Height of one panel in px."""

GAP: Final = 76
"""Height between two panels in px: an axis title and the next heading."""

MOST_RANKS: Final = 8
"""Lines in a panel: as many as there are markers that tell them apart."""


SHORT: Final = "fewer seeds than its rivals"


def shown_ranks(record: SweepRecord) -> list[int]:
    """Return the ranks that get a line, the smallest and the largest among them."""
    ranks = record.config.ranks
    return [ranks[place] for place in evenly(len(ranks), MOST_RANKS)]


def _strength(record: SweepRecord, rank: int) -> float:
    """Return how opaque the line of a rank is: the larger the rank, the stronger."""
    shown = shown_ranks(record)
    return round(0.4 + 0.6 * (shown.index(rank) + 1) / len(shown), 3)


def _hover(point: SweepPoint, by: Quantity) -> str:
    ended = [f"{n} of {point.runs} {word}" for n, word in ((point.diverged, "diverged"), (point.failed, "failed")) if n]
    setting = f"rank {point.rank}, rate {rate_words(point.learning_rate)}"
    return "<br>".join(map(plain, (setting, estimate_words(point.score, by), *ended)))


def _short(point: SweepPoint) -> bool:
    """Tell whether a point has a mean of too few seeds to stand beside its rivals, though none of them was lost."""
    lost = point.diverged or point.failed
    return known(point.score.mean) is not None and not point.eligible and not lost


def _line(record: SweepRecord, rule: str, rank: int, axes: Json) -> Json:
    by, color = score_of(record), hue(rule)
    points = [p for p in record.points if (p.scaling, p.rank) == (rule, rank)]  # what cannot be best leaves a gap
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"rank {rank}",
        "x": [p.learning_rate for p in points],
        "y": [drawn(p.score.mean) if p.eligible else None for p in points],
        "error_y": bars([p.score for p in points], color),
        "opacity": _strength(record, rank),
        "line": {"width": 2, "color": color},
        "marker": {"size": 8, "color": color, "symbol": symbols(shown_ranks(record))[rank]},
        "customdata": [_hover(p, by) for p in points],
        "hovertemplate": "%{customdata}<extra></extra>",
        "showlegend": False,
        "cliponaxis": False,
    } | axes


def _open(record: SweepRecord, rule: str, axes: Json) -> Json:
    """Return the open marks, off the lines: means of fewer seeds than other rates of their rank have."""
    by, color, shapes = score_of(record), hue(rule), symbols(shown_ranks(record))
    points = [p for p in record.points if p.scaling == rule and p.rank in shapes and _short(p)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": SHORT,
        "x": [p.learning_rate for p in points],
        "y": [drawn(p.score.mean) for p in points],
        "error_y": bars([p.score for p in points], color) | {"width": 0},  # one seed has none: no ends in an open mark
        "marker": {
            "size": 8,
            "color": color,
            "symbol": [f"{shapes[p.rank]}-open" for p in points],
            "opacity": [_strength(record, p.rank) for p in points],
            "line": {"width": 1.6, "color": color},
        },
        "customdata": [_hover(p, by) for p in points],
        "hovertemplate": "%{customdata}<extra></extra>",
        "showlegend": False,
        "cliponaxis": False,
    } | axes


def _broken(record: SweepRecord, rule: str, floor: float, axes: Json) -> Json:
    """Return the crosses: at their mean where seeds are left, at the floor of the panel where none is."""
    by, shown = score_of(record), set(shown_ranks(record))
    points = [p for p in record.points if p.scaling == rule and p.rank in shown and (p.diverged or p.failed)]
    means = [known(p.score.mean) for p in points]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "a seed diverged or failed",
        "x": [p.learning_rate for p in points],
        "y": [drawn(floor if mean is None else mean) for mean in means],
        "marker": {"size": 10, "color": "@error", "symbol": BROKEN},
        "customdata": [_hover(p, by) for p in points],
        "hovertemplate": "%{customdata}<extra></extra>",
        "showlegend": False,
        "cliponaxis": False,
    } | axes


def _rings(record: SweepRecord, rule: str, axes: Json, *, on_edge: bool) -> Json:
    """Return the marks around the best rates: a circle, or a square where the best lies on the edge of the grid."""
    shown = set(shown_ranks(record))
    best = [b for b in record.best if b.scaling == rule and b.rank in shown and known(b.score.mean) is not None]
    best = [b for b in best if b.on_edge == on_edge]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "best, on the grid's edge" if on_edge else "best rate of its rank",
        "x": [b.learning_rate for b in best],
        "y": [drawn(b.score.mean) for b in best],
        "marker": {
            "size": 17,
            "color": "@ink",
            "symbol": "square-open" if on_edge else "circle-open",
            "line": {"width": 1.6, "color": "@ink"},
        },
        "hoverinfo": "skip",
        "showlegend": False,
        "cliponaxis": False,
    } | axes


def _legend(record: SweepRecord, floor: float) -> list[Json]:
    """Return traces without points: the legend of ranks and marks, in ink, for all panels."""
    entries: list[tuple[str, str, Json]] = [
        (f"rank {rank}", symbol, {"size": 8, "color": "@ink"}) for rank, symbol in symbols(shown_ranks(record)).items()
    ]
    open_ = {"size": 13, "color": "@ink", "line": {"width": 1.6, "color": "@ink"}}
    entries.append(("best rate of its rank", "circle-open", open_))
    if any(b.on_edge for b in record.best):
        entries.append(("best, on the grid’s edge", "square-open", open_))
    if any(map(_short, record.points)):
        entries.append((SHORT, "square-open", {"size": 8, "color": "@ink", "line": {"width": 1.6, "color": "@ink"}}))
    if any(p.diverged or p.failed for p in record.points):
        entries.append(("a seed diverged or failed", BROKEN, {"size": 10, "color": "@error"}))
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [None],
            "y": [drawn(floor)],
            "marker": look | {"symbol": symbol},
            "hoverinfo": "skip",
            "legend": "legend" if name.startswith("rank ") else "legend2",
        }
        for name, symbol, look in entries
    ]


def _panels(record: SweepRecord, rules: Sequence[str], upward: Json) -> Json:
    inner = len(rules) * PANEL + (len(rules) - 1) * GAP
    keys: Json = {"annotations": []}
    for panel, rule in enumerate(rules):
        n = "" if panel == 0 else str(panel + 1)
        high = 1 - panel * (PANEL + GAP) / inner
        domain = [round(max(0.0, high - PANEL / inner), 6), round(high, 6)]
        keys[f"xaxis{n}"] = rates_axis(record.config.learning_rates) | {"anchor": f"y{n}"}
        keys[f"yaxis{n}"] = upward | {"domain": domain, "anchor": f"x{n}"}
        heading = {"text": f"<b>{plain(rule_words(rule))}</b>", "showarrow": False, "xref": "paper", "yref": "paper"}
        where = {"x": 0, "y": domain[1], "xanchor": "left", "yanchor": "bottom", "font": {"size": 13, "color": "@ink"}}
        keys["annotations"].append(heading | where)
    return keys


def _marks(record: SweepRecord) -> tuple[str, ...]:
    told = []
    lost = [p for p in record.points if p.diverged]
    if lost:
        settings = words.count(len(lost), "setting")
        told.append(
            f"At {settings} of {len(record.points)} a seed diverged; such a rate is not called best. Where no seed is "
            "left the cross stands on the floor."
        )
    failed = sum(p.failed for p in record.points)
    if failed:
        told.append(f"{words.count(failed, 'run')} failed or {'was' if failed == 1 else 'were'} stopped.")
    short = sum(map(_short, record.points))
    if short:
        told.append(
            f"Open marks, off the lines: {words.count(short, 'setting')} with fewer seeds than other rates of the same "
            "rule and rank. A mean of few wins by chance, so none of these is called best."
        )
    edges: list[SweepBest] = [b for b in record.best if b.on_edge]
    if edges:
        told.append(
            f"Squares: for {len(edges)} of {words.count(len(record.best), 'rule and rank', 'rules and ranks')} the "
            "best rate is the lowest or the highest tried; a better one may lie outside."
        )
    return tuple(told)


def _table(record: SweepRecord, by: Quantity) -> Table:
    best = {(b.scaling, b.rank, b.learning_rate): b for b in record.best if b.learning_rate is not None}
    rows = []
    for p in record.points:
        chosen = best.get((p.scaling, p.rank, p.learning_rate))
        note = "" if chosen is None else "best, on the edge" if chosen.on_edge else "best"
        note = "fewer seeds" if _short(p) else note
        counts = (str(p.done), str(p.diverged), str(p.failed))
        rows.append(
            (rule_words(p.scaling), str(p.rank), rate_words(p.learning_rate), *counts, *estimate_cells(p.score), note)
        )
    head = ("rule", "rank", "rate", "done", "diverged", "failed", *ESTIMATE_HEAD, "")
    return Table(f"{by.name.capitalize()} by rule, rank and learning rate", head, tuple(rows), named=True)


def draw(record: SweepRecord) -> Figure | None:
    """Draw the score over the learning rate."""
    rules, by = list(record.config.scaling), score_of(record)
    if not record.points:
        return None
    barred = [p.score for p in record.points if p.eligible or _short(p)]
    crosses = [mean for p in record.points if (mean := known(p.score.mean)) is not None]  # without their intervals
    upward = quantity_axis(by, barred, crosses)
    floor = float(upward["range"][0])
    traces = _legend(record, floor)
    for panel, rule in enumerate(rules):
        axes: Json = {} if panel == 0 else {"xaxis": f"x{panel + 1}", "yaxis": f"y{panel + 1}"}
        traces += [_line(record, rule, rank, axes) for rank in shown_ranks(record)]
        traces += [
            _rings(record, rule, axes, on_edge=False),
            _rings(record, rule, axes, on_edge=True),
            _open(record, rule, axes),
            _broken(record, rule, floor, axes),
        ]
    height = len(rules) * PANEL + (len(rules) - 1) * GAP + 84
    marks = sum(trace.get("legend") == "legend2" for trace in traces)
    keys, room = legends(height, len(shown_ranks(record)), marks)
    plot = layout(
        height + room,
        showlegend=True,
        margin={"l": 66, "r": 20, "t": 34, "b": 50 + room},
        **_panels(record, rules, upward),
    )
    plot |= keys
    ranks = record.config.ranks
    shown = shown_ranks(record)
    return Figure(
        name="sweep-rates",
        title="Which learning rate",
        alt=f"{by.name.capitalize()} against the learning rate, a panel a rule, a line a rank.",
        data=tuple(traces),
        layout=plot,
        caption=(
            f"{named(by)}: means over seeds with 95 % t-intervals, a panel a rule and a line a "
            "rank; the larger the rank, the stronger the line.",
            f"Marked is the {'lowest' if record.config.score == 'loss' else 'highest'} mean of each rank among the "
            "rates at which no seed diverged or was stopped and as many are done as at any such rate of the rank. "
            "Rates whose intervals overlap its own are not told apart from it.",
        ),
        detail="" if len(shown) == len(ranks) else f"{len(shown)} of {len(ranks)} ranks; the table has them all",
        fallback=_table(record, by),
        marks=_marks(record),
    )
