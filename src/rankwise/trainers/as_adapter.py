"""An untrained adapter that carries a plan: a PEFT folder with B = 0, for trainers to start from.

In: a plan. Out: adapter_config.json and adapter_model.safetensors, whole or not at all. A is drawn as PEFT draws it by
default, so that training from the folder is training from PEFT's own start; with B = 0 the model is the base exactly.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rankwise.errors import CannotCarryError, OutputError, OutputExistsError, UsageError
from rankwise.planning.modules import TABLE
from rankwise.records import PlanRecord
from rankwise.trainers.fitting import architecture_of, completed, plan_modules, stacked
from rankwise.trainers.model import GPT2_LAYER, Asked, Job
from rankwise.trainers.peft import FILE, config_of
from rankwise.trainers.readback import compare_adapter
from rankwise.trainers.real_peft import Architecture, installed, load_architecture, peft_tensors

TENSORS: Final = "adapter_model.safetensors"

_REPLACED: Final = frozenset({FILE, TENSORS, "README.md", ".gitattributes"})
"""What a folder may hold that `force` replaces: an adapter and nothing else."""


def write_untrained(
    plan: PlanRecord, out: Path, *, model: str | None = None, force: bool = False, seed: int = 0
) -> None:
    """Write a PEFT adapter folder with the planned ranks and scales that changes nothing yet.

    All tensors are float32 and in memory together: 4 bytes a parameter of the plan, of which B's are never touched.

    Args:
        plan: modules of rank 0 are left out.
        out: the folder.
        model: base model to name in the config; where it is a local folder, names, shapes and kinds of the layers are
            compared with it.
        force: replace an adapter folder that is there.
        seed: of A.

    Raises:
        UsageError: the plan contradicts itself or does not go with the model, or the seed is below 0.
        CannotCarryError: a module is no linear layer, or a stack of experts that PEFT cannot be asked about.
        OutputExistsError, OutputError: the folder is taken, or cannot be written.
    """
    if seed < 0:
        raise UsageError(f"--seed of an untrained adapter must be 0 or more, got {seed}")
    check_out(out, force=force)
    architecture = architecture_of(model, [])
    modules, idle = plan_modules(plan)
    modules, idle, idle_stacks = completed(*stacked(modules, idle), architecture, [])
    layers = [m for m in modules if not m.experts]
    for asked in layers:
        _check_linear(asked, architecture)
    conv1d = [_is_conv1d(m.module, architecture) for m in layers]
    names = tuple(m.module for m in layers)
    turned = bool(layers) and all(conv1d)
    job = Job(
        modules, idle, plan.rule, plan.learning_rate, 0.0, names, conv1d=turned, model=model, idle_stacks=idle_stacks
    )
    config = config_of(job)
    shapes = _layer_shapes(layers) | _stack_shapes(job, config)
    _write(out, modules, config, shapes, np.random.default_rng(seed))


def _layer_shapes(layers: Sequence[Asked]) -> dict[str, tuple[int, ...]]:
    """Return PEFT's tensors of linear layers: name -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for m in layers:
        shapes[f"base_model.model.{m.module}.lora_A.weight"] = (m.r, m.shape[1])
        shapes[f"base_model.model.{m.module}.lora_B.weight"] = (m.shape[0], m.r)
    return shapes


