"""What a grid says, with intervals over seeds: does rank help, which rate is best, how it goes with the rank.

In: a row a run. Out: means, best rates, effects and exponents.

All intervals are 95 % t-intervals over seeds. Nothing is claimed where intervals overlap: an effect of the rank needs
an interval of the difference, seed by seed, that leaves out zero, and two scores whose own intervals lie apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from rankwise.records import (
    Edge,
    Effect,
    Estimate,
    RankEffect,
    RateExponent,
    Score,
    SweepBest,
    SweepPoint,
    SweepRun,
)
from rankwise.tuning.stability.exponents import mean_of

LEAST_RANKS: Final = 3
"""Ranks below which a slope is no more than a difference."""

Key = tuple[str, int, float]
"""Rule, rank, learning rate."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a grid says.

    Attributes:
        score: what settings are compared by.
        points: means over seeds.
        best: best rates.
        effects: of the rank.
        exponents: of the best rate.
    """

    score: Score
    points: tuple[SweepPoint, ...]
    best: tuple[SweepBest, ...]
    effects: tuple[RankEffect, ...]
    exponents: tuple[RateExponent, ...]


def answer(cells: Sequence[SweepRun], score: Score | None = None) -> Answers:
    """Work out all answers.

    Args:
        cells: the runs.
        score: what to compare by; None for the first of bits, exact share and loss that every done run has.
    """
    by = score_of(cells) if score is None else score
    grouped: dict[Key, list[SweepRun]] = defaultdict(list)
    for cell in cells:
        grouped[cell.scaling, cell.rank, cell.learning_rate].append(cell)
    done = {key: [cell for cell in members if cell.status == "done"] for key, members in grouped.items()}
    sure = _eligible(grouped, done, by)
    front = _front([(key, done[key]) for key in sure], by)
    points = tuple(
        _point(key, grouped[key], done[key], by, eligible=key in sure, on_front=key in front) for key in sorted(grouped)
    )
    best = tuple(_best([p for p in points if (p.scaling, p.rank) == group], by) for group in _groups(points))
    bad = {key for key, members in grouped.items() if not _stable(members)}
    return Answers(by, points, best, _effects(points, best, done, by), _exponents(points, done, by, bad))


def score_of(cells: Iterable[SweepRun]) -> Score:
    """Return what all done runs can be compared by."""
    done = [cell for cell in cells if cell.status == "done"]
    names: tuple[Score, ...] = ("bits", "exact_share")
    return next((name for name in names if done and all(getattr(c, name) is not None for c in done)), "loss")


def higher_is_better(by: Score) -> bool:
    """Return which way is up."""
    return by != "loss"


def _groups(points: Sequence[SweepPoint]) -> list[tuple[str, int]]:
    return sorted({(point.scaling, point.rank) for point in points})


def estimate(values: Iterable[float | None]) -> Estimate:
    """Return the mean of what is known, with its interval.

    >>> estimate([1.0, 2.0, 3.0, None]).n
    3
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    fit = mean_of(np.array(known, dtype=np.float64))
    return Estimate(mean=fit.mean, ci=fit.interval, n=len(known))


def apart(one: Estimate, other: Estimate) -> bool:
    """Return whether two intervals do not overlap; a mean without one is told apart from nothing."""
    if one.ci is None or other.ci is None:
        return False
    return one.ci[1] < other.ci[0] or other.ci[1] < one.ci[0]


def _eligible(grouped: dict[Key, list[SweepRun]], done: dict[Key, list[SweepRun]], by: Score) -> set[Key]:
    """Return the settings that may be called best: no seed lost for good, and as many seeds as their rivals.

    A rate that diverges for one seed in three is not a good rate, and the mean of the other two would call it one; a
    mean of one seed beside means of three wins by chance. A failed run is a missing seed.
    """
    usable = {
        key
        for key, members in grouped.items()
        if _stable(members) and any(getattr(cell, by) is not None for cell in done[key])
    }
    most: dict[tuple[str, int], int] = defaultdict(int)
    for key in usable:
        most[key[:2]] = max(most[key[:2]], len(done[key]))
    return {key for key in usable if len(done[key]) == most[key[:2]]}


def _stable(members: Iterable[SweepRun]) -> bool:
    return not any(cell.status in ("diverged", "interrupted") for cell in members)


def _front(points: Sequence[tuple[Key, list[SweepRun]]], by: Score) -> set[Key]:
    """Return the settings that no other one beats both in mean score and in mean forgetting."""
    sign = 1 if higher_is_better(by) else -1
    placed = []
    for key, members in points:
        up, down = estimate(getattr(c, by) for c in members).mean, estimate(c.forgetting for c in members).mean
        if up is not None and down is not None:
            placed.append((key, sign * up, down))
    return {
        key
        for key, up, down in placed
        if not any((u >= up and d <= down) and (u > up or d < down) for _, u, d in placed)
    }


