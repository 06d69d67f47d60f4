"""From figures of modules to the health of groups: averages, bounds, words.

In: what was measured in each LoRA module at one step, and the losses. Out: frozen rows of finite numbers or None, and
a status with its reason. Plain Python: no torch, no model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rankwise.errors import UsageError
from rankwise.records import Skipped

Status = Literal["ok", "starved", "unstable"]
STATUSES: Final[tuple[Status, ...]] = ("ok", "starved", "unstable")
"""From best to worst; the place in this table is the number that is logged."""

EVERYTHING: Final = "all"
"""The group that holds every module measured."""

FIGURES: Final = (
    "branch_ratio",
    "update_norm",
    "update_ratio",
    "norm",
    "relative_norm",
    "effective_rank",
    "stable_rank",
    "grad_norm_A",
    "grad_norm_B",
)
"""What is measured in a module, and averaged over a group; `ModuleHealth` says what each means."""


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """When to look, and from where on a figure is called out. A bound of None is not applied.

    The bounds are heuristics, not theorems: they are far from what healthy runs show, and only say where to look.

    Attributes:
        interval: an observation at every multiple of it; in optimizer steps.
        first_step: one more observation early on, so that a short run shows something; None for none.
        adapter: the name of the PEFT adapter that is watched.
        warm_up: starving is judged from this step on: B starts at zero, and so does the learning rate of most runs.
        starved_branch_ratio: below it, the adapter hardly takes part in the forward pass. Set on the shipped model
            (docs, facts and rank): runs that had recalled 1 % of the bits stood at 0.06 to 0.07, all others at
            0.12 and above. Other models will differ.
        unstable_branch_ratio: above it, the adapter branch is louder than the frozen branch that it is meant to
            correct. Not for initialisations that move a part of W into the adapter (PiSSA, OLoRA): set None there.
        unstable_update_ratio: above it, one optimizer step replaces so large a share of the adapter.
        settled_after: the update ratio is judged from this step on; B A grows from zero, so that after t equal steps
            the ratio is near 1 / t, whatever the learning rate.
        unstable_loss_factor: the loss counts as risen where its mean since the last observation is above this many
            times the lowest such mean, and above the first one. Not applied once a loss of zero or less was seen:
            the losses of policy gradients say nothing here.

    Raises:
        UsageError: a number is out of range.
    """

    interval: int = 50
    first_step: int | None = 10
    adapter: str = "default"
    warm_up: int = 100
    starved_branch_ratio: float | None = 0.08
    unstable_branch_ratio: float | None = 1.0
    unstable_update_ratio: float | None = 0.5
    settled_after: int = 10
    unstable_loss_factor: float | None = 2.0

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("first_step", 1), ("warm_up", 0), ("settled_after", 0)):
            value = getattr(self, name)
            if value is None and name == "first_step":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} must be a whole number of {least} or more, got {value!r}")
        for name in (
            field.name for field in dataclasses.fields(self) if field.name.startswith(("starved_", "unstable_"))
        ):
            bound = getattr(self, name)
            number = isinstance(bound, int | float) and not isinstance(bound, bool)
            if bound is not None and not (number and 0 < bound < math.inf):
                raise UsageError(f"{name} must be a finite number above 0, or None, got {bound!r}")

    def next_due(self, step: int) -> int:
        """Return the first step after `step` at which there is an observation.

        >>> MonitorConfig(interval=50, first_step=10).next_due(0), MonitorConfig(interval=50).next_due(50)
        (10, 100)
        """
        due = (step // self.interval + 1) * self.interval
        return min(due, self.first_step) if self.first_step is not None and self.first_step > step else due


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleHealth:
    """What one step showed of one LoRA module. A figure that cannot be known is None.

    Attributes:
        module: dotted path, without PEFT's prefixes.
        group: as `rankwise.tuning.groups` names it.
        r: rank.
        scaling: s, the factor on B A.
        branch_ratio: RMS of s B A x over RMS of the frozen branch W x, over all positions of the step's forward
            passes, padding included, dropout as in training.
        update_norm: ||s (B A - B' A')||_F, with B' A' before the optimizer step.
        update_ratio: update_norm / norm.
        norm: ||s B A||_F.
        relative_norm: norm / ||W||_F; None for a quantised W.
        effective_rank: exp(entropy of p), p_i = sigma_i^2 / energy of B A; None for B A = 0.
        stable_rank: energy / sigma_1^2; None for B A = 0.
        grad_norm_A: ||gradient of A||_F as the optimizer saw it (after clipping); None where there was none.
        grad_norm_B: likewise of B.
        not_finite: the figures that came out infinite or NaN; they are None above.
    """

    module: str
    group: str
    r: int
    scaling: float | None
    branch_ratio: float | None = None
    update_norm: float | None = None
    update_ratio: float | None = None
    norm: float | None = None
    relative_norm: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    grad_norm_A: float | None = None  # noqa: N815 - the name in the contract
    grad_norm_B: float | None = None  # noqa: N815 - the name in the contract
    not_finite: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHealth:
    """The health of a group of modules at one step.

    Each figure is the geometric mean over the modules in which it is known and above zero, and 0 where it is 0 in all
    of them: figures of modules differ by factors, and an expert that saw no token must not empty its group. None
    where no module knows the figure, or where it is not finite in one: a mean over the others would hide that.

    Attributes:
        modules: how many there are.
        r: rank, None where the modules differ.
        scaling: s, None where the modules differ.
        status: "ok", "starved" or "unstable".
        reason: what was seen, in words.
    """

    step: int
    group: str
    modules: int
    r: int | None
    scaling: float | None
    branch_ratio: float | None
    update_norm: float | None
    update_ratio: float | None
    norm: float | None
    relative_norm: float | None
    effective_rank: float | None
    stable_rank: float | None
    grad_norm_A: float | None  # noqa: N815 - the name in the contract
    grad_norm_B: float | None  # noqa: N815 - the name in the contract
    status: Status
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """All that was seen at one step.

    Attributes:
        step: optimizer steps done.
        loss: mean of the losses given since the last observation; None where none was given or it is not finite.
        status: the worst of the groups; None where nothing can be measured (`supported` is False).
        reason: what was seen, in words.
        groups: one row per group, then the row "all".
        modules: one row per module measured.
        skipped: modules of the adapter that cannot be measured, and why.
        seconds: what this observation cost, its hooks included; on a GPU the kernels of the hooks are not in it.
        supported: False under ZeRO-3 and FSDP, which leave no whole factor to measure.
    """

    step: int
    loss: float | None
    status: Status | None
    reason: str
    groups: tuple[GroupHealth, ...] = ()
    modules: tuple[ModuleHealth, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    seconds: float = 0.0
    supported: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values: finite numbers, words, None, lists and dicts of them."""
        return {
            "step": self.step,
            "loss": self.loss,
            "status": self.status,
            "reason": self.reason,
            "groups": [group.to_dict() for group in self.groups],
            "modules": [
                dataclasses.asdict(module) | {"not_finite": list(module.not_finite)} for module in self.modules
            ],
            "skipped": [{"module": item.module, "reason": item.reason} for item in self.skipped],
            "seconds": self.seconds,
            "supported": self.supported,
        }


