"""What an extraction lost in every module, and the rank of each.

In: an extraction record. Out: two figures, or None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rankwise.records import ExtractedModule, ExtractionRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, evenly, layout, log_axis, plain, value_axis

MOST_ROWS: Final = 40
"""Rows of the table under a figure; the table of modules has all."""

MOST_POINTS: Final = 3000
"""Modules drawn: experts of large models are more."""


def _modules(record: ExtractionRecord) -> tuple[list[ExtractedModule], str]:
    """Return the modules to draw, and what was left out of the drawing."""
    chosen = [record.modules[i] for i in evenly(len(record.modules), MOST_POINTS)]
    thinned = f"{len(chosen):,} of {len(record.modules):,} modules, evenly chosen"
    return chosen, "" if len(chosen) == len(record.modules) else thinned


def _points(name: str, color: str, symbol: str, modules: Sequence[ExtractedModule], values: Sequence[float]) -> Json:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(range(1, len(modules) + 1)),
        "y": [drawn(v) if v > 0 else None for v in values],
        "text": [plain(m.module) for m in modules],
        "marker": {"color": color, "symbol": symbol, "size": 7, "line": {"width": 1.5, "color": color}},
        "hovertemplate": "%{text}<br>%{y:.3g}<extra>%{fullData.name}</extra>",
    }


def _table(modules: Sequence[ExtractedModule]) -> Table:
    shown = [modules[i] for i in evenly(len(modules), MOST_ROWS)]
    rows = tuple(
        (
            m.module,
            str(m.r),
            words.number(m.relative_error),
            words.number(m.relative_error_uncast),
            words.number(m.least_relative_error),
        )
        for m in shown
    )
    return Table("Relative error by module", ("module", "r", "in the file", "before cast", "best"), rows, named=True)


def draw_error(record: ExtractionRecord) -> Figure | None:
    """Draw the error of every module in the file, before the cast, and the least that is possible."""
    modules, thinned = _modules(record)
    values = [v for m in modules for v in (m.relative_error, m.relative_error_uncast, m.least_relative_error) if v > 0]
    if not values:
        return None
    file = [m.relative_error for m in modules]
    before = [m.relative_error_uncast for m in modules]
    best = [m.least_relative_error for m in modules]
    return Figure(
        name="extraction-error",
        title="What was lost, module by module",
        alt=f"Relative weight error of {len(modules)} modules, from {min(values):.2g} to {max(values):.2g}.",
        data=(
            _points("best of this rank", "@ink", "line-ew-open", modules, best),
            _points("before the cast", "@second", "x-thin-open", modules, before),
            _points("in the file", "@first", "circle-open", modules, file),
        ),
        layout=layout(
            340,
            showlegend=True,
            xaxis=axis("module, in the order of the file", range=[0, len(modules) + 1], showgrid=False),
            yaxis=log_axis("‖ΔW − s B A‖ / ‖ΔW‖", values),
        ),
        caption=(
            f"Each place is one of {len(modules):,} modules, in the order of the file (no unit): 0.1 means that 99 % "
            "of the squared norm of its delta is kept.",
            "The dash is a certified bound: no factors of that rank leave less. The cross is what the factors leave in "
            "full precision, the circle what is left after they were rounded to their dtype.",
            "Heights are shares of each module's own delta: a large error in a delta of small norm may matter little. "
            "With calibration the crosses lie above the dashes on purpose: outputs were minimised, not weights.",
        ),
        detail=thinned,
        fallback=_table(modules),
    )


def draw_ranks(record: ExtractionRecord) -> Figure | None:
    """Draw the rank of every module where they differ."""
    modules, thinned = _modules(record)
    ranks = [m.r for m in modules]
    if len(set(ranks)) < 2:
        return None
    bars: Json = {
        "type": "bar",
        "name": "rank",
        "x": list(range(1, len(modules) + 1)),
        "y": ranks,
        "text": [plain(m.module) for m in modules],
        "textposition": "none",
        "marker": {"color": "@first"},
        "hovertemplate": "%{text}<br>rank %{y}<extra></extra>",
    }
    shown = [modules[i] for i in evenly(len(modules), MOST_ROWS)]
    rows = tuple((m.module, str(m.r), f"{m.shape[0]} × {m.shape[1]}") for m in shown)
    return Figure(
        name="extraction-ranks",
        title="The rank of every module",
        alt=f"Ranks of {len(modules)} modules, from {min(ranks)} to {max(ranks)}.",
        data=(bars,),
        layout=layout(
            280,
            xaxis=axis("module, in the order of the file", range=[0, len(modules) + 1], showgrid=False),
            yaxis=value_axis("rank", [float(r) for r in ranks]),
            bargap=0.15,
        ),
        caption=(
            f"The rank r of {len(modules):,} modules, in the order of the file.",
            "Parameters are r × (out + in): equal bars of unequal shapes cost unequally.",
        ),
        detail=thinned,
        fallback=Table("Ranks", ("module", "r", "shape"), rows, named=True),
    )
