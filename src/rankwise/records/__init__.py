"""The records: what every stage hands to the next, as JSON that is readable without torch.

In: numbers and words. Out: frozen structs, their JSON, and readers that refuse what they do not know.
This package owns every format, its version and its history.

History: spectra/1, simulation/1, plan/1, run/1, dry-run/1, recall/1, demo/1, conversion/1, extraction/1,
lint/1, stability/1, probe/1 and counter-test/1 since 0.1.
"""

from __future__ import annotations

import json
from pathlib import Path

from rankwise.errors import RecordError
from rankwise.records.base import Finding, Level, Part, R, Record, Skipped, from_json, now, to_json, version
from rankwise.records.conversion import Addend, ConversionRecord, ConvertedModule, ServedScale, Setting
from rankwise.records.demo import DemoRecord, DemoRun
from rankwise.records.extraction import (
    Calibration,
    ExtractedModule,
    ExtractionRecord,
    NotExtracted,
    WholeModule,
)
from rankwise.records.lint import LintFinding, LintRecord, LintScale, LintSource
from rankwise.records.plan import (
    CurvePoint,
    LeftOut,
    Optimality,
    PlanChoice,
    PlannedModule,
    PlanRecord,
    UniformRank,
)
from rankwise.records.probe import (
    CounterMove,
    CounterTestRecord,
    ProbeCapacity,
    ProbeGradient,
    ProbeLook,
    ProbeRate,
    ProbeRecord,
    ProbeRow,
    SweepCell,
)
from rankwise.records.report import ReportFile, ReportPart, ReportRecord
from rankwise.records.runs import (
    AttributeRecall,
    DryRunRecord,
    Forgetting,
    GroupHealth,
    GroupScale,
    LossPoint,
    Memory,
    Recall,
    RecallRecord,
    RecallScore,
    RunConfig,
    RunRecord,
    Status,
    score_words,
)
from rankwise.records.simulation import ScaledError, ScaleRow, SimulatedUpdate, SimulationRecord, SimulationRow
from rankwise.records.spectra import ModuleSpectrum, SpectraRecord, SpectraSummary
from rankwise.records.stability import (
    StabilityAdvice,
    StabilityCell,
    StabilityConfig,
    StabilityRecord,
    StabilityRow,
    StabilityVerdict,
    Transfer,
    TransferProof,
    Verdict,
    exponent_words,
)
from rankwise.records.sweep import (
    Edge,
    Effect,
    Estimate,
    RankEffect,
    RateExponent,
    Score,
    SweepBest,
    SweepConfig,
    SweepDryRunRecord,
    SweepPoint,
    SweepRecord,
    SweepRun,
)

__all__ = [
    "RECORDS",
    "Addend",
    "AttributeRecall",
    "Calibration",
    "ConversionRecord",
    "ConvertedModule",
    "CounterMove",
    "CounterTestRecord",
    "CurvePoint",
    "DemoRecord",
    "DemoRun",
    "DryRunRecord",
    "Edge",
    "Effect",
    "Estimate",
    "ExtractedModule",
    "ExtractionRecord",
    "Finding",
    "Forgetting",
    "GroupHealth",
    "GroupScale",
    "LeftOut",
    "Level",
    "LintFinding",
    "LintRecord",
    "LintScale",
    "LintSource",
    "LossPoint",
    "Memory",
    "ModuleSpectrum",
    "NotExtracted",
    "Optimality",
    "Part",
    "PlanChoice",
    "PlanRecord",
    "PlannedModule",
    "ProbeCapacity",
    "ProbeGradient",
    "ProbeLook",
    "ProbeRate",
    "ProbeRecord",
    "ProbeRow",
    "RankEffect",
    "RateExponent",
    "Recall",
    "RecallRecord",
    "RecallScore",
    "Record",
    "ReportFile",
    "ReportPart",
    "ReportRecord",
    "RunConfig",
    "RunRecord",
    "ScaleRow",
    "ScaledError",
    "Score",
    "ServedScale",
    "Setting",
    "SimulatedUpdate",
    "SimulationRecord",
    "SimulationRow",
    "Skipped",
    "SpectraRecord",
    "SpectraSummary",
    "StabilityAdvice",
    "StabilityCell",
    "StabilityConfig",
    "StabilityRecord",
    "StabilityRow",
    "StabilityVerdict",
    "Status",
    "SweepBest",
    "SweepCell",
    "SweepConfig",
    "SweepDryRunRecord",
    "SweepPoint",
    "SweepRecord",
    "SweepRun",
    "Transfer",
    "TransferProof",
    "UniformRank",
    "Verdict",
    "WholeModule",
    "any_record",
    "exponent_words",
    "from_json",
    "now",
    "read_any_record",
    "read_record",
    "score_words",
    "to_json",
    "version",
]

RECORDS: dict[str, type[Record]] = {
    kind.FORMAT: kind
    for kind in (
        SpectraRecord,
        SimulationRecord,
        PlanRecord,
        RunRecord,
        DryRunRecord,
        RecallRecord,
        DemoRecord,
        LintRecord,
        StabilityRecord,
        ConversionRecord,
        ExtractionRecord,
        ProbeRecord,
        CounterTestRecord,
        SweepRecord,
        SweepDryRunRecord,
        ReportRecord,
    )
}
"""Format string -> record class."""


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
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    return any_record(text, str(path))


def any_record(text: bytes, where: str) -> Record:
    """Read a record of whatever kind a text says it is.

    Args:
        text: JSON.
        where: the file's name, for messages.

    Raises:
        RecordError: it is no record, or of a kind that this version does not know.
    """
    try:
        found = json.loads(text).get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise RecordError(f"{where} is not a rankwise record: {error}") from error
    if not isinstance(found, str):
        raise RecordError(f"{where} is not a rankwise record: it has no field `format` of the form rankwise/KIND/1")
    for kind in RECORDS.values():  # one of a known kind and another version is refused in its words
        if found.rpartition("/")[0] == kind.FORMAT.rpartition("/")[0]:
            return from_json(text, kind, where)
    raise RecordError(f"{where} is {found!r}; this version reads: {', '.join(sorted(RECORDS))}")
