"""From a plan/1 record to the files of one trainer, read again before they are handed out.

In: a record and the name of a trainer. Out: an `Export`. The plan is checked at the door, turned into the names of the
model where one is given, made uniform on request, written, parsed again and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from rankwise.errors import CannotCarryError, UsageError
from rankwise.planning.wording import FORMULAS
from rankwise.records import PlanRecord, SpectraRecord, version
from rankwise.trainers import axolotl, litgpt, llamafactory, mlx, peft, torchtune, trl, unsloth
from rankwise.trainers.fitting import architecture_of, completed, plan_modules, stacked
from rankwise.trainers.model import GPT2_LAYER, Asked, Export, Job, Trainer
from rankwise.trainers.readback import compare, compare_adapter, compare_with_peft
from rankwise.trainers.real_peft import Architecture, installed, load_architecture, skeleton
from rankwise.trainers.text import scale_lines
from rankwise.trainers.uniform import cost_in_words, shares_meaning, uniform_plan

TRAINERS: Final[dict[str, Trainer]] = {
    "peft": peft.TRAINER,
    "axolotl": axolotl.TRAINER,
    "llamafactory": llamafactory.TRAINER,
    "unsloth": unsloth.TRAINER,
    "trl": trl.TRAINER,
    "torchtune": torchtune.TRAINER,
    "litgpt": litgpt.TRAINER,
    "mlx": mlx.TRAINER,
}
"""Name on the command line -> trainer."""


def export(
    plan: PlanRecord,
    trainer: str,
    *,
    uniform: bool = False,
    alpha_tolerance: float = 1e-3,
    adapter: str | None = None,
    model: str | None = None,
    spectra: SpectraRecord | None = None,
    ask_peft: bool = True,
    read_adapter: bool = True,
) -> Export:
    """Return a plan in the words of one trainer.

    Args:
        plan: modules of rank 0 are left out.
        trainer: a name in `TRAINERS`.
        uniform: write the best uniform plan instead: one rank, no more parameters.
        alpha_tolerance: relative error that a scale may have where the trainer takes whole alphas only.
        adapter: an adapter folder that carries the plan (`as_adapter.write_untrained`), to start from; compared with
            the plan where it lies on this machine.
        model: base model to name in the files. A local folder with a config.json is also compared with: that the
            names are the model's, and that no other module is selected.
        spectra: what the plan was made from, to say what a uniform plan costs in error.
        ask_peft: compare with PEFT itself too, where it is installed.
        read_adapter: compare `adapter` with the plan; off where it is yet to be written.

    Raises:
        UsageError: the trainer is unknown, the plan has no module left or contradicts itself, or it does not go with
            the model.
        CannotCarryError: the trainer's config cannot say this.
        ReadBackError: what was written would not be the plan.
    """
    chosen = _trainer(trainer)
    if not 0 <= alpha_tolerance < 1:
        raise UsageError(f"--alpha-tolerance must be at least 0 and below 1, got {alpha_tolerance:g}")
    if adapter is not None and uniform:
        raise UsageError("an adapter folder carries its own ranks; give it or --uniform, not both")
    notes: list[str] = []
    architecture = architecture_of(model, notes)
    modules, idle = plan_modules(plan)
    why = f"Why: {plan.why}"
    if uniform:
        planned = modules
        modules = uniform_plan(planned, plan.rule, plan.choice, plan.budget)
        cost = cost_in_words(planned, modules, plan, spectra)
        notes.append(cost)
        why = f"{cost} The plan in whose place it stands: {plan.why}"
    modules, idle, idle_stacks = completed(*stacked(modules, idle), architecture, notes)
    _check_stacks(chosen, modules, adapter)
    _check_carries(chosen, modules, adapter)
    names = () if architecture is None else architecture.names
    layers = [m for m in modules if not m.experts]
    job = Job(
        modules=modules,
        idle=_others(modules, idle, names),
        rule=plan.rule,
        learning_rate=plan.learning_rate,
        tolerance=alpha_tolerance,
        targets=_targets([m.module for m in layers], names),
        conv1d=_all_conv1d(layers, architecture),
        model=model,
        adapter=adapter,
        head=_head(chosen, plan, modules, why if plan.why.strip() or uniform else ""),
        idle_stacks=_others(modules, idle_stacks, () if architecture is None else tuple(architecture.stacks)),
    )
    if job.conv1d and job.stacks:
        raise CannotCarryError(
            f"{chosen.title} takes no layers that store their weight transposed (Conv1D, {layers[0].module}) together "
            f"with stacks of experts ({job.stacks[0].module}). Leave one kind out of the plan (--skip)."
        )
    written = chosen.write(job)
    readings = chosen.read(written.files)
    exact = not chosen.whole_alpha and trainer != "trl"  # the YAML of `trl sft` takes whole alphas
    exported = compare(job, readings, exact=exact)
    notes += written.notes
    if job.stacks and adapter is None:
        notes.append(
            f"Stacked parameters of experts: {len(job.stacks)}, in target_parameters (PEFT 0.17 or later). Each expert "
            "gets the rank that stands there; PEFT takes no lora_dropout but 0 with them, and "
            "PEFT 0.21.2 warns that their pattern keys match no module, which it obeys all the same."
        )
    if adapter is not None and read_adapter:
        notes.append(_compare_folder(modules, adapter))
    elif adapter is None and ask_peft and installed("torch", "transformers", "peft"):
        files = compare_with_peft(job, readings, _builder(job, architecture, model), exact=exact)
        if files:
            where = "of names and shapes" if architecture is None else f"of {model}"
            notes.append(f"Checked with PEFT itself on an empty model {where}: {len(modules)} modules.")
    return Export(trainer, written.files, tuple(notes), exported)


def _trainer(name: str) -> Trainer:
    if name not in TRAINERS:
        raise UsageError(f"unknown trainer {name!r:.60}; the trainers are: {', '.join(TRAINERS)}")
    return TRAINERS[name]


def _others(modules: Sequence[Asked], idle: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return every module that is known and not planned."""
    planned = {m.module for m in modules}
    return tuple(name for name in dict.fromkeys([*idle, *names]) if name not in planned)


