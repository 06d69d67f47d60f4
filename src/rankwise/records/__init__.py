"""The records: what every stage hands to the next, as JSON that is readable without torch.

In: numbers and words. Out: frozen structs, their JSON, and readers that refuse what they do not know.
This package owns every format, its version and its history.

History: spectra/1, simulation/1, plan/1, run/1, dry-run/1, recall/1 and demo/1 since 0.1.
"""

from __future__ import annotations

import json
from pathlib import Path

from rankwise.errors import RecordError
from rankwise.records.base import Finding, Level, Part, R, Record, Skipped, from_json, now, to_json, version
from rankwise.records.plan import PlannedModule, PlanRecord
from rankwise.records.runs import (
    AttributeRecall,
    DemoRecord,
    DemoRun,
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

__all__ = [
    "RECORDS",
    "AttributeRecall",
    "DemoRecord",
    "DemoRun",
    "DryRunRecord",
    "Finding",
    "Forgetting",
    "GroupHealth",
    "GroupScale",
    "Level",
    "LossPoint",
    "Memory",
    "ModuleSpectrum",
    "Part",
    "PlanRecord",
    "PlannedModule",
    "Recall",
    "RecallRecord",
    "RecallScore",
    "Record",
    "RunConfig",
    "RunRecord",
    "ScaleRow",
    "ScaledError",
    "SimulatedUpdate",
    "SimulationRecord",
    "SimulationRow",
    "Skipped",
    "SpectraRecord",
    "SpectraSummary",
    "Status",
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
    for kind in (SpectraRecord, SimulationRecord, PlanRecord, RunRecord, DryRunRecord, RecallRecord, DemoRecord)
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
