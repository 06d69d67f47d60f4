"""What would be flat: the exponent g of a scale r^-g, and the learning rates that do the same.

In: what was measured. Out: transferred rates by rank, a run that tries them, and advice in words.

The branch after the first step is linear in the learning rate, under SGD and under Adam alike, and goes like s^p in the
scale: p = 2 under SGD, 1 under Adam. So if it goes like r^e under s = r^-g, it is flat at g + e / p, or at a rate of
r^-e. Later steps bend both: there g is interpolated between the rules that were measured, and the rates are tried out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from rankwise.records import StabilityAdvice, Transfer, TransferProof
from rankwise.scaling import alpha_for, scaling
from rankwise.tuning.stability.exponents import Fit, exponent, mean_of, slopes
from rankwise.tuning.stability.settings import LINEARITY, Cell, Grid
from rankwise.tuning.stability.statistics import Kind, Measured

PROOF_SEEDS: Final = 2
"""Seeds of the runs that try a transferred rate: the ratio is taken seed by seed, which leaves little noise."""

LEAST_CHANGE: Final = 1.02
"""A transferred rate that differs by less is not tried."""

WORDS: Final = {"lora": "alpha / r", "rslora": "alpha / sqrt(r)", "unscaled": "alpha"}

Run = Callable[[Sequence[Cell], int], dict[Cell, float | None]]
"""(cells, step) -> geometric mean over the modules of the branch's RMS after that step; None where it diverged."""


def rule_exponent(rule: str, ranks: Sequence[int]) -> float:
    """Return the g of a rule, s = alpha * r^-g.

    >>> [round(rule_exponent(rule, [4, 64]), 9) for rule in ("lora", "rslora", "unscaled")]
    [1.0, 0.5, 0.0]
    """
    logs = np.log([[scaling(rule, 1.0, rank) for rank in ranks]])
    return float(-slopes(ranks, logs)[0]) + 0.0


def _last_known(measured: Measured, kinds: Sequence[Kind]) -> int | None:
    """Return the last step at which every one of these has an exponent and no diverged run."""
    for step in reversed(measured.grid.steps):
        if all(
            not measured.diverged(kind, step) and len(measured.logs(kind, step, "all", "rms").values) for kind in kinds
        ):
            return step
    return None


def transferred(grid: Grid, optimizer: str, found: float) -> dict[int, float]:
    """Return the learning rate of every rank that makes the branch as large as at the reference rank."""
    return {rank: grid.rates[optimizer] * (rank / grid.reference_rank) ** -found for rank in grid.ranks}


def transfers_of(measured: Measured, run: Run) -> tuple[Transfer, ...]:
    """Carry the learning rate over the ranks, for every rule, optimizer and init.

    Args:
        measured: the grid.
        run: makes the runs that try the rates; not called where the first step is all that was asked for.
    """
    grid, made = measured.grid, []
    for kind in grid.kinds():
        step = _last_known(measured, [kind])
        if step is None:
            continue
        logs = measured.logs(kind, step, "all", "rms").values
        found = exponent(grid.ranks, logs).mean
        if found is None:
            continue
        rates = transferred(grid, kind[1], found)
        made.append(
            Transfer(
                rule=kind[0],
                optimizer=kind[1],
                init=kind[2],
                step=step,
                exponent=found,
                reference_rank=grid.reference_rank,
                learning_rate_by_rank={str(rank): rate for rank, rate in rates.items()},
                proof=_proof(measured, kind, step, rates, logs, run),
            )
        )
    return tuple(made)


def _proof(
    measured: Measured, kind: Kind, step: int, rates: dict[int, float], logs: np.ndarray, run: Run
) -> TransferProof | None:
    """Try the rate of one rank: of the farthest from the reference where that takes a run."""
    grid = measured.grid
    rate = grid.rates[kind[1]]
    here = grid.ranks.index(grid.reference_rank)
    if step == 1:  # all ranks are known without a run: show the one that the straight line fits worst
        gaps = logs.mean(axis=0) - logs.mean(axis=0)[here]
        rank = max(grid.ranks, key=lambda r: abs(gaps[grid.ranks.index(r)] + math.log(rates[r] / rate)))
    else:
        rank = max(grid.ranks, key=lambda r: (abs(math.log(r / grid.reference_rank)), r))
    if rank == grid.reference_rank:
        rank = grid.ranks[-1] if rank != grid.ranks[-1] else grid.ranks[0]
    there = grid.ranks.index(rank)
    factor = rates[rank] / rate
    if max(factor, 1 / factor) < LEAST_CHANGE:
        return None
    before = logs[:, there] - logs[:, here]  # (seeds,)
    if step == 1:
        return TransferProof(
            rank=rank,
            learning_rate=rates[rank],
            how="closed form",
            seeds=len(before),
            ratio_before=math.exp(before.mean()),
            ratio_after=math.exp(before.mean()) * factor,
        )
    seeds = grid.seeds[:PROOF_SEEDS]  # no run of this kind diverged by this step, so that all seeds are in `logs`
    cells = [grid.cell(kind, rank, seed, rates[rank]) for seed in seeds]
    got = run(cells, step)
    sizes = [got[cell] for cell in cells]
    after = None
    if all(size for size in sizes):
        gaps = [math.log(size) - logs[i, here] for i, size in enumerate(sizes) if size]
        after = math.exp(sum(gaps) / len(gaps))
    return TransferProof(
        rank=rank,
        learning_rate=rates[rank],
        how="steps",
        seeds=len(seeds),
        ratio_before=math.exp(before[: len(seeds)].mean()),
        ratio_after=after,
    )


