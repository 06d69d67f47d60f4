"""How runs look in every figure that compares them: a hue a rule, a marker a rank, and where a label has room.

In: rules, ranks, runs and points. Out: colours, symbols, names and places in the words of plotly.js. A hue says which
rule, never which is better; a run that did not end well is drawn as a cross and joined to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from rankwise.records import DemoRun
from rankwise.report import words
from rankwise.report.drawing import Json, known, plain

RULES: Final[dict[str, tuple[str, str]]] = {
    "lora": ("alpha / r", "@first"),
    "rslora": ("alpha / √r", "@second"),
    "unscaled": ("alpha", "@third"),
}
"""Rule -> how it is written, and its hue."""

Point = tuple[float, float]

SYMBOLS: Final = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "pentagon")
"""Markers of the smallest rank of a record, the next one, and so on; past the last they begin again."""

BROKEN: Final = "x"
"""Marker of a run that is not done."""


def rule_words(rule: str) -> str:
    """Write a rule as its formula.

    >>> rule_words("lora"), rule_words("of tomorrow")
    ('alpha / r', 'of tomorrow')
    """
    return RULES.get(rule, (rule, ""))[0]


def hue(rule: str) -> str:
    """Return the colour of a rule."""
    return RULES.get(rule, ("", "@thin"))[1]


def symbols(ranks: Iterable[int]) -> dict[int, str]:
    """Return the marker of every rank.

    >>> symbols([64, 8, 64])
    {8: 'circle', 64: 'diamond'}
    """
    return {rank: SYMBOLS[place % len(SYMBOLS)] for place, rank in enumerate(sorted(set(ranks)))}


def facts_runs(runs: Sequence[DemoRun]) -> list[DemoRun]:
    """Return the runs on the facts, by rule as they come and by rank, those at the best rate last."""
    rules = list(dict.fromkeys(run.scaling for run in runs))
    kept = [run for run in runs if run.role != "style"]
    return sorted(kept, key=lambda run: (run.role == "best rate", rules.index(run.scaling), run.rank))


def run_words(run: DemoRun, rate: str = " at {}") -> str:
    """Return a run in a few words: rank, rule, and the learning rate as `rate` has it.

    Names of runs are free text; this says the same of every run.
    """
    return f"rank {run.rank}, {rule_words(run.scaling)}{rate.format(words.number(run.learning_rate))}"


def bits_words(value: float | None) -> str:
    """Write bits to one decimal; what rounds to zero has no sign.

    >>> bits_words(12.0), bits_words(-0.04), bits_words(None)
    ('12.0', '0.0', '–')
    """
    value = known(value)
    return words.UNKNOWN if value is None else f"{round(value, 1) + 0.0:,.1f}"


def status_words(status: str) -> str:
    """Write a status; anything but "done" carries the cross it has in the figures.

    >>> status_words("done"), status_words("diverged")
    ('done', '× diverged')
    """
    return status if status == "done" else f"× {status}"


def marks_of(runs: Iterable[DemoRun], missing: Iterable[DemoRun]) -> tuple[str, ...]:
    """Return what a figure has to say of runs that are not done, and of those that it cannot draw.

    Args:
        runs: all that the figure is of.
        missing: those among them without the numbers to draw.
    """
    without = list(missing)
    crossed = [f"{run_words(run)} ({run.status})" for run in runs if run.status != "done" and run not in without]
    lost = [run_words(run) + (f" ({run.status})" if run.status != "done" else "") for run in without]
    sentences = []
    if crossed:
        sentences.append(f"Did not finish, drawn as a cross: {'; '.join(crossed)}.")
    if lost:
        sentences.append(f"Not drawn, because the figures are unknown: {'; '.join(lost)}.")
    return tuple(sentences)


def marker(run: DemoRun, shapes: dict[int, str], size: int = 11) -> Json:
    """Return the marker of one run."""
    symbol = shapes[run.rank] if run.status == "done" else BROKEN
    return {
        "size": size,
        "color": hue(run.scaling),
        "symbol": symbol,
        "line": {"width": 1.6, "color": hue(run.scaling)},
    }


class _Box(NamedTuple):
    left: float
    low: float
    right: float
    high: float

    def overlap(self, other: _Box) -> float:
        """Return the area that two boxes share, in square px."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        tall = min(self.high, other.high) - max(self.low, other.low)
        return wide * tall if wide > 0 and tall > 0 else 0.0

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.high - self.low)


