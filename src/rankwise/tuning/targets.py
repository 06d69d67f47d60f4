"""Which layers of a model take an adapter, and what a user's --target-modules means for it.

In: a model and a wish. Out: full names of layers, in the model's order, exactly those that PEFT would wrap; or an error
that names what exists. Give these names to `LoraConfig(target_modules=[...])`: "all-linear" itself means more to PEFT
on some mixtures of experts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from rankwise.checkpoints.stores import printable
from rankwise.errors import TargetModulesError

ALL_LINEAR: Final = "all-linear"

_MAMBA: Final = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_MAMBA_KERNELS: Final = frozenset({"out_proj", "conv1d"})
"""Layers whose weights these models hand to a fused kernel, past any adapter; PEFT refuses them (tuners_utils)."""


def target_modules(model: Any) -> tuple[str, ...]:
    """Return the names of all linear layers (Linear, and GPT-2's Conv1D) but the output embedding.

    That is PEFT's "all-linear", but for two things: experts that are stacked in one parameter are no layers, and are
    left out (PEFT adapts those of Mixtral and Qwen-MoE all the same); and the layers that a Mamba hands to its kernel
    are left out, where PEFT refuses.

    Args:
        model: a live model of transformers, without an adapter.
    """
    head = _head(model)
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    turned = _turned(model, names)
    return tuple(name for name in names if name not in turned and not _past_adapters(model, name))


def matching_modules(model: Any, wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the layers that PEFT would adapt.

    Args:
        model: a live model of transformers, without an adapter.
        wanted: "all-linear"; a list of full names or last parts of names (every one has to match); or one string, a
            regular expression over full names.

    Raises:
        TargetModulesError: something matches nothing, or what takes no adapter.
    """
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return target_modules(model)
    if not isinstance(wanted, str) and [str(entry).lower() for entry in wanted] == [ALL_LINEAR]:
        return target_modules(model)
    modules = {name: module for name, module in model.named_modules() if name}
    matched = _by_pattern(model, modules, wanted) if isinstance(wanted, str) else _by_list(model, modules, wanted)
    found = tuple(name for name in modules if name in matched)
    head = _head(model)
    turned = _turned(model, found)

    def linear() -> str:
        return _leaves(target_modules(model))

    for name in found:
        if modules[name] is head:
            raise TargetModulesError(
                f"{printable(matched[name])!r} matches {name}, the output embedding, which takes no adapter: the "
                "trainer computes the loss from its weight alone. Leave it out."
            )
        if not _takes_adapter(modules[name]) or _past_adapters(model, name):
            raise TargetModulesError(
                f"{printable(matched[name])!r} matches {name}, a {type(modules[name]).__name__}, which takes no "
                f"adapter. Linear layers are: {_leaves(target_modules(model))}."
            )
        if name in turned:
            raise TargetModulesError(
                f"{printable(matched[name])!r} matches {name}, and in a model of the type {model.config.model_type} "
                f"PEFT takes that name for the stacked experts. Leave it out. Linear layers are: {linear()}."
            )
    return found


def _by_pattern(model: Any, modules: Iterable[str], pattern: str) -> dict[str, str]:
    try:
        matched = {name: pattern for name in modules if re.fullmatch(pattern, name)}
    except re.error as error:
        raise TargetModulesError(f"{printable(pattern)!r} is no regular expression: {error}") from error
    if not matched:
        as_entry = any(_fits(name, pattern) for name in modules)
        hint = f" For layers whose name ends in it, give a list: [{pattern!r}]." if as_entry else _meant(model, pattern)
        raise TargetModulesError(
            f"the regular expression {printable(pattern)!r} matches no layer; it has to match a full name such as "
            f"{next(iter(target_modules(model)), 'none')}.{hint}"
        )
    return matched


def _by_list(model: Any, modules: Sequence[str] | dict[str, Any], entries: Sequence[str]) -> dict[str, str]:
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise TargetModulesError(f"target modules are {list(entries)!r}; wanted names of layers, or {ALL_LINEAR}")
    matched: dict[str, str] = {}
    for entry in entries:
        found = [name for name in modules if _fits(name, entry)]
        if not found:
            raise TargetModulesError(
                f"no layer is named {printable(entry)!r}, so it would be passed over.{_meant(model, entry)}"
            )
        matched.update(dict.fromkeys(found, entry))
    return matched


def _fits(name: str, entry: str) -> bool:
    """Tell whether an entry of a list means a module, as PEFT does (`check_target_module_exists`)."""
    return name == entry or name.endswith(f".{entry}")


def _meant(model: Any, entry: str) -> str:
    names = target_modules(model)
    leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    near = difflib.get_close_matches(entry, leaves, n=1) or difflib.get_close_matches(entry, names, n=1, cutoff=0.8)
    return (f" Did you mean {near[0]!r}?" if near else "") + f" Linear layers are: {_leaves(names)}."


def _leaves(names: Iterable[str]) -> str:
    """Return the last parts of names, each once."""
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)) or "none"


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _takes_adapter(module: Any) -> bool:
    """Tell whether PEFT has a LoRA layer for a module (`dispatch_default`, and the quantised ones by their names)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return isinstance(module, kinds) or "Linear" in type(module).__name__


def _past_adapters(model: Any, name: str) -> bool:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind in _MAMBA and name.rsplit(".", 1)[-1] in _MAMBA_KERNELS


def _turned(model: Any, names: Iterable[str]) -> set[str]:
    """Return the names that PEFT would take for something else: the stacked experts of some mixtures.

    Since transformers 5 the experts of Mixtral, Qwen-MoE and others are one parameter a layer, and PEFT turns the old
    names of their projections into `target_parameters`, also where they name a dense layer of the same model.
    """
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a PEFT from before this, or none
        return set()
    turned = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # one half of a fused pair
            turned.add(name)
        else:
            if name not in (config.target_modules or ()):
                turned.add(name)
    return turned
