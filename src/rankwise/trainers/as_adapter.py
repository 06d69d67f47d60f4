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
from rankwise.planning.modules import STACKED, TABLE
from rankwise.records import PlanRecord
from rankwise.trainers.fitting import architecture_of, completed, plan_modules
from rankwise.trainers.model import GPT2_LAYER, Asked, Job
from rankwise.trainers.peft import FILE, config_of
from rankwise.trainers.readback import compare_adapter
from rankwise.trainers.real_peft import Architecture

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
        CannotCarryError: a module is no linear layer.
        OutputExistsError, OutputError: the folder is taken, or cannot be written.
    """
    if seed < 0:
        raise UsageError(f"--seed of an untrained adapter must be 0 or more, got {seed}")
    check_out(out, force=force)
    architecture = architecture_of(model, [])
    modules, idle = plan_modules(plan)
    _check_single(modules)
    modules, idle, _ = completed(modules, idle, (), architecture, [])
    for asked in modules:
        _check_linear(asked, architecture)
    conv1d = [_is_conv1d(m.module, architecture) for m in modules]
    names = tuple(m.module for m in modules)
    job = Job(modules, idle, plan.rule, plan.learning_rate, 0.0, names, conv1d=all(conv1d), model=model)
    config = config_of(job)
    _write(out, modules, config, np.random.default_rng(seed))


def _check_single(modules: Sequence[Asked]) -> None:
    for asked in modules:
        if STACKED.fullmatch(asked.module):
            raise CannotCarryError(
                f"{asked.module} is one expert of a stacked parameter, for which no untrained adapter is written. "
                "Export to peft, axolotl, unsloth or trl, which start from the base; or leave it out (--skip)."
            )


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


def _write(out: Path, modules: Sequence[Asked], config: dict[str, Any], rng: np.random.Generator) -> None:
    """Write the folder beside its place, compare it with the plan, and rename it."""
    target = out.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent) as name:
            place = Path(name) / "whole"
            place.mkdir()
            (place / FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            save_file(_tensors(modules, rng), place / TENSORS, metadata={"format": "pt"})
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


def _tensors(modules: Sequence[Asked], rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Return PEFT's tensors: A uniform within 1 / sqrt(in_features), B zero.

    That is kaiming_uniform(a = sqrt(5)): a bound of sqrt(6 / ((1 + 5) * in_features)), whatever the rank.
    """
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for m in modules:
        out_features, in_features = m.shape
        a = rng.random((m.r, in_features), dtype=np.float32)
        a -= np.float32(0.5)
        a *= np.float32(2.0 / math.sqrt(in_features))
        tensors[f"base_model.model.{m.module}.lora_A.weight"] = a  # (r, in_features)
        tensors[f"base_model.model.{m.module}.lora_B.weight"] = np.zeros((out_features, m.r), dtype=np.float32)
    return tensors
