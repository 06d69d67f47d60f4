"""Which rank every module keeps when an adapter is converted.

In: what the user asked for, and the modules. Out: a rank a module, known beforehand where it does not depend on the
spectrum, else from its singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise import criteria
from rankwise.adapters.merging import Joined
from rankwise.adapters.parts import Array
from rankwise.adapters.stored_units import stack_name
from rankwise.checkpoints.model import LoraModule
from rankwise.errors import UsageError
from rankwise.records import PlanRecord, read_record


@dataclass(frozen=True, slots=True)
class RankChoice:
    """How ranks are chosen; at most one of the four is set, and none keeps every rank.

    Attributes:
        rank: the same for every module.
        energy: share of each module's energy to keep, in (0, 1].
        relative_error: largest error of each module, in [0, 1).
        plan: a plan/1 record, read from a file.
    """

    rank: int | None = None
    energy: float | None = None
    relative_error: float | None = None
    plan: PlanRecord | None = None

    @property
    def by_spectrum(self) -> bool:
        """Whether it takes the singular values to tell a rank."""
        return self.energy is not None or self.relative_error is not None

    @property
    def words(self) -> str | None:
        """The choice in words, or None."""
        if self.rank is not None:
            return f"rank {self.rank}"
        if self.energy is not None:
            return f"energy {self.energy:g} of every module"
        if self.relative_error is not None:
            return f"relative error {self.relative_error:g} of every module"
        return None if self.plan is None else "the ranks of a plan"


def rank_choice(
    rank: int | None, energy: float | None, relative_error: float | None, plan: Path | None, *, signal: bool
) -> RankChoice:
    """Check what the user asked for.

    Raises:
        UsageError: more than one choice, or a value outside its range.
        RecordError: the plan cannot be read.
    """
    if signal:
        raise UsageError(
            "--signal keeps what stands above the rounding noise of tuned - base; an adapter has no such noise to "
            "measure against. Give --rank, --energy, --relative-error or --plan."
        )
    given = {"--rank": rank, "--energy": energy, "--relative-error": relative_error, "--plan": plan}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} each choose the rank; give one of them")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank must be 1 or more, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy must be above 0 and at most 1 (a share of the energy), got {energy:g}")
    if relative_error is not None and not 0 <= relative_error < 1:
        raise UsageError(f"--relative-error must be at least 0 and below 1, got {relative_error:g}")
    return RankChoice(rank, energy, relative_error, None if plan is None else read_record(plan, PlanRecord))


def rank_by_values(choice: RankChoice, module: LoraModule, sigma: Array) -> int:
    """Return the rank that a share of the energy or an error asks for."""
    values = tuple(float(v) for v in sigma)
    spectrum = criteria.Spectrum(module.module, module.shape, values, sum(v * v for v in values))
    if choice.energy is not None:
        return criteria.rank_for_energy(spectrum, choice.energy)
    return criteria.rank_for_relative_error(spectrum, choice.relative_error or 0.0)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks that are known beforehand.

    Attributes:
        by_unit: unit -> rank; 0 leaves it out.
        notes: what was capped, raised or left as it was.
    """

    by_unit: dict[str, int]
    notes: tuple[str, ...]


def known_ranks(choice: RankChoice, modules: Sequence[Joined]) -> Ranks:
    """Return the ranks of a choice that does not depend on the spectrum.

    Raises:
        UsageError: the plan is for another model.
    """
    if choice.rank is not None:
        return _one_rank(choice.rank, modules)
    if choice.plan is not None:
        return _planned(choice.plan, modules)
    return Ranks({j.unit.name: j.r for j in modules}, ())


def _one_rank(rank: int, modules: Sequence[Joined]) -> Ranks:
    low = [j for j in modules if j.r < rank]
    notes: tuple[str, ...] = ()
    if low:
        notes = (
            f"{_count(low, modules)} had a rank below {rank} and were filled with zeros, which changes nothing. The "
            "new directions are zero in both factors and get no gradient, so training on would not use them.",
        )
    return Ranks({j.unit.name: rank for j in modules}, notes)


def _planned(plan: PlanRecord, modules: Sequence[Joined]) -> Ranks:
    wanted: dict[str, int] = {}
    for planned in plan.modules:  # experts of a stack share a rank
        name = stack_name(planned.module)
        wanted[name] = max(planned.r, wanted.get(name, 0))
    for left in plan.left_out:
        wanted.setdefault(stack_name(left.module), 0)
    there = {j.unit.name for j in modules}
    strangers = [name for name, r in wanted.items() if name not in there and r]
    if strangers:
        raise UsageError(
            f"the plan has ranks for modules that the adapter does not have ({strangers[0]}"
            + (f" and {len(strangers) - 1} more" if len(strangers) > 1 else "")
            + f"; the adapter has {modules[0].unit.name}): it was made for another model or other targets"
        )
    capped = [j for j in modules if wanted.get(j.unit.name, 0) > j.r]
    unplanned = [j for j in modules if j.unit.name not in wanted]
    notes = []
    if capped:
        notes.append(
            f"The plan gives {_count(capped, modules)} a rank above the adapter's ({capped[0].unit.name}: "
            f"{wanted[capped[0].unit.name]} above {capped[0].r}); these keep their rank, as there is no more to hold."
        )
    if unplanned:
        notes.append(f"{_count(unplanned, modules)} are not in the plan and keep their rank.")
    notes.append("Of the plan the ranks are used. Its alphas are for training; here every module keeps its own scale.")
    return Ranks({j.unit.name: min(j.r, wanted.get(j.unit.name, j.r)) for j in modules}, tuple(notes))


def _count(some: Sequence[Joined], everything: Sequence[Joined]) -> str:
    return f"{len(some)} of {len(everything)} modules"
