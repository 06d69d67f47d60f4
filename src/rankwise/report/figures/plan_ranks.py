"""Where a plan puts its ranks: layer by module.

In: a plan record. Out: a figure, or None where it holds no module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from rankwise.records import LeftOut, PlannedModule, PlanRecord
from rankwise.report import words
from rankwise.report.drawing import Choice, Figure, Json, Table, axis, drawn, known, layout, plain
from rankwise.report.figures.heat_map import (
    MOST_LONE_COLUMNS,
    MOST_TALL_ROWS,
    MOST_TEXT_COLUMNS,
    NO_LAYER,
    SCALE,
    column_labels,
    place,
)

Item = PlannedModule | LeftOut


class Quantity(NamedTuple):
    """What a colour may stand for: its name, a sentence, its value in one module, and how that is written."""

    label: str
    note: str
    value: Callable[[Item], float | None]
    show: Callable[[float | None], str] = words.number


def _rank(item: Item) -> float | None:
    return item.r if isinstance(item, PlannedModule) else 0


def _kept(item: Item) -> float | None:
    return item.kept_energy_share if isinstance(item, PlannedModule) else 0.0


def _params(item: Item) -> float | None:
    return item.r * sum(item.shape) if isinstance(item, PlannedModule) else 0


def _short(value: float | None) -> str:
    """Write parameters in a cell.

    >>> _short(1_234_567), _short(8192), _short(640)
    ('1.23M', '8.19k', '640')
    """
    value = known(value)
    if value is None:
        return words.UNKNOWN
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _above_edge(item: Item) -> float | None:
    if not isinstance(item, PlannedModule) or item.signal_rank is None:
        return None
    return max(item.r - item.signal_rank, 0)


def _energy_share(item: Item, total: float) -> float | None:
    energy = known(item.energy)
    return energy / total if energy is not None and total > 0 else None


QUANTITIES: Final = (
    Quantity("rank", "Rank of the module; 0 where it is left out by choice.", _rank),
    Quantity("energy kept", "Share of the module's own energy in the directions that it keeps.", _kept, words.share),
    Quantity("parameters", "Parameters of A and B: r × (out + in).", _params, _short),
    Quantity("ranks past the noise edge", "Directions kept that rounding alone could have made.", _above_edge),
)


def _items(record: PlanRecord) -> list[Item]:
    return [*record.modules, *(item for item in record.left_out if item.counted)]


class _Grid(NamedTuple):
    layers: list[str]
    columns: list[str]
    at: dict[tuple[str, str], Item]


def _grid(items: Sequence[Item]) -> _Grid:
    at: dict[tuple[str, str], Item] = {}
    for item in items:
        at.setdefault(place(item.module), item)
    layers = sorted({layer for layer, _ in at if layer != NO_LAYER}, key=int)
    layers += [NO_LAYER] * any(layer == NO_LAYER for layer, _ in at)
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
    top = max(v for row in rows for v in row if v is not None)
    return Choice(quantity.label, ({"z": rows, "text": texts, "zmin": 0, "zmax": top or 1},), {}, quantity.note)


def _trace(grid: _Grid, labels: list[str]) -> Json:
    trace: Json = {
        "type": "heatmap",
        "x": [plain(label) for label in labels],
        "y": grid.layers,
        "customdata": [
            [plain(m.module) if (m := grid.at.get((y, x))) else "" for x in grid.columns] for y in grid.layers
        ],
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
        size = 10.5 if len(grid.layers) <= MOST_TALL_ROWS else 8.5
        trace |= {"texttemplate": "%{text}", "textfont": {"size": size, "color": "#111111"}}
    return trace


def by_column(record: PlanRecord) -> Table:
    """Return ranks, parameters and energy kept by kind of module: the rest of its path without the layer."""
    columns: dict[str, list[Item]] = {}
    for item in _items(record):
        columns.setdefault(place(item.module)[1], []).append(item)
    rows = []
    for label, items in columns.items():
        ranks = [_rank(item) or 0.0 for item in items]
        energies = [known(item.energy) for item in items]
        kept = [known(_kept(item)) for item in items]
        share = None
        if None not in energies and None not in kept and sum(e or 0.0 for e in energies) > 0:
            share = sum((e or 0.0) * (k or 0.0) for e, k in zip(energies, kept, strict=True)) / sum(
                e or 0.0 for e in energies
            )
        params = sum(_params(item) or 0 for item in items)
        rows.append(
            (
                label,
                f"{len(items):,}",
                words.span(ranks),
                words.number(sum(ranks) / len(ranks)),
                f"{params:,.0f}",
                words.share(params / record.params if record.params else None),
                words.share(share),
            )
        )
    head = ("module", "weights", "rank", "mean rank", "parameters", "of all", "energy kept")
    return Table("The plan by kind of module (layers as *)", head, tuple(rows), named=True)


def draw(record: PlanRecord) -> Figure | None:
    """Draw the ranks of a plan as a heat map, with a selector for the quantity."""
    items = _items(record)
    grid = _grid(items)
    if not items or (len(grid.layers) == 1 and len(grid.columns) > MOST_LONE_COLUMNS):
        return None
    total = sum(known(item.energy) or 0.0 for item in items)
    energy = Quantity(
        "share of all energy",
        "Energy of the module's update over that of all modules here, kept or not.",
        lambda item: _energy_share(item, total),
        words.share,
    )
    choices = tuple(c for q in (*QUANTITIES, energy) if (c := _choice(q, grid)) is not None)
    labels = column_labels(grid.columns)
    tall = 20 if len(grid.layers) <= MOST_TALL_ROWS else 13
    columns = axis("", type="category", side="bottom", showgrid=False, showline=False, ticks="")
    columns |= {"autotickangles": [0, -45, -90], "tickfont": {"size": 11}}
    rows = axis("layer", type="category", autorange="reversed", showgrid=False, showline=False, ticks="")
    height = min(1300, max(250, 170 + tall * len(grid.layers)))
    doubled = len(items) - len(grid.at)
    return Figure(
        name="plan-ranks",
        title="Where the ranks go",
        alt="Heat map of the rank of every module, a row a layer, a column a kind of module.",
        data=(_trace(grid, labels),),
        layout=layout(height, xaxis=columns, yaxis=rows, margin={"l": 58, "r": 18, "t": 40, "b": 40}),
        caption=(
            f"One cell a module, n = {len(grid.at)}: the row is the first number in its path (the layer), the column "
            "the rest of the path. Blank: no such module in the plan.",
            "Darker is more, from 0 on the scale above the plot. A rank costs in + out parameters: at equal energies a "
            "larger weight gets less of it.",
            "A low rank means that its directions save little squared error for a parameter, not that the module "
            "matters little: the energy of an update is no measure of importance.",
        ),
        detail=f"{words.count(doubled, 'module')} of a place that is taken not shown" if doubled else "",
        choices=choices,
        choice_label="Quantity",
        chosen=0,
        fallback=by_column(record),
    )
