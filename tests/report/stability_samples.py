"""Checks with made-up numbers that follow power laws: what the page tests draw."""

from __future__ import annotations

from typing import Any

import msgspec
from page_samples import FIXED

from rankwise.records import (
    Finding,
    Skipped,
    StabilityAdvice,
    StabilityCell,
    StabilityConfig,
    StabilityRecord,
    StabilityRow,
    StabilityVerdict,
    Transfer,
    TransferProof,
)

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=hacked()>\"'`&amp;{{7*7}}"
RANKS = (4, 16, 64)
GROUPS = {"all": 0.0, "attention/early": 0.05, "attention/late": 0.1, "mlp/early": -0.05, "mlp/late": -0.1}
LAWS = {("adamw", "lora"): -0.31, ("adamw", "rslora"): 0.19, ("sgd", "lora"): -1.25, ("sgd", "rslora"): -0.04}
VERDICTS = {-0.31: "collapsing", 0.19: "growing", -1.25: "collapsing", -0.04: "stable"}

replace = msgspec.structs.replace


def cell(rule: str, optimizer: str, group: str, step: int, **changed: Any) -> StabilityCell:
    """Return a cell whose branch goes like rank^e."""
    e = LAWS[optimizer, rule] + GROUPS[group]
    near = (round(e - 0.03, 6), round(e + 0.03, 6))
    fields: dict[str, Any] = {
        "rule": rule,
        "optimizer": optimizer,
        "init": "default",
        "learning_rate": 1e-3,
        "group": group,
        "step": step,
        "modules": 28 if group == "all" else 7,
        "runs_diverged": 0,
        "seeds": 5,
        "rms_exponent": e,
        "rms_exponent_ci": near,
        "update_exponent": e + 0.1,
        "update_exponent_ci": None,
        "grad_A_exponent": None if step == 1 else -0.9,
        "grad_A_exponent_ci": None,
        "grad_B_exponent": -0.5,
        "grad_B_exponent_ci": (-0.51, -0.49),
        "loss_exponent": 0.0,
        "loss_exponent_ci": (0.0, 0.0),
        "relative_rms_by_rank": {str(r): 0.01 * step * r**e for r in RANKS},
        "update_rms_by_rank": {str(r): 0.002 * r**e for r in RANKS},
        "spread": 16 ** abs(e),
        "verdict": VERDICTS[LAWS[optimizer, rule]],
    }
    return StabilityCell(**(fields | changed))


