"""plan/1: a rank and an alpha for every module.

In: ranks. Out: the record that trainers' configs are written from.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from rankwise.records.base import Finding, Part, Record, data_frame


class PlannedModule(Part, frozen=True, kw_only=True):
    """What one module gets.

    Attributes:
        module: dotted path of the weight, without `.weight`.
        shape: (out_features, in_features).
        r: rank; 0 leaves the module out.
        lora_alpha: alpha.
        scaling: the factor on B @ A that follows from them under the plan's rule.
        kept_energy_share: share of the energy that this rank keeps, or None where no spectrum was measured.
        energy: squared Frobenius norm of its update, or None.
        signal_rank: number of singular values above the noise edge, or None.
        rounding_limited: whether energy past the signal rank is rounding noise here.
        weight: factor on its squared error in what the plan minimises.
        group: name of the group that shares this rank, or None.
    """

    module: str
    shape: tuple[int, int]
    r: int
    lora_alpha: float
    scaling: float
    kept_energy_share: float | None
    energy: float | None = None
    signal_rank: int | None = None
    rounding_limited: bool = False
    weight: float = 1.0
    group: str | None = None


class LeftOut(Part, frozen=True, kw_only=True):
    """A module that gets no rank.

    Attributes:
        module: dotted path.
        shape: (out_features, in_features).
        reason: why.
        energy: squared Frobenius norm of its update, or None.
        counted: whether its energy counts as error in the plan's figures: it was up for choice and got nothing.
    """

    module: str
    shape: tuple[int, int]
    reason: str
    energy: float | None
    counted: bool = False


class PlanChoice(Part, frozen=True, kw_only=True):
    """What the ranks were chosen by.

    Attributes:
        kind: "budget", "energy", "relative_error", "signal", "rank", or another word of a later command.
        value: parameters, share, error or rank; None for "signal".
        text: as it was asked for, such as "rank:16".
        per_module: whether every module had to reach the value by itself.
        within_signal: whether directions at or under the noise edge counted for nothing.
        relative: whether every module's energy was counted as 1.
        weighted: whether weights were given for some modules.
        min_rank: smallest rank of every module.
        max_rank: largest, or None.
        multiple_of: ranks are multiples of it.
        fuse: whether weights that runtimes join share a rank.
    """

    kind: str
    value: float | None
    text: str
    per_module: bool = False
    within_signal: bool = False
    relative: bool = False
    weighted: bool = False
    min_rank: int = 0
    max_rank: int | None = None
    multiple_of: int = 1
    fuse: bool = False


class Optimality(Part, frozen=True, kw_only=True):
    """How good the ranks are among all that the choice allows.

    Attributes:
        level: squared error that the last direction taken saves for each parameter (weighted), where the cut lies.
        exact: whether no allowed ranks are better, up to rounding.
        kept_share: share of the weighted energy that the plan keeps.
        share_bound: share that no allowed ranks of this many parameters exceed.
        params_bound: parameters that no allowed ranks reaching the target undercut; None under a budget.
    """

    level: float | None
    exact: bool
    kept_share: float
    share_bound: float
    params_bound: int | None


class UniformRank(Part, frozen=True, kw_only=True):
    """One rank for all modules of the plan and those it left out by choice: what the plan is compared with.

    It obeys the plan's multiples and its largest rank.

    Attributes:
        r: rank; at most the smaller side of each weight.
        params: parameters.
        relative_error: over all these modules, or None where the values on file do not say.
    """

    r: int
    params: int
    relative_error: float | None


class CurvePoint(Part, frozen=True, kw_only=True):
    """What a uniform rank costs and leaves, and what allocated ranks leave at that cost.

    Attributes:
        r: the uniform rank.
        params: what it costs.
        uniform_error: relative error of it, or None.
        planned_error: relative error of ranks chosen for that many parameters under the plan's options, or None.
    """

    r: int
    params: int
    uniform_error: float | None
    planned_error: float | None


class PlanRecord(Record, frozen=True, kw_only=True):
    """plan/1: ranks and alphas under a budget.

    Attributes:
        rule: scaling rule of all modules.
        modules: one entry a module.
        params: parameters of the adapter.
        budget: what was allowed, or None.
        relative_error: norm(dW - dW_r) / norm(dW) over all modules, or None.
        learning_rate: to train with, or None where it is not known.
        why: the reasons, in words.
        source: what was planned for, as given, or None.
        base: what it was compared with, or None.
        kind: "adapter" or "delta", or None where no spectra were measured.
        choice: what the ranks were chosen by, or None.
        scale: the factor on B @ A that all modules share, or None where they differ.
        reference_rank: rank at which `--lora-alpha` was read, or None.
        max_lora_rank: what the runtime to serve with has to be told, or None.
        optimality: how good the ranks are among all that were allowed, or None.
        uniform: the largest uniform rank that costs no more than the budget, or than the plan where there was none.
        uniform_same_error: the smallest uniform rank whose error is no larger, or None.
        curve: errors over parameters, uniform and planned.
        left_out: modules without a rank.
        findings: worst first.
    """

    FORMAT: ClassVar[str] = "rankwise/plan/1"

    rule: str
    modules: tuple[PlannedModule, ...]
    params: int
    budget: int | None
    relative_error: float | None
    learning_rate: float | None
    why: str
    source: str | None = None
    base: str | None = None
    kind: Literal["adapter", "delta"] | None = None
    choice: PlanChoice | None = None
    scale: float | None = None
    reference_rank: int | None = None
    max_lora_rank: int | None = None
    optimality: Optimality | None = None
    uniform: UniformRank | None = None
    uniform_same_error: UniformRank | None = None
    curve: tuple[CurvePoint, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    findings: tuple[Finding, ...] = ()

    def to_dataframe(self) -> Any:
        """Return one row a module as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(m) for m in self.modules])

    def __repr__(self) -> str:
        error = "" if self.relative_error is None else f", relative error {self.relative_error:.3g}"
        return f"PlanRecord({len(self.modules)} modules, {self.params:,} parameters, {self.rule}{error})"
