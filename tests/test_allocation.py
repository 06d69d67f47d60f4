"""Ranks under a budget are the best there are: held to every possible choice, at every budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from rankwise import allocation
from rankwise.allocation import Ladder, Problem, ladder
from rankwise.errors import OutOfReachError

CASES = 60
"""Random cases for each kind of option; every case is compared at all its budgets."""


def choices(ladders: Sequence[Ladder]) -> tuple[np.ndarray, np.ndarray]:
    """Return the cost and the gain of every choice of one rank a unit: the slow oracle."""
    costs, gains = np.zeros(1, dtype=np.int64), np.zeros(1)
    for unit in ladders:
        costs = np.add.outer(costs, unit.ranks * unit.cost).ravel()
        gains = np.add.outer(gains, np.cumsum(unit.gains)).ravel()
    return costs, gains


def random_ladders(rng: np.random.Generator, kind: str) -> list[Ladder]:
    """Return two to four units: single weights or groups, of few or many shapes, some with equal values."""
    made = []
    for _ in range(int(rng.integers(2, 5))):
        short = int(rng.integers(2, 9 if kind in ("multiples", "everything") else 6))
        members = int(rng.integers(1, 4)) if kind in ("groups", "everything") else 1
        energies = np.zeros(short)
        for _ in range(members):
            own = np.sort(rng.exponential(size=int(rng.integers(1, short + 1))) ** 2)[::-1]
            energies[: len(own)] += own if rng.uniform() < 0.8 else np.round(own)  # ties, and zeros at the end
        cost = int(rng.integers(3, 30)) if rng.uniform() < 0.6 else 8 * int(rng.integers(1, 4))
        limited = kind in ("limits", "everything")
        most = min(short, int(rng.integers(1, 7))) if limited else short
        least = int(rng.integers(0, 3)) if limited else 0
        step = int(rng.integers(2, 4)) if kind in ("multiples", "everything") else 1
        made.append(ladder(energies, cost, most=most, least=least, step=step))
    return made


KINDS = ("plain", "limits", "multiples", "groups", "everything")


@pytest.mark.parametrize("kind", KINDS)
def test_every_budget_gets_the_best_choice_there_is(rng: np.random.Generator, kind: str) -> None:
    for _ in range(CASES):
        ladders = random_ladders(rng, kind)
        costs, gains = choices(ladders)
        problem = Problem(ladders)
        order = np.argsort(costs, kind="stable")
        best = np.maximum.accumulate(gains[order])
        for budget in range(problem.least_cost, int(costs.max()) + 2):
            found = problem.best_within(budget)
            truth = float(best[np.searchsorted(costs[order], budget, side="right") - 1])
            assert found.cost <= budget
            assert found.exact
            # sums of a dozen numbers of order 1 in another order
            assert found.gain == pytest.approx(truth, rel=1e-12, abs=1e-12)
            assert found.gain_bound == found.gain


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_alone_is_the_best_choice_at_every_breakpoint(rng: np.random.Generator, kind: str) -> None:
    for _ in range(CASES):
        ladders = random_ladders(rng, kind)
        costs, gains = choices(ladders)
        problem = Problem(ladders)
        for budget in problem.breakpoints():
            found = problem.best_within(int(budget), fill=False)
            assert found.gain == pytest.approx(float(gains[costs <= budget].max()), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_target_gets_the_cheapest_choice_there_is(rng: np.random.Generator, kind: str) -> None:
    for _ in range(CASES):
        ladders = random_ladders(rng, kind)
        costs, gains = choices(ladders)
        problem = Problem(ladders)
        for share in (*rng.uniform(0, 1, 12), 1.0):
            target = share * problem.most_gain * (1 - 1e-11)
            found = problem.least_for(target)
            assert found.gain >= target * (1 - 1e-12)
            assert found.exact
            assert found.cost == costs[gains >= target].min()
            assert found.cost_bound == found.cost


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_search_the_bounds_still_hold(
    rng: np.random.Generator, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the size where the search is worth it, what is filled item by item lies between the truth and its bound."""
    monkeypatch.setattr(allocation, "MOST_WORK", 0)
    inexact = 0
    for _ in range(CASES):
        ladders = random_ladders(rng, kind)
        costs, gains = choices(ladders)
        problem = Problem(ladders)
        for budget in rng.integers(problem.least_cost, int(costs.max()) + 2, 10):
            found = problem.best_within(int(budget))
            truth = float(gains[costs <= budget].max())
            assert found.cost <= budget
            assert found.gain * (1 - 1e-12) <= truth <= found.gain_bound * (1 + 1e-12)
            inexact += not found.exact
            if found.exact:
                assert found.gain == pytest.approx(truth, rel=1e-12)
        for share in rng.uniform(0, 1, 10):
            target = float(share) * problem.most_gain
            found = problem.least_for(target)
            truth_cost = int(costs[gains >= target * (1 - 1e-12)].min())
            assert found.gain >= target * (1 - 1e-12)
            assert found.cost_bound is not None
            assert found.cost_bound <= truth_cost <= found.cost
    assert inexact > CASES, "the cases are too easy to test the bound"


