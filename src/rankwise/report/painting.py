"""A figure outside of a page: with colours of its own, as CSV, in the frame of a notebook.

In: a figure. Out: JSON for plotly.py, text.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from functools import cache
from html import escape, unescape
from importlib import resources
from typing import Any, Final

from rankwise.report.drawing import Figure, Json

BLOCKS: Final = {"light": ":root {", "dark": ':root[data-theme="dark"] {'}
"""Theme -> where its colours stand in style.css."""

TOKEN: Final = re.compile(r"--([a-z]+): ([^;]+);")
WHOLE: Final = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
SHARE: Final = re.compile(r"([-+]?)(\d+)(?:\.(\d+))? %")
NUMBER: Final = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


@cache
def colours(theme: str) -> dict[str, str]:
    """Return name -> colour of a theme, out of the style that every page has.

    >>> colours("light")["first"], colours("dark")["first"]
    ('#0065a8', '#6bb8ee')
    """
    style = resources.files("rankwise.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    start = style.index(BLOCKS[theme])
    return dict(TOKEN.findall(style[start : style.index("}", start)]))


def painted(value: Any, theme: str, key: str = "") -> Any:
    """Return JSON in which `@name` under a key that ends in "color" is a colour of the theme."""
    if isinstance(value, str):
        return colours(theme)[value[1:]] if value.startswith("@") and key.endswith("color") else value
    if isinstance(value, list | tuple):
        return [painted(item, theme, key) for item in value]
    if isinstance(value, dict):
        return {k: painted(item, theme, k) for k, item in value.items()}
    return value


def _plain(text: str) -> str:
    """Return a cell of a table as programs read it; tables.js has the same rule.

    >>> _plain("–"), _plain("1,234"), _plain("−0.5"), _plain("=cmd()"), _plain("87.6 %"), _plain("100 %")
    ('', '1234', '-0.5', "'=cmd()", '0.876', '1')
    """
    if text == "–":
        return ""
    number = text.replace("−", "-")
    if WHOLE.fullmatch(number):
        return number.replace(",", "")
    if NUMBER.fullmatch(number):
        return number
    if share := SHARE.fullmatch(number):  # the point two places to the left, without what a division would add
        sign, whole, rest = share[1], share[2].zfill(3), share[3] or ""
        return sign + f"{whole[:-2]}.{whole[-2:]}{rest}".rstrip("0").rstrip(".")
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text  # a spreadsheet would run it


def _written(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    for row in rows:
        writer.writerow([_plain("" if cell is None else str(cell)) for cell in row])
    return text.getvalue()


def shown(figure: Figure) -> Json:
    """Return data and layout with what its selector shows first, as the script in the page merges them."""
    if not figure.choices:
        return {"data": list(figure.data), "layout": figure.layout}
    choice = figure.choices[figure.chosen]
    changed = [*choice.data, *[{}] * (len(figure.data) - len(choice.data))]
    merged = [trace | keys for trace, keys in zip(figure.data, changed, strict=True)]
    return {"data": merged, "layout": figure.layout | choice.layout}


def _drawn(figure: Figure) -> list[list[Any]]:
    rows: list[list[Any]] = [["line", "x", "y", "value"]]
    for trace in shown(figure)["data"]:
        name = unescape(trace.get("meta") or trace.get("name") or "")
        if "z" in trace:
            for j, line in enumerate(trace["z"]):
                rows += [[name, trace["x"][i], trace["y"][j], z] for i, z in enumerate(line)]
        else:
            points = zip(trace["x"], trace.get("y", ()), strict=False)  # an entry of the legend alone has no point
            rows += [[name, x, y, None] for x, y in points if x is not None]
    return rows


def csv_of(figure: Figure) -> str:
    """Return the table of a figure as CSV, or what is drawn where it has none."""
    table = figure.fallback
    return _written(_drawn(figure) if table is None else [table.head, *table.rows])


def framed(figure: Figure) -> str:
    """Return the page of a figure inside a frame, as high as the figure and its words."""
    height = int(figure.layout["height"]) + 480
    page = escape(figure.to_html(), quote=True)
    look = f"width:100%;height:{height}px;border:0"
    return f'<iframe srcdoc="{page}" style="{look}" title="{escape(figure.title)}"></iframe>'
