"""What all figures share: the figure itself, the ranks to draw, axes, and text that is safe in a plot.

In: numbers and words. Out: plain dicts in the JSON schema of plotly.js. A colour is written `@name` and
stands for the custom property `--name` of `templates/style.css`, so that one figure serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final, Literal

Json = dict[str, Any]

DIGITS: Final = 6
"""Significant digits of a number in a plot: past what an eye or a tooltip can use."""

EVERY_RANK: Final = 16
"""Ranks up to this one are all drawn."""

PER_OCTAVE: Final = 8
"""Points drawn for each doubling of the rank past `EVERY_RANK`."""

MOST_TICKS: Final = 8
"""Labels that a rank axis 300 px wide has room for."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One entry of a figure's selector.

    Attributes:
        label: what the selector shows.
        data: for each trace of the figure, the keys that change.
        layout: top-level keys of the layout that change.
        note: a sentence under the plot while this entry is chosen.
    """

    label: str
    data: tuple[Json, ...]
    layout: Json
    note: str


@dataclass(frozen=True, slots=True)
class Table:
    """A small table of words: the numbers of a figure, and the records' own tables.

    Attributes:
        caption: what it is of.
        head: one word a column.
        rows: one cell a column.
        named: whether the first column holds names, which begin at the left, and not numbers.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    named: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot, the words under it, and a table that says the same.

    Attributes:
        name: of the figure in `FIGURES`, and its anchor in the page.
        title: heading, plain words.
        alt: one sentence for those who do not see the plot.
        data: plotly traces.
        layout: plotly layout; `height` in px is always set.
        caption: how to read it, in two to four sentences: units, n, and what it does not say.
        detail: what was left out of the drawing and how it was thinned; may be empty.
        choices: entries of the selector; empty where there is none.
        choice_label: name of the selector.
        chosen: index of the entry shown first.
        fallback: the numbers drawn, as a table; shown at once where scripts are off.
        marks: sentences above the plot: what in it is not what it seems, and what is not in it.
    """

    name: str
    title: str
    alt: str
    data: tuple[Json, ...]
    layout: Json
    caption: tuple[str, ...]
    detail: str = ""
    choices: tuple[Choice, ...] = ()
    choice_label: str = ""
    chosen: int = 0
    fallback: Table | None = None
    marks: tuple[str, ...] = ()

    def spec(self) -> Json:
        """Return what the script in the page needs to draw the figure, as JSON types."""
        choices = [{"data": list(c.data), "layout": c.layout, "note": c.note} for c in self.choices]
        return {"data": list(self.data), "layout": self.layout, "choices": choices, "chosen": self.chosen}

    def to_plotly(self, theme: Literal["light", "dark"] = "light") -> Json:
        """Return `data` and `layout` with colours, as `plotly.graph_objects.Figure(...)` of plotly.py takes them.

        Args:
            theme: whose colours; the page follows the reader's, a file cannot.
        """
        from rankwise.report.painting import painted, shown

        now = shown(self)
        return {"data": painted(now["data"], theme), "layout": painted(now["layout"], theme)}

    def to_csv(self) -> str:
        """Return the numbers of the figure as CSV: its table, or what is drawn where it has none."""
        from rankwise.report.painting import csv_of

        return csv_of(self)

    def to_html(self) -> str:
        """Return a self-contained page of this figure alone."""
        from rankwise.report.page import render_figure

        return render_figure(self)

    def to_image(
        self,
        format: Literal["png", "svg"] = "png",
        *,
        theme: Literal["light", "dark"] = "light",
        width: int = 760,
        browser: str | PathLike[str] | None = None,
    ) -> bytes:
        """Return a picture of the figure, as its selector shows it first, drawn by Chromium, Chrome or Edge.

        Args:
            format: "png", of two pixels for each px, or "svg".
            theme: whose colours.
            width: in px; the height is the one the page has.
            browser: path or name of the browser; the first one on the path if None.

        Raises:
            BrowserError: there is no such browser, or it did not draw.
        """
        from rankwise.report.picturing import pictures

        drawn = pictures({self.name: self}, formats=(format,), theme=theme, width=width, browser=browser)
        return drawn[self.name, format]

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the page in a frame of its own, which the notebook's styles do not reach."""
        from rankwise.report.painting import framed

        return framed(self)


def known(value: float | None) -> float | None:
    """Return the number, or None for what a record cannot know and JSON cannot say (NaN, infinity)."""
    return value if value is not None and math.isfinite(value) else None


def drawn(value: float | None) -> float | int | None:
    """Round to `DIGITS` significant digits, which a third of the page's bytes would otherwise go into.

    >>> drawn(0.123456789), drawn(1.0), drawn(float("nan"))
    (0.123457, 1, None)
    """
    if known(value) is None or value is None:
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded


def ranks_to_draw(longest: int, extra: Iterable[int] = ()) -> list[int]:
    """Return the ranks at which a list of `longest` values is drawn: all of the first, then log-spaced.

    Powers of two, the last rank and those of `extra` that lie inside are always among them.

    >>> ranks_to_draw(4), len(ranks_to_draw(4096))
    ([1, 2, 3, 4], 80)
    """
    steps = range(max(0, math.ceil(PER_OCTAVE * math.log2(max(longest, 1) / EVERY_RANK))) + 1)
    spaced = {round(EVERY_RANK * 2 ** (step / PER_OCTAVE)) for step in steps}
    ranks = {*range(1, EVERY_RANK + 1), *spaced, *extra, longest}
    return sorted(r for r in ranks if 1 <= r <= longest)


