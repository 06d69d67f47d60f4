"""What a conversion cost in every module: the best that the rank allows, and what is in the file.

In: a conversion record. Out: a figure, or None where nothing was lost.
"""

from __future__ import annotations

from rankwise.records import ConversionRecord, ConvertedModule
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, evenly, layout, log_axis, plain

MOST_ROWS = 40
"""Rows of the table under the figure; the table of modules has all."""


def _points(name: str, color: str, symbol: str, modules: list[ConvertedModule], values: list[float]) -> Json:
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


def _table(modules: list[ConvertedModule]) -> Table:
    rows = tuple(
        (m.module, words.number(m.error_before_cast), "exact" if m.exact else words.number(m.relative_error))
        for m in (modules[i] for i in evenly(len(modules), MOST_ROWS))
    )
    return Table("Relative error by module", ("module", "before cast", "as written"), rows, named=True)


def draw(record: ConversionRecord) -> Figure | None:
    """Draw the error of every module before the cast and as written."""
    modules = list(record.modules)
    values = [v for m in modules for v in (m.relative_error, m.error_before_cast) if v > 0]
    if not values:
        return None
    cut = any(m.error_before_cast > 0 for m in modules)
    written = _points("in the file", "@first", "circle-open", modules, [m.relative_error for m in modules])
    best = _points("the best of this rank", "@ink", "line-ew-open", modules, [m.error_before_cast for m in modules])
    exact = sum(m.exact for m in modules)
    caption = [
        f"Each point is one of {len(modules)} modules, in the order of the file. Its height is norm(new − old) / "
        "norm(old) of the whole update, scale included: 0.1 means that 99 % of the energy is left.",
        "A module's share in what the model does is not on this page: a small error in a large update may weigh more.",
    ]
    if cut:
        caption.insert(1, "The dash is the least that any factors of this rank can leave (Eckart and Young).")
    if exact:
        caption.append(f"{exact} modules are the same bit for bit, and have no place on a log scale.")
    return Figure(
        name="conversion-error",
        title="What was lost, module by module",
        alt=f"Relative error of {len(modules)} modules, from {min(values):.2g} to {max(values):.2g}.",
        data=(best, written) if cut else (written,),
        layout=layout(
            320,
            showlegend=cut,
            xaxis=axis("module, in the order of the file", range=[0, len(modules) + 1], showgrid=False),
            yaxis=log_axis("relative error", values),
        ),
        caption=tuple(caption),
        detail=f"the table shows {MOST_ROWS} modules, evenly chosen" if len(modules) > MOST_ROWS else "",
        fallback=_table(modules),
    )
