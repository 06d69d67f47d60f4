"""Energy captured against rank: every module a thin line, their mean a bold one.

In: a spectra record. Out: a figure, or None where no module has a delta.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.records import ModuleSpectrum, SpectraRecord
from rankwise.report import words
from rankwise.report.drawing import (
    Figure,
    Json,
    Table,
    drawn,
    known,
    layout,
    marked_shares,
    plain,
    rank_axis,
    ranks_to_draw,
    share_axis,
)

MOST_LINES: Final = 400
"""Lines drawn: past this a plot of SVG paths no longer answers at once, and no eye tells lines apart."""

Shares = NDArray[np.float64]


def shares_of(module: ModuleSpectrum) -> Shares:
    """Return the share of the energy in the first 1, 2, ... directions.

    Shares are of the energy measured on the delta itself, as in `criteria.energy_share`: a cut-off list ends
    below 1, a complete one at exactly 1.
    """
    values = np.asarray(module.singular_values, dtype=np.float64)
    energy = known(module.energy) or 1.0
    shares = np.minimum(np.cumsum(values * values) / energy, 1.0)
    if module.complete and shares.size:
        shares[-1] = 1.0
    return shares


def mean_at(curves: list[tuple[Shares, bool]], rank: int) -> float | None:
    """Return the mean share at a rank; None where a cut-off list does not reach it.

    Past the end of a complete list there is nothing more to hold: its share stays 1.
    """
    shares = []
    for curve, complete in curves:
        if rank > len(curve) and not complete:
            return None
        shares.append(float(curve[rank - 1]) if rank <= len(curve) else 1.0)
    return float(np.mean(shares)) if shares else None


def _look(limited: bool) -> Json:
    return {
        "name": "one module, limited by rounding" if limited else "one module",
        "line": {"width": 1, "color": "@second" if limited else "@thin", "dash": "dot" if limited else "solid"},
        "marker": {"size": 4, "color": "@second" if limited else "@thin"},
    }


def _legend(limited: bool) -> Json:
    """Return a trace without points: its legend entry shows the line at full strength."""
    return {"type": "scatter", "mode": "lines", "x": [None], "y": [None], "hoverinfo": "skip"} | _look(limited)


def _line(module: ModuleSpectrum, curve: Shares, opacity: float) -> Json:
    ranks = ranks_to_draw(len(curve))
    return _look(module.rounding_limited) | {
        "type": "scatter",
        "mode": "lines" if len(ranks) > 1 else "markers",
        "meta": plain(module.module),
        "x": ranks,
        "y": [drawn(float(curve[r - 1])) for r in ranks],
        "opacity": opacity,
        "hovertemplate": "%{meta}<br>rank %{x}: %{y:.2%}<extra></extra>",
        "showlegend": False,
    }


def _mean(curves: list[tuple[Shares, bool]], longest: int) -> Json:
    ranks = ranks_to_draw(longest)
    means = [mean_at(curves, r) for r in ranks]
    kept = [(r, drawn(m)) for r, m in zip(ranks, means, strict=True) if m is not None]
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(kept) <= 16 else "lines",
        "name": f"mean of {words.count(len(curves), 'module')}",
        "x": [r for r, _ in kept],
        "y": [m for _, m in kept],
        "line": {"width": 4, "color": "@first"},
        "marker": {"size": 6, "color": "@first"},
        "hovertemplate": "mean<br>rank %{x}: %{y:.2%}<extra></extra>",
        "legendrank": 1,
    }


def _detail(record: SpectraRecord, n: int, longest: int, lines: int) -> str:
    left_out, points = len(record.modules) - n, len(ranks_to_draw(longest))
    parts = []
    if left_out:
        parts.append(f"{words.count(left_out, 'module')} without a known, non-zero delta left out")
    if lines < n:
        parts.append(f"{lines} lines, evenly chosen, are drawn of {n}; the mean is over all")
    if points < longest:
        parts.append(f"drawn at {points} log-spaced ranks of {longest:,}")
    return "; ".join(parts)


def _caption(drawable: list[ModuleSpectrum]) -> tuple[str, ...]:
    n = len(drawable)
    lines = (
        "The line is the one module" if n == 1 else f"Each thin line is one of {n} modules, the bold line their mean"
    )
    sentences = [
        f"{lines}: the share of the squared Frobenius norm of ΔW that the largest directions up to a rank hold (no "
        "unit).",
        "The best approximation of that rank has the relative error √(1\u00a0−\u00a0share): 90 % still leaves an "
        "error of 32 %, 99 % one of 10 %.",
    ]
    if any(m.rounding_limited for m in drawable):
        sentences.append(
            "The dotted lines count rounding noise, which has no low rank: read the signal rank of those modules."
        )
    sentences.append(
        "It does not say which rank the task needs: a curve that rises early can mean that few directions were "
        "enough, or that the others were starved by a small scaling or learning rate. `rankwise check "
        "--adapter` tests which."
    )
    return tuple(sentences)


def _fallback(record: SpectraRecord) -> Table:
    rows = tuple((rank, words.share(value)) for rank, value in record.summary.energy_by_rank.items())
    return Table("Mean share of the energy by rank", ("rank", "mean share of the energy"), rows)


def draw(record: SpectraRecord) -> Figure | None:
    """Draw the energy captured against rank for every module of a record."""
    drawable = [m for m in words.trained(record.modules) if m.singular_values]
    if not drawable:
        return None
    curves = [(shares_of(m), m.complete) for m in drawable]
    longest = max(len(curve) for curve, _ in curves)
    step = -(-len(drawable) // MOST_LINES)
    opacity = 0.75 if len(drawable) <= 20 else 0.5 if len(drawable) <= 80 else 0.28
    traces: list[Json] = []
    for module, (curve, _) in list(zip(drawable, curves, strict=True))[::step]:
        traces.append(_line(module, curve, opacity))
    lines = len(traces)
    if len(drawable) == 1:
        traces[0]["line"] = traces[0]["line"] | {"width": 3}
    traces += [_legend(limited) for limited in sorted({m.rounding_limited for m in drawable[::step]})]
    if len(drawable) > 1:
        traces.append(_mean(curves, longest))
    more: dict[str, Any] = marked_shares((0.9, 0.99))
    plot = layout(430, xaxis=rank_axis(longest), yaxis=share_axis("share of the energy"), showlegend=True, **more)
    return Figure(
        name="energy",
        title="Energy captured against rank",
        alt=f"Share of the energy against rank for {words.count(len(drawable), 'module')}; lines at 90 % and 99 %.",
        data=tuple(traces),
        layout=plot,
        caption=_caption(drawable),
        detail=_detail(record, len(drawable), longest, lines),
        fallback=_fallback(record),
    )