def test_gain_per_parameter_falls_along_every_ladder(rng: np.random.Generator) -> None:
    """What the cut rests on, for blocks cut short and padded ones too; a mean may rise by its rounding."""
    for _ in range(300):
        for unit in random_ladders(rng, "everything"):
            ratios = unit.gains[1:] / np.diff(unit.ranks)
            assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(ratios))


@pytest.mark.parametrize(
    ("most", "least", "step", "expected"),
    [
        (8, 0, 1, [0, 1, 2, 3, 4, 5]),  # five values: a sixth rank adds nothing
        (3, 0, 1, [0, 1, 2, 3]),
        (8, 2, 1, [2, 3, 4, 5]),
        (8, 7, 1, [7]),  # must have seven, five of use
        (8, 0, 4, [0, 4, 8]),
        (7, 0, 4, [0, 4, 7]),  # the whole smaller side, though no multiple
        (8, 1, 4, [4, 8]),
        (3, 0, 4, [0, 3]),
        (3, 9, 4, [3]),
    ],
)
def test_ranks_of_a_ladder(most: int, least: int, step: int, expected: list[int]) -> None:
    unit = ladder(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), 10, most=most, least=least, step=step)
    assert unit.ranks.tolist() == expected
    assert unit.gains.sum() == sum([5, 4, 3, 2, 1][: expected[-1]])


def test_a_remainder_is_filled_better_than_by_taking_the_next_best() -> None:
    """The next best item per parameter does not fit; two small ones do, and together beat the one that does."""
    ladders = [
        ladder(np.array([10.0]), 10, most=1),
        ladder(np.array([9.0]), 10, most=1),
        ladder(np.array([4.4, 4.3]), 5, most=2),
        ladder(np.array([6.0]), 7, most=1),
    ]
    found = Problem(ladders).best_within(17)
    assert (found.ranks, found.cost, found.exact) == ((1, 0, 0, 1), 17, True)
    assert Problem(ladders).best_within(20).ranks == (1, 1, 0, 0)
    assert Problem(ladders).best_within(15).ranks == (1, 0, 1, 0)


def test_a_budget_below_the_least_ranks_and_a_target_above_the_largest_are_refused() -> None:
    problem = Problem([ladder(np.array([2.0, 1.0]), 5, most=2, least=1)])
    with pytest.raises(OutOfReachError, match="cost 5 parameters, more than the budget of 4"):
        problem.best_within(4)
    with pytest.raises(OutOfReachError, match="keep 3 of 4"):
        problem.least_for(4.0)
    assert problem.least_for(0.0).ranks == (1,)
    assert problem.best_within(10**12).ranks == (2,)


def test_larger_budgets_never_keep_less(rng: np.random.Generator) -> None:
    ladders = [
        ladder(np.sort(rng.exponential(size=40))[::-1], int(cost), most=40) for cost in rng.integers(50, 5000, 12)
    ]
    problem = Problem(ladders)
    found = [problem.best_within(int(b)) for b in np.linspace(0, problem.most_cost, 60)]
    assert all(a.gain <= b.gain * (1 + 1e-12) for a, b in itertools.pairwise(found))
    assert found[-1].gain == pytest.approx(problem.most_gain, rel=1e-12)


def test_ranks_reaching_what_each_unit_wants() -> None:
    problem = Problem([ladder(np.arange(9.0, 0, -1), 1, most=9, step=4), ladder(np.ones(3), 1, most=3)])
    assert problem.ranks_reaching([5, 0]) == (8, 0)
    assert problem.ranks_reaching([9, 7]) == (9, 3)
