"""Score over the rank: each rank at its own best rate, and at one rate for all.

In: a sweep record. Out: a figure each, or None where no rank has a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rankwise.records import Estimate, SweepBest, SweepPoint, SweepRecord
from rankwise.report import words
from rankwise.report.drawing import Choice, Figure, Json, Table, drawn, known, layout, level, plain
from rankwise.report.looks import hue, rule_words
from rankwise.report.sweep_looks import (
    ESTIMATE_HEAD,
    OTHERS,
    Quantity,
    bars,
    ceiling,
    estimate_cells,
    estimate_words,
    named,
    quantity_axis,
    ranks_axis,
    rate_words,
    rules_words,
    score_of,
    shifts,
)

MOST_RATES: Final = 12
"""Rates that get an entry of their own in the selector."""

EDGES: Final = {"lowest": "the lowest rate tried", "highest": "the highest rate tried", "only": "the only rate tried"}

Spot = tuple[int, Estimate, str]
"""Rank, what was found there, and what to say of it."""


def _line(rule: str, spots: Sequence[Spot], by: Quantity, open_: Sequence[bool], shift: float) -> Json:
    color = hue(rule)
    texts = [f"rank {rank}: {estimate_words(found, by)}" for rank, found, _ in spots]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(rule_words(rule)),
        "x": [drawn(rank * shift) for rank, _, _ in spots],
        "y": [drawn(found.mean) for _, found, _ in spots],
        "error_y": bars([found for _, found, _ in spots], color),
        "line": {"width": 2.5, "color": color},
        "marker": {
            "size": 9,
            "color": color,
            "symbol": ["circle-open" if o else "circle" for o in open_],
            "line": {"width": 2, "color": color},
        },
        "customdata": [f"{plain(told)}<br>{plain(spot[2])}" for told, spot in zip(texts, spots, strict=True)],
        "hovertemplate": "%{customdata}<extra>%{fullData.name}</extra>",
        "cliponaxis": False,
    }


def _best_text(b: SweepBest) -> str:
    rate = "" if b.learning_rate is None else f"rate {rate_words(b.learning_rate)}"
    return f"{rate}, {EDGES[b.edge]}" if b.edge else rate


def _at_best(record: SweepRecord) -> dict[str, list[SweepBest]]:
    found: dict[str, list[SweepBest]] = {}
    for b in sorted(record.best, key=lambda b: b.rank):
        if known(b.score.mean) is not None:
            found.setdefault(b.scaling, []).append(b)
    return found


def _point_at(record: SweepRecord, b: SweepBest) -> SweepPoint | None:
    key = (b.scaling, b.rank, b.learning_rate)
    return next((p for p in record.points if (p.scaling, p.rank, p.learning_rate) == key), None)


def edge_mark(record: SweepRecord) -> str | None:
    """Return the sentence on best rates at the edge of the grid, or None."""
    edges = [b for b in record.best if b.on_edge and known(b.score.mean) is not None]
    if not edges:
        return None
    return (
        f"Open marks: the best rate lies on the edge of the rates tried ({len(edges)} of {len(record.best)} rules and "
        "ranks); a better one may lie outside, and with it a better score."
    )


def seeds_mark(record: SweepRecord) -> str | None:
    """Return the sentence on marks without an interval, or None."""
    alone = sum(p.done == 1 for p in record.points)
    if not alone:
        return None
    which = "Every setting has" if alone == len([p for p in record.points if p.done]) else f"{alone} settings have"
    return f"{which} one seed: no interval, and nothing can be told apart there."


def _marks(record: SweepRecord) -> tuple[str, ...]:
    lost = [b for b in record.best if known(b.score.mean) is None]
    told = [edge_mark(record), seeds_mark(record)]
    if lost:
        named = ", ".join(f"rank {b.rank} under {rule_words(b.scaling)}" for b in lost[:6])
        more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
        told.append(f"Not drawn, because no rate there has all its seeds done: {named}{more}.")
    return tuple(sentence for sentence in told if sentence)


def _held(
    record: SweepRecord, axis_words: str = "all that the data hold"
) -> tuple[list[Json], list[Json], list[float]]:
    held = ceiling(record)
    if held is None:
        return [], [], []
    line, text = level(held, f"{words.number(held, 4)}: {axis_words}")
    return [line], [text], [held]


def _table(record: SweepRecord, by: Quantity) -> Table:
    rows = []
    for rule, found in _at_best(record).items():
        for b in found:
            rate = words.UNKNOWN if b.learning_rate is None else rate_words(b.learning_rate)
            rows.append((rule_words(rule), str(b.rank), rate, b.edge or "inside", *estimate_cells(b.score)))
    head = ("rule", "rank", "best rate", "on the grid", *ESTIMATE_HEAD)
    return Table(f"{by.name.capitalize()} by rank, each at its best rate", head, tuple(rows), named=True)


def draw_answer(record: SweepRecord) -> Figure | None:
    """Draw the score over the rank, each rank at its own best rate: whether rank helps."""
    found, by = _at_best(record), score_of(record)
    if not found:
        return None
    traces, off = [], shifts(record.config.scaling, record.config.ranks)
    for rule, members in found.items():
        spots = [(b.rank, b.score, _best_text(b)) for b in members]
        traces.append(_line(rule, spots, by, [b.on_edge for b in members], off[rule]))
    shapes, notes, held = _held(record)
    estimates = [b.score for members in found.values() for b in members]
    upward = quantity_axis(by, estimates, held)
    down = record.config.score == "loss"
    plot = layout(
        400,
        showlegend=True,
        xaxis=ranks_axis(sorted({b.rank for members in found.values() for b in members})),
        yaxis=upward,
        shapes=shapes,
        annotations=notes,
        margin={"l": 66, "r": 20, "t": 40, "b": 50},
    )
    seeds = sorted({b.score.n for members in found.values() for b in members})
    return Figure(
        name="sweep-answer",
        title="Does rank help?",
        alt=f"{by.name.capitalize()} against rank at each rank's best learning rate, a line a rule, with intervals.",
        data=tuple(traces),
        layout=plot,
        caption=(
            f"{named(by)} of each rank at the learning rate that suits it best, a line a rule; "
            f"means over seeds with 95 % t-intervals, n = {words.span(seeds)}.",
            "Lower is better." if down else "Higher is better.",
            rules_words(record),
            "The rate was chosen by the same seeds, which flatters the score a little. An interval says what another "
            "seed on the same data would give, and not what other data would.",
        ),
        fallback=_table(record, by),
        marks=_marks(record),
    )


# --- every quantity, and one rate for all ---------------------------------------------------------------------


def _quantities(record: SweepRecord) -> list[Quantity]:
    score = score_of(record)
    taken = {score.field, record.config.score}
    others = [q for q in OTHERS if q.field not in taken]
    kept = [q for q in others if any(known(getattr(p, q.field).mean) is not None for p in record.points)]
    return [score, *kept]


def _best_view(record: SweepRecord, by: Quantity) -> tuple[list[Json], list[Estimate]]:
    traces, estimates = [], []
    off = shifts(record.config.scaling, record.config.ranks)
    for rule in record.config.scaling:
        spots, edges = [], []
        for b in _at_best(record).get(rule, []):
            point = _point_at(record, b)
            found = None if point is None else getattr(point, by.field)
            if found is not None and known(found.mean) is not None:
                spots.append((b.rank, found, _best_text(b)))
                edges.append(b.on_edge)
        traces.append(_line(rule, spots, by, edges, off[rule]))
        estimates += [found for _, found, _ in spots]
    return traces, estimates


def _rate_view(record: SweepRecord, by: Quantity, rate: float) -> tuple[list[Json], list[Estimate]]:
    traces, estimates = [], []
    off = shifts(record.config.scaling, record.config.ranks)
    for rule in record.config.scaling:
        mine = [p for p in record.points if (p.scaling, p.learning_rate) == (rule, rate) and p.eligible]
        mine = sorted((p for p in mine if known(p.score.mean) is not None), key=lambda p: p.rank)
        spots = [(p.rank, p.score, "") for p in mine]
        traces.append(_line(rule, spots, by, [False] * len(spots), off[rule]))
        estimates += [p.score for p in mine]
    return traces, estimates


def _left_out(record: SweepRecord, rate: float) -> str:
    lost = [p for p in record.points if p.learning_rate == rate and not p.eligible]
    if not lost:
        return ""
    named = ", ".join(f"rank {p.rank} under {rule_words(p.scaling)}" for p in lost[:6])
    return f" Left out, because a seed diverged or is missing: {named}{' and more' if len(lost) > 6 else ''}."


def _choice(label: str, by: Quantity, view: tuple[list[Json], list[Estimate]], held: Json, note: str) -> Choice | None:
    traces, estimates = view
    if not estimates:
        return None
    return Choice(label, tuple(traces), {"yaxis": quantity_axis(by, estimates)} | held, note)


def draw_ranks(record: SweepRecord) -> Figure | None:
    """Draw every quantity over the rank, each rank at its best rate; and the score at one rate for all."""
    ranks, score = list(record.config.ranks), score_of(record)
    if not _at_best(record):
        return None
    nothing: Json = {"shapes": [], "annotations": []}
    found: list[Choice | None] = []
    for by in _quantities(record):
        shapes, notes, _ = _held(record) if by is score else ([], [], [])
        held = {"shapes": shapes, "annotations": notes}
        note = f"{by.name.capitalize()} at the rate with the best {score.name}."
        found.append(_choice(f"{by.name}, each rank at its best rate", by, _best_view(record, by), held, note))
    rates = record.config.learning_rates
    for rate in rates if len(rates) <= MOST_RATES else ():
        note = (
            f"{score.name.capitalize()} with learning rate {rate_words(rate)} at every rank.{_left_out(record, rate)}"
        )
        view = _rate_view(record, score, rate)
        found.append(_choice(f"{score.name}, all at {rate_words(rate)}", score, view, nothing, note))
    choices = [choice for choice in found if choice is not None]
    first = choices[1] if len(choices) > 1 else choices[0]
    plot = layout(
        400, showlegend=True, xaxis=ranks_axis(ranks), margin={"l": 72, "r": 20, "t": 40, "b": 50}, **first.layout
    )
    return Figure(
        name="sweep-ranks",
        title="What else goes with the rank",
        alt="A quantity against rank, a line a rule, with intervals; the quantity can be chosen.",
        data=first.data,
        layout=plot,
        caption=(
            "Means over seeds with 95 % t-intervals, a line a rule; rules stand a little apart. Bits a parameter: "
            "recalled bits over all trainable parameters. Forgetting: rise of the loss on text that the base "
            "modelled already, nats a token.",
            "With one rate for all ranks, a rank may look bad because the rate does not suit it: alpha / r shrinks the "
            "factor as the rank rises.",
        ),
        choices=tuple(choices),
        choice_label="Quantity",
        chosen=choices.index(first),
        fallback=_wide_table(record),
        detail="" if len(rates) <= MOST_RATES else f"{len(rates)} rates are too many for the selector; see the table",
    )


def _wide_table(record: SweepRecord) -> Table:
    """Return every setting with all its means: the table of the sweep."""
    others = [q for q in _quantities(record) if q.field != "score"]
    head = ("rule", "rank", "rate", "done", "diverged", "failed", score_of(record).name, "95 % low", "95 % high")
    rows = []
    for p in record.points:
        counts = (str(p.done), str(p.diverged), str(p.failed))
        means = (words.number(getattr(p, q.field).mean, 4) for q in others)
        cells = (*estimate_cells(p.score)[:3], *means)
        rows.append((rule_words(p.scaling), str(p.rank), rate_words(p.learning_rate), *counts, *cells))
    return Table("Every setting, means over its seeds", (*head, *(q.name for q in others)), tuple(rows), named=True)
