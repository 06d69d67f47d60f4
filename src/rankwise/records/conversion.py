"""conversion/1: what became of an adapter that was written in another rank, rule, layout or format.

In: figures of each module. Out: the record.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from rankwise.records.base import Part, Record, Skipped, data_frame


class Setting(Part, frozen=True, kw_only=True):
    """Rank, alpha and rule of one module, and the factor on B @ A that follows.

    Attributes:
        r: rank of the factors.
        lora_alpha: alpha; None where the format has none, or where several adapters were merged.
        scaling: the factor on B @ A.
        rule: "lora", "rslora" or "unscaled"; None where the factor stands for itself.
    """

    r: int
    lora_alpha: float | None
    scaling: float
    rule: str | None


class ConvertedModule(Part, frozen=True, kw_only=True):
    """What became of one module; experts have one entry each.

    Attributes:
        module: dotted path, or the name that the source gives.
        shape: (out_features, in_features).
        kind: "linear", "embedding", "conv" or "expert".
        before: of the source; of a merge, of the factors laid side by side.
        after: as written.
        rank: number of directions kept; `after.r` is larger where it was filled with zeros.
        dtype: storage dtype of the factors as written.
        norm: Frobenius norm of the update, scaling * B @ A, before.
        kept_energy_share: share of its energy in the directions kept.
        error_before_cast: norm(new - old) / norm(old) before the factors are rounded to their dtype.
        relative_error: the same of the factors as written, with the scaling as written.
        exact: whether the update is the same, bit for bit, in float32.
    """

    module: str
    shape: tuple[int, int]
    kind: str
    before: Setting
    after: Setting
    rank: int
    dtype: str
    norm: float
    kept_energy_share: float
    error_before_cast: float
    relative_error: float
    exact: bool


class Addend(Part, frozen=True, kw_only=True):
    """An adapter that went into the sum, and its weight."""

    source: str
    weight: float


class ServedScale(Part, frozen=True, kw_only=True):
    """What a runtime would do with the files as written.

    Attributes:
        runtime: its name.
        right: whether it loads the file, and applies the factor that is meant to every module.
        lowest: smallest of (factor applied) / (factor meant) over the modules.
        highest: largest of them.
        wrong: modules that get another factor than is meant.
    """

    runtime: str
    right: bool
    lowest: float
    highest: float
    wrong: int


class ConversionRecord(Record, frozen=True, kw_only=True):
    """conversion/1: what became of an adapter.

    Attributes:
        source: the adapter, as given.
        adapters: all adapters that went into it with their weights; one where nothing was merged.
        out: where it was written.
        source_format: "peft", "kohya", "diffusers", "mlx" or "cloneofsimo".
        out_format: as written: "peft", "kohya", "diffusers" or "mlx".
        rule: scaling rule as written, or None where modules have different ones.
        choice: how the rank was chosen, in words such as "rank 16"; None where it was kept.
        runtime: what it was made for, or None.
        baked: whether the scale is folded into B, and all modules padded to one rank, with lora_alpha = r.
        exact: whether every update is the same, bit for bit, in float32.
        relative_error: over all modules together, as written: norm(new - old) / norm(old).
        params: entries of the factors as written, padding counted.
        modules: one entry a module, in the order of the file.
        carried: tensors that are no factors and were copied.
        left_out: modules and tensors that are not in the result, and why.
        runtimes: what each runtime would do with it.
        notes: what else there is to know, a sentence or two each.
    """

    FORMAT: ClassVar[str] = "rankwise/conversion/1"

    source: str
    adapters: tuple[Addend, ...]
    out: str
    source_format: str
    out_format: str
    rule: str | None
    choice: str | None
    runtime: str | None
    baked: bool
    exact: bool
    relative_error: float
    params: int
    modules: tuple[ConvertedModule, ...]
    carried: tuple[str, ...]
    left_out: tuple[Skipped, ...]
    runtimes: tuple[ServedScale, ...]
    notes: tuple[str, ...]

    def to_dataframe(self) -> Any:
        """Return one row a module as a pandas DataFrame (needs pandas)."""
        rows = []
        for m in self.modules:
            row = msgspec.structs.asdict(m)
            for when in ("before", "after"):
                row |= {f"{name}_{when}": value for name, value in msgspec.structs.asdict(row.pop(when)).items()}
            rows.append(row)
        return data_frame(rows)

    def __repr__(self) -> str:
        how = "exact" if self.exact else f"relative error {self.relative_error:.2g}"
        return (
            f"ConversionRecord({self.source!r} -> {self.out!r}, {self.out_format}: {len(self.modules)} modules, {how})"
        )
