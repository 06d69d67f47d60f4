"""Plans of planted spectra: what the page tests draw."""

from __future__ import annotations

from typing import Any

import msgspec
import page_samples

import rankwise
from rankwise.records import LeftOut, PlannedModule, PlanRecord, SpectraRecord

HOSTILE = "<img src=x onerror=window.hacked=1>{{7*7}}"


def fixed(record: PlanRecord, **more: Any) -> PlanRecord:
    head: dict[str, Any] = {"created": page_samples.FIXED["created"], "rankwise": "0.1.0"}
    return msgspec.structs.replace(record, **(head | more))


def bare() -> PlanRecord:
    """A plan that no spectra stand behind, as another command may make it."""
    planned = PlannedModule(
        module="layers.0.q_proj", shape=(4, 8), r=2, lora_alpha=4.0, scaling=2.0, kept_energy_share=None
    )
    return PlanRecord(
        format=PlanRecord.FORMAT,
        rankwise="0.1.0",
        created=page_samples.FIXED["created"],
        command=(),
        device="cpu",
        seed=None,
        rule="lora",
        modules=(planned,),
        params=24,
        budget=None,
        relative_error=None,
        learning_rate=1e-3,
        why="planted",
    )


def hostile() -> PlanRecord:
    spectra = page_samples.record([page_samples.module(f"layers.{k}.{HOSTILE}", [2, 1, 0.5]) for k in range(3)])
    made = rankwise.plan(spectra, budget="rank:1")
    left = LeftOut(module=HOSTILE, shape=(2, 2), reason=HOSTILE, energy=None)
    return fixed(made, why=HOSTILE, source=HOSTILE, left_out=(*made.left_out, left))


def delta() -> SpectraRecord:
    return page_samples.delta(layers=4, n=48)


RECORDS: dict[str, PlanRecord] = {
    "budget": fixed(rankwise.plan(page_samples.adapter(layers=4), budget="rank:4")),
    "energy": fixed(rankwise.plan(delta(), energy=0.9)),
    "signal": fixed(rankwise.plan(delta(), signal=True)),
    "uniform": fixed(rankwise.plan(page_samples.adapter(layers=2), rank=4)),
    "one": fixed(rankwise.plan(page_samples.record([page_samples.module("lone", [1.0])]), energy=0.9)),
    "bare": bare(),
    "hostile": hostile(),
}
