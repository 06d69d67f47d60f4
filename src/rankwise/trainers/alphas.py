"""The alpha that gives a planned scale under the rule that a trainer has.

In: a job and a trainer's rule. Out: one alpha a module; whole numbers where the trainer takes nothing else, and an
error that says what would fit where they cannot carry the scale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from rankwise.errors import CannotCarryError
from rankwise.scaling import alpha_for, scaling
from rankwise.trainers.model import Asked, Job

_ROUNDING: Final = 1e-12
"""Relative; products and quotients of a few floats are off by less, and what is nearer to a whole number is one."""

_TRIES: Final = 4096
"""Whole alphas tried on the way from the planned scale to one that fits."""


def rule_of(job: Job, *, rslora: bool) -> str:
    """Return the rule under which a trainer carries the plan: its own where the trainer has it, else alpha / r."""
    return "rslora" if job.rule == "rslora" and rslora else "lora"


def real_alphas(job: Job, rule: str) -> dict[str, float]:
    """Return module -> alpha that gives the planned scale under `rule`.

    >>> q = Asked("q", (8, 8), 16, lora_alpha=8.0, scaling=2.0)  # 8 / sqrt(16)
    >>> real_alphas(Job((q,), (), "rslora", None, 1e-3, ("q",), False), "lora")  # 32 / 16
    {'q': 32.0}
    """
    return {
        m.module: m.lora_alpha if job.rule == rule else _exact(alpha_for(rule, m.scaling, m.r)) for m in job.modules
    }


def _exact(alpha: float) -> float:
    near = round(alpha)
    return float(near) if near and math.isclose(alpha, near, rel_tol=_ROUNDING) else alpha


def plain(alpha: float) -> float | int:
    """Write a whole alpha as an integer: some readers take nothing else."""
    return int(alpha) if alpha == int(alpha) else alpha


def whole_alphas(job: Job, rule: str, title: str, ways_out: Sequence[str] = ()) -> tuple[dict[str, int], float]:
    """Return module -> the nearest whole alpha, and the largest relative error of a scale that this makes.

    Args:
        job: the tolerance is its own.
        rule: the rule that the trainer applies.
        title: of the trainer, for the message.
        ways_out: more ways that this trainer leaves.

    Raises:
        CannotCarryError: a scale would be off by more than the tolerance.
    """
    alphas = {name: (alpha, max(1, round(alpha))) for name, alpha in real_alphas(job, rule).items()}
    errors = {name: near / alpha - 1 for name, (alpha, near) in alphas.items()}
    worst = max(errors, key=lambda name: abs(errors[name]))
    if abs(errors[worst]) > job.tolerance:
        asked = next(m for m in job.modules if m.module == worst)
        alpha, near = alphas[worst]
        raise CannotCarryError(
            f"{title} takes whole alphas only. {worst} needs alpha = {alpha:.6g} for its scale of {asked.scaling:.6g} "
            f"at rank {asked.r}; {near} would make it {scaling(rule, near, asked.r):.6g}, off by {errors[worst]:+.2%}, "
            f"and --alpha-tolerance allows {job.tolerance:.2%}. {_advice(job, rule, ways_out)}"
        )
    return {name: near for name, (_, near) in alphas.items()}, abs(errors[worst])


def _advice(job: Job, rule: str, more: Sequence[str]) -> str:
    ways = []
    near = fitting_scale(job.modules, rule, job.tolerance)
    if near is not None:
        ways.append(f"plan again with --scale {near:.6g}, which whole alphas carry")
    if rule == "rslora" and _off(job.modules, "lora", 1.0) <= job.tolerance:
        ways.append("plan again with --scaling lora, under which the same scales need whole alphas")
    ways += [*more, "take a trainer with real alphas (peft, trl, unsloth)"]
    return "Either " + ", or ".join(ways) + "."


def _off(modules: Sequence[Asked], rule: str, factor: float) -> float:
    """Return the largest relative error of whole alphas when every scale is multiplied by `factor`."""
    worst = 0.0
    for module in modules:
        alpha = alpha_for(rule, module.scaling * factor, module.r)
        worst = max(worst, abs(max(1, round(alpha)) / alpha - 1))
    return worst


def fitting_scale(modules: Sequence[Asked], rule: str, tolerance: float) -> float | None:
    """Return the scale nearest to the planned one that whole alphas carry; None without one, or with several scales.

    >>> q = Asked("q", (8, 8), 32, lora_alpha=11.3, scaling=11.3 / 32**0.5)
    >>> round(fitting_scale((q,), "rslora", 1e-3) * 32**0.5, 9)  # alpha 11
    11.0
    """
    scale = modules[0].scaling
    if any(not math.isclose(m.scaling, scale, rel_tol=1e-9) for m in modules):
        return None
    kinds = {m.r: m for m in modules}  # alpha depends on the rank alone
    rank = Counter(m.r for m in modules).most_common(1)[0][0]
    unit = alpha_for(rule, scale, rank)
    start = max(1, round(unit))
    for step in range(_TRIES):
        for whole in (start - step, start + step):
            if whole >= 1 and _off(tuple(kinds.values()), rule, whole / unit) <= tolerance:
                return scale * whole / unit
    return None


def common_pair(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> tuple[int, float]:
    """Return the (rank, alpha) that most modules have; of several, the one that comes first."""
    return Counter((r, alphas[name]) for name, r in ranks.items()).most_common(1)[0][0]
