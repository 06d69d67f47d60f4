"""Models without weights, and what PEFT itself makes of a config on them.

In: names and shapes, or a folder with a config.json. Out: the layers of the model; the rank and scale that PEFT gives
to each. Everything is on the meta device: no weight is read or made. torch, transformers and peft are imported when
they are needed, and their absence is an answer.
"""

from __future__ import annotations

import importlib.util
import json
import re
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
        stacks: parameter of three dimensions -> (experts, rows, columns).
    """

    model: Any
    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]
    conv1d: frozenset[str]
    stacks: Mapping[str, tuple[int, int, int]]


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
    # the weight of a convolution has three dimensions too, and is no stack: it belongs to a layer
    stacks = {
        name: (parameter.shape[0], parameter.shape[1], parameter.shape[2])
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.rpartition(".")[2] != "weight"
    }
    return Architecture(model, tuple(n for n, _ in model.named_modules() if n), shapes, frozenset(turned), stacks)


def skeleton(modules: Sequence[Asked], idle: Iterable[str], idle_stacks: Iterable[str] = ()) -> Any:
    """Return a tree of empty modules with a layer or a stacked parameter at each name, on the meta device."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    root = nn.Module()
    shapes = {m.module: m.shape for m in modules} | dict.fromkeys(idle, (1, 1)) | dict.fromkeys(idle_stacks, (1, 1))
    experts = {m.module: m.experts for m in modules if m.experts} | dict.fromkeys(idle_stacks, 1)
    for name in sorted(shapes):  # parents before children
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        out_features, in_features = shapes[name]
        if name in experts:
            stack = torch.empty(experts[name], out_features, in_features, device="meta")
            parent.register_parameter(last, nn.Parameter(stack))
            continue
        if GPT2_LAYER.fullmatch(name):
            layer: Any = Conv1D(1, 1).to("meta")
            layer.nf, layer.nx = out_features, in_features
            layer.weight = nn.Parameter(layer.weight.new_empty(in_features, out_features))
        else:
            layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        parent.add_module(last, layer)
    return root


def ask_peft(model: Any, config: Mapping[str, Any], file: str) -> dict[str, tuple[int, float]]:
    """Return module -> (rank, scale) of every layer and parameter that PEFT adapts. The model is changed.

    Wrapped parameters of one module lie around each other; they are named as the parameters are.

    Raises:
        ReadBackError: PEFT refuses the config.
    """
    from peft.tuners.lora import LoraLayer

    def own_name(path: str, layer: Any) -> str:
        parameter = getattr(layer, "parameter_name", None)  # of ParamWrapper, which PEFT has since 0.17
        return path if parameter is None else f"{re.sub(r'([.]base_layer)+$', '', path)}.{parameter}"

    made = _put_on(model, config, file)
    return {
        own_name(name, layer): (layer.r["default"], layer.scaling["default"])
        for name, layer in made.base_model.model.named_modules()
        if isinstance(layer, LoraLayer) and "default" in layer.r
    }


def peft_tensors(model: Any, config: Mapping[str, Any], file: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that PEFT would save, in its order. The model is changed.

    Raises:
        ReadBackError: PEFT refuses the config.
    """
    from peft import get_peft_model_state_dict

    made = _put_on(model, config, file)
    held = get_peft_model_state_dict(made, save_embedding_layers=False)
    return {name: tuple(int(side) for side in tensor.shape) for name, tensor in held.items()}


def _put_on(model: Any, config: Mapping[str, Any], file: str) -> Any:
    """Return the model with the adapters of a config, on the device of the model."""
    from peft import LoraConfig, get_peft_model

    # the kind of task adds wrappers that a bare tree of modules does not go with, and changes no layer
    fields = {key: value for key, value in config.items() if key not in ("peft_type", "task_type")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, LoraConfig(**fields), low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ReadBackError(f"{file}: PEFT refuses the config that was written: {str(error)[:500]}") from error
