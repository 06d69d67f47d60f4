"""simulation/1: style and fact updates from planted spectra.

In: figures over ranks. Out: the record.
"""

from __future__ import annotations

from typing import Any, ClassVar

from rankwise.records.base import Part, Record, data_frame


class ScaleRow(Part, frozen=True, kw_only=True):
    """The two scalings at one rank."""

    rank: int
    lora: float
    rslora: float


class ScaledError(Part, frozen=True, kw_only=True):
    """Relative error of a truncated SVD multiplied by each rule's scaling."""

    lora: float
    rslora: float


class SimulationRow(Part, frozen=True, kw_only=True):
    """One rank of one planted update.

    Attributes:
        rank: number of directions kept.
        energy_share: share of the energy in them, E.
        truncation_error: relative error of the plain truncated SVD, sqrt(1 - E).
        scaled_error: relative error of the truncated SVD times each rule's scaling s, measured on the
            matrices.
        closed_form: the same from E and s alone: sqrt(1 - E s (2 - s)).
    """

    rank: int
    energy_share: float
    truncation_error: float
    scaled_error: ScaledError
    closed_form: ScaledError


class SimulatedUpdate(Part, frozen=True, kw_only=True):
    """One planted update: its spectrum, and what a rank-r approximation keeps of it.

    Attributes:
        planted: the recipe, e.g. "linear:5:0.5:4".
        shape: (out_features, in_features).
        singular_values: of the update with its noise, largest first.
        energy: squared Frobenius norm.
        stable_rank: energy / sigma_1^2.
        effective_rank: exp(entropy of sigma_i^2 / energy).
        rank_90: smallest rank that holds 90 % of the energy.
        rank_99: the same for 99 %.
        rows: one entry a rank.
    """

    planted: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    energy: float
    stable_rank: float | None
    effective_rank: float | None
    rank_90: int
    rank_99: int
    rows: tuple[SimulationRow, ...]


class SimulationRecord(Record, frozen=True, kw_only=True):
    """simulation/1: style and fact updates from planted spectra.

    Attributes:
        lora_alpha: alpha of the scalings.
        size: the updates are size x size.
        noise: standard deviation of the iid noise added to each update.
        scales: the two scalings over ranks.
        updates: "style" and "facts" (and "planted", where --spectrum plants one).
        notes: what scaling collapse is not, and what it is.
    """

    FORMAT: ClassVar[str] = "rankwise/simulation/1"

    lora_alpha: float
    size: int
    noise: float
    scales: tuple[ScaleRow, ...]
    updates: dict[str, SimulatedUpdate]
    notes: tuple[str, ...]

    def to_dataframe(self) -> Any:
        """Return one row an update and rank as a pandas DataFrame (needs pandas)."""
        rows = []
        for name, update in self.updates.items():
            for row in update.rows:
                rows.append(
                    {
                        "update": name,
                        "rank": row.rank,
                        "energy_share": row.energy_share,
                        "truncation_error": row.truncation_error,
                        "scaled_error_lora": row.scaled_error.lora,
                        "scaled_error_rslora": row.scaled_error.rslora,
                    }
                )
        return data_frame(rows)

    def __repr__(self) -> str:
        parts = []
        for name, update in self.updates.items():
            parts.append(f"{name} ({update.planted}) needs rank {update.rank_90} for 90 % of its energy")
        return f"SimulationRecord(alpha {self.lora_alpha:g}: {'; '.join(parts)})"
