"""Singular values of one module, with the noise edge; a selector for the module.

In: a spectra record. Out: a figure, or None where no module has a value above zero.
"""

from __future__ import annotations

from typing import Any, Final

from rankwise.records import ModuleSpectrum, SpectraRecord
from rankwise.report import words
from rankwise.report.drawing import Choice, Figure, Json, drawn, known, layout, log_axis, rank_axis, ranks_to_draw

MOST_CHOICES: Final = 1500
"""Modules in the selector: each costs two kilobytes of page."""

BARE: Final = {"l": 58, "r": 44, "t": 12, "b": 50}
"""Margins of a plot without a legend."""


def _points(module: ModuleSpectrum) -> list[tuple[int, float]]:
    """Return (rank, value) of what is drawn; a value of zero has no place on a log axis."""
    signal = module.signal_rank or 0
    ranks = ranks_to_draw(len(module.singular_values), extra=(signal, signal + 1))
    return [(r, v) for r in ranks if known(v := module.singular_values[r - 1]) and v > 0]


def _split(module: ModuleSpectrum) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return the points above the noise edge and those below; all are above where no edge is known."""
    points = _points(module)
    if known(module.noise_edge) is None or module.signal_rank is None:
        return points, []
    return [p for p in points if p[0] <= module.signal_rank], [p for p in points if p[0] > module.signal_rank]


def _note(module: ModuleSpectrum) -> str:
    n = len(module.singular_values)
    out, into = module.shape
    parts = [f"{out} × {into}: {words.count(n, 'singular value')}" + ("" if module.complete else ", the largest only")]
    zeros = sum(v == 0 for v in module.singular_values)
    if zeros:
        parts.append(f"{zeros} of them zero and not drawn")
    edge = known(module.noise_edge)
    if edge is None and module.r is not None:
        parts.append("no noise edge: this is an adapter, whose factors were not rounded to a checkpoint's grid")
    elif edge is None:
        parts.append("no noise edge is known here")
    elif module.signal_rank is not None:
        parts.append(f"{words.count(module.signal_rank, 'value')} above the noise edge at {words.number(edge)}")
    if module.rounding_limited:
        parts.append("limited by rounding: energy ranks mislead here")
    return "; ".join(parts) + "."


def _choice(module: ModuleSpectrum) -> Choice:
    above, below = _split(module)
    edge = known(module.noise_edge)
    longest = len(module.singular_values)
    line = [(1, edge), (longest, edge)] if edge else []
    data: list[Json] = [{"x": [x for x, _ in part], "y": [drawn(y) for _, y in part]} for part in (above, below, line)]
    values = [y for _, y in (*above, *below)] + ([edge] if edge else [])
    shown = {
        "xaxis": rank_axis(longest, "index of the singular value (log scale)"),
        "yaxis": log_axis("singular value (log scale)", values),
    }
    return Choice(module.module, tuple(data), shown, _note(module))


def _traces(edges: bool) -> tuple[Json, ...]:
    hover = "value %{x}: %{y:.4g}<extra></extra>"

    def points(name: str, color: str, symbol: str) -> Json:
        marker: dict[str, Any] = {"size": 6, "symbol": symbol, "color": color, "line": {"width": 1.2, "color": color}}
        line = {"width": 1, "color": color}
        look = {"mode": "lines+markers", "line": line, "marker": marker, "hovertemplate": hover}
        return {"type": "scatter", "name": name} | look

    edge: Json = {
        "type": "scatter",
        "name": "noise edge",
        "mode": "lines",
        "line": {"width": 2, "color": "@second", "dash": "dash"},
        "hovertemplate": "noise edge: %{y:.4g}<extra></extra>",
    }
    above = points("above the noise edge" if edges else "singular value", "@first", "circle")
    return above, points("rounding alone explains these", "@thin", "circle-open"), edge


def _detail(record: SpectraRecord, shown: int, drawable: int) -> str:
    longest = max(len(m.singular_values) for m in record.modules)
    points = len(ranks_to_draw(longest))
    parts = []
    if points < longest:
        edge = ", and on both sides of the noise edge" if any(m.signal_rank for m in record.modules) else ""
        parts.append(f"lists are drawn at log-spaced places, {points} of {longest:,}{edge}")
    if shown < drawable:
        parts.append(f"the selector has the first {shown} of {drawable} modules")
    return "; ".join(parts)


def _caption(record: SpectraRecord, edges: bool) -> tuple[str, ...]:
    of = "scaling · B A" if record.kind == "adapter" else "tuned − base"
    first = f"Singular values of {of} for one module, largest first, in the units of the weights; both axes are log."
    if not edges:
        return (
            first,
            "No noise edge is drawn: it is the largest singular value that rounding a checkpoint to its dtype "
            "would produce, and no module of this record has one.",
            "A steep fall does not say that the small directions are useless: how large a value must be to "
            "matter depends on the inputs and the task, which are not in these files.",
        )
    return (
        first,
        "The dashed line is the noise edge: the largest singular value that rounding to the checkpoint's dtype "
        "alone would produce in this module. Filled points lie above it; open ones are no more than rounding "
        "explains.",
        "A value below the edge is not proof that nothing was learnt there, only that these two files cannot show it.",
    )


def draw(record: SpectraRecord) -> Figure | None:
    """Draw the singular values of each module, one at a time."""
    drawable = [m for m in record.modules if any(known(v) and v > 0 for v in m.singular_values)]
    if not drawable:
        return None
    shown = drawable[:MOST_CHOICES]
    edges = any(known(m.noise_edge) for m in shown)
    choices = tuple(_choice(m) for m in shown)
    return Figure(
        name="singular-values",
        title="Singular values" + (" and the noise edge" if edges else ""),
        alt="Singular values of the chosen module on logarithmic axes" + (", with the noise edge." if edges else "."),
        data=_traces(edges),
        layout=layout(410 if edges else 380, showlegend=edges, **({} if edges else {"margin": BARE})),
        caption=_caption(record, edges),
        detail=_detail(record, len(shown), len(drawable)),
        choices=choices,
        choice_label="Module",
    )
