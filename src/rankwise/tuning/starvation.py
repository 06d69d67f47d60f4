"""Was an adapter starved, or had it enough? What the gains of a counter-test come to.

In: what each way of going on gained, over orders of the batches. Out: a verdict with its reason, and findings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

from rankwise.records import Finding
from rankwise.records.probe import CounterMove, Interval, StarvedVerdict

STUDENT: Final = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Degrees of freedom -> 97.5 % quantile of Student's t; beyond, 2.262 is on the safe side."""

USUAL_SCALE: Final = 0.25
"""alpha / r of 16 at rank 64: scales in common recipes lie here or above."""

VERDICTS: Final[dict[str, StarvedVerdict]] = {
    "scale": "starved by scale",
    "rank": "starved by rank",
    "rate": "starved by rate",
}

CAVEATS: Final = (
    "The loss is that of rows the adapter was trained on. A lower one is not better answers to other questions, and "
    "what is forgotten on the way is not measured here.",
    "A few dozen steps tell what binds now. What binds after as many again may be something else.",
    "Under Adam a larger scale and a higher rate are nearly the same thing: where both gain, take the cheaper to "
    "change.",
)


def paired(gains: Sequence[float]) -> tuple[float | None, Interval | None]:
    """Return the mean of paired differences with its 95 % interval; None where one is no number.

    >>> paired([1.0, 1.0, 1.0])
    (1.0, (1.0, 1.0))
    """
    if not all(map(math.isfinite, gains)):
        return None, None
    mean = statistics.fmean(gains)
    half = STUDENT.get(len(gains) - 1, 2.262) * statistics.stdev(gains) / math.sqrt(len(gains))
    return mean, (mean - half, mean + half)


def judge(
    moves: Sequence[CounterMove], start_loss: float, scaling: float, *, least: float
) -> tuple[StarvedVerdict, str]:
    """Return the verdict and its reason: the move that gains most beyond noise, if any does.

    Args:
        moves: as tried, the first "as it is".
        start_loss: before any step.
        scaling: of the adapter, which decides between scale and rate where both gain alike.
        least: gain that counts, nats a token.
    """
    asis = moves[0]
    went = "" if asis.loss is None else f" As it is, the loss went from {start_loss:.4g} to {asis.loss:.4g}."
    if start_loss <= least:
        return "sufficient", f"A loss of {start_loss:.4g} leaves less to gain than the {least:.4f} that counts.{went}"
    sure = [m for m in moves[1:] if _lowers(m, start_loss, least)]
    if not sure:
        return _nothing_sure(moves, start_loss, least, went)
    best = max(sure, key=lambda m: m.gain or 0.0)
    tie = ""
    for other in [m for m in sure if m is not best]:
        gap, interval = paired([x - y for x, y in zip(_known(other), _known(best), strict=True)])
        alike = gap is not None and interval is not None and (interval[0] <= 0 or gap <= least)
        if not alike:
            continue
        if {best.move, other.move} != set(_STEP):
            tie += f" {other.text} gains as much, as far as these orders tell: take more --seeds to part them."
            continue
        low = scaling < USUAL_SCALE
        tie += (
            f" Scale and rate gain alike, within {max(gap or 0.0, least):.3g}: under Adam they are nearly one knob. A "
            f"scale of {scaling:.3g} is {'below' if low else 'not below'} {USUAL_SCALE:g}, so it is called "
            f"{'scale' if low else 'rate'}."
        )
        best = next(m for m in (best, other) if m.move == ("scale" if low else "rate"))
    more = "".join(f" {m.text} gains {m.gain:.4f}." for m in sure if m is not best)
    text = f"{best.text} lowers the loss by {best.gain:.4f} nats a token more than going on as it is.{tie}{more}{went}"
    return VERDICTS[best.move], text


_STEP: Final = ("scale", "rate")


def _nothing_sure(
    moves: Sequence[CounterMove], start_loss: float, least: float, went: str
) -> tuple[StarvedVerdict, str]:
    asis = moves[0]
    if asis.loss is None or asis.loss > start_loss + least:
        words = "diverges" if asis.loss is None else "makes the loss worse"
        return "undecided", (
            f"Going on as it is {words}, and nothing that was changed lowers it: the rate is too high to go on at. "
            f"Give a lower --learning-rate.{went}"
        )
    open_ones = [m.text for m in moves[1:] if not _gains_nothing(m, least)]
    if not open_ones:
        return "sufficient", f"No move gains {least:.4f} nats a token over going on as it is.{went}"
    differ = f"The orders of the batches differ by more than what may be gained ({', '.join(open_ones)})"
    return "undecided", f"{differ}: take more --seeds.{went}"


def _lowers(move: CounterMove, start_loss: float, least: float) -> bool:
    """Tell whether a move surely gains over going on as it is, and lies below the start."""
    if move.gain_interval is None or move.loss is None:
        return False
    return move.gain_interval[0] > least and move.loss < start_loss - least


def _gains_nothing(move: CounterMove, least: float) -> bool:
    """Tell whether a move gains nothing: not on average, or surely less than what counts. Divergence is no gain."""
    if move.gain is None or move.gain_interval is None:
        return True
    return move.gain <= 0 or move.gain_interval[1] <= least


def _known(move: CounterMove) -> list[float]:
    return [math.nan if loss is None else loss for loss in move.losses]


def findings_of(
    start_loss: float, base_loss: float, asis: float | None, *, least: float, gone_on: int, count: int
) -> tuple[Finding, ...]:
    """Name what makes a counter-test worth less.

    Args:
        start_loss: before any step, nats a token.
        base_loss: without the adapter.
        asis: after going on as it is; None where that diverged.
        least: gain that counts.
        gone_on: rows that the steps saw.
        count: rows of the data.
    """
    found = []
    if start_loss > base_loss:
        text = (
            f"With the adapter these rows cost {start_loss:.4g} nats a token, without it {base_loss:.4g}: it was "
            "trained on other data, or it is broken. Give the data that it was trained on."
        )
        found.append(Finding(code="worse-than-base", level="warning", text=text))
    if asis is None or asis > start_loss + least:
        after = "diverged" if asis is None else f"went from {start_loss:.4g} to {asis:.4g}"
        text = (
            f"Going on as it is, the loss {after}: the gains are gains over that. The adapter was trained at a lower "
            "rate than this, or to where its schedule ended near zero; give --learning-rate to go on at another."
        )
        found.append(Finding(code="going-on-hurts", level="warning", text=text))
    if gone_on < count:
        text = (
            f"{gone_on:,} of {count:,} rows were gone on with, and judged: as many as the steps take. Room that other "
            "rows hold can be taken for these, so that a lack of rank may be missed; give more --steps."
        )
        found.append(Finding(code="sampled-rows", level="info", text=text))
    return tuple(found)
