"""Extractions with made-up numbers: what the page tests draw."""

from __future__ import annotations

from page_samples import FIXED
from run_samples import HOSTILE

from rankwise.records import (
    Calibration,
    ExtractedModule,
    ExtractionRecord,
    Finding,
    NotExtracted,
    WholeModule,
)


def module(name: str, *, error: float = 0.1, rank: int = 8, **more: object) -> ExtractedModule:
    """Return one module whose cast costs two hundredths of its error."""
    given = {
        "module": name,
        "kind": "linear",
        "shape": (64, 48),
        "r": rank,
        "lora_alpha": float(rank),
        "scaling": 1.0,
        "relative_norm": 0.02,
        "kept_energy_share": 1 - error**2,
        "relative_error": error,
        "relative_error_uncast": error / 1.02,
        "least_relative_error": error / 1.0205,
        "route": "subspace",
    }
    return ExtractedModule(**(given | more))  # type: ignore[arg-type]


def record(modules: tuple[ExtractedModule, ...], **more: object) -> ExtractionRecord:
    """Return an extraction of these modules."""
    given = {
        **FIXED,
        "format": ExtractionRecord.FORMAT,
        "command": ("rankwise", "extract", "base", "tuned", "out", "--rank", "8"),
        "device": "cpu",
        "seed": 0,
        "base": "base",
        "tuned": "tuned",
        "out": "out",
        "choice": "rank",
        "wanted": 8,
        "rule": "lora",
        "dtype": "bfloat16",
        "params": sum(m.r * sum(m.shape) for m in modules),
        "relative_error": 0.1,
        "carried_energy_share": 0.98,
        "modules": modules,
        "whole": (),
        "left_out": (),
        "unchanged": 3,
        "target_modules": ("q_proj",),
        "calibration": None,
        "findings": (),
    }
    return ExtractionRecord(**(given | more))  # type: ignore[arg-type]


CALIBRATED = Calibration(
    data="texts.jsonl",
    samples=64,
    tokens=4096,
    held_out=16,
    modules=2,
    output_error=0.06,
    output_error_plain=0.1,
    base_loss=3.2,
    tuned_loss=2.5,
    adapter_loss=2.6,
    plain_loss=2.7,
    loss_difference=0.2,
    loss_difference_plain=0.25,
    inputs="tuned",
)

MANY = tuple(module(f"model.layers.{i}.q_proj", error=0.05 + i / 500, rank=4 + i % 5) for i in range(60))

RECORDS: dict[str, ExtractionRecord] = {
    "extraction": record(MANY, choice="energy", wanted=0.99),
    "whole extraction": record(
        (module("a.b", error=0.0), module("a.c", error=0.0)),
        relative_error=0.0,
        whole=(WholeModule(module="norm", tensors=("weight",), params=48, relative_norm=0.1),),
    ),
    "calibrated extraction": record(
        (module("a.b", output_error=0.05, output_error_plain=0.1), module("a.c", notes=("rank 9 was cut to 8",))),
        calibration=CALIBRATED,
        choice="signal",
        wanted=None,
    ),
    "hostile extraction": record(
        (module(HOSTILE),),
        base=HOSTILE,
        tuned=HOSTILE,
        out=HOSTILE,
        choice="plan",
        wanted=HOSTILE,
        left_out=(NotExtracted(module=HOSTILE, reason=HOSTILE, relative_norm=0.3, energy=1.0),),
        findings=(Finding(code="left-out", level="warning", text=HOSTILE),),
    ),
}
