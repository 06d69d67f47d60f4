"""What the figures of a sweep share: the words of a score, axes over ranks and rates, means with intervals.

In: points and best rates of a sweep. Out: axes, traces and words. Nothing is worked out here that the
record does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from rankwise.records import Estimate, Score, SweepRecord
from rankwise.report import words
from rankwise.report.drawing import MOST_TICKS, Json, axis, drawn, known, share_axis, value_axis


class Quantity(NamedTuple):
    """One thing that a sweep measures: its field in a point, its name, and its unit."""

    field: str
    name: str
    unit: str


SCORES: Final[dict[Score, Quantity]] = {
    "bits": Quantity("score", "recalled bits", "bits"),
    "exact_share": Quantity("score", "exact answers", "share of the facts"),
    "loss": Quantity("score", "last training loss", "nats a token"),
}
"""What settings are compared by -> how it is called."""

OTHERS: Final = (
    Quantity("bits_per_param", "bits a parameter", "bits a trainable parameter"),
    Quantity("exact_share", "exact answers", "share of the facts"),
    Quantity("forgetting", "forgetting", "nats a token"),
    Quantity("loss", "last training loss", "nats a token"),
)
"""What is measured beside the score."""

MOST_RATE_LABELS: Final = 6
"""Labels that a rate axis 300 px wide has room for."""


def estimate_cells(found: Estimate) -> tuple[str, str, str, str]:
    """Return mean, ends of the interval and number of seeds, a cell each.

    >>> estimate_cells(Estimate(mean=2.0, ci=(1.0, 3.0), n=3)), estimate_cells(Estimate(mean=0.5, ci=None, n=1))
    (('2', '1', '3', '3'), ('0.5', '–', '–', '1'))
    """
    low, high = found.ci if found.ci is not None else (None, None)
    return words.number(found.mean, 4), words.number(low, 4), words.number(high, 4), str(found.n)


ESTIMATE_HEAD: Final = ("mean", "95 % low", "95 % high", "seeds")
"""Heads of the columns of `estimate_cells`."""


def estimate_words(found: Estimate, by: Quantity) -> str:
    """Write a mean with its interval; a share in per cent."""

    def one(value: float | None) -> str:
        return words.share(value) if by.unit.startswith("share") else words.number(value)

    if known(found.mean) is None:
        return "unknown"
    if found.ci is None:
        return f"{one(found.mean)} (one seed, no interval)" if found.n == 1 else f"{one(found.mean)} (no interval)"
    return f"{one(found.mean)} ({one(found.ci[0])} to {one(found.ci[1])}, {found.n} seeds)"


def half_width(found: Estimate) -> float | int | None:
    """Return half of an interval, which is symmetric about its mean; None where there is none."""
    return None if found.ci is None else drawn((found.ci[1] - found.ci[0]) / 2)


def bars(found: Sequence[Estimate], color: str) -> Json:
    """Return the error bars of means; a mean without an interval gets none."""
    halves = [half_width(e) for e in found]
    return {"type": "data", "array": [h or 0 for h in halves], "color": color, "thickness": 1.4, "width": 5}


def spaced_labels(values: Sequence[float], texts: Sequence[str], most: int) -> list[str]:
    """Return the label of every tick of a log axis, empty where the one before it leaves no room.

    >>> spaced_labels([1, 10, 11, 100], ["1", "10", "11", "100"], 4)
    ['1', '10', '', '100']
    """
    room = (math.log10(values[-1]) - math.log10(values[0])) / most
    labels, last = [], -math.inf
    for value, text in zip(values, texts, strict=True):
        fits = math.log10(value) - last >= room * 0.98
        labels.append(text if fits else "")
        last = math.log10(value) if fits else last
    return labels


def ranks_axis(ranks: Sequence[int], title: str = "rank (log scale)") -> Json:
    """Return the axis over the ranks of a sweep: a tick at every rank, a label where there is room."""
    low, high = math.log10(ranks[0]), math.log10(ranks[-1])
    pad = 0.06 * (high - low) or 0.2
    labels = spaced_labels(ranks, [str(r) for r in ranks], MOST_TICKS - 1)
    ticks = {"tickvals": list(ranks), "ticktext": labels, "minor": {"ticks": ""}}
    return axis(title, type="log", range=[round(low - pad, 4), round(high + pad, 4)], tickangle=0, **ticks)


APART: Final = 0.016
"""Share of a rank axis between the marks that two rules have at one rank: half a mark on a phone."""


def shifts(rules: Sequence[str], ranks: Sequence[int]) -> dict[str, float]:
    """Return, for every rule, the factor by which its marks stand off their rank, so that none hides another.

    >>> {rule: round(factor, 3) for rule, factor in shifts(["lora", "rslora"], [4, 64]).items()}
    {'lora': 0.978, 'rslora': 1.022}
    >>> shifts(["lora"], [4, 64])
    {'lora': 1.0}
    """
    wide = 1.0 if ranks[0] == ranks[-1] else math.log10(ranks[-1] / ranks[0])
    middle = (len(rules) - 1) / 2
    return {rule: float(10 ** (APART * wide * (place - middle))) for place, rule in enumerate(rules)}


def rate_words(rate: float) -> str:
    """Write a learning rate as short as it can be.

    >>> rate_words(0.0003), rate_words(0.01), rate_words(0.00125)
    ('3e-4', '0.01', '0.00125')
    """
    mantissa, _, exponent = f"{rate:e}".partition("e")
    short = f"{float(mantissa):g}e{int(exponent)}"
    return min(f"{rate:g}".replace("e-0", "e-"), short, key=len)


def rate_label(rate: float) -> str:
    """Write a learning rate to two digits, for a plot; tables have it in full.

    >>> rate_label(0.000215443469)
    '2.2e-4'
    """
    return rate_words(float(f"{rate:.2g}"))


def rates_axis(rates: Sequence[float], title: str = "learning rate (log scale)") -> Json:
    """Return the axis over the rates of a sweep: a tick at every rate, a label where there is room."""
    low, high = math.log10(rates[0]), math.log10(rates[-1])
    pad = 0.06 * (high - low) or 0.2
    labels = spaced_labels(rates, [rate_label(rate) for rate in rates], MOST_RATE_LABELS)
    ticks = {"tickvals": list(rates), "ticktext": labels, "minor": {"ticks": ""}}
    return axis(title, type="log", range=[round(low - pad, 4), round(high + pad, 4)], tickangle=0, **ticks)


def named(quantity: Quantity, *, capital: bool = True) -> str:
    """Write a quantity with its unit, where its name does not say it.

    >>> named(SCORES["bits"]), named(SCORES["loss"], capital=False)
    ('Recalled bits', 'last training loss (nats a token)')
    """
    name = quantity.name.capitalize() if capital else quantity.name
    return name if quantity.name.endswith(quantity.unit) else f"{name} ({quantity.unit})"


def quantity_axis(quantity: Quantity, found: Sequence[Estimate], more: Sequence[float] = ()) -> Json:
    """Return the axis of a quantity, zero and the ends of all intervals in it."""
    ends = [v for e in found for v in (known(e.mean), *(e.ci or ())) if v is not None] or [0.0, 1.0]
    if quantity.unit.startswith("share"):
        highest = max([*ends, *more, 0.0])
        if highest > 0.5:
            return share_axis(quantity.name)
        return value_axis(quantity.name, [*ends, *more], tickformat=".0%" if highest > 0.05 else ".1%")
    unit = "" if quantity.name.endswith(quantity.unit) or quantity.name == "bits a parameter" else f", {quantity.unit}"
    return value_axis(f"{quantity.name}{unit}", [*ends, *more])


ROW: Final = 19
"""Height of a row of a legend in px."""


def legends(height: int, ranks: int, marks: int) -> tuple[Json, int]:
    """Return two legends below a plot, ranks over marks, and the height in px that they take on a phone.

    One legend would set every entry as wide as the longest, and ranks below each other.

    Args:
        height: of the figure without them.
        ranks: number of entries of traces whose `legend` is "legend".
        marks: number of those of "legend2".
    """
    upper, lower = ROW * -(-ranks // 2), ROW * marks
    room = upper + lower + 14
    common = {"orientation": "h", "x": 0, "xanchor": "left", "bgcolor": "@clear", "yref": "container"}
    still = {"itemclick": False, "itemdoubleclick": False, "yanchor": "bottom"}
    first = common | still | {"y": round((lower + 8) / (height + room), 4)}
    return {"legend": first, "legend2": common | still | {"y": 0}}, room


FACTORS: Final = {
    "lora": "alpha / r is `lora`",
    "rslora": "alpha / √r is `rslora`",
    "unscaled": "alpha is `unscaled`",
}
"""Rule -> the formula that figures show, and the name that commands take."""


def rules_words(record: SweepRecord) -> str:
    """Return the sentence that says what a rule is, and why its marks are not quite at their rank."""
    told = "; ".join(FACTORS[rule] for rule in record.config.scaling if rule in FACTORS)
    apart = " Where rules share a rank, their marks stand a little apart." if len(record.config.scaling) > 1 else ""
    return f"A rule is the factor on B\u00a0A{': ' if told else ''}{told}.{apart}"


def score_of(record: SweepRecord) -> Quantity:
    """Return what the settings of a sweep are compared by."""
    return SCORES[record.config.score]


def ceiling(record: SweepRecord) -> float | None:
    """Return the bits that the data hold, where that is the score and all runs agree on it."""
    if record.config.score != "bits":
        return None
    held = {round(bits, 6) for cell in record.cells if (bits := known(cell.bits_possible)) is not None}
    return held.pop() if len(held) == 1 else None
