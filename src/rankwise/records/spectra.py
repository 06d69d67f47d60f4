"""spectra/1: what an adapter, or tuned - base, is made of.

In: the spectra of modules. Out: the record.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from rankwise.records.base import Finding, Part, Record, Skipped, data_frame


class ModuleSpectrum(Part, frozen=True, kw_only=True):
    """What the delta of one module is made of. A field that cannot be known is None.

    Attributes:
        module: dotted path of the weight, without `.weight`; experts end in `[i]`.
        shape: (out_features, in_features).
        r: rank of the factors (adapters).
        lora_alpha: alpha (adapters).
        scaling: the factor on B @ A that the trainer applied (adapters).
        rule: "lora", "rslora" or "unscaled" (adapters).
        dtype: storage dtype in the spelling of safetensors: "BF16", "F16", "F32", "F64".
        singular_values: of scaling * B @ A, or of tuned - base; largest first. Accurate to 1e-4 relative
            for every value above 1e-3 of the largest.
        complete: whether every value that is not listed is zero: those past an adapter's rank, and all of
            an unchanged weight.
        energy: squared Frobenius norm, measured on the delta itself to 1e-6.
        stable_rank: energy / sigma_1^2.
        effective_rank: exp(entropy of sigma_i^2 / energy).
        rank_90: smallest rank that holds 90 % of the energy.
        rank_99: the same for 99 %.
        relative_norm: norm(dW) / norm(W_base), Frobenius.
        unchanged_share: share of the entries that are bit-equal in base and tuned.
        noise_edge: largest singular value that rounding to the dtype alone would produce here.
        signal_rank: number of singular values above the noise edge.
        rounding_limited: whether rounding makes up so much of the delta that energy ranks mislead.
        warnings: codes of the findings that concern this module.
    """

    module: str
    shape: tuple[int, int]
    r: int | None
    lora_alpha: float | None
    scaling: float | None
    rule: str | None
    dtype: str
    singular_values: tuple[float, ...]
    complete: bool
    energy: float | None
    stable_rank: float | None
    effective_rank: float | None
    rank_90: int | None
    rank_99: int | None
    relative_norm: float | None
    unchanged_share: float | None
    noise_edge: float | None
    signal_rank: int | None
    rounding_limited: bool
    warnings: tuple[str, ...] = ()


class SpectraSummary(Part, frozen=True, kw_only=True):
    """All modules taken together.

    Attributes:
        modules: number of modules measured.
        params: entries of all deltas measured (out * in summed), not of the factors.
        energy_by_rank: rank -> mean over the modules of the energy share in that many directions.
        effective_rank_mean: mean over the modules where it is known.
        rank_90_mean: mean over the modules where it is known.
        findings: worst first.
    """

    modules: int
    params: int
    energy_by_rank: dict[str, float | None]
    effective_rank_mean: float | None
    rank_90_mean: float | None
    findings: tuple[Finding, ...]


class SpectraRecord(Record, frozen=True, kw_only=True):
    """spectra/1: the spectra of an adapter, or of tuned - base.

    Attributes:
        source: what was inspected, as given.
        base: what it was compared with, as given.
        kind: "adapter" (scaling * B @ A) or "delta" (tuned - base).
        modules: one entry a module, in the order of the file.
        skipped: what was left out, and why.
        summary: all modules taken together.
    """

    FORMAT: ClassVar[str] = "rankwise/spectra/1"

    source: str
    base: str | None
    kind: Literal["adapter", "delta"]
    modules: tuple[ModuleSpectrum, ...]
    skipped: tuple[Skipped, ...]
    summary: SpectraSummary

    def to_dataframe(self) -> Any:
        """Return one row a module as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(m) for m in self.modules])

    def __repr__(self) -> str:
        s = self.summary
        mean = "unknown" if s.rank_90_mean is None else f"{s.rank_90_mean:.1f}"
        codes = ", ".join(f.code for f in s.findings) or "none"
        return (
            f"SpectraRecord({self.kind} of {self.source!r}: {s.modules} modules, "
            f"mean rank for 90 % of the energy {mean}, findings: {codes})"
        )
