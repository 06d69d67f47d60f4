"""Layer by module: where in the model the update lies, and how wide it is there.

In: a spectra record. Out: a figure, or None where no quantity is known for any module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Final, NamedTuple

from rankwise.records import ModuleSpectrum, SpectraRecord
from rankwise.report import words
from rankwise.report.drawing import Choice, Figure, Json, axis, drawn, known, layout, plain

NO_LAYER: Final = "none"
"""Row of modules without a number in their path, such as lm_head."""

WHOLE_NUMBER: Final = re.compile(r"(?<![^.:])[0-9]{1,9}(?![^.:])")
"""A part of a path that is a number and nothing else."""

MOST_LONE_COLUMNS: Final = 40
"""Columns past which a single row says nothing that the table does not say better."""

MOST_TEXT_COLUMNS: Final = 10
"""Columns up to which a cell has room for its number."""

MOST_TALL_ROWS: Final = 48
"""Layers up to which a row is 20 px high."""

LONG_LABEL: Final = 22
"""Characters of a column's label past which its beginning is cut."""

SCALE: Final = [[0, "#f7edc6"], [0.34, "#bcdcae"], [0.67, "#7dbdb9"], [1, "#4a90bd"]]
"""Falls evenly in lightness, so it reads without hue; dark text on it keeps a contrast of 5 to 1."""


class Quantity(NamedTuple):
    """What a colour may stand for: its name, a sentence, and its value in one module."""

    label: str
    note: str
    value: Callable[[ModuleSpectrum], float | None]
    show: Callable[[float | None], str] = words.number


def _quantities(total: float) -> dict[str, Quantity]:
    def of_total(module: ModuleSpectrum) -> float | None:
        energy = known(module.energy)
        return energy / total if energy is not None and total > 0 else None

    return {
        "rank_90": Quantity(
            "rank for 90 % of the energy", "Smallest number of directions that hold 90 %.", lambda m: m.rank_90
        ),
        "effective_rank": Quantity(
            "effective rank",
            "exp of the entropy of the energy over the directions: how many of equal size would be as spread out.",
            lambda m: m.effective_rank,
        ),
        "stable_rank": Quantity(
            "stable rank", "Energy over that of the largest direction; at least 1.", lambda m: m.stable_rank
        ),
        "energy_share": Quantity(
            "share of the update's energy",
            "Energy of the module over the sum of all modules here: large matrices hold more by their size alone.",
            of_total,
            words.share,
        ),
        "relative_norm": Quantity(
            "relative norm", "‖ΔW‖ / ‖W‖ of the module, Frobenius; no unit.", lambda m: m.relative_norm
        ),
        "signal_rank": Quantity(
            "signal rank", "Number of singular values above the noise edge.", lambda m: m.signal_rank
        ),
    }


def place(module: str) -> tuple[str, str]:
    """Return the layer (the first whole number in the dotted path, or behind a colon) and the rest of it.

    >>> place("model.layers.12.self_attn.q_proj"), place("lm_head")
    (('12', 'model.layers.*.self_attn.q_proj'), ('none', 'lm_head'))
    >>> place("h.3.experts.w1[7]"), place("unet:12")
    (('3', 'h.*.experts.w1[7]'), ('12', 'unet:*'))
    """
    found = WHOLE_NUMBER.search(module)
    if found is None:
        return NO_LAYER, module
    return str(int(found[0])), module[: found.start()] + "*" + module[found.end() :]


def column_labels(columns: Sequence[str]) -> list[str]:
    """Shorten column paths to what tells them apart: the common beginning goes, up to a dot."""
    inner = [c for c in columns if "*" in c]
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*(c.split(".") for c in inner), strict=False))
    shared = "".join(f"{parts[0]}." for parts in alike) if len(inner) > 1 else ""
    labels: list[str] = []
    for column in columns:
        label = column.removeprefix(shared) if shared else re.sub(r"^.*?\*\.", "", column)
        label = label if len(label) <= LONG_LABEL else "…" + label[-LONG_LABEL + 1 :]
        labels.append(label if label not in labels else column)
    return labels


class _Grid(NamedTuple):
    layers: list[str]
    columns: list[str]
    at: dict[tuple[str, str], ModuleSpectrum]


def _grid(modules: Sequence[ModuleSpectrum]) -> _Grid:
    at: dict[tuple[str, str], ModuleSpectrum] = {}
    for module in modules:
        at.setdefault(place(module.module), module)
    numbered = sorted((layer for layer in {layer for layer, _ in at} if layer != NO_LAYER), key=int)
    layers = numbered + [NO_LAYER] * any(layer == NO_LAYER for layer, _ in at)
    return _Grid(layers, list(dict.fromkeys(column for _, column in at)), at)


