"""rankwise: what rank, what scaling, what learning rate? Measure LoRA updates instead of guessing.

Each command of `rankwise --help` is one function of the same name here. Importing this package is fast;
numpy, scipy and torch are loaded by the functions that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise._version import __version__

# eager, so that the name is the function: importing the submodule later would bind the module to it
from rankwise.scaling import SCALINGS, scaling

if TYPE_CHECKING:
    from rankwise.errors import RankwiseError
    from rankwise.inspection import inspect
    from rankwise.records import (
        DemoRecord,
        DryRunRecord,
        Finding,
        ModuleSpectrum,
        PlanRecord,
        RecallRecord,
        RunRecord,
        SimulationRecord,
        SpectraRecord,
        SpectraSummary,
        read_record,
    )
    from rankwise.report import render_page
    from rankwise.simulation import lora_approximation, simulate
    from rankwise.tuning.callback import RankMonitorCallback
    from rankwise.tuning.demonstration import demo
    from rankwise.tuning.health import MonitorConfig
    from rankwise.tuning.memory import dry_run
    from rankwise.tuning.monitor import RankMonitor
    from rankwise.tuning.recalling import recall
    from rankwise.tuning.training import train

_HOMES = {
    "RankwiseError": "rankwise.errors",
    "inspect": "rankwise.inspection",
    "DemoRecord": "rankwise.records",
    "DryRunRecord": "rankwise.records",
    "Finding": "rankwise.records",
    "PlanRecord": "rankwise.records",
    "RecallRecord": "rankwise.records",
    "RunRecord": "rankwise.records",
    "ModuleSpectrum": "rankwise.records",
    "SimulationRecord": "rankwise.records",
    "SpectraRecord": "rankwise.records",
    "SpectraSummary": "rankwise.records",
    "read_record": "rankwise.records",
    "render_page": "rankwise.report",
    "lora_approximation": "rankwise.simulation",
    "simulate": "rankwise.simulation",
    "MonitorConfig": "rankwise.tuning.health",
    "RankMonitor": "rankwise.tuning.monitor",
    "RankMonitorCallback": "rankwise.tuning.callback",
    "demo": "rankwise.tuning.demonstration",
    "dry_run": "rankwise.tuning.memory",
    "recall": "rankwise.tuning.recalling",
    "train": "rankwise.tuning.training",
}
"""Public name -> module that holds it."""

__all__ = [
    "SCALINGS",
    "DemoRecord",
    "DryRunRecord",
    "Finding",
    "ModuleSpectrum",
    "MonitorConfig",
    "PlanRecord",
    "RankMonitor",
    "RankMonitorCallback",
    "RankwiseError",
    "RecallRecord",
    "RunRecord",
    "SimulationRecord",
    "SpectraRecord",
    "SpectraSummary",
    "__version__",
    "demo",
    "dry_run",
    "inspect",
    "lora_approximation",
    "read_record",
    "recall",
    "render_page",
    "scaling",
    "simulate",
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
