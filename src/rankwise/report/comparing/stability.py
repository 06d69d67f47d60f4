"""Checks beside each other: the exponent of the branch in the rank, for every rule, optimizer and init.

In: stability records. Out: an `Extra`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.records import StabilityRecord, StabilityVerdict
from rankwise.report import words
from rankwise.report.comparing.common import Compared, Extra
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, known, layout, plain
from rankwise.report.figures.stability import exponent_text
from rankwise.report.looks import rule_words

These = Sequence[Compared[StabilityRecord]]
Key = tuple[str, str, str]


def _by_key(one: Compared[StabilityRecord]) -> dict[Key, StabilityVerdict]:
    return {(v.rule, v.optimizer, v.init): v for v in one.record.verdicts}


def _key_words(key: Key) -> str:
    return f"{rule_words(key[0])}, {key[1]}, {key[2]}"


def _trace(one: Compared[StabilityRecord], keys: list[Key], shift: float) -> Json:
    mine = _by_key(one)
    present = [(k, mine[key]) for k, key in enumerate(keys) if key in mine and known(mine[key].exponent) is not None]
    halves = [None if v.exponent_ci is None else (v.exponent_ci[1] - v.exponent_ci[0]) / 2 for _, v in present]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [drawn(k + shift) for k, _ in present],
        "y": [drawn(v.exponent) for _, v in present],
        "error_y": {"type": "data", "array": [drawn(h) or 0 for h in halves], "color": one.color, "width": 5},
        "customdata": [plain(f"{_key_words((v.rule, v.optimizer, v.init))}, step {v.step}") for _, v in present],
        "hovertemplate": "%{customdata}<br>exponent %{y:.3f}<extra>%{fullData.name}</extra>",
    } | one.look(size=9)


def _figure(these: These, keys: list[Key]) -> Figure | None:
    n = len(these)
    traces = [_trace(one, keys, 0.5 * ((one.place + 0.5) / n - 0.5)) for one in these]
    ends = [v for t in traces for y, h in zip(t["y"], t["error_y"]["array"], strict=True) for v in (y - h, y + h)]
    if not ends:
        return None
    bands = {one.record.config.band for one in these}
    band = max(bands)
    ends += [-band, band]
    pad = 0.08 * (max(ends) - min(ends))
    where = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": -band, "y1": band, "layer": "below"}
    labels = ["<br>".join(map(plain, (rule_words(k[0]), f"{k[1]}, {k[2]}"))) for k in keys]
    return Figure(
        name="compare-exponents",
        title="Exponents of the branch in the rank, beside each other",
        alt=f"Exponent with its interval for {words.count(len(keys), 'rule, optimizer and init', 'of them')}.",
        data=tuple(traces),
        layout=layout(
            400,
            showlegend=True,
            xaxis=axis("", range=[-0.6, len(keys) - 0.4], tickvals=list(range(len(keys))), ticktext=labels),
            yaxis=axis("exponent after the last step", range=[drawn(min(ends) - pad), drawn(max(ends) + pad)]),
            shapes=[{"type": "rect", "fillcolor": "@grid", "line": {"width": 0}} | where],
        ),
        caption=(
            "Slope of log RMS(s\u00a0B\u00a0A\u00a0x) against log r over all modules after the last step of each "
            "record, with its 95 % t-interval over the seeds; 0 is flat.",
            f"The grey band, ±{band:g}, is called stable"
            + (" in the record with the widest band." if len(bands) > 1 else "."),
        ),
        fallback=Table(
            "Exponents with 95 % intervals, and verdicts",
            ("rule, optimizer, init", *(one.letter for one in these)),
            tuple(_row(these, key) for key in keys),
            named=True,
        ),
    )


def _row(these: These, key: Key) -> tuple[str, ...]:
    cells = []
    for one in these:
        v = _by_key(one).get(key)
        cells.append(words.UNKNOWN if v is None else f"{exponent_text(v.exponent, v.exponent_ci)} {v.verdict}")
    return (_key_words(key), *cells)


def extra(these: These) -> Extra:
    """Return what checks add to their comparison."""
    keys = list(dict.fromkeys(key for one in these for key in _by_key(one)))
    figure = _figure(these, keys)
    verdicts = [tuple(v.verdict if (v := _by_key(one).get(key)) else None for one in these) for key in keys]
    shared = [row for row in verdicts if None not in row]
    agree = sum(len(set(row)) == 1 for row in shared)
    return Extra(
        verdict=f"The verdicts agree in {agree} of {len(shared)} rules, optimizers and inits that all records hold.",
        rows=(
            ("model", *(one.record.config.model for one in these)),
            ("data", *(one.record.config.data for one in these)),
            *(_row(these, key) for key in keys),
        ),
        figures=() if figure is None else (figure,),
    )
