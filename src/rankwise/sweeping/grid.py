"""The grid: its cells, their names, and the order in which they are run.

In: lists of ranks, rules, rates and seeds. Out: cells, each with the name of its folder; a name read back.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Final

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
    ranks: Iterable[int],
    scaling: Iterable[str],
    learning_rates: Iterable[float],
    seeds: Iterable[int],
) -> Grid:
    """Check the lists and put them in ascending order (rules as given).

    Raises:
        UsageError: a list is empty, has a value twice, or one that cannot be.
    """
    lists: dict[str, tuple[Any, ...]] = {
        "--ranks": _listed("--ranks", ranks, Integral),
        "--scaling": _listed("--scaling", scaling, str),
        "--learning-rates": _listed("--learning-rates", learning_rates, Real),
        "--seeds": _listed("--seeds", seeds, Integral),
    }
    for flag, values in lists.items():
        if not values:
            raise UsageError(f"{flag} is empty; give at least one value, or leave the flag out")
        twice = [value for value, times in Counter(values).items() if times > 1]
        if twice:
            raise UsageError(f"{flag} has {twice[0]} more than once; a cell is run once")
    for rank in lists["--ranks"]:
        if rank < 1:
            raise UsageError(f"--ranks must be 1 or more, got {rank}")
    for rule in lists["--scaling"]:
        if rule not in SCALINGS:
            raise UsageError(f"--scaling: there is no {rule!r}; there are: {', '.join(SCALINGS)}")
    for rate in lists["--learning-rates"]:
        if not (math.isfinite(rate) and rate > 0):
            raise UsageError(f"--learning-rates must be finite numbers above 0, got {rate}")
    for seed in lists["--seeds"]:
        if not 0 <= seed < 2**32:  # numpy's and transformers' range
            raise UsageError(f"--seeds must be from 0 to {2**32 - 1}, got {seed}")
    number = math.prod(len(values) for values in lists.values())
    if number > MOST:
        raise UsageError(
            f"this grid has {number:,} cells, more than {MOST:,}; run it in parts, each into its own folder"
        )
    return Grid(
        tuple(sorted(lists["--ranks"])),
        lists["--scaling"],
        tuple(sorted(lists["--learning-rates"])),
        tuple(sorted(lists["--seeds"])),
    )


def _listed(flag: str, values: Any, kind: Any) -> tuple[Any, ...]:
    """Return a list, a range or an array as plain numbers or words.

    Raises:
        UsageError: it is none, or holds something else.
    """
    plain: dict[Any, Any] = {Integral: (operator.index, "whole numbers"), Real: (float, "numbers"), str: (str, "words")}
    to, words = plain[kind]
    items = [values] if isinstance(values, str) or not hasattr(values, "__iter__") else list(values)
    if isinstance(values, str) or any(isinstance(item, bool) or not isinstance(item, kind) for item in items):
        raise UsageError(f"{flag} must be a list of {words}, got {values!r}")
    return tuple(to(item) for item in items)


def seeds_of(seeds: Any, first: int) -> tuple[int, ...]:
    """Return the seeds: a number of them, from the first on, or those listed.

    >>> seeds_of(3, 10), seeds_of([7, 1], 0)
    ((10, 11, 12), (7, 1))

    Raises:
        UsageError: there would be none.
    """
    if not isinstance(seeds, Integral) or isinstance(seeds, bool):
        return _listed("--seeds", seeds, Integral)
    number = operator.index(seeds)
    if not 1 <= number <= MOST:
        raise UsageError(f"--seeds must be 1 or more, got {number}")
    return tuple(range(first, first + number))