def _check_stacks(trainer: Trainer, modules: Sequence[Asked], adapter: str | None) -> None:
    """Refuse experts for a trainer without `target_parameters`; what starts from a folder needs no key for them."""
    stack = next((m for m in modules if m.experts), None)
    if stack is None or trainer.stacks or (adapter is not None and trainer.from_adapter):
        return
    ways = "Export to peft, axolotl, unsloth or trl; or leave the experts out of the plan (--skip)."
    if trainer.from_adapter:
        ways = f"Give --as-adapter FOLDER --model BASE, which {trainer.title} starts from. {ways}"
    raise CannotCarryError(
        f"{trainer.title} takes no stacked parameters of experts, and the plan has {stack.module} ({stack.experts} "
        f"experts). {ways}"
    )


def _check_carries(trainer: Trainer, modules: Sequence[Asked], adapter: str | None) -> None:
    """Refuse a plan of several ranks or scales for a trainer that takes one, and an adapter for one that takes none."""
    if adapter is not None:
        if not trainer.from_adapter:
            raise CannotCarryError(
                f"{trainer.title} cannot start from a PEFT adapter folder. Export without --as-adapter; --uniform "
                "makes the best plan of one rank."
            )
        return
    ranks = sorted({m.r for m in modules})
    scales = sorted({m.scaling for m in modules})
    if trainer.per_module or (len(ranks) == 1 and math.isclose(scales[0], scales[-1], rel_tol=1e-9)):
        return
    what = f"{len(ranks)} ranks ({ranks[0]} to {ranks[-1]})" if len(ranks) > 1 else f"one rank and {len(scales)} scales"
    ways = []
    if trainer.from_adapter:
        ways.append(f"--as-adapter FOLDER, an untrained adapter of the plan, which {trainer.title} starts from")
    uniform = "--uniform, the best plan of one rank"
    ways.append(uniform if shares_meaning(modules) else "plan again with one --scale")
    raise CannotCarryError(
        f"{trainer.title} takes one rank and one alpha for all modules; the plan has {what}. Give {'; or '.join(ways)}."
    )


def _targets(planned: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return last parts of names where the model shows that they select the planned modules alone; else full names."""
    last = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in planned))
    wanted, parts = frozenset(planned), frozenset(last)
    if names and all(name in wanted for name in names if name.rsplit(".", 1)[-1] in parts):
        return last
    return tuple(planned)


def _all_conv1d(modules: Sequence[Asked], architecture: Architecture | None) -> bool:
    if architecture is not None:
        return bool(modules) and all(m.module in architecture.conv1d for m in modules)
    return bool(modules) and all(GPT2_LAYER.fullmatch(m.module) for m in modules)


def _head(trainer: Trainer, plan: PlanRecord, modules: Sequence[Asked], why: str) -> tuple[str, ...]:
    return (
        f"rankwise {version()}: a plan ({plan.rule}, scale = {FORMULAS[plan.rule]}) for {trainer.title}, to merge into "
        "your own config.",
        *scale_lines(modules),
        f"{sum(m.params for m in modules):,} parameters.",
        *([why] if why else []),
    )


def _builder(job: Job, architecture: Architecture | None, model: str | None) -> Callable[[], Any]:
    """Return what makes a fresh model for PEFT to change."""
    if architecture is None or model is None:
        return lambda: skeleton(job.modules, job.idle, job.idle_stacks)
    return lambda: load_architecture(Path(model)).model


def _compare_folder(modules: Sequence[Asked], adapter: str) -> str:
    if not Path(adapter).is_dir():
        return f"{adapter} is no folder on this machine; it was not compared with the plan."
    compare_adapter(modules, Path(adapter))
    return f"{adapter} was compared with the plan: {len(modules)} modules, ranks and scales are those planned."
