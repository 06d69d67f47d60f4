"""What the monitor saw over the steps, a line a group of modules: branch ratio, and effective rank.

In: a run record. Out: a figure each, or None where the monitor has no such number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from rankwise.records import GroupHealth, RunRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, evenly, known, layout, log_axis, plain
from rankwise.report.figures.loss_curve import MOST_ROWS, kept_line, steps_axis

KINDS: Final = {"attention": "@first", "mlp": "@second", "embedding": "@third"}
"""Kind of module -> its hue; others are grey."""

DASHES: Final = {"early": "solid", "middle": "dash", "late": "dot"}
"""Third of the stack -> how its line is broken."""

STATUSES: Final = {"starved": "triangle-down-open", "unstable": "x"}
"""Status -> the marker it puts on a line."""

MOST_STEPS: Final = 400
"""Steps drawn of a group."""


ENTRY: Final = 15
"""Height in px for each entry of the legend, which on a phone stand below each other."""


class Quantity(NamedTuple):
    """What is drawn: its value, its name on the axis, the title and the words under it."""

    name: str
    title: str
    axis: str
    value: Callable[[GroupHealth], float | None]
    caption: tuple[str, ...]


BRANCH: Final = Quantity(
    "branch-ratio",
    "Branch ratio over the steps",
    "branch ratio",
    lambda h: h.branch_ratio,
    (
        "RMS of scaling\u00a0·\u00a0B\u00a0A\u00a0x over RMS of W\u00a0x (no unit): how "
        "loud the adapter speaks beside the weights it sits on.",
        "Where B begins at 0, so does it. How large it has to become depends on the data and is no figure of merit.",
    ),
)
WIDTH: Final = Quantity(
    "effective-rank",
    "Effective rank over the steps",
    "effective rank",
    lambda h: h.effective_rank,
    (
        "exp(entropy) of the energy of scaling\u00a0·\u00a0B\u00a0A over its directions: how many of equal "
        "size would be as spread out; at most r.",
        "A small one does not say that the data need few directions: others may have been starved by a small scaling "
        "or learning rate.",
    ),
)


def _look(group: str) -> Json:
    if group == "all":
        return {"width": 3.5, "color": "@ink", "dash": "solid"}
    kind, _, third = group.partition("/")
    return {"width": 2, "color": KINDS.get(kind, "@thin"), "dash": DASHES.get(third, "solid")}


def _of(record: RunRecord, quantity: Quantity) -> dict[str, list[GroupHealth]]:
    """Return group -> its rows in order of steps, for groups with a known value."""
    groups: dict[str, list[GroupHealth]] = {}
    for row in record.health:
        groups.setdefault(row.group, []).append(row)
    kept = {g: rows for g, rows in groups.items() if any(known(quantity.value(row)) is not None for row in rows)}
    return {group: sorted(rows, key=lambda row: row.step) for group, rows in kept.items()}


def _line(group: str, rows: list[GroupHealth], quantity: Quantity, log: bool) -> Json:
    values = [known(quantity.value(row)) for row in rows]
    look = _look(group)
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(rows) <= 40 else "lines",
        "name": plain(group),
        "x": [row.step for row in rows],
        "y": [drawn(v) if v is not None and (v > 0 or not log) else None for v in values],
        "line": look,
        "marker": {"size": 5, "color": look["color"]},
        "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
    }


def _statuses(groups: dict[str, list[GroupHealth]], quantity: Quantity, log: bool) -> list[Json]:
    """Return the marks of every status but "ok", one trace a status so that the legend has each once."""
    found: dict[str, list[tuple[int, float, str]]] = {}
    for group, rows in groups.items():
        for row in rows:
            value = known(quantity.value(row))
            if row.status != "ok" and value is not None and (value > 0 or not log):
                found.setdefault(row.status, []).append((row.step, value, group))
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": plain(status),
            "x": [step for step, _, _ in points],
            "y": [drawn(value) for _, value, _ in points],
            "marker": {
                "size": 10,
                "symbol": STATUSES.get(status, "star"),
                "color": "@ink",
                "line": {"width": 1.5, "color": "@ink"},
            },
            "customdata": [plain(group) for _, _, group in points],
            "hovertemplate": "step %{x}: %{y:.4g}<extra>%{customdata}: %{fullData.name}</extra>",
        }
        for status, points in found.items()
    ]


def _axis(title: str, values: list[float]) -> tuple[Json, bool]:
    above = [v for v in values if v > 0]
    if above and max(above) / min(above) >= 30:
        return log_axis(f"{title} (log scale)", above), True
    high = max([0.0, *values])
    return axis(title, range=[min(0.0, *values) if values else 0.0, drawn(1.06 * high or 1.0)]), False


def _table(groups: dict[str, list[GroupHealth]], quantity: Quantity) -> Table:
    at = {(row.step, group): row for group, rows in groups.items() for row in rows}
    steps = sorted({step for step, _ in at})
    chosen = [steps[place] for place in evenly(len(steps), MOST_ROWS)]
    rows = []
    for step in chosen:
        cells = []
        for group in groups:
            row = at.get((step, group))
            mark = "" if row is None or row.status == "ok" else f" {row.status}"
            cells.append(words.UNKNOWN if row is None else words.number(quantity.value(row)) + mark)
        rows.append((f"{step:,}", *cells))
    few = "" if len(chosen) == len(steps) else f", {len(chosen)} of {len(steps):,} steps"
    return Table(f"{quantity.axis[0].upper()}{quantity.axis[1:]} by group{few}", ("step", *groups), tuple(rows))


def _statuses_words(groups: dict[str, list[GroupHealth]]) -> tuple[str, ...]:
    """Return a sentence on each status but "ok": in which groups, at how many of the steps looked at."""
    counts: dict[str, dict[str, int]] = {}
    for group, rows in groups.items():
        for row in rows:
            if row.status != "ok":
                counts.setdefault(row.status, {}).setdefault(group, 0)
                counts[row.status][group] += 1
    return tuple(
        f"Marked {status}: "
        + "; ".join(f"{group} at {n:,} of {words.count(len(groups[group]), 'look')}" for group, n in where.items())
        + "."
        for status, where in counts.items()
    )


def _draw(record: RunRecord, quantity: Quantity) -> Figure | None:
    groups = _of(record, quantity)
    if not groups:
        return None
    shown = {g: [rows[place] for place in evenly(len(rows), MOST_STEPS)] for g, rows in groups.items()}
    values = [v for rows in shown.values() for row in rows if (v := known(quantity.value(row))) is not None]
    scale, log = _axis(quantity.axis, values)
    last = max(row.step for rows in shown.values() for row in rows)
    longest = max(map(len, groups.values()))
    shapes, notes = kept_line(record)
    detail = [] if longest <= MOST_STEPS else [f"{MOST_STEPS} steps, evenly chosen, are drawn of {longest:,}"]
    if log and any(v <= 0 for v in values):
        detail.append("values of 0 have no place on a log axis and are left out")
    traces = [_line(group, rows, quantity, log) for group, rows in shown.items()] + _statuses(shown, quantity, log)
    scales = {"xaxis": steps_axis(record, last), "yaxis": scale, "shapes": shapes, "annotations": notes}
    plot = layout(400 + ENTRY * len(traces), showlegend=True, **scales)
    return Figure(
        name=quantity.name,
        title=quantity.title,
        alt=f"{quantity.axis} over the steps, a line for each of {words.count(len(groups), 'group')} of modules.",
        data=tuple(traces),
        layout=plot,
        caption=(
            *quantity.caption,
            f"A line is the mean over the modules of a group, n = {words.count(len(groups), 'group')}; hues are kinds "
            "of modules, the dash is the depth, marks are what the monitor said of a group at a step.",
        ),
        detail="; ".join(detail),
        fallback=_table(groups, quantity),
        marks=_statuses_words(groups),
    )


def draw_branch_ratio(record: RunRecord) -> Figure | None:
    """Draw the branch ratio of each group over the steps."""
    return _draw(record, BRANCH)


def draw_effective_rank(record: RunRecord) -> Figure | None:
    """Draw the effective rank of each group over the steps."""
    return _draw(record, WIDTH)
