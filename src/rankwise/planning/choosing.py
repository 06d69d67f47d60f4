"""Choose the ranks: under a budget, to a share or an error, above the noise edge, or one for all.

In: updates, units, a choice. Out: a rank for every update, and how good the choice is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np

from rankwise.allocation import Allocation, Ladder, Problem, ladder
from rankwise.errors import CriterionError, OutOfReachError, UsageError
from rankwise.planning.modules import Floats, Unit, Update
from rankwise.records import PlanChoice

UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
"""Ending of a budget -> its factor."""

LENIENT: Final = 1e-12
"""Relative slack of a target: a share that was computed from the same sums must be reached by them."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen.

    Attributes:
        ranks: of every update.
        budget: parameters allowed, or None.
        allocation: how the cut was made, or None where every module was chosen by itself.
        reached: False where directions above the noise edge ended before the target.
        problem: the units and their ranks, for other budgets; None for one rank in all modules.
        total: weighted energy of all updates.
    """

    ranks: tuple[int, ...]
    budget: int | None
    allocation: Allocation | None
    reached: bool
    problem: Problem | None
    total: float


def parsed_budget(budget: int | str, updates: Sequence[Update]) -> int:
    """Return a budget in parameters; `rank:N` is what rank N in all these modules would cost.

    Raises:
        UsageError: it is neither a whole number above 0 (with k, M or G after it) nor rank:N.
    """
    text = str(budget).strip()
    by_rank = re.fullmatch(r"rank:([0-9]{1,9})", text)
    if by_rank and int(by_rank[1]) > 0:
        return uniform_cost(updates, int(by_rank[1]))
    number = re.fullmatch(r"([0-9][0-9_,]{0,15}|[0-9]{1,12}\.[0-9]{1,9})([kKmMgG]?)", text)
    if number and not isinstance(budget, bool):
        exact = Fraction(number[1].replace(",", "").replace("_", "")) * UNITS[number[2].lower()]  # no 1.005M - 1e-10
        if exact >= 1 and exact.denominator == 1:
            return int(exact)
    raise UsageError(f"--budget: wanted a number of parameters such as 2000000 or 2M, or rank:16; got {text!r:.60}")


def uniform_cost(updates: Sequence[Update], rank: int) -> int:
    """Return the parameters of one rank in all modules, each at most at the smaller side of its weight."""
    return sum(min(rank, u.most) * u.cost for u in updates)


def _energies(unit: Unit, updates: Sequence[Update], *, within_signal: bool) -> Floats:
    """Return what each rank of a unit adds, weighted and summed over its members."""
    rows = []
    for place in unit.members:
        u = updates[place]
        row = u.energies if not within_signal or u.signal_rank is None else u.energies[: u.signal_rank]
        rows.append(row * u.weight)
    summed = np.zeros(max(map(len, rows)))
    for row in rows:
        summed[: len(row)] += row
    return summed


def _most(unit: Unit, updates: Sequence[Update], choice: PlanChoice) -> tuple[int, int | None]:
    """Return the largest rank of a unit, and the last known one where a cut-off list ends before it."""
    most = min(updates[place].most for place in unit.members)
    if choice.max_rank is not None and choice.max_rank < most:
        most = choice.max_rank - choice.max_rank % choice.multiple_of
    ends = [len(updates[place].energies) for place in unit.members if not updates[place].complete]
    known = min(ends, default=most)
    if known >= most:
        return most, None
    return max(known - known % choice.multiple_of, 0), known


def _ladders(units: Sequence[Unit], updates: Sequence[Update], choice: PlanChoice) -> tuple[list[Ladder], list[int]]:
    """Return the ranks of every unit, and the last level that a cut-off list knows (-1: all are known)."""
    ladders, ends = [], []
    for unit in units:
        most, known = _most(unit, updates, choice)
        if known is not None and (most == 0 or most < choice.min_rank):
            raise CriterionError(_too_short(updates[unit.members[0]].module, known, choice))
        energies = _energies(unit, updates, within_signal=choice.within_signal)
        cost = sum(updates[place].cost for place in unit.members)
        ladders.append(ladder(energies, cost, most=most, least=choice.min_rank, step=choice.multiple_of))
        ends.append(-1 if known is None else most)
    return ladders, ends


def _too_short(module: str, known: int, choice: PlanChoice) -> str:
    return (
        f"{module}: the {known} singular values on file do not reach far enough for this plan: what lies past "
        "them might be worth a rank, and it is not known. Run `rankwise inspect` again with a larger --values "
        f"(or all), or say --max-rank {max(known - known % choice.multiple_of, 1)}"
    )


def choose(choice: PlanChoice, budget: int | str | None, updates: Sequence[Update], units: Sequence[Unit]) -> Chosen:
    """Return the ranks.

    Raises:
        OutOfReachError: the other options do not let the choice be met.
        CriterionError: a cut-off list is too short to say.
        UsageError: the choice does not fit these spectra.
    """
    total = float(sum(u.weight * u.total for u in updates))
    if choice.kind == "rank":
        rank = int(choice.value or 0)
        return Chosen(tuple(min(rank, u.most) for u in updates), None, None, True, None, total)
    if choice.kind == "signal" or choice.within_signal:
        _check_signal(updates, choice)
    ladders, ends = _ladders(units, updates, choice)
    problem = Problem(ladders)
    allowed = None if budget is None else parsed_budget(budget, updates)
    allocation, reached = None, True
    if choice.kind == "signal" or choice.per_module:
        wanted = [max(_alone(updates[place], choice) for place in unit.members) for unit in units]
        ranks = problem.ranks_reaching(wanted)
        reached = choice.kind == "signal" or all(_reaches(u, choice) for u in updates)
        short = [place for place, (got, want) in enumerate(zip(ranks, wanted, strict=True)) if got < want]
        if short:
            _explain_short(units[short[0]], updates, choice, wanted[short[0]], ranks[short[0]])
    elif allowed is not None:
        allocation = problem.best_within(allowed)
        ranks = allocation.ranks
    else:
        allocation, reached = _for_target(problem, ladders, ends, units, updates, choice, total)
        ranks = allocation.ranks
    for place, rank in enumerate(ranks):
        if ends[place] >= 0 and rank >= ends[place] and not (choice.kind == "signal" or choice.per_module):
            raise CriterionError(_too_short(updates[units[place].members[0]].module, ends[place], choice))
    return Chosen(by_update(units, ranks, len(updates)), allowed, allocation, reached, problem, total)


def by_update(units: Sequence[Unit], ranks: Sequence[int], n: int) -> tuple[int, ...]:
    """Return the rank of each of `n` updates from those of the units."""
    found = [0] * n
    for unit, rank in zip(units, ranks, strict=True):
        for member in unit.members:
            found[member] = rank
    return tuple(found)


def _target(choice: PlanChoice, total: float) -> float:
    """Return the weighted energy to keep."""
    value = float(choice.value or 0.0)
    if choice.kind == "energy":
        return value * total * (1 - LENIENT)
    return total - value * value * total * (1 + 1e-9) - total * LENIENT


def _for_target(
    problem: Problem,
    ladders: Sequence[Ladder],
    ends: Sequence[int],
    units: Sequence[Unit],
    updates: Sequence[Update],
    choice: PlanChoice,
    total: float,
) -> tuple[Allocation, bool]:
    target = _target(choice, total)
    if problem.most_gain >= target:
        return problem.least_for(target), True
    cut = [p for p, end in enumerate(ends) if end >= 0 and int(ladders[p].ranks[-1]) >= end]
    if cut:  # what is missing lies past the values on file
        raise CriterionError(_too_short(updates[units[cut[0]].members[0]].module, ends[cut[0]], choice))
    if choice.within_signal:
        return problem.best_within(problem.most_cost), False
    wanted = f"{choice.value:g} of the energy" if choice.kind == "energy" else f"a relative error of {choice.value:g}"
    kept = problem.most_gain / total
    reach = f"{kept:.6g} of the energy" if choice.kind == "energy" else f"{max(1 - kept, 0.0) ** 0.5:.4g}"
    caps = [f"--max-rank {choice.max_rank}"] if choice.max_rank is not None else []
    caps += ["--fuse, which ends at the smallest side of the weights it joins"] if choice.fuse else []
    raise OutOfReachError(
        f"{wanted} cannot be reached under {' and '.join(caps) or 'the ranks that these spectra hold'}: the largest "
        f"ranks allowed reach {reach}. Raise the cap or ask for less"
    )


def _alone(update: Update, choice: PlanChoice) -> int:
    """Return the rank that one module needs by itself."""
    if choice.kind == "signal":
        return int(update.signal_rank or 0)
    target = _target(choice, update.total)
    allowed = update.total - target
    rank = int(np.searchsorted(-update.left, -allowed, side="left"))
    if rank >= len(update.left):
        if not update.complete:
            raise CriterionError(_too_short(update.module, len(update.energies), choice))
        rank = len(update.energies)
    if choice.within_signal and update.signal_rank is not None:
        rank = min(rank, update.signal_rank)
    return rank


def _reaches(update: Update, choice: PlanChoice) -> bool:
    """Tell whether the directions above the noise edge of one module hold what it needs by itself."""
    if not choice.within_signal or update.signal_rank is None:
        return True
    left = update.left_at(update.signal_rank)
    return left is not None and left <= update.total - _target(choice, update.total)


def _explain_short(unit: Unit, updates: Sequence[Update], choice: PlanChoice, wanted: int, got: int) -> None:
    """Refuse a cap below what a module needs by itself; a signal rank above the cap is cut and said in a finding."""
    if choice.kind == "signal":
        return
    most = max(updates[place].most for place in unit.members)
    cap = f"--max-rank {choice.max_rank}" if choice.max_rank is not None else f"the smaller sides of {unit.name}"
    raise OutOfReachError(
        f"{unit.name or updates[unit.members[0]].module} needs rank {wanted} (of {most}) to reach {choice.text} by "
        f"itself, and {cap} ends at {got}. Raise the cap, ask for less, or leave out --per-module"
    )


def _check_signal(updates: Sequence[Update], choice: PlanChoice) -> None:
    """Refuse a choice by the noise edge where there is none."""
    unknown = [u for u in updates if u.signal_rank is None]
    flag = "--signal" if choice.kind == "signal" else "--within-signal"
    if len(unknown) == len(updates) and all(u.complete for u in updates):
        raise UsageError(
            f"{flag} needs the noise edge of a full fine-tune (SOURCE --base BASE); these spectra have none: the "
            "factors of an adapter are not a difference of rounded weights. Use --energy, --relative-error, --budget "
            "or --rank"
        )
    cut = [u for u in unknown if not u.complete]
    if cut and choice.kind == "signal":
        raise CriterionError(
            f"{cut[0].module}: all {len(cut[0].energies)} singular values on file stand above the noise edge, so that "
            "where it lies in the list is not known. Run `rankwise inspect` again with a larger --values (or all)"
        )
    if unknown and choice.kind == "signal":
        raise UsageError(f"--signal: {unknown[0].module} has no known noise edge; leave it out with --skip")
