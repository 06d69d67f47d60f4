"""The best uniform plan: one rank for all modules, for trainers that take no other.

In: modules of a plan and, where they were measured, their spectra. Out: the same modules at the largest rank that costs
no more parameters than the plan, and words that say what this costs in error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rankwise.errors import CannotCarryError
from rankwise.records import ModuleSpectrum, PlanRecord, SpectraRecord
from rankwise.records.plan import PlanChoice
from rankwise.scaling import alpha_for, scaling
from rankwise.trainers.model import Asked

Spectra = SpectraRecord | None


def uniform_plan(
    modules: Sequence[Asked], rule: str, choice: PlanChoice | None = None, budget: int | None = None
) -> tuple[Asked, ...]:
    """Return the modules at one rank, one alpha and one scale.

    The rank is the largest at which the adapter has no more parameters than the plan, or than the plan was allowed,
    within its multiples and its largest rank; of a plan for one rank in every module that rank, also where a weight has
    a smaller side. What all modules share is kept: their scale, or else their alpha.

    Raises:
        CannotCarryError: they share neither.

    >>> two = (Asked("q", (8, 8), 12, 24.0, 2.0), Asked("v", (8, 8), 4, 8.0, 2.0))
    >>> [(m.r, m.lora_alpha, m.scaling) for m in uniform_plan(two, "lora")]
    [(8, 16.0, 2.0), (8, 16.0, 2.0)]
    """
    allowed = max(sum(m.params for m in modules), budget or 0)
    rank = allowed // sum(sum(m.shape) for m in modules)  # 1 or more, since every module has that
    if choice is not None:
        rank = min(rank, choice.max_rank or rank)
        rank -= rank % choice.multiple_of if rank >= choice.multiple_of else 0
        if choice.kind == "rank" and choice.value is not None:
            rank = int(choice.value)
    scale, alpha = modules[0].scaling, modules[0].lora_alpha
    if all(math.isclose(m.scaling, scale, rel_tol=1e-9) for m in modules):
        alpha = alpha_for(rule, scale, rank)
        near = round(alpha)
        alpha = float(near) if near and math.isclose(alpha, near, rel_tol=1e-12) else alpha
    elif any(not math.isclose(m.lora_alpha, alpha, rel_tol=1e-9) for m in modules):
        low, high = min(m.scaling for m in modules), max(m.scaling for m in modules)
        raise CannotCarryError(
            f"the modules of the plan share neither scale ({low:.6g} to {high:.6g}) nor alpha, so that no uniform plan "
            "has the same meaning. Plan again with one --scale or one --lora-alpha."
        )
    return tuple(replace(m, r=rank, lora_alpha=alpha, scaling=scaling(rule, alpha, rank)) for m in modules)


def shares_meaning(modules: Sequence[Asked]) -> bool:
    """Tell whether all modules have one scale or one alpha, so that a uniform plan can have it too."""
    return any(
        all(math.isclose(value, values[0], rel_tol=1e-9) for value in values)
        for values in ([m.scaling for m in modules], [m.lora_alpha for m in modules])
    )


def cost_in_words(modules: Sequence[Asked], uniform: Sequence[Asked], plan: PlanRecord, spectra: Spectra) -> str:
    """Say what the uniform plan costs in error.

    Args:
        modules: as planned.
        uniform: the same at one rank.
        plan: the record, for the shares of energy it keeps.
        spectra: the spectra that the plan was made from, if they are at hand.
    """
    rank = uniform[0].r
    ranks = [m.r for m in modules]
    before, after = sum(m.params for m in modules), sum(m.params for m in uniform)
    if min(ranks) == max(ranks) == rank:
        return f"The plan is uniform as it is: rank {rank}."
    head = f"Uniform rank {rank} in place of ranks {min(ranks)} to {max(ranks)}: {after:,} parameters, "
    head += f"where the plan has {before:,}. "
    above = [m.module for m in uniform if m.r > min(m.shape)]
    if above:
        head += f"It is above the smaller side of {len(above)} weights (first {above[0]}), where it reaches no more. "
    # the record counts no parameters past the smaller side of a weight, where they add nothing to what is kept
    useful = sum(min(rank, *m.shape) * sum(m.shape) for m in uniform)
    points = [(u.r, u.params, u.relative_error) for u in (plan.uniform, plan.uniform_same_error) if u is not None]
    points += [(point.r, point.params, point.uniform_error) for point in plan.curve]
    exact = next((error for r, params, error in points if (r, params) == (rank, useful) and error is not None), None)
    if exact is not None and plan.relative_error is not None:
        return head + f"Relative error: {exact:.4f}, where the plan has {plan.relative_error:.4f}."
    measured = {m.module: m for m in spectra.modules} if spectra is not None else {}
    if all((s := measured.get(m.module)) is not None and s.energy is not None for m in modules):
        planned, flat = (_error({m.module: m.r for m in each}, measured) for each in (modules, uniform))
        most = "at most " if any(not s.complete and rank > len(s.singular_values) for s in measured.values()) else ""
        return head + f"Relative error over these modules: {most}{flat:.4f}, where the plan has {planned:.4f}."
    known = {m.module: m for m in plan.modules}
    left = before_left = total = 0.0
    for asked in modules:
        share, energy = known[asked.module].kept_energy_share, known[asked.module].energy
        if share is None or energy is None:
            return head + "What this costs in error is not known: the plan has no figures of spectra."
        # the largest values come first: the top k of r hold at least k / r of what all r hold
        left += energy * max(0.0, 1 - share * min(1.0, rank / asked.r))
        before_left += energy * max(0.0, 1 - share)
        total += energy
    if total <= 0:
        return head + "There is no update to lose."
    return head + (
        f"Relative error over these modules: at most {math.sqrt(left / total):.4f}, where the plan has "
        f"{math.sqrt(before_left / total):.4f}; the spectra would say exactly."
    )


def _error(ranks: Mapping[str, int], spectra: Mapping[str, ModuleSpectrum]) -> float:
    """Return norm(dW - dW_r) / norm(dW) over all modules; a spectrum cut short counts as zero past its end."""
    left = total = 0.0
    for name, rank in ranks.items():
        energy = spectra[name].energy or 0.0
        sigma = np.asarray(spectra[name].singular_values, dtype=np.float64)
        # the energy is measured apart, to 1e-6: of a complete list its own end says more exactly what is left
        rest = sigma[rank:] if spectra[name].complete else sigma[:rank]
        left += float(rest @ rest) if spectra[name].complete else max(0.0, energy - float(rest @ rest))
        total += energy
    return math.sqrt(left / total) if total > 0 else 0.0