def check(
    *, optimizers: tuple[str, ...] = ("adamw", "sgd"), steps: tuple[int, ...] = (1, 5, 20), **changed: Any
) -> Any:
    """Return a check of two rules."""
    rules = ("lora", "rslora")
    cells = tuple(cell(r, o, g, s) for o in optimizers for r in rules for g in GROUPS for s in steps)
    verdicts = tuple(
        StabilityVerdict(
            rule=c.rule,
            optimizer=c.optimizer,
            init=c.init,
            step=c.step,
            exponent=c.rms_exponent,
            exponent_ci=c.rms_exponent_ci,
            verdict=c.verdict,
        )
        for c in cells
        if c.group == "all" and c.step == steps[-1]
    )
    advice = [
        StabilityAdvice(
            optimizer=o,
            init="default",
            rule="rslora",
            step=steps[-1],
            exponent=0.69,
            exponent_ci=(0.66, 0.72),
            lora_alpha_by_rank={"4": 16.0, "16": 12.3, "64": 9.45},
            learning_rate_by_rank={"4": 1e-3, "16": 7.7e-4, "64": 5.9e-4},
            text=f"{o}: a scale of r^-0.69 would make it flat. Flat does not say that facts will be recalled.",
        )
        for o in optimizers
    ]
    proof = TransferProof(rank=64, learning_rate=5.9e-4, how="steps", seeds=2, ratio_before=1.69, ratio_after=1.03)
    transfers = tuple(
        Transfer(
            rule=r,
            optimizer=o,
            init="default",
            step=steps[-1],
            exponent=LAWS[o, r],
            reference_rank=4,
            learning_rate_by_rank={str(n): 1e-3 * (n / 4) ** -LAWS[o, r] for n in RANKS},
            proof=proof if r == "rslora" else None,
        )
        for o in optimizers
        for r in rules
    )
    row = StabilityRow(
        rule="lora",
        optimizer=optimizers[0],
        init="default",
        rank=4,
        seed=0,
        step=1,
        module="layers.0.self_attn.q_proj",
        branch_rms=0.01,
        relative_rms=0.005,
        update_rms=0.01,
        grad_norm_A=0.0,
        grad_norm_B=0.3,
        loss=2.5,
    )
    fields: dict[str, Any] = {
        **FIXED,
        "command": ("rankwise", "check", "rankwise:tiny", "rankwise:facts?n=40&seed=1"),
        "format": StabilityRecord.FORMAT,
        "config": StabilityConfig(
            model="rankwise:tiny",
            data="rankwise:facts?n=40&seed=1",
            ranks=RANKS,
            scaling=rules,
            optimizer=optimizers,
            init=("default",),
            learning_rates=dict.fromkeys(optimizers, 1e-3),
            steps=steps,
            seeds=(0, 1, 2, 3, 4),
            lora_alpha=16.0,
            target_modules=("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"),
            batch_size=16,
            max_length=256,
            measured_tokens=187,
            gradient_checkpointing=False,
            dtype="float32",
            band=0.1,
            reference_rank=4,
        ),
        "verdicts": verdicts,
        "cells": cells,
        "rows": (row,),
        "advice": advice[0],
        "more_advice": tuple(advice[1:]),
        "transfers": transfers,
        "skipped": (),
        "findings": (),
        "seconds": 12.5,
    }
    return StabilityRecord(**(fields | changed))


def unknown() -> Any:
    """Return a check of which every run had diverged."""
    whole = check(optimizers=("adamw",), steps=(5,))
    none = dict.fromkeys(map(str, RANKS))
    empty: dict[str, Any] = {
        name: None for name in StabilityCell.__struct_fields__ if name.endswith(("exponent", "exponent_ci"))
    }
    empty |= {"relative_rms_by_rank": none, "update_rms_by_rank": none, "spread": None, "verdict": "undecided"}
    advice = replace(
        whole.advice,
        rule=None,
        step=None,
        exponent=None,
        exponent_ci=None,
        lora_alpha_by_rank={},
        learning_rate_by_rank={},
        text="No advice.",
    )
    return replace(
        whole,
        cells=tuple(replace(c, seeds=0, runs_diverged=15, modules=0, **empty) for c in whole.cells),
        verdicts=tuple(replace(v, exponent=None, exponent_ci=None, verdict="undecided") for v in whole.verdicts),
        advice=advice,
        transfers=(),
        findings=(Finding(code="diverged-in-check", level="warning", text="15 of 15 runs diverged."),),
    )


def hostile() -> Any:
    """Return a check whose words are an attack."""
    whole = check(optimizers=("adamw",))
    config = replace(whole.config, model=HOSTILE, data=HOSTILE, target_modules=(HOSTILE,))
    return replace(
        whole,
        config=config,
        command=("rankwise", HOSTILE),
        skipped=(Skipped(module=HOSTILE, reason=HOSTILE),),
        findings=(Finding(code="<b>", level="warning", text=HOSTILE),),
        advice=replace(whole.advice, text=HOSTILE),
        cells=tuple(replace(c, group=HOSTILE) if c.group == "mlp/late" else c for c in whole.cells),
    )


def partly_diverged() -> Any:
    """Return a check in which some runs left by the last step."""
    whole = check()
    changed = tuple(
        replace(c, runs_diverged=3, seeds=2, verdict="undecided") if c.step == 20 and c.rule == "rslora" else c
        for c in whole.cells
    )
    return replace(whole, cells=changed)


RECORDS: dict[str, Any] = {
    "check": check(),
    "check of one step": check(optimizers=("adamw",), steps=(1,)),
    "check of many steps": check(optimizers=("sgd",), steps=tuple(range(1, 13))),
    "diverged check": partly_diverged(),
    "check of nothing": unknown(),
    "hostile check": hostile(),
}
