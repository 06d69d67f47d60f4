"""plan/1: a rank and an alpha for every module.

In: ranks. Out: the record that trainers' configs are written from.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from rankwise.records.base import Part, Record, data_frame


class PlannedModule(Part, frozen=True, kw_only=True):
    """What one module gets.

    Attributes:
        module: dotted path of the weight, without `.weight`.
        shape: (out_features, in_features).
        r: rank; 0 leaves the module out.
        lora_alpha: alpha.
        scaling: the factor on B @ A that follows from them under the plan's rule.
        kept_energy_share: share of the energy that this rank keeps, or None where no spectrum was measured.
    """

    module: str
    shape: tuple[int, int]
    r: int
    lora_alpha: float
    scaling: float
    kept_energy_share: float | None


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
    """

    FORMAT: ClassVar[str] = "rankwise/plan/1"

    rule: str
    modules: tuple[PlannedModule, ...]
    params: int
    budget: int | None
    relative_error: float | None
    learning_rate: float | None
    why: str

    def to_dataframe(self) -> Any:
        """Return one row a module as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(m) for m in self.modules])

    def __repr__(self) -> str:
        return f"PlanRecord({len(self.modules)} modules, {self.params:,} parameters, {self.rule})"
