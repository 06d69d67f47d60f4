"""rankwise: what rank, what scaling, what learning rate? Measure LoRA updates instead of guessing.

Each command of `rankwise --help` is one function of the same name here. Importing this package is fast;
numpy, scipy and torch are loaded by the functions that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise._version import __version__

# eager, so that the names are the functions: importing the submodules later would bind the modules to them
from rankwise.reporting import figures, report
from rankwise.scaling import SCALINGS, scaling

if TYPE_CHECKING:
    from rankwise.adapters.conversion import convert
    from rankwise.adapters.extraction import extract
    from rankwise.errors import RankwiseError
    from rankwise.inspection import inspect
    from rankwise.linting import lint
    from rankwise.planning import plan
    from rankwise.records import (
        ConversionRecord,
        CounterTestRecord,
        DemoRecord,
        DryRunRecord,
        ExtractionRecord,
        Finding,
        LintRecord,
        ModuleSpectrum,
        PlanRecord,
        ProbeRecord,
        RecallRecord,
        ReportRecord,
        RunRecord,
        SimulationRecord,
        SpectraRecord,
        SpectraSummary,
        StabilityRecord,
        SweepDryRunRecord,
        SweepRecord,
        read_record,
    )
    from rankwise.report import render_page
    from rankwise.simulation import lora_approximation, simulate
    from rankwise.sweeping.running import sweep
    from rankwise.tuning.callback import RankMonitorCallback
    from rankwise.tuning.countertest import counter_test
    from rankwise.tuning.demonstration import demo
    from rankwise.tuning.health import MonitorConfig
    from rankwise.tuning.memory import dry_run
    from rankwise.tuning.monitor import RankMonitor
    from rankwise.tuning.probing.measuring import probe
    from rankwise.tuning.recalling import recall
    from rankwise.tuning.stability.checking import check
    from rankwise.tuning.training import train

_HOMES = {
    "extract": "rankwise.adapters.extraction",
    "RankwiseError": "rankwise.errors",
    "convert": "rankwise.adapters.conversion",
    "inspect": "rankwise.inspection",
    "plan": "rankwise.planning",
    "ConversionRecord": "rankwise.records",
    "CounterTestRecord": "rankwise.records",
    "DemoRecord": "rankwise.records",
    "DryRunRecord": "rankwise.records",
    "ExtractionRecord": "rankwise.records",
    "Finding": "rankwise.records",
    "LintRecord": "rankwise.records",
    "lint": "rankwise.linting",
    "PlanRecord": "rankwise.records",
    "ProbeRecord": "rankwise.records",
    "RecallRecord": "rankwise.records",
    "ReportRecord": "rankwise.records",
    "RunRecord": "rankwise.records",
    "ModuleSpectrum": "rankwise.records",
    "SimulationRecord": "rankwise.records",
    "SpectraRecord": "rankwise.records",
    "SpectraSummary": "rankwise.records",
    "StabilityRecord": "rankwise.records",
    "SweepDryRunRecord": "rankwise.records",
    "SweepRecord": "rankwise.records",
    "read_record": "rankwise.records",
    "render_page": "rankwise.report",
    "lora_approximation": "rankwise.simulation",
    "simulate": "rankwise.simulation",
    "MonitorConfig": "rankwise.tuning.health",
    "RankMonitor": "rankwise.tuning.monitor",
    "RankMonitorCallback": "rankwise.tuning.callback",
    "check": "rankwise.tuning.stability.checking",
    "demo": "rankwise.tuning.demonstration",
    "dry_run": "rankwise.tuning.memory",
    "counter_test": "rankwise.tuning.countertest",
    "probe": "rankwise.tuning.probing.measuring",
    "recall": "rankwise.tuning.recalling",
    "sweep": "rankwise.sweeping.running",
    "train": "rankwise.tuning.training",
}
"""Public name -> module that holds it."""

__all__ = [
    "SCALINGS",
    "ConversionRecord",
    "CounterTestRecord",
    "DemoRecord",
    "DryRunRecord",
    "ExtractionRecord",
    "Finding",
    "LintRecord",
    "ModuleSpectrum",
    "MonitorConfig",
    "PlanRecord",
    "ProbeRecord",
    "RankMonitor",
    "RankMonitorCallback",
    "RankwiseError",
    "RecallRecord",
    "ReportRecord",
    "RunRecord",
    "SimulationRecord",
    "SpectraRecord",
    "SpectraSummary",
    "StabilityRecord",
    "SweepDryRunRecord",
    "SweepRecord",
    "__version__",
    "check",
    "convert",
    "counter_test",
    "demo",
    "dry_run",
    "extract",
    "figures",
    "inspect",
    "lint",
    "lora_approximation",
    "plan",
    "probe",
    "read_record",
    "recall",
    "render_page",
    "report",
    "scaling",
    "simulate",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
