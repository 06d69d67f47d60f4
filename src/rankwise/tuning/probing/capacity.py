"""Bits a parameter, by how often a fact is seen; and the rank that holds so many bits.

In: bits, planned exposures, shapes. Out: an interval of densities with its sources, and the ranks that follow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rankwise.records.probe import ProbeCapacity


@dataclass(frozen=True, slots=True)
class Density:
    """Bits a parameter after so many exposures of every fact.

    Attributes:
        exposures: times that each fact was seen.
        bits_per_param: bits recalled over parameters trained.
        source: paper, or script that measured it.
    """

    exposures: float
    bits_per_param: float
    source: str


OWN: Final = (
    Density(9, 0.0153, "lab/probe_calibration.py"),
    Density(21, 0.115, "lab/probe_calibration.py"),
)
"""The most that LoRA of rank 1 on all linear layers of `rankwise:tiny` reached there: 40 people at 9, 160 at
21 (40 people reached 0.048 there: steps bind, not room). Later exposures were not measured."""

PUBLISHED: Final = (
    Density(100, 1.0, "arXiv:2404.05405, whole networks"),
    Density(1000, 2.0, "arXiv:2404.05405, whole networks"),
)
"""Networks trained from scratch: at least 1 bit after 100 exposures, 2 after 1000."""

LORA_MOST: Final = (1.7, 2.8)
"""Bits a trainable LoRA parameter where training went on until nothing more went in: arXiv:2607.21351."""


def published(exposures: float) -> float:
    """Return the density of `PUBLISHED`: in proportion below the first point, a power law between, flat above.

    >>> published(50), round(published(1000), 3), published(1e6)
    (0.5, 2.0, 2.0)
    """
    first, last = PUBLISHED
    if exposures <= first.exposures:
        return first.bits_per_param * exposures / first.exposures
    slope = math.log(last.bits_per_param / first.bits_per_param) / math.log(last.exposures / first.exposures)
    return first.bits_per_param * math.exp(slope * math.log(min(exposures, last.exposures) / first.exposures))


def measured(exposures: float, table: Sequence[Density] = OWN) -> float:
    """Return the density of our own calibration: a power law between its points, in proportion outside."""
    if exposures <= table[0].exposures:
        return table[0].bits_per_param * exposures / table[0].exposures
    for one, two in itertools.pairwise(table):
        if exposures <= two.exposures:
            slope = math.log(two.bits_per_param / one.bits_per_param) / math.log(two.exposures / one.exposures)
            return one.bits_per_param * math.exp(slope * math.log(exposures / one.exposures))
    return table[-1].bits_per_param  # what was not measured is not promised


def densities(exposures: float) -> tuple[float, float, str]:
    """Return the lowest and the highest density to expect, and where they come from."""
    own, law = measured(exposures), published(exposures)
    high = LORA_MOST[1] if exposures >= PUBLISHED[-1].exposures else law
    low, high = min(own, high), max(own, high)
    if exposures >= PUBLISHED[-1].exposures:
        low = max(low, LORA_MOST[0])
        words = "1.7 to 2.8 bits a LoRA parameter trained to the end (arXiv:2607.21351)"
    else:
        point = "" if exposures >= PUBLISHED[0].exposures else ", taken in proportion below"
        last = OWN[-1].exposures
        run = f"{last:g} exposures, the most that were run" if exposures > last else f"{exposures:.3g} exposures"
        words = (
            f"lowest: LoRA on rankwise:tiny, {own:.2g} at {run} (lab/probe_calibration.py); "
            f"highest: whole networks, {law:.2g} (arXiv:2404.05405: 1 at 100 exposures, 2 at 1000{point})"
        )
    return low, high, words


def capacity_of(bits: float, exposures: float, shapes: Sequence[tuple[int, int]]) -> ProbeCapacity:
    """Return what could hold the bits.

    Args:
        bits: to learn, in all rows.
        exposures: times that each fact will be seen.
        shapes: (out_features, in_features) of the target modules.
    """
    low, high, source = densities(exposures)
    middle = math.sqrt(low * high)
    each = sum(map(sum, shapes))

    def rank(density: float) -> int:
        return math.ceil(max(0.0, bits) / density / each)

    return ProbeCapacity(
        bits_per_param=middle,
        bits_per_param_interval=(low, high),
        source=source,
        exposures=exposures,
        params_per_rank=each,
        params=max(0.0, bits) / middle,
        min_rank=rank(middle),
        rank_interval=(rank(high), rank(low)),
    )