def flat_exponent(measured: Measured, optimizer: str, init: str, step: int) -> Fit:
    """Return the g at which the branch would not depend on the rank after a step.

    With two rules or more: the zero of a straight line through their exponents, seed by seed. With one, from the power
    of the scale that holds at the first step.
    """
    grid = measured.grid
    of_rule = [
        slopes(grid.ranks, measured.logs((rule, optimizer, init), step, "all", "rms").values) for rule in grid.scaling
    ]
    g = np.array([rule_exponent(rule, grid.ranks) for rule in grid.scaling])
    if len(g) == 1:
        return mean_of(g[0] + of_rule[0] / LINEARITY[optimizer])
    found = np.stack(of_rule)  # (rules, seeds)
    x = g - g.mean()
    powers = -(x @ found) / (x @ x)  # (seeds,), how fast the exponent falls with g
    if not (powers > 0.1 * LINEARITY[optimizer]).all():  # the scale no longer decides: no g can be read off
        return Fit(None, None, len(powers))
    return mean_of(g.mean() + found.mean(axis=0) / powers)


def advice_of(measured: Measured, optimizer: str, init: str, transfers: Sequence[Transfer]) -> StabilityAdvice:
    """Say what would be flat for one optimizer and init."""
    grid = measured.grid
    kinds = [(rule, optimizer, init) for rule in grid.scaling]
    step = _last_known(measured, kinds)
    if step is None:
        text = (
            f"No advice for {optimizer} from the {init} init: there is no step at which every run is there. Give a "
            "smaller --learning-rate."
        )
        return StabilityAdvice(
            optimizer=optimizer,
            init=init,
            rule=None,
            step=None,
            exponent=None,
            exponent_ci=None,
            lora_alpha_by_rank={},
            learning_rate_by_rank={},
            text=text,
        )
    found = {
        rule: exponent(grid.ranks, measured.logs((rule, optimizer, init), step, "all", "rms").values).mean
        for rule in grid.scaling
    }
    known = {rule: value for rule, value in found.items() if value is not None}
    rule = min(known, key=lambda name: abs(known[name]))
    flat = flat_exponent(measured, optimizer, init, step)
    rates = next(
        (
            t.learning_rate_by_rank
            for t in transfers
            if (t.rule, t.optimizer, t.init) == (rule, optimizer, init) and t.step == step
        ),
        {str(rank): rate for rank, rate in transferred(grid, optimizer, known[rule]).items()},
    )
    return StabilityAdvice(
        optimizer=optimizer,
        init=init,
        rule=rule,
        step=step,
        exponent=flat.mean,
        exponent_ci=flat.interval,
        lora_alpha_by_rank={} if flat.mean is None else _alphas(grid, rule, flat.mean),
        learning_rate_by_rank=rates,
        text=_text(grid, optimizer, init, step, known, rule, flat),
    )


def _alphas(grid: Grid, rule: str, g: float) -> dict[str, float]:
    """Return the alpha of every rank that gives a scale of r^-g under a rule."""
    at_reference = scaling(rule, grid.lora_alpha, grid.reference_rank)
    return {str(rank): alpha_for(rule, at_reference * (rank / grid.reference_rank) ** -g, rank) for rank in grid.ranks}


def _text(grid: Grid, optimizer: str, init: str, step: int, known: dict[str, float], rule: str, flat: Fit) -> str:
    laws = " and ".join(f"r^{value:+.2f} under {WORDS[name]}" for name, value in known.items())
    told = [
        f"{optimizer} from the {init} init, learning rate {grid.rates[optimizer]:g}: after {step} "
        f"step{'s' if step > 1 else ''} the branch goes like {laws}."
    ]
    if flat.mean is None:
        told.append("No exponent of the scale would make it flat here: the rules differ too little by now.")
    else:
        told.append(
            f"A scale of r^-{flat.mean:.2f} would make it flat (alpha / r is r^-1)."
            if flat.mean >= 0
            else f"A scale of r^{-flat.mean:+.2f} would make it flat (alpha / r is r^-1)."
        )
    nearest = "comes nearest" if len(known) > 1 else "is the one rule measured"
    told.append(
        f"{WORDS[rule]} {nearest}; with it, multiply the learning rate of rank {grid.reference_rank} by "
        f"(r / {grid.reference_rank})^{-known[rule] + 0.0:+.2f}."
    )
    told.append(
        "Flat means that these steps move every rank by the same amount. It does not say that this amount is the "
        "right one, nor that facts will be recalled: sweep the rate at one rank, and measure recall."
    )
    return " ".join(told)
