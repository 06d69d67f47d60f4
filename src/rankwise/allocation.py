"""Which ranks keep most energy for their parameters: one sort, one cut, and an exact fill of what is left.

In: for each unit (a module, or a group with one rank) the ranks it may have, what one rank costs and what each step
keeps. Out: a rank for every unit, and a bound that says how far from the best possible it can be.

The units' gains fall from step to step relative to their cost, so that the steps above one level of gain per
parameter, whatever their unit, are the best choice for what they cost together (Lagrange; the greedy solution of the
linear relaxation of a multiple-choice knapsack, Sinha & Zoltners 1979, doi:10.1287/opre.27.3.503). A budget that lies
between two such cuts leaves a remainder. The same multiplier bounds what a better choice could gain, and rules out
every rank that is too far from the cut to belong to it; the few that are left are searched by dynamic programming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import OutOfReachError

Floats = NDArray[np.float64]
Wholes = NDArray[np.int64]

MOST_WORK: Final = 30_000_000
"""Steps of the dynamic programme, and cells of its table, past which the cut and its greedy fill stand."""

SLACK: Final = 1e-12
"""Relative error of a float64 sum of a million terms, with a margin: differences below it decide nothing."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """The ranks that one unit may have.

    Attributes:
        ranks: (levels,), ascending; the first is the least it must have, which may be 0.
        cost: parameters of one rank: in_features + out_features, summed over the members of a group.
        gains: (levels,), what `ranks[0]` keeps, then what each further level adds; weighted energy.
    """

    ranks: Wholes
    cost: int
    gains: Floats


def ladder(energies: Floats, cost: int, *, most: int, least: int = 0, step: int = 1) -> Ladder:
    """Return the ranks of one unit and what they keep.

    Ranks are multiples of `step` up to `most`, and `most` itself, whether it is a multiple or not: a rank past the
    smaller side of a weight reaches nothing. Levels that would add nothing are left away.

    The gain per parameter falls from level to level: energies fall, a level adds a block of them, and the mean of a
    block is no larger than that of the block before, be it full, cut short by `most` or padded with zeros.

    Args:
        energies: (known,), what each direction adds, largest first; those past the end are zero.
        cost: parameters of one rank.
        most: largest rank allowed.
        least: smallest rank allowed; rounded up to a multiple of `step`, and to `most` at the most.
        step: ranks are multiples of it.
    """
    first = min(-(-least // step) * step, most)
    useful = int(np.count_nonzero(energies[:most]))
    ranks = [first, *range((first // step + 1) * step, most + 1, step)]
    if ranks[-1] < most:
        ranks.append(most)
    needed = next((place for place, rank in enumerate(ranks) if rank >= useful), len(ranks) - 1)
    levels = np.array(ranks[: needed + 1], dtype=np.int64)
    padded = np.zeros(int(levels[-1]), dtype=np.float64)
    held = min(len(energies), len(padded))
    padded[:held] = energies[:held]
    blocks = np.add.reduceat(padded, levels[:-1]) if len(levels) > 1 else np.zeros(0)
    return Ladder(levels, cost, np.concatenate(([padded[: levels[0]].sum()], blocks)))


@dataclass(frozen=True, slots=True)
class Allocation:
    """A rank for every unit.

    Attributes:
        ranks: one for each unit, in order.
        cost: parameters together.
        gain: weighted energy kept.
        level: gain per parameter at which the items were cut; 0.0 where every item was taken.
        gain_bound: no ranks of this cost, or below the budget, keep more.
        cost_bound: no ranks that reach the target cost less; None under a budget.
        exact: whether no allowed ranks are better, up to rounding; else they are better by less than the bounds say.
    """

    ranks: tuple[int, ...]
    cost: int
    gain: float
    level: float
    gain_bound: float
    cost_bound: int | None
    exact: bool


class Problem:
    """All units together, sorted once: many budgets and targets can be asked of it."""

    def __init__(self, ladders: Sequence[Ladder]) -> None:
        sizes = np.array([len(u.ranks) for u in ladders], dtype=np.int64)
        self._first: Wholes = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        self._sizes = sizes
        self._unit = np.repeat(np.arange(len(ladders)), sizes)
        self._ranks = np.concatenate([u.ranks for u in ladders])  # (levels of all units,)
        self._costs = np.concatenate([u.ranks * u.cost for u in ladders])
        self._gains = np.concatenate([np.cumsum(u.gains) for u in ladders])
        # one item a level above the first: what it adds, what it costs
        item = np.ones(len(self._unit), dtype=bool)
        item[self._first] = False
        self._item_unit = self._unit[item]
        self._item_cost = np.concatenate([np.diff(u.ranks) * u.cost for u in ladders])
        self._item_gain = np.concatenate([u.gains[1:] for u in ladders])
        # rounding may let a ratio rise by its last bit: a later item of a unit must not come before an earlier one
        self._ratio = np.concatenate(
            [np.minimum.accumulate(u.gains[1:] / (np.diff(u.ranks) * u.cost)) for u in ladders]
        )
        self._order = np.argsort(-self._ratio, kind="stable")
        self._sum_cost = np.cumsum(self._item_cost[self._order])
        self._sum_gain = self._gains[self._first].sum() + np.cumsum(self._item_gain[self._order])
        self.least_cost = int(self._costs[self._first].sum())
        """Parameters of the least ranks."""
        self.most_cost = self.least_cost + int(self._item_cost.sum())
        """Parameters of the largest ranks that still add something."""
        self.most_gain = float(self._gains[self._first + sizes - 1].sum())
        """Weighted energy of the largest ranks."""

    @property
    def items(self) -> int:
        """Number of steps between ranks, all units together."""
        return len(self._order)

    @property
    def cheapest_step(self) -> int:
        """Parameters of the cheapest step from a least rank to the next, 0 where there is none."""
        return int(min(self._item_cost, default=0))

    def breakpoints(self) -> Wholes:
        """Return the costs of all cuts at one level, ascending: there the cut alone is the best choice."""
        return np.concatenate(([self.least_cost], self.least_cost + self._sum_cost))

    def best_within(self, budget: int, *, fill: bool = True) -> Allocation:
        """Return the ranks that keep most within a budget.

        Args:
            budget: parameters.
            fill: search the remainder by dynamic programming; without, it is filled item by item.

        Raises:
            OutOfReachError: the least ranks alone cost more.
        """
        if budget < self.least_cost:
            raise OutOfReachError(
                f"the least ranks allowed cost {self.least_cost:,} parameters, more than the budget of {budget:,}"
            )
        taken = int(np.searchsorted(self._sum_cost, budget - self.least_cost, side="right"))
        levels = self._cut(taken)
        if taken == self.items:
            return self._made(levels, 0.0, self._gain(levels), None, True)
        ratio = float(self._ratio[self._order[taken]])
        levels = self._filled(levels, budget)
        bound = self._relaxed(ratio) + ratio * budget
        gap = max(bound - self._gain(levels), 0.0)
        exact = gap <= SLACK * bound
        if fill and not exact:
            table = self._table(ratio, gap, budget)
            if table is not None:
                levels, exact = self._better(levels, table.levels_at(len(table.best) - 1)), True
        return self._made(levels, ratio, bound, None, exact)

    def least_for(self, target: float, *, fill: bool = True) -> Allocation:
        """Return the ranks that keep a weighted energy for the fewest parameters.

        Args:
            target: weighted energy to keep.
            fill: search the ranks near the cut by dynamic programming; without, items too many are dropped one by one.

        Raises:
            OutOfReachError: the largest ranks keep less.
        """
        start = float(self._gains[self._first].sum())
        if target <= start:
            return self._made(np.zeros(len(self._first), dtype=np.int64), math.inf, start, self.least_cost, True)
        if target > self.most_gain:
            raise OutOfReachError(f"the largest ranks allowed keep {self.most_gain:.6g} of {target:.6g}")
        taken = int(np.searchsorted(self._sum_gain, target, side="left")) + 1
        taken = min(taken, self.items)
        ratio = float(self._ratio[self._order[taken - 1]])
        levels = self._trimmed(self._cut(taken), target)
        cost = self._cost(levels)
        below = (target - self._relaxed(ratio)) / ratio
        gap = max(cost - below, 0.0)
        exact = gap < 1.0 - 1e-9  # costs are whole numbers
        if fill and not exact:
            table = self._table(ratio, gap * ratio, cost)
            if table is not None:
                found = table.cheapest(target)
                if found is not None and self._cost(found) < cost:
                    levels = found
                exact = True
        least = self._cost(levels) if exact else math.ceil(below * (1 - SLACK))
        return self._made(levels, ratio, self._relaxed(ratio) + ratio * self._cost(levels), least, exact)

    def ranks_reaching(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """Return for each unit the smallest rank it may have that is at least as large as wanted, or its largest."""
        found = []
        for unit, rank in enumerate(wanted):
            ranks = self._ranks[self._first[unit] : self._first[unit] + self._sizes[unit]]
            found.append(int(ranks[min(int(np.searchsorted(ranks, rank)), len(ranks) - 1)]))
        return tuple(found)

    def _cut(self, taken: int) -> Wholes:
        """Return the level of every unit when the first `taken` items are taken."""
        return np.bincount(self._item_unit[self._order[:taken]], minlength=len(self._first)).astype(np.int64)

    def _cost(self, levels: Wholes) -> int:
        return int(self._costs[self._first + levels].sum())

    def _gain(self, levels: Wholes) -> float:
        return float(self._gains[self._first + levels].sum())

    def _relaxed(self, ratio: float) -> float:
        """Return the largest sum of gain - ratio * cost over all levels: the dual function less its budget."""
        return float(np.maximum.reduceat(self._gains - ratio * self._costs, self._first).sum())

    def _better(self, levels: Wholes, others: Wholes) -> Wholes:
        return others if self._gain(others) > self._gain(levels) else levels

    def _filled(self, levels: Wholes, budget: int) -> Wholes:
        """Take the best next item that fits into what is left of the budget, until none does."""
        levels, spare = levels.copy(), budget - self._cost(levels)
        while True:
            at = self._first + levels
            able = levels + 1 < self._sizes
            after = np.where(able, at + 1, at)
            cost, gain = self._costs[after] - self._costs[at], self._gains[after] - self._gains[at]
            ratio = np.where(able & (cost <= spare), gain / np.maximum(cost, 1), -1.0)
            best = int(np.argmax(ratio))
            if ratio[best] <= 0:
                return levels
            levels[best] += 1
            spare -= int(cost[best])

    def _trimmed(self, levels: Wholes, target: float) -> Wholes:
        """Drop the costliest last item that the target does not need, until every one is needed."""
        levels = levels.copy()
        while True:
            at = self._first + levels
            before = np.where(levels > 0, at - 1, at)
            cost, gain = self._costs[at] - self._costs[before], self._gains[at] - self._gains[before]
            spare = self._gain(levels) - target
            cost = np.where(gain <= spare, cost, 0)
            best = int(np.argmax(cost))
            if cost[best] <= 0:
                return levels
            levels[best] -= 1

    def _table(self, ratio: float, gap: float, budget: int) -> _Table | None:
        """Return the table of the levels that a better choice may hold, or None where it would be too large.

        A choice that holds a level whose gain - ratio * cost is by more than `gap` below its unit's largest is worse
        than what is there already.
        """
        worth = self._gains - ratio * self._costs
        largest = np.maximum.reduceat(worth, self._first)
        kept = largest[self._unit] - worth <= gap * (1 + 1e-9) + SLACK * self.most_gain
        places = np.flatnonzero(kept)
        units, starts = np.unique(self._unit[places], return_index=True)
        groups = np.split(places, starts[1:])
        base = np.array([group[0] for group in groups], dtype=np.int64)  # (units,), in order: every unit keeps its best
        spare = budget - int(self._costs[base].sum())
        if spare < 0:
            return None
        free = [(int(u), group) for u, group in zip(units, groups, strict=True) if len(group) > 1]
        steps = [self._costs[group[1:]] - self._costs[group[0]] for _, group in free]
        unit = int(np.gcd.reduce(np.concatenate(steps))) if steps else 1
        width = min(spare, sum(int(s[-1]) for s in steps)) // unit
        if (width + 1) * sum(map(len, steps)) > MOST_WORK:
            return None
        return _Table(self, base - self._first, free, steps, unit, width)

    def _made(self, levels: Wholes, ratio: float, bound: float, least: int | None, exact: bool) -> Allocation:
        gain = self._gain(levels)
        return Allocation(
            ranks=tuple(int(r) for r in self._ranks[self._first + levels]),
            cost=self._cost(levels),
            gain=gain,
            level=ratio,
            gain_bound=gain if exact else max(gain, min(bound, self.most_gain)),
            cost_bound=least,
            exact=exact,
        )


class _Table:
    """The dynamic programme over the levels near the cut: the best gain for every cost, and how it is made."""

    def __init__(
        self,
        problem: Problem,
        base: Wholes,
        free: list[tuple[int, Wholes]],
        steps: list[Wholes],
        unit: int,
        width: int,
    ) -> None:
        gains, first = problem._gains, problem._first  # one file, one algorithm
        self._base, self._free = base, free
        self._steps = [s // unit for s in steps]
        self._least = float(gains[first + base].sum())
        self._levels = [group - first[u] for u, group in free]
        self.best: Floats = np.zeros(width + 1)
        """Gain above that of the base, for a cost of up to 0, 1, 2, ... units above it."""
        self._choice: list[NDArray[Any]] = []
        for (_, group), step in zip(free, self._steps, strict=True):
            made = self.best.copy()
            choice = np.zeros(width + 1, dtype=np.int32)
            for place, (size, at) in enumerate(zip(step, group[1:], strict=True), start=1):
                if size > width:
                    break
                offered = self.best[: width + 1 - size] + (gains[at] - gains[group[0]])
                better = offered > made[size:]
                made[size:][better] = offered[better]
                choice[size:][better] = place
            self.best = made
            self._choice.append(choice)

    def levels_at(self, column: int) -> Wholes:
        """Return the level of every unit in the best choice of at most this cost."""
        levels = self._base.copy()
        for index in range(len(self._free) - 1, -1, -1):
            place = int(self._choice[index][column])
            levels[self._free[index][0]] = self._levels[index][place]
            if place:
                column -= int(self._steps[index][place - 1])
        return levels

    def cheapest(self, target: float) -> Wholes | None:
        """Return the levels of the cheapest choice that keeps the target, or None."""
        column = int(np.searchsorted(self.best, target - self._least, side="left"))
        return None if column >= len(self.best) else self.levels_at(column)
