"""What a uniform rank would leave and cost beside a plan.

In: updates, ranks, and the problem that was solved. Out: errors, uniform ranks, a curve.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Final

from rankwise.errors import OutOfReachError
from rankwise.planning.choosing import Chosen, by_update, uniform_cost
from rankwise.planning.modules import Unit, Update
from rankwise.records import CurvePoint, PlanChoice, UniformRank

PER_OCTAVE: Final = 2
"""Points of the curve for each doubling of the rank."""


def relative_error(updates: Sequence[Update], ranks: Sequence[int]) -> float | None:
    """Return norm(dW - dW_r) / norm(dW) over all modules, or None where a cut-off list does not say."""
    left = [u.left_at(r) for u, r in zip(updates, ranks, strict=True)]
    known = [value for value in left if value is not None]
    if len(known) < len(left):
        return None
    return math.sqrt(math.fsum(known) / math.fsum(u.total for u in updates))


def uniform(updates: Sequence[Update], rank: int) -> UniformRank:
    """Return what one rank in all modules costs and leaves."""
    error = relative_error(updates, [min(rank, u.most) for u in updates])
    return UniformRank(r=rank, params=uniform_cost(updates, rank), relative_error=error)


def _uniform_ranks(updates: Sequence[Update], choice: PlanChoice) -> list[int]:
    """Return the uniform ranks that the plan's own multiples and cap allow, and the largest that is of any use."""
    step, last = choice.multiple_of, max(u.most for u in updates)
    if choice.max_rank is not None and choice.max_rank < last:
        return list(range(step, choice.max_rank + 1, step))
    return [*range(step, last, step), last]


def uniform_within(updates: Sequence[Update], choice: PlanChoice, params: int) -> UniformRank | None:
    """Return the largest uniform rank that costs at most so much, or None where the smallest costs more."""
    ranks = _uniform_ranks(updates, choice)
    place = bisect.bisect_right(ranks, params, key=lambda rank: uniform_cost(updates, rank))
    return uniform(updates, ranks[place - 1]) if place else None


def uniform_reaching(updates: Sequence[Update], choice: PlanChoice, error: float | None) -> UniformRank | None:
    """Return the smallest uniform rank with at most this relative error, or None where the files do not say."""
    if error is None:
        return None
    ranks = _uniform_ranks(updates, choice)

    def enough(rank: int) -> bool:
        found = uniform(updates, rank).relative_error
        return found is None or found <= error * (1 + 1e-9)  # past the values on file: the answer lies below

    place = bisect.bisect_left(ranks, True, key=enough)
    made = uniform(updates, ranks[place]) if place < len(ranks) else None
    return None if made is None or made.relative_error is None else made


def curve(
    updates: Sequence[Update], units: Sequence[Unit], chosen: Chosen, choice: PlanChoice, extra: Sequence[int]
) -> list[CurvePoint]:
    """Return errors over parameters: at each point a uniform rank, and ranks chosen for what it costs.

    Args:
        updates: all modules that count.
        units: what one rank is chosen for.
        chosen: what the plan chose, with its problem; the chosen ranks of every point obey the same options.
        choice: the options.
        extra: uniform ranks to draw besides.
    """
    if chosen.problem is None:
        return []
    longest = min(max(len(u.energies) for u in updates), choice.max_rank or max(u.most for u in updates))
    octaves = range(math.ceil(PER_OCTAVE * math.log2(longest)) + 1)
    allowed = _uniform_ranks(updates, choice)
    wanted = {*(round(2 ** (k / PER_OCTAVE)) for k in octaves), longest, *extra}
    points = []
    for rank in sorted(
        {allowed[min(bisect.bisect_left(allowed, r), len(allowed) - 1)] for r in wanted if r <= longest}
    ):
        flat = uniform(updates, rank)
        if flat.params > max(sum(math.prod(u.shape) for u in updates), uniform_cost(updates, 1)):
            break  # more than the weights themselves have
        try:
            found = chosen.problem.best_within(flat.params, fill=False)
        except OutOfReachError:
            continue  # the least ranks alone cost more than this
        ranks = by_update(units, found.ranks, len(updates))
        open_ended = any(not u.complete and r >= len(u.energies) for u, r in zip(updates, ranks, strict=True))
        error = None if open_ended else relative_error(updates, ranks)
        points.append(CurvePoint(r=rank, params=flat.params, uniform_error=flat.relative_error, planned_error=error))
    return points