@dataclass(frozen=True, slots=True)
class LossSeen:
    """The losses of a run as means between observations: the latest, the first, the lowest. NaN where one was NaN."""

    latest: float
    first: float
    lowest: float

    def then(self, latest: float) -> LossSeen:
        """Return the losses with one more mean; one that is not finite is the latest and no more."""
        lowest = min(self.lowest, latest) if math.isfinite(latest) else self.lowest
        first = self.first if math.isfinite(self.first) else latest
        return LossSeen(latest, first, lowest)

    def has_risen(self, factor: float | None) -> bool:
        """Tell whether the latest mean is above the first and above `factor` times the lowest; not for factor None."""
        return factor is not None and self.lowest > 0 and self.latest > max(self.first, factor * self.lowest)


NO_LOSS: Final = LossSeen(math.nan, math.nan, math.inf)
"""Before the first loss."""


def module_health(
    module: str, group: str, *, r: int, scaling: float, figures: Mapping[str, float | None]
) -> ModuleHealth:
    """Return the row of a module; figures that are not finite become None and are named."""
    bad = tuple(name for name in FIGURES if (value := figures.get(name)) is not None and not math.isfinite(value))
    known = {name: None if name in bad else figures.get(name) for name in FIGURES}
    if not math.isfinite(scaling):
        bad = ("scaling", *bad)
    return ModuleHealth(
        module=module, group=group, r=r, scaling=scaling if math.isfinite(scaling) else None, not_finite=bad, **known
    )


