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
        Finding,
        ModuleSpectrum,
        SimulationRecord,
        SpectraRecord,
        SpectraSummary,
        read_record,
    )
    from rankwise.report import render_page
    from rankwise.simulation import lora_approximation, simulate

_HOMES = {
    "RankwiseError": "rankwise.errors",
    "inspect": "rankwise.inspection",
    "Finding": "rankwise.records",
    "ModuleSpectrum": "rankwise.records",
    "SimulationRecord": "rankwise.records",
    "SpectraRecord": "rankwise.records",
    "SpectraSummary": "rankwise.records",
    "read_record": "rankwise.records",
    "render_page": "rankwise.report",
    "lora_approximation": "rankwise.simulation",
    "simulate": "rankwise.simulation",
}
"""Public name -> module that holds it."""

__all__ = [
    "SCALINGS",
    "Finding",
    "ModuleSpectrum",
    "RankwiseError",
    "SimulationRecord",
    "SpectraRecord",
    "SpectraSummary",
    "__version__",
    "inspect",
    "lora_approximation",
    "read_record",
    "render_page",
    "scaling",
    "simulate",
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
