"""The branch against the rank, a panel a step, and its exponent over the steps; the band drawn into both.

In: a stability record. Out: a figure each, or None where no run is left to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rankwise.records import StabilityCell, StabilityRecord
from rankwise.report import words
from rankwise.report.drawing import Choice, Figure, Json, Table, axis, drawn, evenly, known, layout, log_axis, plain
from rankwise.report.looks import hue, rule_words

PANEL: Final = 250
"""Height of one panel in px."""

GAP: Final = 74
"""Height between two panels in px: an axis title and the next heading."""

MOST_PANELS: Final = 6
"""Steps that get a panel."""

DASHES: Final = {"attention": "dash", "mlp": "dot"}
"""Kind of module -> how the line of a group is broken."""

Kind = tuple[str, str]
"""Optimizer and init."""


def kinds(record: StabilityRecord) -> list[Kind]:
    """Return every optimizer and init, in their order."""
    return list(dict.fromkeys((cell.optimizer, cell.init) for cell in record.cells))


def _kind_words(record: StabilityRecord, kind: Kind) -> str:
    rate = record.config.learning_rates.get(kind[0])
    return f"{kind[0]}, {kind[1]} init, learning rate {words.number(rate)}"


def _cells(record: StabilityRecord, kind: Kind, step: int) -> list[StabilityCell]:
    """Return the cells of one panel: groups first, so that the line of all modules lies on top."""
    mine = [c for c in record.cells if (c.optimizer, c.init, c.step) == (*kind, step)]
    return sorted(mine, key=lambda c: c.group == "all")


def _relative(cell: StabilityCell, record: StabilityRecord) -> list[float | None]:
    """Return the branch at every rank over that at the reference rank."""
    values = [known(cell.relative_rms_by_rank.get(str(rank))) for rank in record.config.ranks]
    base = known(cell.relative_rms_by_rank.get(str(record.config.reference_rank)))
    return [None if not v or not base else v / base for v in values]


def _steps(record: StabilityRecord) -> list[int]:
    steps = sorted({cell.step for cell in record.cells})
    return [steps[place] for place in evenly(len(steps), MOST_PANELS)]


def _band(record: StabilityRecord, axes: Json) -> Json:
    """Return the area that exponents within the band reach, from the reference rank on."""
    ranks = sorted({*record.config.ranks, record.config.reference_rank})
    up = [(r / record.config.reference_rank) ** record.config.band for r in ranks]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "the band",
        "x": ranks + ranks[::-1],
        "y": [drawn(v) for v in up] + [drawn(1 / v) for v in up[::-1]],
        "fill": "toself",
        "fillcolor": "@grid",
        "line": {"width": 0, "color": "@grid"},
        "hoverinfo": "skip",
        "showlegend": not axes,
    } | axes


def _line(cell: StabilityCell, record: StabilityRecord, axes: Json) -> Json:
    whole = cell.group == "all"
    color = hue(cell.rule)
    dash = "solid" if whole else DASHES.get(cell.group.partition("/")[0], "longdash")
    label = rule_words(cell.rule) if whole else f"{rule_words(cell.rule)}, {cell.group}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if whole else "lines",
        "name": plain(label),
        "x": list(record.config.ranks),
        "y": [drawn(v) for v in _relative(cell, record)],
        "line": {"width": 3 if whole else 1, "color": color, "dash": dash},
        "marker": {"size": 7, "color": color},
        "legendgroup": plain(cell.rule),
        "showlegend": whole and not axes,
        "customdata": [plain(_number(cell.relative_rms_by_rank.get(str(r)))) for r in record.config.ranks],
        "hovertemplate": "rank %{x}: %{y:.3g} of the reference<br>%{customdata} of W x<extra>%{fullData.name}</extra>",
    } | axes


def _number(value: float | None) -> str:
    return words.number(value)


def _traces(record: StabilityRecord, kind: Kind, steps: Sequence[int]) -> list[Json]:
    traces = []
    for panel, step in enumerate(steps):
        axes: Json = {} if panel == 0 else {"xaxis": f"x{panel + 1}", "yaxis": f"y{panel + 1}"}
        traces.append(_band(record, axes))
        traces += [_line(cell, record, axes) for cell in _cells(record, kind, step)]
    return traces


def _panels(record: StabilityRecord, kind: Kind, steps: Sequence[int]) -> Json:
    """Return axes and headings, one panel a step, from top to bottom."""
    inner = len(steps) * PANEL + (len(steps) - 1) * GAP
    ranks = list(record.config.ranks)
    ends = [math.log10(ranks[0]), math.log10(ranks[-1])]
    pad = 0.05 * (ends[1] - ends[0])
    sizes = [v for step in steps for c in _cells(record, kind, step) for v in _relative(c, record) if v is not None]
    keys: Json = {"annotations": []}
    for panel, step in enumerate(steps):
        n = "" if panel == 0 else str(panel + 1)
        high = 1 - panel * (PANEL + GAP) / inner
        domain = [round(max(0.0, high - PANEL / inner), 6), round(high, 6)]
        ticks = {"tickvals": ranks, "ticktext": [str(r) for r in ranks], "minor": {"ticks": ""}}
        span = [round(ends[0] - pad, 4), round(ends[1] + pad, 4)]
        keys[f"xaxis{n}"] = axis("rank (log scale)", type="log", anchor=f"y{n}", range=span, **ticks)
        keys[f"yaxis{n}"] = log_axis(f"over rank {record.config.reference_rank}", [*sizes, 1.0]) | {
            "domain": domain,
            "anchor": f"x{n}",
        }
        heading = {"text": f"<b>after {words.count(step, 'step')}</b>", "showarrow": False, "xref": "paper"}
        where = {"x": 1, "y": domain[1], "xanchor": "right", "yanchor": "bottom", "font": {"size": 13, "color": "@ink"}}
        keys["annotations"].append(heading | where | {"yref": "paper"})
    return keys


def _rank_table(record: StabilityRecord) -> Table:
    ranks = [str(rank) for rank in record.config.ranks]
    rows = []
    for cell in record.cells:
        if cell.group == "all":
            what = f"{rule_words(cell.rule)}, {cell.optimizer}, {cell.init}, step {cell.step}"
            spread = words.UNKNOWN if known(cell.spread) is None else f"{words.number(cell.spread)}×"
            rows.append((what, *(_number(cell.relative_rms_by_rank.get(rank)) for rank in ranks), spread))
    head = ("all modules", *(f"r = {rank}" for rank in ranks), "largest / smallest")
    return Table("RMS of the branch over that of the frozen output", head, tuple(rows), named=True)


def _marks(record: StabilityRecord) -> tuple[str, ...]:
    lost = [c for c in record.cells if c.group == "all" and c.runs_diverged and c.step == record.config.steps[-1]]
    return tuple(
        f"{words.count(c.runs_diverged, 'run')} under {rule_words(c.rule)}, {c.optimizer}, {c.init} init had diverged "
        f"by step {c.step}: seeds with such a run are left out from there on."
        for c in lost
    )


def draw_ranks(record: StabilityRecord) -> Figure | None:
    """Draw the branch against the rank, a panel a step."""
    found, steps = kinds(record), _steps(record)
    if not any(known(c.spread) is not None for c in record.cells):
        return None
    panels = {kind: _panels(record, kind, steps) for kind in found}
    height = len(steps) * PANEL + (len(steps) - 1) * GAP + 124
    margin = {"l": 66, "r": 18, "t": 74, "b": 50}
    plot = layout(height, showlegend=True, margin=margin, **panels[found[0]])
    plot["legend"] = plot["legend"] | {"y": 1 + 28 / (height - 124)}
    c = record.config
    everywhere = {cell.step for cell in record.cells}
    return Figure(
        name="stability-ranks",
        title="The branch against the rank",
        alt="RMS of the adapter's branch against the rank, a line a rule, a panel a step: "
        + "; ".join(f"{v.rule}, {v.optimizer}, {v.init} {v.verdict}" for v in record.verdicts)
        + ".",
        data=tuple(_traces(record, found[0], steps)),
        layout=plot,
        caption=(
            "RMS of s\u00a0B\u00a0A\u00a0x over the RMS of the frozen output, as a multiple of its value at rank "
            f"{c.reference_rank}; x is what the frozen model puts into the module. Geometric means over modules and "
            f"seeds, n = {words.count(len(c.seeds), 'seed')} and {words.count(len(c.ranks), 'rank')}.",
            "Bold lines are all modules; thin ones are groups, dashed for attention, dotted for MLP. A straight line "
            "of slope e is r^e.",
            f"The grey band is where exponents from −{c.band:g} to {c.band:g} lead: a line inside it is flat, one that "
            "leaves it at the top grows with the rank, one that leaves it below collapses.",
            "Flat says that steps are of one size at every rank. It does not say that anything is recalled.",
        ),
        detail="" if len(steps) == len(everywhere) else f"{len(steps)} of {len(everywhere)} steps have a panel",
        choices=tuple(
            Choice(_kind_words(record, kind), tuple(_traces(record, kind, steps)), panels[kind], _note(record, kind))
            for kind in found
        )
        if len(found) > 1
        else (),
        choice_label="Optimizer and init",
        fallback=_rank_table(record),
        marks=_marks(record),
    )


def _note(record: StabilityRecord, kind: Kind) -> str:
    told = [
        f"{rule_words(v.rule)}: exponent {exponent_text(v.exponent, v.exponent_ci)}, {v.verdict}"
        for v in record.verdicts
        if (v.optimizer, v.init) == kind
    ]
    return f"After the last step: {'; '.join(told)}." if told else ""


def exponent_text(value: float | None, interval: tuple[float, float] | None) -> str:
    """Write an exponent with its interval.

    >>> exponent_text(-0.5, (-0.61, -0.39)), exponent_text(0.25, None), exponent_text(None, None)
    ('−0.50 (−0.61 to −0.39)', '+0.25', '–')
    """
    if known(value) is None:
        return words.UNKNOWN
    ends = "" if interval is None else f" ({interval[0]:+.2f} to {interval[1]:+.2f})"
    return f"{value:+.2f}{ends}".replace("-", "−")


# --- over the steps -----------------------------------------------------------------------------------------


def _whole(record: StabilityRecord, kind: Kind, rule: str) -> list[StabilityCell]:
    mine = [c for c in record.cells if (c.optimizer, c.init) == kind and c.rule == rule and c.group == "all"]
    return sorted(mine, key=lambda c: c.step)


def _exponents(record: StabilityRecord, kind: Kind) -> list[Json]:
    traces = []
    for rule in record.config.scaling:
        cells = _whole(record, kind, rule)
        halves = [
            None if c.rms_exponent_ci is None else (c.rms_exponent_ci[1] - c.rms_exponent_ci[0]) / 2 for c in cells
        ]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(rule_words(rule)),
                "x": [c.step for c in cells],
                "y": [drawn(c.rms_exponent) for c in cells],
                "error_y": {
                    "type": "data",
                    "array": [drawn(h) or 0 for h in halves],
                    "color": hue(rule),
                    "thickness": 1.5,
                    "width": 6,
                },
                "line": {"width": 2, "color": hue(rule)},
                "marker": {"size": 8, "color": hue(rule)},
                "customdata": [c.verdict for c in cells],
                "hovertemplate": "step %{x}: %{y:.3f}, %{customdata}<extra>%{fullData.name}</extra>",
            }
        )
    return traces


def _reach(record: StabilityRecord) -> list[float | int | None]:
    ends = [record.config.band, -record.config.band, 0.0]
    for c in record.cells:
        if c.group == "all" and c.rms_exponent is not None:
            ends += [c.rms_exponent, *(c.rms_exponent_ci or ())]
    finite = [v for v in ends if known(v) is not None]
    pad = 0.08 * (max(finite) - min(finite))
    return [drawn(min(finite) - pad), drawn(max(finite) + pad)]


def _step_table(record: StabilityRecord) -> Table:
    rows = tuple(
        (
            f"{rule_words(c.rule)}, {c.optimizer}, {c.init}, step {c.step}",
            exponent_text(c.rms_exponent, c.rms_exponent_ci),
            exponent_text(c.update_exponent, c.update_exponent_ci),
            exponent_text(c.grad_A_exponent, c.grad_A_exponent_ci),
            exponent_text(c.grad_B_exponent, c.grad_B_exponent_ci),
            c.verdict,
        )
        for c in record.cells
        if c.group == "all"
    )
    head = ("all modules", "branch", "its last change", "gradient of A", "gradient of B", "verdict")
    return Table("Exponents in the rank, with 95 % intervals over the seeds", head, rows, named=True)


def draw_steps(record: StabilityRecord) -> Figure | None:
    """Draw the exponent of all modules over the steps."""
    found = kinds(record)
    if not any(c.group == "all" and known(c.rms_exponent) is not None for c in record.cells):
        return None
    c = record.config
    steps = sorted({cell.step for cell in record.cells})
    pad = 0.06 * math.log10(steps[-1] / steps[0]) or 0.2
    span = [round(math.log10(steps[0]) - pad, 4), round(math.log10(steps[-1]) + pad, 4)]
    ticks = {"tickvals": steps, "ticktext": [str(s) for s in steps], "minor": {"ticks": ""}}
    where = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": -c.band, "y1": c.band, "layer": "below"}
    band: Json = {"type": "rect", "fillcolor": "@grid", "line": {"width": 0}} | where
    plot = layout(
        400,
        showlegend=True,
        xaxis=axis("optimizer steps (log scale)", type="log", range=span, **ticks),
        yaxis=axis("exponent of the branch in the rank", range=_reach(record)),
        shapes=[band],
    )
    return Figure(
        name="stability-steps",
        title="The exponent over the steps",
        alt="Exponent of the branch of all modules over the steps, a line a rule, with intervals.",
        data=tuple(_exponents(record, found[0])),
        layout=plot,
        caption=(
            "Slope of log RMS(s\u00a0B\u00a0A\u00a0x) against log r over all modules (no unit), with a 95 % t-interval "
            f"over the seeds, n = {words.count(len(c.seeds), 'seed')}; the data are the same for all seeds, so that "
            "the interval is about the draw of A alone.",
            f"The grey band, from −{c.band:g} to {c.band:g}, is called stable; an interval that straddles its edge is "
            "undecided.",
            "At step 1 the exponent does not depend on the learning rate; later it does.",
        ),
        choices=tuple(
            Choice(_kind_words(record, kind), tuple(_exponents(record, kind)), {}, _note(record, kind))
            for kind in found
        )
        if len(found) > 1
        else (),
        choice_label="Optimizer and init",
        fallback=_step_table(record),
    )