def average(values: Sequence[float | None]) -> float | None:
    """Return the geometric mean of the values above zero, 0 where all known values are 0, None where none is known.

    >>> average([1.0, 4.0, None, 0.0]), average([0.0, None]), average([None])
    (2.0, 0.0, None)
    """
    known = [value for value in values if value is not None]
    logs = [math.log(value) for value in known if value > 0]
    if not logs:
        return 0.0 if known else None
    return math.exp(math.fsum(logs) / len(logs))


def group_health(
    step: int, group: str, rows: Sequence[ModuleHealth], config: MonitorConfig, *, loss: LossSeen | None = None
) -> GroupHealth:
    """Return the averages over a group of modules, and the verdict on them."""
    bad = [(row.module, name) for row in rows for name in row.not_finite]
    spoilt = {name for _, name in bad}
    figures = {name: None if name in spoilt else average([getattr(row, name) for row in rows]) for name in FIGURES}
    status, reason = judge(step, figures, config, not_finite=bad, loss=loss)
    ranks, scalings = {row.r for row in rows}, {row.scaling for row in rows}
    return GroupHealth(
        step=step,
        group=group,
        modules=len(rows),
        r=ranks.pop() if len(ranks) == 1 else None,
        scaling=scalings.pop() if len(scalings) == 1 else None,
        status=status,
        reason=reason,
        **figures,
    )


def judge(
    step: int,
    figures: Mapping[str, float | None],
    config: MonitorConfig,
    *,
    not_finite: Sequence[tuple[str, str]] = (),
    loss: LossSeen | None = None,
) -> tuple[Status, str]:
    """Return the status of a group's figures and what was seen, in words. The first rule that fits decides.

    Args:
        step: optimizer steps done.
        figures: name -> average; names of `FIGURES`, what is missing or None is not judged.
        config: the bounds.
        not_finite: (module, figure) for each figure that came out infinite or NaN.
        loss: the losses so far, for the group that is judged by them.
    """
    branch, update = figures.get("branch_ratio"), figures.get("update_ratio")
    calmer = "a smaller learning rate or scale would tell"
    if not_finite:
        module, figure = not_finite[0]
        more = f" and {len(not_finite) - 1} more figures" if len(not_finite) > 1 else ""
        return "unstable", f"{figure} of {module}{more} came out infinite or NaN; {calmer}"
    if loss is not None and not math.isfinite(loss.latest):
        return "unstable", f"the loss is not finite; {calmer}"
    if loss is not None and loss.has_risen(config.unstable_loss_factor):
        seen = f"the loss rose to {loss.latest:.3g}: it began at {loss.first:.3g} and was down at {loss.lowest:.3g}"
        return "unstable", f"{seen}; {calmer}"
    if _above(branch, config.unstable_branch_ratio):
        seen = f"the adapter branch is {branch:.3g} times as loud as the frozen branch"
        return "unstable", f"{seen} (bound {config.unstable_branch_ratio:g}); if the loss does not fall, {calmer}"
    if step >= config.settled_after and _above(update, config.unstable_update_ratio):
        seen = f"one optimizer step moved the adapter by {update:.3g} of its own norm"
        return "unstable", f"{seen} (bound {config.unstable_update_ratio:g}); {calmer}"
    if step >= config.warm_up and _above(config.starved_branch_ratio, branch):
        seen = f"after {step} steps the adapter branch is at {branch:.2g} of the frozen branch"
        words = "if the loss has stopped falling, a larger scale or learning rate would tell"
        return "starved", f"{seen} (bound {config.starved_branch_ratio:g}); {words}"
    return "ok", "no figure is out of its bounds" + ("; the branch ratio is not known" if branch is None else "")


def _above(value: float | None, bound: float | None) -> bool:
    """Tell whether a value is above a bound; not where either is None."""
    return value is not None and bound is not None and value > bound


def worst(groups: Sequence[GroupHealth]) -> tuple[Status, str]:
    """Return the worst status among the groups, and the reason of the first group that has it."""
    status = max((group.status for group in groups), key=STATUSES.index)
    found = [group for group in groups if group.status == status]
    if status == "ok":
        return status, found[0].reason
    others = [group.group for group in found[1:] if group.group != EVERYTHING]
    more = f" (likewise {', '.join(others)})" if others else ""
    return status, f"{found[0].group}: {found[0].reason}{more}"
