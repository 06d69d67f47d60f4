"""Spectra beside each other: the mean energy over the rank, the values of one module, the modules that differ most.

In: spectra records. Out: an `Extra`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rankwise.records import ModuleSpectrum, SpectraRecord
from rankwise.report import words
from rankwise.report.comparing.common import Compared, Extra
from rankwise.report.drawing import (
    Choice,
    Figure,
    Json,
    Table,
    drawn,
    known,
    layout,
    log_axis,
    marked_shares,
    rank_axis,
    ranks_to_draw,
    share_axis,
)
from rankwise.report.figures.energy import mean_at, shares_of

MOST_CHOICES: Final = 500
"""Modules in the selector."""

MOST_ROWS: Final = 50
"""Modules in the table of those that differ most."""

These = Sequence[Compared[SpectraRecord]]


def _energy(these: These) -> Figure | None:
    traces, rows, longest = [], [], 1
    for one in these:
        drawable = [m for m in words.trained(one.record.modules) if m.singular_values]
        if not drawable:
            continue
        curves = [(shares_of(m), m.complete) for m in drawable]
        last = max(len(curve) for curve, _ in curves)
        longest = max(longest, last)
        means = [(r, mean_at(curves, r)) for r in ranks_to_draw(last)]
        kept = [(r, m) for r, m in means if m is not None]
        mode = "lines+markers" if len(kept) <= 16 else "lines"
        points = {"type": "scatter", "mode": mode, "x": [r for r, _ in kept], "y": [drawn(m) for _, m in kept]}
        hover = {"hovertemplate": "rank %{x}: %{y:.2%}<extra>%{fullData.name}</extra>"}
        traces.append(points | one.look(size=6) | hover)
        rows.append((one.letter, dict(kept)))
    if not traces:
        return None
    ranks = sorted({r for _, row in rows for r in row if r & (r - 1) == 0 or r == longest})
    table = Table(
        "Mean share of the energy by rank",
        ("rank", *(f"mean share, {letter}" for letter, _ in rows)),
        tuple((str(r), *(words.share(row.get(r)) for _, row in rows)) for r in ranks),
    )
    return Figure(
        name="compare-energy",
        title="Energy captured against rank, laid over each other",
        alt="Mean share of the energy against rank, a line a record.",
        data=tuple(traces),
        layout=layout(
            430,
            showlegend=True,
            xaxis=rank_axis(longest),
            yaxis=share_axis("mean share of the energy"),
            **marked_shares((0.9, 0.99)),
        ),
        caption=(
            "Share of the squared Frobenius norm of ΔW in the largest directions up to a rank, as a mean over the "
            "modules of each record that have a delta.",
            "Records of other modules, other data or other steps have other curves for these reasons alone.",
        ),
        fallback=table,
    )


def _common(these: These) -> list[str]:
    sets = [{m.module for m in one.record.modules if any(v > 0 for v in m.singular_values)} for one in these]
    shared = set.intersection(*sets)
    return [m.module for m in these[0].record.modules if m.module in shared]


def _module(one: Compared[SpectraRecord], name: str) -> ModuleSpectrum:
    return next(m for m in one.record.modules if m.module == name)


def _points(module: ModuleSpectrum) -> list[tuple[int, float]]:
    values = module.singular_values
    return [(r, v) for r in ranks_to_draw(len(values)) if known(v := values[r - 1]) is not None and v > 0]


def _values(these: These) -> Figure | None:
    names = _common(these)
    if not names:
        return None
    by_name = [{m.module: m for m in one.record.modules} for one in these]
    choices = []
    for name in names[:MOST_CHOICES]:
        points = [_points(modules[name]) for modules in by_name]
        data = tuple({"x": [r for r, _ in p], "y": [drawn(v) for _, v in p]} for p in points)
        axes = {
            "xaxis": rank_axis(max(len(modules[name].singular_values) for modules in by_name), "index (log scale)"),
            "yaxis": log_axis("singular value (log scale)", [v for p in points for _, v in p]),
        }
        told = (
            f"{one.letter}: effective rank {words.number(modules[name].effective_rank)}"
            for one, modules in zip(these, by_name, strict=True)
        )
        choices.append(Choice(name, data, axes, "; ".join(told) + "."))
    base: list[Json] = [
        {"type": "scatter", "mode": "lines+markers", "hovertemplate": "%{x}: %{y:.4g}<extra>%{fullData.name}</extra>"}
        | one.look(size=5)
        for one in these
    ]
    first = choices[0]
    return Figure(
        name="compare-values",
        title="Singular values of one module, laid over each other",
        alt=f"Singular values of one of {len(names)} modules, a line a record.",
        data=tuple(trace | keys for trace, keys in zip(base, first.data, strict=True)),
        layout=layout(400, showlegend=True, **first.layout),
        caption=(
            f"Singular values of ΔW of one module that all records have (n = {words.count(len(names), 'module')}), no "
            "unit. The size says how far training went, the slope over how many directions.",
        ),
        choices=tuple(choices),
        choice_label="Module",
        detail="" if len(names) <= MOST_CHOICES else f"the selector has {MOST_CHOICES} of {len(names)} modules",
        fallback=None,
    )


def _modules(these: These) -> tuple[Table, ...]:
    """Return the modules whose effective ranks lie furthest apart."""
    by_name = [{m.module: m for m in one.record.modules} for one in these]
    apart = []
    for name in _common(these):
        ranks = [known(modules[name].effective_rank) for modules in by_name]
        present = [r for r in ranks if r is not None]
        if len(present) == len(ranks):
            apart.append((max(present) - min(present), name))
    apart.sort(key=lambda row: -row[0])
    if not apart:
        return ()
    rows = []
    for _, name in apart[:MOST_ROWS]:
        mine = [modules[name] for modules in by_name]
        rows.append(
            (
                name,
                *(words.number(m.effective_rank) for m in mine),
                *(words.number(m.rank_90) for m in mine),
                *(words.number(m.energy) for m in mine),
            )
        )
    of = ("effective rank", "rank 90\u00a0%", "energy")
    head = ("module", *(f"{what}, {one.letter}" for what in of for one in these))
    few = "" if len(apart) <= MOST_ROWS else f", {MOST_ROWS} of {len(apart)}"
    return (Table(f"Modules by how far their effective ranks lie apart{few}", head, tuple(rows), named=True),)


def _only(these: These) -> tuple[tuple[str, ...], ...]:
    """Return the row that says how many modules a record has alone."""
    sets = [{m.module for m in one.record.modules} for one in these]
    shared = set.intersection(*sets)
    return (("modules that not all have", *(str(len(s - shared)) for s in sets)),)


def extra(these: These) -> Extra:
    """Return what spectra add to their comparison."""
    found = [figure for figure in (_energy(these), _values(these)) if figure is not None]
    means = [known(one.record.summary.rank_90_mean) for one in these]
    told = ", ".join(f"{words.number(mean)} in {one.letter}" for one, mean in zip(these, means, strict=True))
    return Extra(
        verdict=f"Mean rank that holds 90 % of a module’s energy: {told}.",
        rows=_only(these),
        figures=tuple(found),
        tables=_modules(these),
    )
