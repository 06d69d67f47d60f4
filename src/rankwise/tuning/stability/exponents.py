"""The exponent of a power law in the rank, with its interval over the seeds.

In: logarithms of a statistic by seed and rank. Out: slopes, their mean, and a 95 % t-interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Fit:
    """A mean over seeds.

    Attributes:
        mean: or None where there is no seed.
        interval: 95 %, or None of fewer than two seeds.
        seeds: number of them.
    """

    mean: float | None
    interval: tuple[float, float] | None
    seeds: int


NOTHING: Final = Fit(None, None, 0)


def slopes(ranks: Sequence[int], logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the least-squares slope of each row against the logarithm of the rank.

    Args:
        ranks: two different ones at least.
        logs: (seeds, ranks).

    >>> slopes([4, 16], np.log([[8.0, 2.0], [1.0, 4.0]])).round(9).tolist()
    [-1.0, 1.0]
    """
    x = np.log(np.asarray(ranks, dtype=float))
    x -= x.mean()
    found: NDArray[np.float64] = logs @ x / (x @ x)
    return found


def mean_of(values: NDArray[np.float64]) -> Fit:
    """Return the mean of one number a seed, and its t-interval.

    >>> fit = mean_of(np.array([1.0, 2.0, 3.0]))
    >>> fit.mean, [round(end, 3) for end in fit.interval]  # 2 -+ 4.303 / sqrt(3)
    (2.0, [-0.484, 4.484])
    """
    n = len(values)
    if n == 0:
        return NOTHING
    mean = float(values.mean())
    if n == 1:
        return Fit(mean, None, 1)
    from scipy.special import stdtrit  # scipy.stats would take a second to import

    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(values.std(ddof=1)) / math.sqrt(n)
    return Fit(mean, (mean - half, mean + half), n)


def exponent(ranks: Sequence[int], logs: NDArray[np.float64]) -> Fit:
    """Return the exponent of a statistic in the rank."""
    return mean_of(slopes(ranks, logs)) if len(logs) else NOTHING
