"""The grid: its cells, their names, and the order in which they are run.

In: lists of ranks, rules, rates and seeds. Out: cells, each with the name of its folder; a name read back.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rankwise.errors import UsageError
from rankwise.scaling import SCALINGS

NAME: Final = re.compile(r"rank=(\d+),scaling=([a-z]+),lr=([^,]+),seed=(\d+)")

DEFAULT_RANKS: Final = (4, 16, 64)
DEFAULT_SCALING: Final = ("lora", "rslora")
DEFAULT_SEEDS: Final = 3

MOST: Final = 100_000
"""Cells past which a grid is taken for a slip of the keyboard."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What sets one run apart from the others.

    Attributes:
        seed: of A and of the order of the data. First, so that all settings have one seed before any has two.
        rank: r of every module.
        scaling: rule.
        learning_rate: highest.
    """

    seed: int
    rank: int
    scaling: str
    learning_rate: float

    @property
    def name(self) -> str:
        """The name of the cell's folder.

        >>> Cell(0, 64, "rslora", 1e-3).name
        'rank=64,scaling=rslora,lr=0.001,seed=0'
        """
        short = f"{self.learning_rate:g}"  # as people write it, where that is the same number
        rate = short if float(short) == self.learning_rate else repr(self.learning_rate)
        return f"rank={self.rank},scaling={self.scaling},lr={rate},seed={self.seed}"


@dataclass(frozen=True, slots=True)
class Grid:
    """Lists that are crossed."""

    ranks: tuple[int, ...]
    scaling: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order in which they are run."""
        return tuple(
            Cell(seed, rank, rule, rate)
            for seed in self.seeds
            for rank in self.ranks
            for rule in self.scaling
            for rate in self.learning_rates
        )


def cell_of(name: str) -> Cell | None:
    """Return the cell that a folder's name stands for, or None where it is no such name.

    >>> cell_of("rank=64,scaling=rslora,lr=0.001,seed=0")
    Cell(seed=0, rank=64, scaling='rslora', learning_rate=0.001)
    >>> cell_of("rank=064,scaling=rslora,lr=1e-3,seed=0") is None  # one cell has one name
    True
    """
    found = NAME.fullmatch(name)
    if found is None:
        return None
    try:
        cell = Cell(int(found[4]), int(found[1]), found[2], float(found[3]))
    except ValueError:
        return None
    return cell if math.isfinite(cell.learning_rate) and cell.name == name else None


def make_grid(
    ranks: Sequence[int],
    scaling: Sequence[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
) -> Grid:
    """Check the lists and put them in ascending order (rules as given).

    Raises:
        UsageError: a list is empty, has a value twice, or one that cannot be.
    """
    lists: dict[str, Sequence[int | float | str]] = {
        "--ranks": ranks,
        "--scaling": scaling,
        "--learning-rates": learning_rates,
        "--seeds": seeds,
    }
    for flag, values in lists.items():
        if not values:
            raise UsageError(f"{flag} is empty; give at least one value, or leave the flag out")
        twice = [value for value, times in Counter(values).items() if times > 1]
        if twice:
            raise UsageError(f"{flag} has {twice[0]} more than once; a cell is run once")
    for rank in ranks:
        if rank < 1:
            raise UsageError(f"--ranks must be 1 or more, got {rank}")
    for rule in scaling:
        if rule not in SCALINGS:
            raise UsageError(f"--scaling: there is no {rule!r}; there are: {', '.join(SCALINGS)}")
    for rate in learning_rates:
        if not (math.isfinite(rate) and rate > 0):
            raise UsageError(f"--learning-rates must be finite numbers above 0, got {rate}")
    for seed in seeds:
        if not 0 <= seed < 2**32:  # numpy's and transformers' range
            raise UsageError(f"--seeds must be from 0 to {2**32 - 1}, got {seed}")
    number = math.prod(len(values) for values in lists.values())
    if number > MOST:
        raise UsageError(
            f"this grid has {number:,} cells, more than {MOST:,}; run it in parts, each into its own folder"
        )
    return Grid(tuple(sorted(ranks)), tuple(scaling), tuple(sorted(map(float, learning_rates))), tuple(sorted(seeds)))


def seeds_of(seeds: int | Sequence[int], first: int) -> tuple[int, ...]:
    """Return the seeds: a number of them, from the first on, or those listed.

    >>> seeds_of(3, 10), seeds_of([7, 1], 0)
    ((10, 11, 12), (7, 1))

    Raises:
        UsageError: there would be none.
    """
    if not isinstance(seeds, int):
        return tuple(seeds)
    if not 1 <= seeds <= MOST:
        raise UsageError(f"--seeds must be 1 or more, got {seeds}")
    return tuple(range(first, first + seeds))