def _stack_shapes(job: Job, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return PEFT's tensors of stacked parameters: PEFT is asked, as how it nests and turns them is its own affair.

    Raises:
        CannotCarryError: there are some, and PEFT or the model is not there to be asked.
    """
    if not job.stacks:
        return {}
    first = job.stacks[0].module
    if job.conv1d:
        raise CannotCarryError(
            f"PEFT takes no layers that store their weight transposed (Conv1D, {job.layers[0].module}) together with "
            f"stacks of experts ({first}). Leave one kind out of the plan (--skip)."
        )
    known = job.model is not None and (Path(job.model) / "config.json").is_file()
    if job.model is None or not known or not installed("torch", "transformers", "peft"):
        raise CannotCarryError(
            f"{first} is a stack of experts, whose tensors PEFT nests and turns by the model. Give --model, a local "
            "folder with the base's config.json, with the extra `train` installed; or leave it out (--skip)."
        )
    asked = peft_tensors(load_architecture(Path(job.model)).model, config, FILE)
    layers = {f"base_model.model.{m.module}." for m in job.layers}
    return {name: shape for name, shape in asked.items() if not any(name.startswith(stem) for stem in layers)}


def _check_linear(asked: Asked, architecture: Architecture | None) -> None:
    """Refuse embeddings and convolutions: their factors have other shapes and names.

    Raises:
        CannotCarryError: it is no linear layer, as far as the model or the name tells.
    """
    what = None
    if architecture is not None and asked.module not in architecture.shapes:
        what = f"a {type(architecture.model.get_submodule(asked.module)).__name__} in the model"
    elif architecture is None and TABLE.fullmatch(asked.module):
        what = "an embedding by its name"
    if what is not None:
        raise CannotCarryError(
            f"{asked.module} is {what}; an untrained adapter is written for linear layers (Linear, and GPT-2's Conv1D) "
            "only. Leave it out of the plan."
        )


def _is_conv1d(module: str, architecture: Architecture | None) -> bool:
    return module in architecture.conv1d if architecture is not None else GPT2_LAYER.fullmatch(module) is not None


def check_out(out: Path, *, force: bool) -> None:
    """Refuse a folder before any work is done for it.

    Raises:
        OutputExistsError: it is taken, and `force` is not set.
        OutputError: it is no adapter folder, or cannot be written to.
    """
    try:
        if (out.exists() or out.is_symlink()) and not out.is_dir():
            raise OutputError(f"{out} is a file; a folder was meant. Nothing was written.")
        inside = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        if inside and not force:
            raise OutputExistsError(str(out))
        strangers = [name for name in inside if name not in _REPLACED]
        if strangers:
            raise OutputError(
                f"{out} holds more than an adapter ({', '.join(strangers[:3])}); --force replaces an adapter and "
                "deletes nothing else. Choose another folder. Nothing was written."
            )
        parent = out.absolute().parent
        if not parent.is_dir():
            raise OutputError(f"{out} cannot be written: there is no folder {parent}. Make it first.")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}. Nothing was written.") from error
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out} cannot be written: no permission to write into {parent}.")


def _write(
    out: Path,
    modules: Sequence[Asked],
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    rng: np.random.Generator,
) -> None:
    """Write the folder beside its place, compare it with the plan, and rename it."""
    target = out.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent) as name:
            place = Path(name) / "whole"
            place.mkdir()
            (place / FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            save_file(_tensors(shapes, rng), place / TENSORS, metadata={"format": "pt"})
            mask = os.umask(0)
            os.umask(mask)
            for path in place.iterdir():
                path.chmod(0o666 & ~mask)  # safetensors makes its files private
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            compare_adapter(modules, place)
            if target.is_dir():
                target.rename(Path(name) / "old")
            try:
                place.rename(target)
            except OSError:
                if (Path(name) / "old").is_dir():
                    (Path(name) / "old").rename(target)
                raise
            shutil.rmtree(Path(name) / "old", ignore_errors=True)
    except (OSError, SafetensorError) as error:
        words = getattr(error, "strerror", None) or error
        raise OutputError(f"{out} cannot be written: {words}. Nothing was written.") from error


def _tensors(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Return PEFT's tensors: A uniform within 1 / sqrt(in_features), B zero.

    That is kaiming_uniform(a = sqrt(5)): a bound of sqrt(6 / ((1 + 5) * in_features)), whatever the rank; for the
    stacked A of experts too, of which each row reads in_features inputs.
    """
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in shapes.items():
        if name.endswith(".lora_B.weight"):
            tensors[name] = np.zeros(shape, dtype=np.float32)
            continue
        a = rng.random(shape, dtype=np.float32)
        a -= np.float32(0.5)
        a *= np.float32(2.0 / math.sqrt(shape[1]))
        tensors[name] = a  # (r, in_features), or (experts * r, in_features)
    return tensors
