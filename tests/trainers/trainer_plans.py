"""Plans for the tests of the exporters, and PEFT's rule written out a second time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rankwise.records import PlanRecord, now, version
from rankwise.records.plan import PlannedModule
from rankwise.scaling import scaling

LLAMA = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
"""Layers of one block of the small Llama of tests/tuning/small_models.py."""

Row = tuple[str, tuple[int, int], int, float]


def planned(rows: Iterable[Row], rule: str = "lora", **more: Any) -> PlanRecord:
    """Return a plan of (module, shape, r, lora_alpha) rows."""
    modules = tuple(
        PlannedModule(
            module=name,
            shape=shape,
            r=r,
            lora_alpha=alpha,
            scaling=scaling(rule, alpha, r) if r else 0.0,
            kept_energy_share=None,
        )
        for name, shape, r, alpha in rows
    )
    fields: dict[str, Any] = {
        "format": PlanRecord.FORMAT,
        "rankwise": version(),
        "created": now(),
        "command": ("rankwise", "plan"),
        "device": "cpu",
        "seed": 0,
        "rule": rule,
        "modules": modules,
        "params": sum(m.r * sum(m.shape) for m in modules),
        "budget": None,
        "relative_error": None,
        "learning_rate": None,
        "why": "planted",
    }
    return PlanRecord(**(fields | more))


def names(blocks: int = 2, stem: str = "model.layers") -> dict[str, tuple[int, int]]:
    """Return every layer of a small Llama, with its shape."""
    return {f"{stem}.{i}.{kind}": shape for i in range(blocks) for kind, shape in LLAMA.items()}


def uniform(r: int = 8, alpha: float = 16.0, rule: str = "lora", blocks: int = 2, **more: Any) -> PlanRecord:
    return planned(((n, s, r, alpha) for n, s in names(blocks).items()), rule, **more)


def mixed(rule: str = "lora", blocks: int = 2, **more: Any) -> PlanRecord:
    """Ranks 4, 8 and 16 at a scale of 2 each; whole alphas under all three rules."""
    ranks = (4, 16, 4, 4, 16, 4, 4)  # squares, so that alpha = 2 * sqrt(r) is whole
    alpha = {"lora": lambda r: 2.0 * r, "rslora": lambda r: 2.0 * math.sqrt(r), "unscaled": lambda r: 2.0}[rule]
    rows = [(n, s, ranks[i % 7], alpha(ranks[i % 7])) for i, (n, s) in enumerate(names(blocks).items())]
    return planned(rows, rule, **more)


def peft_gives(config: Mapping[str, Any], module: str) -> tuple[int, float] | None:
    """Return (rank, scale) that PEFT gives to a module: its lines, written out here again."""
    targets = config["target_modules"]
    if isinstance(targets, str):
        if not re.fullmatch(targets, module):
            return None
    elif not any(module == t or module.endswith("." + t) for t in targets):
        return None
    r, alpha = (
        next((v for key, v in (config.get(field) or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
        for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"]))
    )
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def wanted(plan: PlanRecord) -> dict[str, tuple[int, float]]:
    return {m.module: (m.r, m.scaling) for m in plan.modules if m.r}
