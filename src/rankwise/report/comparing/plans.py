"""Plans beside each other: the rank of every module, and the modules whose ranks differ.

In: plan records. Out: an `Extra`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rankwise.records import PlanRecord
from rankwise.report import words
from rankwise.report.comparing.common import Compared, Extra
from rankwise.report.drawing import Figure, Table, axis, drawn, known, layout, plain, value_axis

MOST_ROWS: Final = 200
"""Modules in the table."""

These = Sequence[Compared[PlanRecord]]


def _names(these: These) -> list[str]:
    return list(dict.fromkeys(m.module for one in these for m in one.record.modules))


def _ranks(these: These) -> list[dict[str, int]]:
    return [{m.module: m.r for m in one.record.modules} for one in these]


def _figure(these: These, names: list[str], ranks: list[dict[str, int]]) -> Figure | None:
    if not names:
        return None
    traces = []
    for one, mine in zip(these, ranks, strict=True):
        present = [(k, name, mine[name]) for k, name in enumerate(names, start=1) if name in mine]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [k for k, _, _ in present],
                "y": [r for _, _, r in present],
                "customdata": [plain(name) for _, name, _ in present],
                "hovertemplate": "%{customdata}<br>rank %{y}<extra>%{fullData.name}</extra>",
            }
            | one.look(size=8 if len(names) <= 60 else 5)
        )
    highest = [float(r) for mine in ranks for r in mine.values()]
    return Figure(
        name="compare-ranks",
        title="Rank of every module, laid over each other",
        alt=f"Rank of each of {len(names)} modules, a mark a record.",
        data=tuple(traces),
        layout=layout(
            400,
            showlegend=True,
            xaxis=axis("module, in the order of the record", range=[0, drawn(len(names) + 1.0)], tickformat=",d"),
            yaxis=value_axis("rank", highest),
        ),
        caption=(
            f"The rank that each plan gives to a module, n = {words.count(len(names), 'module')}; a module without a "
            "mark gets none. Which module it is stands in the table and under the pointer.",
        ),
        fallback=_table(these, names, ranks),
    )


def _table(these: These, names: list[str], ranks: list[dict[str, int]]) -> Table:
    rows = [(name, *(str(mine.get(name, words.UNKNOWN)) for mine in ranks)) for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    head = ("module", *(f"rank, {one.letter}" for one in these))
    few = f", {MOST_ROWS} of them" if len(differing) > MOST_ROWS else ""
    caption = f"{len(differing)} of {words.count(len(names), 'module')} with other ranks{few}"
    return Table(caption, head, tuple(differing[:MOST_ROWS]), named=True)


def extra(these: These) -> Extra:
    """Return what plans add to their comparison."""
    names, ranks = _names(these), _ranks(these)
    figure = _figure(these, names, ranks)
    told = []
    for one in these:
        error = known(one.record.relative_error)
        left = "" if error is None else f", relative error {words.number(error)}"
        told.append(f"{one.letter} has {one.record.params:,} parameters{left}")
    errors = tuple(words.number(one.record.relative_error) for one in these)
    return Extra(
        verdict=f"{'; '.join(told)}.",
        rows=(("relative error", *errors), ("source", *(one.record.source or words.UNKNOWN for one in these))),
        figures=() if figure is None else (figure,),
    )