PLACES: Final[dict[str, tuple[float, float]]] = {
    "top center": (-0.5, 1.0),
    "middle right": (0.0, 0.0),
    "middle left": (-1.0, 0.0),
    "bottom center": (-0.5, -1.0),
    "top right": (0.0, 1.0),
    "top left": (-1.0, 1.0),
    "bottom right": (0.0, -1.0),
    "bottom left": (-1.0, -1.0),
}
"""`textposition` of plotly.js -> left edge of the text in its widths, and side above (1) or below (-1) the point."""

NARROW: Final = (265.0, 300.0)
"""Width and height in px of a plot on a phone: labels that have room there have room everywhere."""


def _box(place: str, x: float, y: float, label: str) -> _Box:
    lines = label.split("<br>")
    wide, tall = 6.2 * max(map(len, lines)), 15.0 * len(lines)
    across, side = PLACES[place]
    left = x + across * wide + (14 if across == 0.0 else -14 if across == -1.0 else 0)
    middle = y + side * (8 + tall / 2)
    return _Box(left, middle - tall / 2, left + wide, middle + tall / 2)


def label_places(
    points: Sequence[Point],
    labels: Sequence[str],
    *,
    lines: Sequence[tuple[Point, Point]] = (),
) -> list[str]:
    """Return where each label goes: on the first free side of its point, or the one where it covers least.

    Args:
        points: where the points lie in the plot, as shares of its width and height.
        labels: what stands at them; `<br>` begins a new line.
        lines: to keep clear of, by their two ends in the same shares.

    >>> label_places([(0.5, 0.5), (0.5, 0.53)], ["below", "above"])
    ['middle right', 'top center']
    """
    width, height = NARROW
    at = [(x * width, y * height) for x, y in points]
    frame = _Box(0, 0, width, height)
    taken = [_Box(x - 7, y - 7, x + 7, y + 7) for x, y in at]
    steps = [(a, b, 40 if a != b else 0) for a, b in lines]  # a mark is a line without a length
    drops = [
        ((a[0] + (b[0] - a[0]) * k / (n or 1)) * width, (a[1] + (b[1] - a[1]) * k / (n or 1)) * height)
        for a, b, n in steps
        for k in range(n + 1)
    ]
    inked = [_Box(x - 3, y - 3, x + 3, y + 3) for x, y in drops]
    chosen: list[str] = []
    for own, ((x, y), label) in enumerate(zip(at, labels, strict=True)):
        others = [box for place, box in enumerate(taken) if place != own] + inked
        boxes = {place: _box(place, x, y, label) for place in PLACES}

        def covered(place: str, boxes: dict[str, _Box] = boxes, others: list[_Box] = others) -> float:
            box = boxes[place]
            return sum(box.overlap(other) for other in others) + 2 * (box.area - box.overlap(frame))

        best = min(PLACES, key=covered)
        chosen.append(best)
        taken.append(boxes[best])
    return chosen


def spaced(label: str, place: str) -> str:
    """Return a label with a blank on the side of its point, where plotly.js would let them touch.

    >>> spaced("9.0", "middle left").endswith("\xa0"), spaced("9.0", "top center")
    (True, '9.0')
    """
    if place.endswith("left"):
        return "<br>".join(f"{line}\u00a0\u00a0" for line in label.split("<br>"))
    return "<br>".join(f"\u00a0\u00a0{line}" for line in label.split("<br>")) if place.endswith("right") else label


def fractions(values: Sequence[float], low: float, high: float) -> list[float]:
    """Return where values lie between the ends of an axis."""
    return [(v - low) / ((high - low) or 1.0) for v in values]


def safe(label: str) -> str:
    """Escape a label of several lines for a plot; its line breaks stay."""
    return "<br>".join(plain(line) for line in label.split("\n"))
