"""PEFT: a folder with adapter_model.safetensors and adapter_config.json.

In: modules with their ranks, alphas and rule. Out: tensors and the config; one that was PEFT's before keeps its own
names, targets and other fields. Held to real PEFT by tests/interop/test_converted_in_peft.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from rankwise.adapters.baking import Written
from rankwise.adapters.formats.names import component_of, dotted, inside
from rankwise.adapters.formats.writer import Entry, Pairs, Result, Setup, Writer
from rankwise.adapters.parts import Array
from rankwise.adapters.peft_folder import CONFIG, WEIGHTS, Placed, expert_tensors, factor_tensors, peft_config
from rankwise.adapters.stored_units import Unit, ungrouped
from rankwise.checkpoints.model import Adapter
from rankwise.errors import UsageError
from rankwise.runtimes import RUNTIMES

_OWN: Final = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "inference_mode")
"""Fields that are written anew also where the source had a config."""

_STALE: Final[dict[str, Any]] = {"eva_config": None, "corda_config": None, "lora_ga_config": None, "loftq_config": {}}
"""Fields that PEFT would start from data or from the base again, and their empty values."""


def _paths(adapter: Adapter, units: Sequence[Unit]) -> dict[str, str]:
    if adapter.format == "peft":
        return {u.name: u.path for u in units}
    experts = [u for u in units if u.kind == "expert"]
    if experts:
        raise UsageError(
            f"{adapter.source}: {experts[0].name} adapts a stack of experts; {adapter.format} and PEFT stack, name and "
            "fuse experts in different ways, so it cannot be written as peft. --format "
            f"{adapter.format} keeps the layout."
        )
    made = dotted(adapter, units, "peft")
    components = sorted({c for p in made.values() if (c := component_of(p)) is not None and p.startswith(f"{c}.")})
    if len(components) > 1:
        raise UsageError(
            f"{adapter.source} holds adapters for several models ({', '.join(components)}); a PEFT folder is for one. "
            "Write it as diffusers or kohya."
        )
    return {name: inside(path) for name, path in made.items()}


def _tensors(unit: Unit, path: str, pairs: Pairs, written: Written) -> dict[str, Array]:  # noqa: ARG001 - as all writers
    if unit.kind == "expert":
        return expert_tensors(path, pairs)
    ((a, b),) = pairs
    if unit.groups > 1:
        b = ungrouped(b, unit.groups)
    return factor_tensors(path, unit.kind, a, b, kernel=unit.kernel)


def _finish(setup: Setup, entries: Sequence[Entry]) -> Result:
    source = dict(setup.adapter.config or {}) if setup.adapter.format == "peft" else {}
    placed = [
        Placed(
            module=e.unit.key if source and e.unit.key is not None else e.path,
            kind="expert" if e.unit.parameter else e.unit.kind,
            r=e.written.r,
            lora_alpha=e.written.lora_alpha,
        )
        for e in entries
    ]
    rule = entries[0].written.rule
    base = source.get("base_model_name_or_path")
    if setup.adapter.format == "mlx":
        base = (setup.adapter.config or {}).get("model")
    config = peft_config(placed, rule, base=base if isinstance(base, str) else None, task_type=source.get("task_type"))
    unnamed = [e.unit.name for e in entries if e.unit.key is None]
    if unnamed and (config["rank_pattern"] or config["alpha_pattern"]):
        raise UsageError(
            f"{unnamed[0]}: the file does not tell which parameter this stack of experts is of, so no rank or alpha of "
            "its own can be written for it. --bake gives all modules one rank and one alpha."
        )
    if source:
        config = _onto(source, config, setup)
    return Result({"format": "pt"}, {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"})


def _onto(source: dict[str, Any], made: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """Return the source's config with the fields that are new."""
    config = source | {field: made[field] for field in _OWN} | {k: v for k, v in _STALE.items() if k in source}
    if setup.changed:  # names that end alike would bring the modules back that were left out
        config["target_modules"] = made["target_modules"]
        config["target_parameters"] = made.get("target_parameters")
        config |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    elif not source.get("target_modules") and not source.get("target_parameters"):
        config["target_modules"] = made["target_modules"]
    if not setup.others:
        config |= {"modules_to_save": None, "bias": "none"}
        if source.get("trainable_token_indices") is not None:
            config["trainable_token_indices"] = None
    return config


WRITER: Final = Writer(
    file=WEIGHTS,
    folder=True,
    rules=("lora", "rslora"),
    uniform=False,
    paths=_paths,
    tensors=_tensors,
    finish=_finish,
    readers={name: False for name, row in RUNTIMES.items() if row.reads_config and name != "peft"},
)
