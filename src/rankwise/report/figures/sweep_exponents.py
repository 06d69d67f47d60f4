"""The best learning rate over the rank, with the power law that the record fitted to it.

In: a sweep record. Out: a figure, or None where fewer than two ranks have a best rate.
"""

from __future__ import annotations

import math

from rankwise.records import RateExponent, SweepBest, SweepRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, drawn, layout, plain
from rankwise.report.figures.stability import exponent_text
from rankwise.report.looks import hue, rule_words
from rankwise.report.sweep_looks import ranks_axis, rate_words, rates_axis, shifts


def _best(record: SweepRecord, rule: str) -> list[SweepBest]:
    return [b for b in record.best if b.scaling == rule and b.learning_rate is not None]


def _marks_of(rule: str, best: list[SweepBest], shift: float) -> Json:
    color = hue(rule)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(rule_words(rule)),
        "x": [drawn(b.rank * shift) for b in best],
        "y": [b.learning_rate for b in best],
        "marker": {
            "size": 11,
            "color": color,
            "symbol": ["square-open" if b.on_edge else "circle" for b in best],
            "line": {"width": 2, "color": color},
        },
        "customdata": [
            plain(f"rank {b.rank}: {rate_words(b.learning_rate or 0.0)}{f', on the edge ({b.edge})' if b.edge else ''}")
            for b in best
        ],
        "hovertemplate": "%{customdata}<extra>%{fullData.name}</extra>",
        "cliponaxis": False,
    }


def _line(found: RateExponent, best: list[SweepBest], shift: float) -> Json | None:
    """Return the line of the fitted slope through the mean of the logarithms of the rates it was fitted to."""
    if found.exponent is None:
        return None
    used = [b for b in best if b.rank in found.ranks]
    if not used:
        return None
    x0 = math.fsum(math.log(b.rank) for b in used) / len(used)
    y0 = math.fsum(math.log(b.learning_rate or 1.0) for b in used) / len(used)
    ends = [min(found.ranks), max(found.ranks)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(f"rank^{exponent_text(found.exponent, found.ci)}"),
        "x": [drawn(rank * shift) for rank in ends],
        "y": [drawn(math.exp(y0 + found.exponent * (math.log(rank) - x0))) for rank in ends],
        "line": {"width": 2, "color": hue(found.scaling), "dash": "dash"},
        "hoverinfo": "skip",
    }


def _table(record: SweepRecord) -> Table:
    rows = []
    for e in record.exponents:
        left = "; ".join(f"rank {rank}: {why}" for rank, why in e.left_out.items()) or words.UNKNOWN
        ranks = ", ".join(map(str, e.ranks)) or words.UNKNOWN
        rows.append((rule_words(e.scaling), exponent_text(e.exponent, e.ci), ranks, str(e.seeds), left))
    head = ("rule", "exponent", "ranks", "seeds", "left out")
    return Table("Exponent of the best rate in the rank, with 95 % interval", head, tuple(rows), named=True)


def _marks(record: SweepRecord) -> tuple[str, ...]:
    told = []
    for e in record.exponents:
        if e.exponent is None:
            out = "; ".join(f"rank {rank}: {why}" for rank, why in e.left_out.items())
            told.append(
                f"{rule_words(e.scaling)}: no power law is fitted: that takes three ranks whose best rate is known "
                f"and lies inside the grid, and there {'is' if len(e.ranks) == 1 else 'are'} {len(e.ranks)}"
                f"{f' (left out: {out})' if out else ''}."
            )
        elif e.ci is None:
            told.append(f"{rule_words(e.scaling)}: the exponent is of one seed and has no interval.")
    return tuple(told)


def draw(record: SweepRecord) -> Figure | None:
    """Draw the best rate over the rank, a mark a rank and a line a rule."""
    found = {rule: _best(record, rule) for rule in record.config.scaling}
    if max((len(best) for best in found.values()), default=0) < 2:
        return None
    traces: list[Json] = []
    off = shifts(record.config.scaling, record.config.ranks)
    for rule, best in found.items():
        traces.append(_marks_of(rule, best, off[rule]))
        line = next((_line(e, best, off[rule]) for e in record.exponents if e.scaling == rule), None)
        traces += [line] if line is not None else []
    rates = record.config.learning_rates
    upward = rates_axis(rates, "best learning rate (log scale)")
    plot = layout(
        380,
        showlegend=True,
        xaxis=ranks_axis(record.config.ranks),
        yaxis=upward,
        margin={"l": 66, "r": 20, "t": 40, "b": 50},
    )
    return Figure(
        name="sweep-exponents",
        title="How the best rate goes with the rank",
        alt="Best learning rate against rank, a mark a rank, with the power law fitted for each rule.",
        data=tuple(traces),
        layout=plot,
        caption=(
            "The rate with the best mean of each rank; open squares lie on the edge of the rates tried and are a "
            "bound, not a value. Ranks of which a seed has its best rate there are not fitted.",
            "Dashed, with its exponent and 95 % interval in the legend: the least-squares slope of log(best rate) "
            "against log(rank), found for each seed and averaged. Its interval includes half a step of the grid: a "
            "coarse grid cannot give a sharp exponent.",
        ),
        fallback=_table(record),
        marks=_marks(record),
    )
