"""The records: what every stage hands to the next, as JSON that is readable without torch.

In: numbers and words. Out: frozen structs, their JSON, and readers that refuse what they do not know.
This module owns every format, its version and its history.

History: spectra/1 and simulation/1 since 0.1.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import msgspec

from rankwise._version import __version__
from rankwise.errors import MissingDependencyError, RecordError

Level = Literal["info", "warning", "error"]


def version() -> str:
    """Return the version of rankwise."""
    return __version__


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a record: all fields by name, unknown fields refused."""


class Finding(Part, frozen=True, kw_only=True):
    """One thing worth saying about a source.

    Attributes:
        code: stable, in kebab case; its page is `docs/reference/findings.md#code`.
        level: "info", "warning" or "error".
        text: what was seen, in which modules, and what it means.
    """

    code: str
    level: Level
    text: str


class Skipped(Part, frozen=True, kw_only=True):
    """A weight that was left out, and why."""

    module: str
    reason: str


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


class Record(Part, frozen=True, kw_only=True):
    """What every record begins with.

    Attributes:
        format: "rankwise/KIND/1".
        rankwise: version that wrote it.
        created: UTC, ISO 8601.
        command: argv of the command, or the call spelled as one.
        device: where the numbers were computed.
        seed: of the random numbers that went into it.
    """

    FORMAT: ClassVar[str] = ""

    format: str
    rankwise: str
    created: str
    command: tuple[str, ...]
    device: str
    seed: int | None

    def to_json(self) -> str:
        """Return the record as JSON text, one field a line, numbers finite or null."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a record back; refuses another kind, a newer format and unknown fields.

        Raises:
            RecordError: the text is not such a record.
        """
        return from_json(text, cls)


def _frame(rows: list[dict[str, Any]]) -> Any:
    try:
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingDependencyError("pandas", "dev", "to_dataframe()") from error
    return pd.DataFrame(rows)


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
        return _frame([msgspec.structs.asdict(m) for m in self.modules])

    def __repr__(self) -> str:
        s = self.summary
        mean = "unknown" if s.rank_90_mean is None else f"{s.rank_90_mean:.1f}"
        codes = ", ".join(f.code for f in s.findings) or "none"
        return (
            f"SpectraRecord({self.kind} of {self.source!r}: {s.modules} modules, "
            f"mean rank for 90 % of the energy {mean}, findings: {codes})"
        )


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
        return _frame(rows)

    def __repr__(self) -> str:
        parts = []
        for name, update in self.updates.items():
            parts.append(f"{name} ({update.planted}) needs rank {update.rank_90} for 90 % of its energy")
        return f"SimulationRecord(alpha {self.lora_alpha:g}: {'; '.join(parts)})"


RECORDS: dict[str, type[Record]] = {kind.FORMAT: kind for kind in (SpectraRecord, SimulationRecord)}
"""Format string -> record class."""

R = TypeVar("R", bound=Record)


def _finite(value: Any) -> Any:
    """Replace what JSON has no word for: NaN and infinities by None, lone surrogates by their escape."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):  # a path whose bytes are not UTF-8 has lone surrogates, which JSON cannot hold
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def to_json(record: Record) -> str:
    """Return a record as indented JSON; every number is a finite float or null."""
    plain = _finite(msgspec.to_builtins(record))
    return msgspec.json.format(msgspec.json.encode(plain), indent=1).decode() + "\n"


def from_json(text: str | bytes, kind: type[R], where: str = "the record") -> R:
    """Read a record of one kind.

    Args:
        text: JSON.
        kind: the class wanted.
        where: the file's name, for messages.

    Raises:
        RecordError: not JSON, another kind, a newer format, an unknown field or a value of a wrong type.
    """
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is not JSON: {error}") from error
    found = head.get("format") if isinstance(head, dict) else None
    if not isinstance(found, str) or not found.startswith("rankwise/"):
        raise RecordError(f"{where} is not a rankwise record: it has no field `format` of the form rankwise/KIND/1")
    if found != kind.FORMAT:
        wanted_kind, wanted_version = kind.FORMAT.split("/")[1:3]
        found_kind, _, found_version = found.removeprefix("rankwise/").partition("/")
        newer = re.fullmatch("[0-9]{1,9}", found_version) is not None and int(found_version) > int(wanted_version)
        if found_kind == wanted_kind and newer:
            raise RecordError(
                f"{where} is {found}, newer than the {kind.FORMAT} that rankwise {version()} reads; "
                "update rankwise: pip install -U rankwise"
            )
        raise RecordError(f"{where} is {found}; wanted {kind.FORMAT}")
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise RecordError(f"{where} is not a whole {kind.FORMAT} record: {error}") from error


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record of one kind from a file.

    Raises:
        RecordError: the file cannot be read or is not such a record.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    return from_json(text, kind, str(path))


def read_any_record(path: Path) -> Record:
    """Read a record of whatever kind a file says it is.

    Raises:
        RecordError: the file cannot be read, or says a kind that this version does not know.
    """
    try:
        text = path.read_bytes()
        found = json.loads(text).get("format")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise RecordError(f"{path} is not a rankwise record: {error}") from error
    if not isinstance(found, str):
        raise RecordError(f"{path} is not a rankwise record: it has no field `format` of the form rankwise/KIND/1")
    for kind in RECORDS.values():  # one of a known kind and another version is refused in its words
        if found.rpartition("/")[0] == kind.FORMAT.rpartition("/")[0]:
            return from_json(text, kind, str(path))
    raise RecordError(f"{path} is {found!r}; this version reads: {', '.join(sorted(RECORDS))}")
