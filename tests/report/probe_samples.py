"""Records of a probe and of a counter-test, made by hand."""

from __future__ import annotations

from typing import Any

from rankwise.records import (
    CounterMove,
    CounterTestRecord,
    PlannedModule,
    PlanRecord,
    ProbeCapacity,
    ProbeGradient,
    ProbeLook,
    ProbeRate,
    ProbeRecord,
    ProbeRow,
    SweepCell,
)

HEAD: dict[str, Any] = {
    "rankwise": "0.1.0",
    "created": "2026-01-02T03:04:05+00:00",
    "command": ("rankwise", "probe", "model", "data"),
    "device": "cpu",
    "seed": 0,
}


def probe_record(**changed: Any) -> ProbeRecord:
    """Return a record of two modules and three rows."""
    plan = PlanRecord(
        format=PlanRecord.FORMAT,
        **HEAD,
        rule="rslora",
        modules=(
            PlannedModule(
                module="layers.0.q_proj", shape=(8, 8), r=8, lora_alpha=16.0, scaling=5.66, kept_energy_share=None
            ),
        ),
        params=128,
        budget=None,
        relative_error=None,
        learning_rate=3e-3,
        why="Rank 8: a reason. `rankwise check` says more.",
    )
    gradient = {"stable_rank": 1.5, "rank_90": 2, "rank_99": 4}
    fields: dict[str, Any] = {
        "format": ProbeRecord.FORMAT,
        **HEAD,
        "model": "model",
        "data": "facts <b>.jsonl",
        "examples": 3,
        "measured_examples": 3,
        "tokens": 30,
        "target_tokens": 9,
        "max_length": 64,
        "target_modules": ("layers.0.q_proj",),
        "bits_to_learn": 9.5,
        "base_bits": 30.0,
        "form_bits": 8.5,
        "repeated_bits": 12.0,
        "bits_by_example": {"0": 0.5, "0.5": 1.0, "1": 8.0},
        "base_bits_by_example": {"0": 9.0, "0.5": 10.0, "1": 11.0},
        "known_rows": 0,
        "repeated_rows": 2,
        "rows": tuple(
            ProbeRow(row=i, tokens=3, base_bits=10.0 + i - 1, formed_bits=7.0, news_bits=bits)
            for i, bits in enumerate((8.0, 1.0, 0.5))
        ),
        "adaptation_rank": 4,
        "adaptation_rate": 1e-3,
        "adaptation_steps": (10, 0),
        "adaptation": (ProbeLook(half=0, step=0, bits_per_token=3.0),),
        "apart": True,
        "epochs": 20.0,
        "job": "facts",
        "job_given": False,
        "capacity": ProbeCapacity(
            bits_per_param=0.2,
            bits_per_param_interval=(0.1, 0.4),
            source="somewhere",
            exposures=45.0,
            params_per_rank=16,
            params=47.5,
            min_rank=3,
            rank_interval=(2, 6),
        ),
        "gradient": (
            ProbeGradient(
                module="layers.0.q_proj", shape=(8, 8), energy=4.0, effective_rank=2.5, coherence=0.2, **gradient
            ),
            ProbeGradient(
                module="layers.0.v_proj",
                shape=(8, 8),
                energy=0.0,
                stable_rank=None,
                effective_rank=None,
                rank_90=0,
                rank_99=0,
                coherence=None,
            ),
        ),
        "gradient_examples": 3,
        "rates": tuple(ProbeRate(learning_rate=10.0**-k, loss=2.0, smoothed=2.0) for k in (4, 3, 2)),
        "recommendation": plan,
        "decided": False,
        "sweep": (SweepCell(rank=8, scaling="rslora", lora_alpha=16.0, learning_rate=3e-3, why="the best guess"),),
        "caveats": ("A caveat that comes first.",),
        "findings": (),
        "seconds": 1.0,
    }
    return ProbeRecord(**(fields | changed))


def counter_record(**changed: Any) -> CounterTestRecord:
    """Return a record in which a larger rank helps."""
    nothing = {"gain": None, "gain_interval": None}
    fields: dict[str, Any] = {
        "format": CounterTestRecord.FORMAT,
        **HEAD,
        "model": "model",
        "adapter": "runs/adapter",
        "data": "data",
        "examples": 40,
        "judged_examples": 40,
        "rank": 1,
        "scaling": 4.0,
        "effective_rank": 1.0,
        "learning_rate": 1e-2,
        "optimizer": "adamw",
        "steps": 40,
        "batch_size": 16,
        "seeds": (0, 1),
        "start_loss": 2.0,
        "base_loss": 5.0,
        "least_gain": 0.02,
        "moves": (
            CounterMove(move="as it is", text="as it is", rank=1, factor=1.0, losses=(1.9, 1.9), loss=1.9, **nothing),
            CounterMove(
                move="rank",
                text="rank 1 -> 4",
                rank=4,
                factor=4.0,
                losses=(1.0, 1.1),
                loss=1.05,
                gain=0.85,
                gain_interval=(0.2, 1.5),
            ),
            CounterMove(
                move="rate", text="rate 0.01 -> 0.04", rank=1, factor=4.0, losses=(None, 1.0), loss=None, **nothing
            ),
        ),
        "verdict": "starved by rank",
        "text": "rank 1 -> 4 lowers the loss.",
        "caveats": ("The loss is that of rows the adapter was trained on.",),
        "findings": (),
        "seconds": 1.0,
    }
    return CounterTestRecord(**(fields | changed))


RECORDS = {"probe": probe_record(), "counter-test": counter_record()}
