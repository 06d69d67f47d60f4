"""The plan in the names of the model that is trained.

In: a plan/1 record, and the folder of the base model where there is one. Out: what is asked for each module; or an
error that says where the plan contradicts itself or the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Final

from rankwise.checkpoints.experts import wrapping_order
from rankwise.errors import CannotCarryError, UsageError
from rankwise.planning.modules import STACKED
from rankwise.records import PlanRecord
from rankwise.scaling import scaling
from rankwise.trainers.model import Asked
from rankwise.trainers.real_peft import Architecture, installed, load_architecture

_EXPERT: Final = re.compile(r"(.*)\[(\d+)\]")


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
    """Return what the plan asks for, and the modules that it leaves out; of stacked parameters each expert by itself.

    Raises:
        UsageError: the plan is empty or contradicts itself.
    """
    twice = len({m.module for m in plan.modules}) < len(plan.modules)
    chosen = [m for m in plan.modules if m.r > 0]
    if twice or not chosen:
        raise UsageError("the plan names a module twice" if twice else "the plan has no module of a rank above 0")
    modules = []
    for m in chosen:
        factor = scaling(plan.rule, m.lora_alpha, m.r)
        if not math.isclose(factor, m.scaling, rel_tol=1e-6):
            raise UsageError(
                f"the plan contradicts itself: {m.module} has scaling {m.scaling:.8g}, and alpha {m.lora_alpha:g} at "
                f"rank {m.r} gives {factor:.8g} under {plan.rule}"
            )
        modules.append(Asked(m.module, (m.shape[0], m.shape[1]), m.r, m.lora_alpha, factor))
    return tuple(modules), tuple(m.module for m in plan.modules if m.r == 0)


def stacked(
    modules: Sequence[Asked], idle: Sequence[str]
) -> tuple[tuple[Asked, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the modules with the experts of a parameter joined in one entry, modules left out, stacks left out.

    Raises:
        CannotCarryError: experts of one parameter are planned unequally, or some are left out.
    """
    joined: dict[str, list[Asked]] = {}
    for m in modules:
        stack = STACKED.fullmatch(m.module)
        joined.setdefault(m.module if stack is None else stack[1], []).append(m)
    made = []
    for name, members in joined.items():
        if len(members) == 1 and members[0].module == name:
            made.append(members[0])
        else:
            left_out = {int(found[2]) for each in idle if (found := _EXPERT.fullmatch(each)) and found[1] == name}
            made.append(_joined(name, members, left_out))
    stacks = dict.fromkeys(found[1] for each in idle if (found := STACKED.fullmatch(each)))
    others = tuple(each for each in idle if STACKED.fullmatch(each) is None)
    return tuple(made), others, tuple(name for name in stacks if name not in joined)


def _joined(name: str, members: Sequence[Asked], left_out: Set[int]) -> Asked:
    """Return one entry for all experts of a parameter.

    Raises:
        CannotCarryError: they differ, or do not count from 0 without a gap.
    """
    first = members[0]
    why = None
    places = {int(found[2]) for m in members if (found := _EXPERT.fullmatch(m.module))}
    if len(places) < len(members):
        raise UsageError(f"the plan names {name} both as a module and as experts, or an expert twice")
    if missing := (set(range(max(places) + 1)) - places) | left_out:
        why = f"the plan leaves {name}[{min(missing)}] without one"
    for m in members:
        if (m.r, m.shape) != (first.r, first.shape) or not math.isclose(m.scaling, first.scaling, rel_tol=1e-9):
            why = (
                f"it has rank {m.r} at scale {m.scaling:.6g} for {m.shape}, where {first.module} has rank {first.r} at "
                f"scale {first.scaling:.6g} for {first.shape}"
            )
            first = m
            break
    if why is not None:
        raise CannotCarryError(
            f"{first.module} is one expert of a stacked parameter. Trainers give one rank and scale to all experts of "
            f"a parameter, and {why}. Plan all of them alike, or leave them all out (--skip)."
        )
    return replace(first, module=name, experts=len(members))


def completed(
    modules: Sequence[Asked],
    idle: Sequence[str],
    idle_stacks: Sequence[str],
    architecture: Architecture | None,
    notes: list[str],
) -> tuple[tuple[Asked, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the modules, those left out and the stacks left out, under their full names in the model.

    Raises:
        UsageError: the plan is of another model.
        CannotCarryError: it leaves some experts of a stacked parameter out.
    """
    if architecture is None:
        _note_unseen([m for m in modules if m.experts], notes)
        return tuple(modules), tuple(idle), tuple(idle_stacks)
    prefix = _prefix([m.module for m in modules], architecture, notes)
    named = tuple(replace(m, module=prefix + m.module) for m in modules)
    for asked in named:
        if asked.experts:
            _check_stack(asked, architecture)
            continue
        shape = architecture.shapes.get(asked.module)
        if shape is not None and shape != asked.shape:
            raise UsageError(
                f"{asked.module} has shape {asked.shape} in the plan and {shape} in the model; the plan was made for "
                "another model"
            )
    return named, tuple(prefix + name for name in idle), tuple(prefix + name for name in idle_stacks)


def _note_unseen(stacks: Sequence[Asked], notes: list[str]) -> None:
    """Say what only the model could show about stacks of experts.

    Raises:
        CannotCarryError: a name may be that of a layer, whose weight the trainers call by another name.
    """
    for stack in stacks:
        if wrapping_order((stack.module.rpartition(".")[2], "gate_up_proj")) is None:
            raise CannotCarryError(
                f"{stack.module} is a stack of experts by a name that may be a parameter or a layer with a weight, and "
                "trainers tell the two apart. Give --model, a local folder with the base's config.json."
            )
    if stacks:
        notes.append(
            f"That the model has no more experts than the plan ({stacks[0].experts} in {stacks[0].module}) was not "
            "checked; --model with a local folder does."
        )


def _check_stack(asked: Asked, architecture: Architecture) -> None:
    """Compare a stacked parameter with the model; models store their experts in either orientation.

    Raises:
        UsageError: the plan is of another model.
        CannotCarryError: it leaves some experts out.
    """
    found = architecture.stacks.get(asked.module)
    if found is None:
        raise UsageError(
            f"{asked.module} is a stack of {asked.experts} experts in the plan, and the model has no parameter of "
            "three dimensions by that name; the plan was made for another model, or for another way of loading it"
        )
    if sorted(found[1:]) != sorted(asked.shape):
        raise UsageError(
            f"the experts of {asked.module} have shape {asked.shape} in the plan and {found[1:]} in the model; the "
            "plan was made for another model"
        )
    if found[0] < asked.experts:
        raise UsageError(
            f"{asked.module} has {asked.experts} experts in the plan and {found[0]} in the model; the plan was made "
            "for another model"
        )
    if found[0] > asked.experts:
        raise CannotCarryError(
            f"the plan leaves {found[0] - asked.experts} of the {found[0]} experts of {asked.module} without an "
            "adapter, and trainers give one rank to all of them. Plan all alike, or leave them all out (--skip)."
        )


def _prefix(planned: Sequence[str], architecture: Architecture, notes: list[str]) -> str:
    """Return what stands before the plan's names in the model: checkpoints often leave the first part out."""
    names = frozenset(architecture.names) | frozenset(architecture.stacks)
    first = planned[0]
    stems = [""] + [
        name.removesuffix(first) for name in (*architecture.names, *architecture.stacks) if name.endswith(f".{first}")
    ]
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
