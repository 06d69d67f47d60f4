"""One rank for one delta: a fixed one, one by its spectrum, or one that a plan gives.

In: flags, and a delta. Out: a rank, why it is not the one asked for, and what is known of the energy it holds.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise import criteria, linalg
from rankwise.deltas import Delta
from rankwise.errors import CriterionError, RecordError, UsageError
from rankwise.noise import read_noise
from rankwise.records import PlannedModule, PlanRecord, read_record
from rankwise.scaling import SCALINGS, alpha_for, scaling

Array = NDArray[Any]

Kind = Literal["rank", "energy", "relative-error", "signal", "plan"]

FLAGS: Final = "--rank N, --energy SHARE, --relative-error X, --signal or --plan FILE"


@dataclass(frozen=True, slots=True)
class Need:
    """What one delta gets.

    Attributes:
        rank: 0 leaves it out.
        held: energy of the first `rank` values where the spectrum was taken.
        note: why the rank is not the one asked for, or empty.
        reason: why the rank is 0, or empty.
    """

    rank: int
    held: float | None = None
    note: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """How ranks are chosen.

    Attributes:
        kind: which rule.
        wanted: the number that came with it; the path of the plan; None for "signal".
        plan: module -> what the plan gives it.
        rule: scaling rule.
        lora_alpha: alpha of every module where it was given.
    """

    kind: Kind
    wanted: float | int | str | None
    rule: str
    lora_alpha: float | None
    plan: dict[str, PlannedModule] | None = None

    @property
    def needs_values(self) -> bool:
        """Whether the rank depends on the spectrum."""
        return self.kind in ("energy", "relative-error", "signal")

    def asks_for(self, module: str) -> bool:
        """Whether a plan gives a module a rank: what a plan names needs no flag."""
        return self.plan is not None and module in self.plan and self.plan[module].r > 0

    def need(self, delta: Delta, difference: Array, energy: float, *, seed: int, device: str) -> Need:
        """Return the rank of one delta that is finite and not zero.

        Raises:
            CriterionError: the criterion does not apply to this delta.
        """
        most = min(difference.shape)
        if self.kind == "rank":
            return _capped(int(self.wanted or 0), most)
        if self.plan is not None:
            planned = self.plan.get(delta.module)
            if planned is None:
                return Need(0, reason="the plan does not name it")
            if planned.shape not in (difference.shape, difference.shape[::-1]):
                raise UsageError(
                    f"{delta.module}: the plan says shape {planned.shape}, the checkpoints have {difference.shape}; "
                    "the plan is of another model"
                )
            return _capped(planned.r, most) if planned.r else Need(0, reason="the plan gives it rank 0")
        sigma = linalg.matrix_values(difference, device=device).sigma
        if self.kind == "signal":
            noise = read_noise(delta.base, delta.tuned, difference, sigma, seed=seed)
            if noise.signal_rank is None:
                return Need(0, reason="its noise edge cannot be known: the numbers are too small for float32")
            rank = noise.signal_rank
            reason = "no singular value stands above the noise edge" if rank == 0 else ""
        else:
            shape = (int(difference.shape[0]), int(difference.shape[1]))
            spectrum = criteria.Spectrum(delta.module, shape, tuple(float(v) for v in sigma), energy)
            wanted = float(self.wanted or 0.0)
            by = criteria.rank_for_energy if self.kind == "energy" else criteria.rank_for_relative_error
            rank = by(spectrum, wanted)
            reason = "rank 0 meets the criterion" if rank == 0 else ""
        return Need(rank, float(np.sum(sigma[:rank] ** 2)), reason=reason)

    def scale(self, module: str, rank: int) -> tuple[float, float]:
        """Return (lora_alpha, the factor on B @ A) of a module of this rank.

        Without a plan or an alpha, alpha is the rank: the factor is then 1 under `lora` and sqrt(r) under `rslora`,
        which the factors make up for. A whole alpha is carried by every reader of a config.
        """
        if self.plan is not None and module in self.plan:
            planned = self.plan[module]  # its factor is what was planned, also where the rank was cut
            return alpha_for(self.rule, planned.scaling, rank), planned.scaling
        alpha = self.lora_alpha if self.lora_alpha is not None else float(rank) if self.rule != "unscaled" else 1.0
        return alpha, scaling(self.rule, alpha, rank)


def _capped(rank: int, most: int) -> Need:
    return Need(rank) if rank <= most else Need(most, note=f"rank {rank} was cut to {most}, the smaller side")


def choose(
    *,
    rank: int | None,
    energy: float | None,
    relative_error: float | None,
    signal: bool,
    plan: str | Path | PlanRecord | None,
    rule: str | None,
    lora_alpha: float | None,
) -> Choice:
    """Check the flags and return the choice that they make.

    Raises:
        UsageError: not exactly one way of choosing, or a number out of its range.
        RecordError: the plan is no plan.
    """
    ways: dict[Kind, Any] = {
        "rank": rank,
        "energy": energy,
        "relative-error": relative_error,
        "signal": signal or None,
        "plan": plan,
    }
    given: list[Kind] = [kind for kind, value in ways.items() if value is not None]
    if len(given) != 1:
        got = "none" if not given else " and ".join(f"--{kind}" for kind in given)
        raise UsageError(f"extract needs one way of choosing ranks, {FLAGS}; got {got}")
    if rule is not None and rule not in SCALINGS:
        raise UsageError(f"--scaling must be one of {', '.join(SCALINGS)}; got {rule!r}")
    if lora_alpha is not None and not (math.isfinite(lora_alpha) and lora_alpha > 0):
        raise UsageError(f"--lora-alpha must be a finite number above 0, got {lora_alpha}")
    kind = given[0]
    if plan is not None:
        return _planned(plan, rule, lora_alpha)
    if kind == "rank" and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UsageError(f"--rank must be a whole number of 1 or more, got {rank!r}; for a share use --energy")
    if energy is not None and not 0 < energy <= 1:
        raise CriterionError(f"--energy must be above 0 and at most 1, got {energy}")
    if relative_error is not None and not 0 < relative_error < 1:
        raise CriterionError(f"--relative-error must be above 0 and below 1, got {relative_error}")
    return Choice(kind, None if kind == "signal" else ways[kind], rule or "lora", lora_alpha)


def _planned(plan: str | Path | PlanRecord, rule: str | None, lora_alpha: float | None) -> Choice:
    record = plan if isinstance(plan, PlanRecord) else read_record(Path(plan), PlanRecord)
    for flag, value, own in (("--scaling", rule, record.rule), ("--lora-alpha", lora_alpha, None)):
        if value is not None and value != own:
            raise UsageError(f"--plan gives rank, alpha and rule of every module; leave out {flag} {value}")
    if record.rule not in SCALINGS:
        raise RecordError(f"the plan's rule is {record.rule!r}; this version knows {', '.join(SCALINGS)}")
    twice = [name for name, count in Counter(m.module for m in record.modules).items() if count > 1]
    if twice:
        raise RecordError(f"the plan names {twice[0]} more than once; each module needs one rank")
    for m in record.modules:
        if m.r < 0 or (m.r and not (math.isfinite(m.scaling) and m.scaling > 0)):
            raise RecordError(
                f"the plan gives {m.module} rank {m.r} and scaling {m.scaling}; a rank is 0 or more, a scaling above 0"
            )
    where = "a plan" if isinstance(plan, PlanRecord) else str(plan)
    return Choice("plan", where, record.rule, None, {m.module: m for m in record.modules})
