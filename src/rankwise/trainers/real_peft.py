"""Models without weights, and what PEFT itself makes of a config on them.

In: names and shapes, or a folder with a config.json. Out: the layers of the model; the rank and scale that PEFT gives
to each. Everything is on the meta device: no weight is read or made. torch, transformers and peft are imported when
they are needed, and their absence is an answer.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import ConfigError, ReadBackError, UsageError
from rankwise.trainers.model import GPT2_LAYER, Asked


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model without weights.

    Attributes:
        model: the module, on the meta device.
        names: all its modules.
        shapes: layer -> (out_features, in_features), of the linear ones.
        conv1d: those linear layers that store their weight as (in, out).
    """

    model: Any
    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]
    conv1d: frozenset[str]


def installed(*packages: str) -> bool:
    """Tell whether packages are there, without importing them."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def load_architecture(folder: Path) -> Architecture:
    """Build the model that a folder's config.json describes, without its weights.

    Raises:
        ConfigError: the config cannot be read.
        UsageError: transformers does not know the model.
    """
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error}") from error
    named = (raw.get("architectures") or [None])[0] if isinstance(raw, dict) else None
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, str(named), None) or transformers.AutoModelForCausalLM
        build = getattr(kind, "_from_config", None) or kind.from_config
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(config)
    except (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError, RuntimeError) as error:
        raise UsageError(
            f"transformers cannot build the model of {folder / 'config.json'}: {str(error)[:300]}. Leave --model out "
            "to check the export against the plan's names alone."
        ) from error
    shapes, turned = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
            turned.add(name)
        elif isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
    return Architecture(model, tuple(n for n, _ in model.named_modules() if n), shapes, frozenset(turned))


def skeleton(modules: Sequence[Asked], idle: Iterable[str]) -> Any:
    """Return a tree of empty modules with a linear layer at each name, on the meta device."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    root = nn.Module()
    shapes = {m.module: m.shape for m in modules} | dict.fromkeys(idle, (1, 1))
    for name in sorted(shapes):  # parents before children
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        out_features, in_features = shapes[name]
        if GPT2_LAYER.fullmatch(name):
            layer: Any = Conv1D(1, 1).to("meta")
            layer.nf, layer.nx = out_features, in_features
            layer.weight = nn.Parameter(layer.weight.new_empty(in_features, out_features))
        else:
            layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        parent.add_module(last, layer)
    return root


def ask_peft(model: Any, config: Mapping[str, Any], file: str) -> dict[str, tuple[int, float]]:
    """Return module -> (rank, scale) of every layer that PEFT adapts. The model is changed.

    Raises:
        ReadBackError: PEFT refuses the config.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    # the kind of task adds wrappers that a bare tree of modules does not go with, and changes no layer
    fields = {key: value for key, value in config.items() if key not in ("peft_type", "task_type")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = get_peft_model(model, LoraConfig(**fields), low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ReadBackError(f"{file}: PEFT refuses the config that was written: {str(error)[:500]}") from error
    return {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in made.base_model.model.named_modules()
        if isinstance(layer, LoraLayer) and "default" in layer.r
    }
