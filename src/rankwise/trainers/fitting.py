"""The plan in the names of the model that is trained.

In: a plan/1 record, and the folder of the base model where there is one. Out: what is asked for each module; or an
error that says where the plan contradicts itself or the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rankwise.errors import CannotCarryError, UsageError
from rankwise.planning.modules import STACKED
from rankwise.records import PlanRecord
from rankwise.scaling import scaling
from rankwise.trainers.model import Asked
from rankwise.trainers.real_peft import Architecture, installed, load_architecture


def architecture_of(model: str | None, notes: list[str]) -> Architecture | None:
    """Return the model without its weights, where `model` is a folder on this machine and transformers is installed."""
    if model is None:
        return None
    folder = Path(model)
    if not (folder / "config.json").is_file():
        notes.append(
            f"{model} is no folder with a config.json on this machine, so the names of the plan were not compared with "
            "those of the model."
        )
        return None
    if not installed("torch", "transformers"):
        notes.append("The names of the plan were not compared with those of the model: transformers is not installed.")
        return None
    return load_architecture(folder)


def plan_modules(plan: PlanRecord) -> tuple[tuple[Asked, ...], tuple[str, ...]]:
    """Return what the plan asks for, and the modules that it leaves out.

    Raises:
        UsageError: the plan is empty or contradicts itself.
        CannotCarryError: it plans single experts of a stacked parameter.
    """
    twice = len({m.module for m in plan.modules}) < len(plan.modules)
    chosen = [m for m in plan.modules if m.r > 0]
    if twice or not chosen:
        raise UsageError("the plan names a module twice" if twice else "the plan has no module of a rank above 0")
    modules = []
    for m in chosen:
        if STACKED.fullmatch(m.module):
            raise CannotCarryError(
                f"{m.module} is one expert of a stacked parameter. Trainers take one rank for all experts of a "
                "parameter, in keys of their own, which is not exported yet; leave it out of the plan (--skip)."
            )
        factor = scaling(plan.rule, m.lora_alpha, m.r)
        if not math.isclose(factor, m.scaling, rel_tol=1e-6):
            raise UsageError(
                f"the plan contradicts itself: {m.module} has scaling {m.scaling:.8g}, and alpha {m.lora_alpha:g} at "
                f"rank {m.r} gives {factor:.8g} under {plan.rule}"
            )
        modules.append(Asked(m.module, (m.shape[0], m.shape[1]), m.r, m.lora_alpha, factor))
    return tuple(modules), tuple(m.module for m in plan.modules if m.r == 0)


def completed(
    modules: Sequence[Asked], idle: Sequence[str], architecture: Architecture | None, notes: list[str]
) -> tuple[tuple[Asked, ...], tuple[str, ...]]:
    """Return the modules, and those left out, under their full names in the model.

    Raises:
        UsageError: the plan is of another model.
    """
    if architecture is None:
        return tuple(modules), tuple(idle)
    prefix = _prefix([m.module for m in modules], architecture, notes)
    named = tuple(replace(m, module=prefix + m.module) for m in modules)
    for asked in named:
        shape = architecture.shapes.get(asked.module)
        if shape is not None and shape != asked.shape:
            raise UsageError(
                f"{asked.module} has shape {asked.shape} in the plan and {shape} in the model; the plan was made for "
                "another model"
            )
    return named, tuple(prefix + name for name in idle)


def _prefix(planned: Sequence[str], architecture: Architecture, notes: list[str]) -> str:
    """Return what stands before the plan's names in the model: checkpoints often leave the first part out."""
    names = frozenset(architecture.names)
    first = planned[0]
    stems = [""] + [name.removesuffix(first) for name in architecture.names if name.endswith(f".{first}")]
    for stem in stems:
        if all(stem + name in names for name in planned):
            if stem:
                notes.append(f"The model has the planned modules below {stem.rstrip('.')}; their names were completed.")
            return stem
    missing = [name for name in planned if name not in names]
    raise UsageError(
        f"the model has no module {missing[0]}, which the plan names ({len(missing)} of {len(planned)} are missing). "
        f"Its linear layers are named like {next(iter(architecture.shapes), 'none')}; the plan was made for another "
        "model, or for another way of loading it."
    )