def _point(
    key: Key, members: Sequence[SweepRun], done: Sequence[SweepRun], by: Score, *, eligible: bool, on_front: bool
) -> SweepPoint:
    rule, rank, rate = key
    return SweepPoint(
        scaling=rule,
        rank=rank,
        learning_rate=rate,
        params=next((cell.params for cell in members if cell.params is not None), None),
        runs=len(members),
        done=len(done),
        diverged=sum(cell.status == "diverged" for cell in members),
        failed=sum(cell.status in ("failed", "interrupted") for cell in members),
        score=estimate(getattr(cell, by) for cell in done),
        loss=estimate(cell.loss for cell in done),
        exact_share=estimate(cell.exact_share for cell in done),
        forgetting=estimate(cell.forgetting for cell in done),
        bits_per_param=estimate(cell.bits_per_param for cell in done),
        eligible=eligible,
        on_front=on_front,
    )


NOTHING: Final = Estimate(mean=None, ci=None, n=0)


def _best(points: Sequence[SweepPoint], by: Score) -> SweepBest:
    """Return the best rate among the points of one rule and rank."""
    sign = 1 if higher_is_better(by) else -1
    rates = sorted(point.learning_rate for point in points)
    eligible = [point for point in points if point.eligible and point.score.mean is not None]
    if not eligible:
        return SweepBest(
            scaling=points[0].scaling, rank=points[0].rank, learning_rate=None, on_edge=False, edge=None, tied=(),
            score=NOTHING, forgetting=NOTHING, bits_per_param=NOTHING, params=points[0].params,
        )  # fmt: skip
    top = max(eligible, key=lambda point: sign * (point.score.mean or 0.0))
    edge = edge_of(top.learning_rate, rates)
    return SweepBest(
        scaling=top.scaling,
        rank=top.rank,
        learning_rate=top.learning_rate,
        on_edge=edge is not None,
        edge=edge,
        tied=tuple(p.learning_rate for p in eligible if p is not top and not apart(p.score, top.score)),
        score=top.score,
        forgetting=top.forgetting,
        bits_per_param=top.bits_per_param,
        params=top.params,
    )


def edge_of(rate: float, rates: Sequence[float]) -> Edge | None:
    """Say on which end of the rates tried one lies.

    >>> edge_of(1e-3, [1e-3, 3e-3]), edge_of(3e-3, [1e-3, 3e-3, 1e-2]), edge_of(1e-3, [1e-3])
    ('lowest', None, 'only')
    """
    if len(rates) == 1:
        return "only"
    return "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else None


def _effects(
    points: Sequence[SweepPoint], best: Sequence[SweepBest], done: dict[Key, list[SweepRun]], by: Score
) -> tuple[RankEffect, ...]:
    """Compare neighbouring ranks and the two ends, under each rule: at each one's best rate, and at one for both."""
    found = []
    at = {(p.scaling, p.rank, p.learning_rate): p for p in points if p.eligible}
    for rule in sorted({point.scaling for point in points}):
        mine = {b.rank: b.learning_rate for b in best if b.scaling == rule and b.learning_rate is not None}
        for low, high in _pairs(sorted(mine)):
            found.append(_effect(at[rule, low, mine[low]], at[rule, high, mine[high]], "best", done, by))
        for rate in sorted({p.learning_rate for p in points if p.scaling == rule}):
            ranks = sorted(rank for r, rank, lr in at if (r, lr) == (rule, rate))
            found += [_effect(at[rule, a, rate], at[rule, b, rate], "rate", done, by) for a, b in _pairs(ranks)]
    return tuple(found)


def _pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    ends = [(ranks[0], ranks[-1])] if len(ranks) > 2 else []
    return ends + list(pairwise(ranks))


def _effect(low: SweepPoint, high: SweepPoint, at: str, done: dict[Key, list[SweepRun]], by: Score) -> RankEffect:
    def by_seed(point: SweepPoint) -> dict[int, float]:
        members = done[point.scaling, point.rank, point.learning_rate]
        return {cell.seed: value for cell in members if (value := getattr(cell, by)) is not None}

    before, after = by_seed(low), by_seed(high)
    difference = estimate(after[seed] - before[seed] for seed in sorted(before.keys() & after.keys()))
    return RankEffect(
        scaling=low.scaling,
        low_rank=low.rank,
        high_rank=high.rank,
        at="best" if at == "best" else "rate",
        low_learning_rate=low.learning_rate,
        high_learning_rate=high.learning_rate,
        difference=difference,
        verdict=_verdict(difference, by) if apart(low.score, high.score) else "undecided",
    )


