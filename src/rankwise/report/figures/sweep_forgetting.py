"""What was learnt against what it cost: every setting of a sweep, and those that no other one beats in both.

In: a sweep record. Out: a figure, or None where forgetting was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from rankwise.records import SweepPoint, SweepRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, drawn, known, layout, log_axis, plain, value_axis
from rankwise.report.looks import fractions, hue, label_places, rule_words, spaced, symbols
from rankwise.report.sweep_looks import (
    ESTIMATE_HEAD,
    Quantity,
    bars,
    estimate_cells,
    estimate_words,
    half_width,
    legends,
    named,
    quantity_axis,
    rate_label,
    rate_words,
    score_of,
)

MOST_LABELS: Final = 3
"""Settings on the front that are named in the plot; all are in the table."""

APART: Final = 0.15
"""Share of the height of the plot between two settings that are named."""

MOST_BARS: Final = 40
"""Points up to which all have error bars."""


MOST_LINEAR: Final = 20.0
"""Largest forgetting over the smallest, both positive, up to which the axis is linear: beyond it a few broken settings
would push all others, and with them the front, into a corner."""


def placed(record: SweepRecord) -> list[SweepPoint]:
    """Return the settings with both numbers and all their seeds."""
    return [
        p
        for p in record.points
        if p.eligible and known(p.score.mean) is not None and known(p.forgetting.mean) is not None
    ]


def _hover(p: SweepPoint, by: Quantity) -> str:
    setting = plain(f"{rule_words(p.scaling)}, rank {p.rank}, rate {rate_words(p.learning_rate)}")
    cost = words.number(p.forgetting.mean)
    return f"{setting}<br>{plain(estimate_words(p.score, by))}<br>forgetting {plain(cost)} nats a token"


def _across(costs: Sequence[float]) -> Json:
    """Return the axis of forgetting: over the means, since a wide interval would push all points into a corner."""
    if min(costs) > 0 and max(costs) > MOST_LINEAR * min(costs):
        return log_axis("forgetting, nats a token (log scale)", costs)
    return value_axis("forgetting, nats a token", costs)


def _left_end(across: Json) -> float:
    """Return the forgetting at the left end of the axis."""
    low = float(across["range"][0])
    return 10**low if across.get("type") == "log" else low


def _bars_across(points: Sequence[SweepPoint], color: str, across: Json) -> Json:
    """Return the bars of forgetting; on a log axis one that reaches 0 or below ends at the frame."""
    made = bars([p.forgetting for p in points], color) | {"thickness": 0.8, "width": 2}
    if across.get("type") != "log":
        return made
    room = [(known(p.forgetting.mean) or 0.0) - _left_end(across) for p in points]
    halves = [half_width(p.forgetting) or 0 for p in points]
    below = [drawn(min(half, most)) for half, most in zip(halves, room, strict=True)]
    return made | {"symmetric": False, "arrayminus": below}


def _cloud(
    points: list[SweepPoint], by: Quantity, shapes: dict[int, str], rule: str, across: Json, *, with_bars: bool
) -> Json:
    color = hue(rule)
    mine = [p for p in points if p.scaling == rule]
    trace: Json = {
        "type": "scatter",
        "mode": "markers",
        "name": plain(rule_words(rule)),
        "x": [drawn(p.forgetting.mean) for p in mine],
        "y": [drawn(p.score.mean) for p in mine],
        "marker": {
            "size": [11 if p.on_front else 8 for p in mine],
            "color": color,
            "opacity": [1 if p.on_front else 0.55 for p in mine],
            "symbol": [shapes[p.rank] for p in mine],
            "line": {"width": 0},
        },
        "customdata": [_hover(p, by) for p in mine],
        "hovertemplate": "%{customdata}<extra></extra>",
        "showlegend": False,
        "cliponaxis": False,
    }
    if with_bars:
        trace |= {
            "error_x": _bars_across(mine, color, across),
            "error_y": bars([p.score for p in mine], color) | {"thickness": 0.8, "width": 2},
        }
    return trace


def _front(front: list[SweepPoint], places: list[str], labels: list[str]) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+text",
        "name": "beaten by no other in both",
        "x": [drawn(p.forgetting.mean) for p in front],
        "y": [drawn(p.score.mean) for p in front],
        "line": {"width": 1.2, "color": "@ink", "dash": "dot"},
        "text": [spaced(plain(label), place) if label else "" for label, place in zip(labels, places, strict=True)],
        "textposition": places,
        "textfont": {"size": 11.5, "color": "@ink"},
        "hoverinfo": "skip",
        "cliponaxis": False,
        "legend": "legend2",
    }


def _legend(rules: list[str], shapes: dict[int, str], floor: float) -> list[Json]:
    entries = [(plain(rule_words(rule)), {"size": 9, "color": hue(rule), "symbol": "square"}) for rule in rules]
    entries += [(f"rank {rank}", {"size": 8, "color": "@ink", "symbol": symbol}) for rank, symbol in shapes.items()]
    blank = {"type": "scatter", "mode": "markers", "x": [None], "y": [floor], "hoverinfo": "skip"}
    where = [{"legend": "legend2"}] * len(rules) + [{"legend": "legend"}] * len(shapes)
    return [blank | {"name": name, "marker": look} | at for (name, look), at in zip(entries, where, strict=True)]


def _table(points: list[SweepPoint], by: Quantity) -> Table:
    rows = []
    for p in sorted(points, key=lambda p: known(p.forgetting.mean) or 0.0):
        setting = (rule_words(p.scaling), str(p.rank), rate_words(p.learning_rate))
        cost = estimate_cells(p.forgetting)[:3]
        rows.append((*setting, "yes" if p.on_front else "", *estimate_cells(p.score), *cost))
    more = ("forgetting", "95 % low", "95 % high")
    head = ("rule", "rank", "rate", "front", by.name, *ESTIMATE_HEAD[1:], *more)
    return Table(f"{by.name.capitalize()} and forgetting (nats a token)", head, tuple(rows), named=True)


def _told_of(heights: Sequence[float]) -> set[int]:
    """Return the places on the front that are named: from the top down, those far enough below the last."""
    chosen: list[int] = []
    for place in sorted(range(len(heights)), key=lambda k: -heights[k]):
        if len(chosen) < MOST_LABELS and (not chosen or heights[chosen[-1]] - heights[place] >= APART):
            chosen.append(place)
    return set(chosen)


def _named(
    points: list[SweepPoint], front: list[SweepPoint], across: Json, tall: Sequence[float], *, with_bars: bool
) -> tuple[list[str], list[str]]:
    """Return a label for each place on the front, empty for most, and where it stands clear of what is drawn."""

    def spot(cost: float | None, score: float | None) -> tuple[float, float]:
        along = max(known(cost) or 0.0, _left_end(across))
        along = math.log10(along) if across.get("type") == "log" else along
        return fractions([along], *across["range"])[0], fractions([known(score) or 0.0], *tall)[0]

    spots = [spot(p.forgetting.mean, p.score.mean) for p in front]
    told_of = sorted(_told_of([y for _, y in spots]))  # room for the empty labels of a long front is not looked for
    labels = [f"rank {p.rank}, {rate_label(p.learning_rate)}" if k in told_of else "" for k, p in enumerate(front)]
    ink = list(pairwise(spots))
    for p in points:
        at = spot(p.forgetting.mean, p.score.mean)
        ink.append((at, at))
        if with_bars:
            (left, right), (low, high) = p.forgetting.ci or (p.forgetting.mean,) * 2, p.score.ci or (p.score.mean,) * 2
            ink += [(spot(left, p.score.mean), spot(right, p.score.mean))]
            ink += [(spot(p.forgetting.mean, low), spot(p.forgetting.mean, high))]
    found = label_places([spots[k] for k in told_of], [labels[k] for k in told_of], lines=ink)
    sides = dict(zip(told_of, found, strict=True))
    return labels, [sides.get(k, "top center") for k in range(len(front))]


def draw(record: SweepRecord) -> Figure | None:
    """Draw the score against forgetting, a mark a setting."""
    points, by = placed(record), score_of(record)
    if not points:
        return None
    shapes = symbols(p.rank for p in points)
    few = len(points) <= MOST_BARS
    costs = [known(p.forgetting.mean) or 0.0 for p in points]
    across = _across(costs)
    logarithmic = across.get("type") == "log"
    upward = quantity_axis(by, [p.score for p in points])
    front = sorted((p for p in points if p.on_front), key=lambda p: known(p.forgetting.mean) or 0.0)
    labels, places = _named(points, front, across, upward["range"], with_bars=few)
    rules = [rule for rule in record.config.scaling if any(p.scaling == rule for p in points)]
    traces = _legend(rules, shapes, float(upward["range"][0]))
    traces += [_cloud(points, by, shapes, rule, across, with_bars=few) for rule in rules]
    traces.append(_front(front, places, labels))
    keys, room = legends(430, len(shapes), len(rules) + 1)
    margin = {"l": 66, "r": 24, "t": 20, "b": 50 + room}
    plot = layout(430 + room, showlegend=True, xaxis=across, yaxis=upward, margin=margin) | keys
    lost = len(record.points) - len(points)
    told = f"{words.count(lost, 'setting')} without both numbers and all seeds {'is' if lost == 1 else 'are'} left out."
    return Figure(
        name="sweep-forgetting",
        title="Recall against forgetting" if record.config.score != "loss" else "Training loss against forgetting",
        alt=f"{by.name.capitalize()} against forgetting, a mark a setting of the grid.",
        data=tuple(traces),
        layout=plot,
        caption=(
            f"Upwards {named(by, capital=False)}, across the rise of the loss on text that the base modelled already "
            f"(nats a token, 0 is the base itself): means over seeds, n = {words.count(len(points), 'setting')}."
            + (" That axis is logarithmic, and the base itself, at 0, has no place on it." if logarithmic else ""),
            "The dotted line joins the settings that no other one beats in both, by their means; where intervals "
            "overlap, neighbours are not told apart.",
            "Forgetting is measured on one kind of text: what else may have been lost is not in this figure.",
        ),
        detail=f"intervals of forgetting may reach {'0 or less, and ' if logarithmic else ''}past the frame"
        if few
        else f"intervals are left out for {len(points)} points; the table has them",
        fallback=_table(points, by),
        marks=(told,) if lost else (),
    )