def plain(text: str) -> str:
    """Escape text for a plot: plotly.js reads a subset of HTML in labels and tooltips.

    >>> plain("<b>q_proj</b>")
    '&lt;b&gt;q_proj&lt;/b&gt;'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def rank_ticks(longest: int) -> list[int]:
    """Return every rank of a few, else powers of two, or of four or more where labels would be too many.

    >>> rank_ticks(3), rank_ticks(16), rank_ticks(4096)
    ([1, 2, 3], [1, 2, 4, 8, 16], [1, 4, 16, 64, 256, 1024, 4096])
    """
    if longest <= MOST_TICKS:
        return list(range(1, longest + 1))
    powers = [2**k for k in range(max(longest, 1).bit_length())]
    return powers[:: math.ceil(len(powers) / MOST_TICKS)]


def axis(title: str, **more: Any) -> Json:
    """Return an axis in the page's colours."""
    base: Json = {
        "title": {"text": title, "standoff": 8, "font": {"size": 13}},
        "gridcolor": "@grid",
        "linecolor": "@line",
        "tickcolor": "@line",
        "ticks": "outside",
        "ticklen": 4,
        "zeroline": False,
        "showline": True,
        "automargin": True,
    }
    return base | more


def rank_axis(longest: int, title: str = "rank (log scale)") -> Json:
    """Return the axis over ranks: log scale, labels at powers of two."""
    ticks = rank_ticks(longest)
    end = math.log10(max(longest, 1))
    pad = 0.03 * end or 0.15
    return axis(
        title,
        type="log",
        range=[round(-pad, 4), round(end + pad, 4)],
        tickvals=ticks,
        ticktext=[str(t) for t in ticks],
        minor={"ticks": ""},
    )


def share_axis(title: str) -> Json:
    """Return the axis of a share from 0 to 1, in per cent."""
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    return axis(title, range=[0, 1.02], tickvals=ticks, ticktext=[f"{t * 100:g} %" for t in ticks])


def value_axis(title: str, values: Sequence[float], **more: Any) -> Json:
    """Return the linear axis for values and zero, with room for labels at both ends."""
    low, high = min(0.0, *values), max(0.0, *values)
    pad = 0.1 * ((high - low) or 1.0)
    ends = [drawn(low - (pad if low < 0 else 0.6 * pad)), drawn(high + pad)]
    return axis(title, range=ends, **more)


def log_axis(title: str, values: Sequence[float]) -> Json:
    """Return the log axis for positive values, wide enough that a flat row of them looks flat."""
    low, high = math.log10(min(values)), math.log10(max(values))
    decades = high - low
    pad = max(0.06 * decades, (0.6 - decades) / 2, 0.05)
    more: Json = {"range": [round(low - pad, 4), round(high + pad, 4)]}
    if decades > 1.6:
        more |= {"dtick": math.ceil(decades / MOST_TICKS), "exponentformat": "power", "tickfont": {"size": 10}}
    else:
        more |= {"dtick": "D2" if decades > 0.5 else "D1", "tickformat": "~g"}
    return axis(title, type="log", **more)


def layout(height: int, **more: Any) -> Json:
    """Return the layout that every figure starts from."""
    base: Json = {
        "height": height,
        "margin": {"l": 58, "r": 44, "t": 36, "b": 50},
        "paper_bgcolor": "@surface",
        "plot_bgcolor": "@surface",
        "font": {"color": "@ink", "size": 12},
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "@raised",
            "bordercolor": "@line",
            "font": {"color": "@ink", "size": 12},
            "align": "left",
            "namelength": -1,
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "bgcolor": "@clear",
            "itemclick": False,
            "itemdoubleclick": False,
        },
    }
    return base | more


def level(y: float, label: str, *, dash: str = "dash", axis_name: str = "y") -> tuple[Json, Json]:
    """Return a shape and an annotation: a line across the plot at a height, and what it is, at its left end."""
    where = {"xref": "paper", "yref": axis_name}
    stroke = {"color": "@line", "width": 1, "dash": dash}
    line: Json = {"type": "line", "layer": "below", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": stroke}
    text: Json = {"text": label, "showarrow": False, "font": {"size": 11, "color": "@muted"}}
    place = {"x": 0, "y": y, "xanchor": "left", "yanchor": "bottom", "xshift": 4}
    return line | where, text | place | where


def evenly(n: int, most: int) -> list[int]:
    """Return at most `most` places of a list of `n`, evenly chosen, the first and the last among them.

    >>> evenly(3, 5), evenly(101, 3), evenly(0, 3)
    ([0, 1, 2], [0, 50, 100], [])
    """
    if n <= most:
        return list(range(n))
    return [round(k * (n - 1) / (most - 1)) for k in range(most)]


def marked_shares(shares: Sequence[float], axis_name: str = "y", domain: str = "paper") -> Json:
    """Return the layout keys that draw a dashed line at each share, with its label in the right margin."""
    lines, labels = [], []
    for share in shares:
        where = {"xref": domain, "yref": axis_name}
        stroke = {"color": "@line", "width": 1, "dash": "dash"}
        lines.append(
            {"type": "line", "layer": "below", "x0": 0, "x1": 1, "y0": share, "y1": share, "line": stroke} | where
        )
        label = {"x": 1, "y": share, "xanchor": "left", "yanchor": "middle", "xshift": 4}
        text = {"text": f"{share * 100:g} %", "showarrow": False, "font": {"size": 11, "color": "@muted"}}
        labels.append(where | label | text)
    return {"shapes": lines, "annotations": labels}