def _verdict(difference: Estimate, by: Score) -> Effect:
    if difference.ci is None or difference.ci[0] <= 0 <= difference.ci[1]:
        return "undecided"
    return "helps" if (difference.ci[0] > 0) == higher_is_better(by) else "hurts"


def _exponents(
    points: Sequence[SweepPoint], done: dict[Key, list[SweepRun]], by: Score, bad: set[Key]
) -> tuple[RateExponent, ...]:
    sign = 1 if higher_is_better(by) else -1

    def value(cell: SweepRun) -> float | None:
        found = getattr(cell, by)
        return None if found is None else sign * float(found)

    return tuple(
        _exponent([p for p in points if p.scaling == rule], done, value, bad)
        for rule in sorted({p.scaling for p in points})
    )


def _exponent(
    points: Sequence[SweepPoint],
    done: dict[Key, list[SweepRun]],
    value: Callable[[SweepRun], float | None],
    bad: set[Key],
) -> RateExponent:
    """Fit log(best rate) against log(rank), seed by seed.

    A best rate on the edge of the grid is a bound, not a value: its rank is left out. So is one where a rate that did
    not diverge lacks seeds: it might have been best for them. A grid knows a best rate to half a step either way, which
    a slope with weights w_i over the ranks can turn into sum |w_i| times half a step: seeds that agree on every rate
    would otherwise give an interval of no width.
    """
    rule = points[0].scaling
    chosen: dict[int, dict[int, float]] = {}
    steps: dict[int, float] = {}
    left_out: dict[str, str] = {}
    for rank in sorted({point.rank for point in points}):
        mine = [point for point in points if point.rank == rank]
        rates = sorted(point.learning_rate for point in mine)
        by_seed = _best_by_seed([p for p in mine if p.eligible], done, value)
        short = [p.learning_rate for p in mine if not p.eligible and (p.scaling, p.rank, p.learning_rate) not in bad]
        edges = {edge for rate in by_seed.values() if (edge := edge_of(rate, rates)) is not None}
        if not by_seed:
            left_out[str(rank)] = "no rate at which every seed was done"
        elif short:
            left_out[str(rank)] = f"seeds are missing at {', '.join(f'{rate:g}' for rate in short)}"
        elif edges:
            which = "only one rate was tried" if "only" in edges else f"on the {' and the '.join(sorted(edges))} rate"
            left_out[str(rank)] = which if "only" in edges else f"the best rate of a seed lies {which} tried"
        else:
            chosen[rank] = by_seed
            gaps = [math.log(b / a) for a, b in pairwise(rates)]
            at = [rates.index(rate) for rate in by_seed.values()]
            steps[rank] = max(max(gaps[place - 1], gaps[place]) / 2 for place in at)
    ranks = tuple(chosen)
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in chosen.values()))) if chosen else []
    if len(ranks) < LEAST_RANKS or not seeds:
        return RateExponent(
            scaling=rule, exponent=None, ci=None, from_grid=None, seeds=len(seeds), ranks=ranks, left_out=left_out
        )
    x = np.log(ranks)
    weights = (x - x.mean()) / ((x - x.mean()) @ (x - x.mean()))
    slopes = np.array([weights @ np.log([chosen[rank][seed] for rank in ranks]) for seed in seeds])
    fit = mean_of(slopes)
    grid = float(np.abs(weights) @ np.array([steps[rank] for rank in ranks]))
    ci = None if fit.interval is None else (fit.interval[0] - grid, fit.interval[1] + grid)
    return RateExponent(
        scaling=rule, exponent=fit.mean, ci=ci, from_grid=grid, seeds=len(seeds), ranks=ranks, left_out=left_out
    )


def _best_by_seed(
    points: Sequence[SweepPoint], done: dict[Key, list[SweepRun]], value: Callable[[SweepRun], float | None]
) -> dict[int, float]:
    """Return seed -> its own best rate, for the seeds that every rate has."""
    scores: dict[int, dict[float, float]] = defaultdict(dict)
    for point in points:
        for cell in done[point.scaling, point.rank, point.learning_rate]:
            if (found := value(cell)) is not None:
                scores[cell.seed][point.learning_rate] = found
    whole = {seed: rates for seed, rates in scores.items() if len(rates) == len(points)}
    return {seed: max(rates, key=lambda rate: rates[rate]) for seed, rates in whole.items()}