def _choice(quantity: Quantity, grid: _Grid) -> Choice | None:
    rows: list[list[float | int | None]] = []
    texts: list[list[str]] = []
    for layer in grid.layers:
        cells = [grid.at.get((layer, column)) for column in grid.columns]
        values = [None if m is None else known(quantity.value(m)) for m in cells]
        rows.append([drawn(v) for v in values])
        texts.append(["" if v is None else quantity.show(v) for v in values])
    if all(v is None for row in rows for v in row):
        return None
    return Choice(quantity.label, ({"z": rows, "text": texts},), {}, quantity.note)


def _trace(grid: _Grid, labels: list[str]) -> Json:
    names = [[plain(m.module) if (m := grid.at.get((y, x))) else "" for x in grid.columns] for y in grid.layers]
    trace: Json = {
        "type": "heatmap",
        "x": [plain(label) for label in labels],
        "y": grid.layers,
        "customdata": names,
        "hovertemplate": "%{customdata}<br>%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": SCALE,
        "xgap": 2 if len(labels) <= 40 else 0,
        "ygap": 2 if len(grid.layers) <= 60 else 1,
        "colorbar": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.0,
            "yanchor": "bottom",
            "len": 0.5,
            "thickness": 10,
            "outlinewidth": 0,
            "nticks": 5,
            "ypad": 4,
            "xpad": 0,
        },
    }
    if len(labels) <= MOST_TEXT_COLUMNS:
        trace |= {
            "texttemplate": "%{text}",
            "textfont": {"size": 10.5 if len(grid.layers) <= MOST_TALL_ROWS else 8.5, "color": "#111111"},
        }
    return trace


def _detail(grid: _Grid, modules: Sequence[ModuleSpectrum]) -> str:
    empty = len(grid.layers) * len(grid.columns) - len(grid.at)
    doubled = len(modules) - len(grid.at)
    parts = [f"{words.count(empty, 'place')} of the grid without a module"] if empty else []
    if doubled:
        parts.append(f"{words.count(doubled, 'module')} of a place that is taken not shown")
    return "; ".join(parts)


def _caption(grid: _Grid, limited: int) -> tuple[str, ...]:
    sentences = [
        f"One cell a module, n = {len(grid.at)}: the row is the first number in the module's path (the layer), the "
        f"column the rest of the path; cells without a value stay blank.",
        "Darker is more, on the scale above the plot, which runs over the cells shown; numbers of matrices of "
        "different shape are not on one footing.",
    ]
    if limited:
        sentences.append(
            f"In {words.count(limited, 'module')} every quantity but the signal rank and the norm counts "
            "rounding noise."
        )
    sentences.append("A dark cell is not an important one: how much a module matters is no property of its ΔW alone.")
    return tuple(sentences)


def draw(record: SpectraRecord) -> Figure | None:
    """Draw the heat map of layers and modules, with a selector for the quantity."""
    total = sum(e for m in record.modules if (e := known(m.energy)) is not None)
    grid = _grid(record.modules)
    drawable = {n: c for n, q in _quantities(total).items() if (c := _choice(q, grid)) is not None}
    if not drawable or (len(grid.layers) == 1 and len(grid.columns) > MOST_LONE_COLUMNS):
        return None
    limited = sum(m.rounding_limited for m in record.modules)
    first = "signal_rank" if limited and "signal_rank" in drawable else next(iter(drawable))
    labels = column_labels(grid.columns)
    tall = 20 if len(grid.layers) <= MOST_TALL_ROWS else 13
    height = min(1300, max(250, 170 + tall * len(grid.layers)))
    columns = axis("", type="category", side="bottom", showgrid=False, showline=False, ticks="")
    columns |= {"autotickangles": [0, -45, -90], "tickfont": {"size": 11}}
    rows = axis("layer", type="category", autorange="reversed", showgrid=False, showline=False, ticks="")
    return Figure(
        name="heat-map",
        title="Layer by module",
        alt="Heat map of the chosen quantity, one cell a module, a row a layer.",
        data=(_trace(grid, labels),),
        layout=layout(height, xaxis=columns, yaxis=rows, margin={"l": 58, "r": 18, "t": 40, "b": 40}),
        caption=_caption(grid, limited),
        detail=_detail(grid, record.modules),
        choices=tuple(drawable.values()),
        choice_label="Quantity",
        chosen=list(drawable).index(first),
    )
