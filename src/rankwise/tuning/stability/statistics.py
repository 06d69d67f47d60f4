"""Rows of single modules -> figures of groups, a number a seed and rank.

In: rows. Out: for each statistic the mean of its logarithm over the modules of a group, with what had to be left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rankwise.tuning.groups import group_modules

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rankwise.records import StabilityRow
    from rankwise.tuning.stability.settings import Cell, Grid

Kind = tuple[str, str, str]

STATISTICS: Final[dict[str, str]] = {
    "rms": "branch_rms",
    "relative": "relative_rms",
    "update": "update_rms",
    "grad_A": "grad_norm_A",
    "grad_B": "grad_norm_B",
    "loss": "loss",
}
"""Short name -> field of a row."""


@dataclass(frozen=True, slots=True)
class Logs:
    """Mean logarithms of one statistic over the modules of a group.

    Attributes:
        values: (seeds, ranks), natural logarithms; empty where nothing is left.
        modules: number of modules that the means are over.
    """

    values: NDArray[np.float64]
    modules: int


class Measured:
    """All rows of a check, by what they are of."""

    def __init__(self, grid: Grid, rows: Iterable[StabilityRow], diverged: Mapping[Cell, int]) -> None:
        rows = tuple(rows)
        self.grid = grid
        self.modules = tuple(dict.fromkeys(row.module for row in rows))
        self.groups = {"all": self.modules, **group_modules(self.modules)}
        self._diverged = diverged
        self._still = {row.module for row in rows if row.branch_rms == 0}
        self._still -= {row.module for row in rows if row.branch_rms}
        places = {module: i for i, module in enumerate(self.modules)}
        seeds, ranks = ({v: i for i, v in enumerate(of)} for of in (grid.seeds, grid.ranks))
        shape = (len(STATISTICS), len(seeds), len(ranks), len(self.modules))
        self._logs: dict[tuple[Kind, int], NDArray[np.float64]] = {}
        fields = tuple(STATISTICS.values())
        for row in rows:
            key = ((row.rule, row.optimizer, row.init), row.step)
            if key not in self._logs:
                self._logs[key] = np.full(shape, np.nan)
            for i, name in enumerate(fields):
                value = getattr(row, name)
                if value is not None and value > 0:
                    self._logs[key][i, seeds[row.seed], ranks[row.rank], places[row.module]] = np.log(value)

    def diverged(self, kind: Kind, step: int) -> int:
        """Return how many runs had diverged by a step."""
        return sum(cell.kind == kind and seen <= step for cell, seen in self._diverged.items())

    def logs(self, kind: Kind, step: int, group: str, statistic: str) -> Logs:
        """Return the mean logarithms of a statistic.

        Seeds of which a run diverged are left out whole: without it the ranks of that seed would not be those of the
        others. So are modules in which the statistic is zero or unknown in any run that is left.
        """
        known = self._logs.get((kind, step))
        empty = Logs(np.empty((0, len(self.grid.ranks))), 0)
        if known is None:
            return empty
        lost = {cell.seed for cell, seen in self._diverged.items() if cell.kind == kind and seen <= step}
        seeds = [i for i, seed in enumerate(self.grid.seeds) if seed not in lost]
        members = set(self.groups[group])
        places = [i for i, module in enumerate(self.modules) if module in members]
        values = known[tuple(STATISTICS).index(statistic)][np.ix_(seeds, range(len(self.grid.ranks)), places)]
        there = np.isfinite(values).all(axis=(0, 1))
        if not seeds or not there.any():
            return empty
        return Logs(values[:, :, there].mean(axis=2), int(there.sum()))

    def silent(self) -> tuple[str, ...]:
        """Return the modules whose branch stayed at zero in every run: no gradient reaches them."""
        return tuple(module for module in self.modules if module in self._still)


def by_rank(logs: Logs, ranks: Sequence[int]) -> dict[str, float | None]:
    """Return the geometric mean over the seeds at every rank."""
    if not len(logs.values):
        return {str(rank): None for rank in ranks}
    return {str(r): float(v) for r, v in zip(ranks, np.exp(logs.values.mean(axis=0)), strict=True)}
