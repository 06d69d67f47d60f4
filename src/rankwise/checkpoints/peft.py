"""PEFT's LoRA adapters: adapter_model.safetensors or .bin, with adapter_config.json.

In: a weight set and the config, or None. Out: an `Adapter` with the rank and scaling that PEFT gives to
each module. Written against PEFT 0.21 and held to it by tests/interop/test_peft_patterns.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from rankwise.checkpoints.experts import Parameter, parameters_of, split
from rankwise.checkpoints.factors import Draft, Factors, Pair, Scale, linear, table
from rankwise.checkpoints.model import Adapter, TensorInfo
from rankwise.checkpoints.patterns import LoraSettings, idle_keys, read_settings
from rankwise.checkpoints.sharded import WeightSet
from rankwise.errors import ConfigError, UnsupportedAdapterError
from rankwise.scaling import scaling

PREFIX: Final = "base_model.model."

_KEY: Final = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)

CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` (or how they begin) under which PEFT changes the base weights."""

_KEEPS_BASE: Final = ("gaussian", "eva", "orthogonal", "mica", "true", "false")


def recognises(names: Sequence[str]) -> bool:
    """Tell whether any tensor is named as PEFT names factors."""
    return any(".lora_" in name and _KEY.fullmatch(name) for name in names)


@dataclass(slots=True)
class _Keys:
    """The tensors of the file by role: module -> part -> tensor, and everything else."""

    linear: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    embedding: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    dora: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)


def read(source: str, weights: WeightSet, config: Mapping[str, Any] | None) -> Adapter:
    """Return a PEFT adapter.

    Raises:
        ConfigError: a field of the config is of the wrong type.
        TensorError: a factor can be none, or two do not fit each other.
    """
    where = weights.store.label("adapter_config.json")
    settings = None if config is None else read_settings(config, where)
    draft = Draft(weights, shown=_clean)
    keys = _sort_keys(weights)
    targets = _targets(config, where)
    _note_config(draft, config, settings)
    for module in keys.dora:
        text = "{modules}: DoRA. The figures are of scaling * B @ A; the learned magnitudes are left out."
        draft.note("dora", "info", text, module)
    seen: list[str] = []
    parameters = parameters_of(tuple(keys.linear), targets)
    for pair in draft.pair_up(keys.linear, "lora_A", "lora_B"):
        seen.append(_add_linear(draft, pair, settings, parameters.get(pair.module)))
    for pair in draft.pair_up(keys.embedding, "lora_embedding_A", "lora_embedding_B"):
        seen.append(_add_embedding(draft, pair, settings))
    seen.extend(_pattern_name(m) for m in (*keys.linear, *keys.embedding) if m not in parameters)
    _note_idle_keys(draft, settings, seen)
    _skip_others(draft, keys.others)
    return draft.finish(source, "peft", config)


def _sort_keys(weights: WeightSet) -> _Keys:
    keys = _Keys()
    adapters: dict[str, str] = {}
    for name in weights.names():
        match = _KEY.fullmatch(name)
        if match is None:
            keys.others.append(name)
            continue
        adapters.setdefault(match["adapter"] or "", name)
        module, part = match["module"], match["part"]
        if part == "lora_magnitude_vector":
            keys.dora.add(module)
            continue
        group = keys.embedding if "embedding" in part else keys.linear
        if part in group.setdefault(module, {}):
            break  # a second adapter name: refused below
        group[module][part] = weights.info(name)
    if len(adapters) > 1:
        first, second = list(adapters.values())[:2]
        raise UnsupportedAdapterError(
            f"{weights.label} holds several adapters ({first} and {second}); rankwise reads one at a time. Save each "
            "by its name with `save_pretrained(selected_adapters=[...])`."
        )
    return keys


def _clean(path: str) -> str:
    """Strip PEFT's prefixes, however often they were put on, and its inner segments."""
    while path.startswith(PREFIX):
        path = path[len(PREFIX) :]
    return path.replace(".base_layer.", ".").removesuffix(".base_layer")


def _pattern_name(path: str) -> str:
    """Return the name that PEFT matches patterns with: one prefix off, also where there are two."""
    path = path.removeprefix(PREFIX).removesuffix(".base_layer.out_proj")  # of nn.MultiheadAttention
    return path.replace(".base_layer.", ".").removesuffix(".base_layer")


def module_path(tensor: str) -> str:
    """Return the path of the module that a factor belongs to, as stored; the tensor's name where it is no factor."""
    match = _KEY.fullmatch(tensor)
    return tensor if match is None else match["module"]


def pattern_name(path: str) -> str:
    """Return the name that PEFT matches patterns and targets with, for a path as stored."""
    return _pattern_name(path)


def _targets(config: Mapping[str, Any] | None, where: str) -> tuple[str, ...]:
    found = (config or {}).get("target_parameters")
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise ConfigError(f"{where}: `target_parameters` is {found!r:.100}; wanted a list of parameter names.")
    return tuple(found)


def _scale(draft: Draft, settings: LoraSettings | None, name: str, r: int, module: str) -> Scale:
    """Return the scale by the config, and note where the tensors contradict its rank.

    The scaling is then still alpha / r with the config's r: PEFT computes it when it builds the layers, before
    it looks at a tensor, and so do other loaders of the config (PEFT then refuses the file for its shapes).
    Where another key that matches gives the tensors' rank, that is the rank that was trained.
    """
    if settings is None:
        return Scale()
    wanted = settings.rank_of(name)
    if r != wanted and r in settings.ranks.every(name):
        text = (
            "{modules}: several keys of `rank_pattern` match, and the tensors have not the rank of the first. PEFT "
            "sorts keys when it saves, so the order in training was another; the tensors' rank is used. PEFT "
            "refuses to load this: move the key that was meant to the front."
        )
        draft.note("pattern-order", "warning", text, module)
        wanted = r
    elif r != wanted:
        text = (
            f"{{modules}}: the config gives rank {wanted}, the tensors have {r}. Config and weights are of different "
            "runs, or the weights were resized. r is the tensors' here, the scaling the config's: what was "
            "trained with is not known, and PEFT refuses to load this."
        )
        draft.note("rank-contradicts-config", "error", text, module)
    _note_alpha_order(draft, settings, name, module)
    return Scale(settings.alpha_of(name), scaling(settings.rule, settings.alpha_of(name), wanted), settings.rule)


def _note_alpha_order(draft: Draft, settings: LoraSettings, name: str, module: str) -> None:
    if len(settings.alphas.every(name)) > 1:
        text = (
            "{modules}: several keys of `alpha_pattern` match and give different alphas. The first is used, as PEFT "
            "does when it loads; but PEFT sorts keys when it saves, so training may have used another."
        )
        draft.note("pattern-order", "warning", text, module)


def _add_linear(draft: Draft, pair: Pair, settings: LoraSettings | None, parameter: Parameter | None) -> str:
    """Add a module, or the experts of a parameter; return the name that patterns match."""
    if parameter is not None:
        return _add_parameter(draft, pair, settings, parameter)
    name = _pattern_name(pair.module)
    factors = linear(pair)
    scale = _scale(draft, settings, name, factors.r, pair.module)
    draft.add(pair, factors, scale)
    return name


def _add_embedding(draft: Draft, pair: Pair, settings: LoraSettings | None) -> str:
    """PEFT stores A as (r, num_embeddings) and B as (embedding_dim, r); the table's delta is (B @ A).T."""
    turned = Pair(pair.module, _turn(pair.a), _turn(pair.b))
    factors = table(turned)
    factors = Factors(factors.shape, factors.r, "embedding", lambda a, b: (b.T, a.T))
    name = _pattern_name(pair.module)
    scale = _scale(draft, settings, name, factors.r, pair.module)
    draft.add(pair, factors, scale)
    return name


def _turn(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.name, info.shape[::-1], info.dtype, info.file)


def _add_parameter(draft: Draft, pair: Pair, settings: LoraSettings | None, parameter: Parameter) -> str:
    """Add what `target_parameters` wrapped: a matrix, or a stack of experts with a rank each."""
    path = _clean(pair.module)
    module = f"{path}.{parameter.name}".removesuffix(".weight") if parameter.name else path
    name = f"{_pattern_name(pair.module)}.{parameter.name}" if parameter.name else _pattern_name(pair.module)
    if not parameter.name:
        text = (
            "{modules}: `target_parameters` names several parameters here, and the file does not say which pair of "
            "factors belongs to which. The modules keep the names that the file gives them."
        )
        draft.note("expert-names", "warning", text, pair.module)
        module = pair.module.removeprefix(PREFIX)
    whole = linear(pair)
    r = whole.r if settings is None else settings.rank_of(name)
    count, rest = divmod(whole.r, r)
    if rest or whole.kind != "linear":
        text = (
            f"{{modules}}: the factors have rank {whole.r} in all, no multiple of the rank {r} that the config gives "
            "to each expert, so it is not known how many experts there are."
        )
        draft.note("rank-contradicts-config", "error", text, pair.module)
        draft.skip(module, f"rank {whole.r} of all experts is no multiple of the config's {r}")
        return name
    scale = Scale()
    if settings is not None:
        scale = Scale.by_rule(settings.rule, settings.alpha_of(name), r)
        _note_alpha_order(draft, settings, name, pair.module)
        if len(settings.ranks.every(name)) > 1:
            text = (
                "{modules}: several keys of `rank_pattern` match and give different ranks. The first is used to tell "
                "the experts apart; PEFT sorts keys when it saves, so their number here may be wrong."
            )
            draft.note("pattern-order", "error", text, pair.module)
    if count == 1:
        draft.add(pair, whole, scale, module=module)
    for index in range(count if count > 1 else 0):
        one = Factors(whole.shape, r, "expert", partial(split, index=index, count=count))
        draft.add(pair, one, scale, module=f"{module}[{index}]")
    return name


def _note_config(draft: Draft, config: Mapping[str, Any] | None, settings: LoraSettings | None) -> None:
    if config is None or settings is None:
        text = (
            "There is no adapter_config.json beside the weights, so alpha, rule and scaling are unknown; ranks are "
            "those of the tensors. Figures are of B @ A without a scaling."
        )
        draft.note("no-config", "warning", text)
        return
    if settings.defaulted:
        fields = " and ".join(settings.defaulted)
        text = f"adapter_config.json does not give {fields}; PEFT's defaults (8) are taken, as PEFT does."
        draft.note("config-defaults", "warning", text)
    init = config.get("init_lora_weights")
    word = str(init).lower()
    if init is None or word in _KEEPS_BASE:
        return
    known = word.startswith(CHANGES_BASE)
    text = (
        f"`init_lora_weights` is {init!r:.60}. "
        + ("PEFT changes the base weights at this start" if known else "It is not known to keep the base weights")
        + ", so scaling * B @ A is what is added to that changed base, not what training changed in the original "
        "one. Saved with `path_initial_model_for_weight_conversion`, an adapter fits the original base."
    )
    draft.note("init-changes-base", "warning", text)


def _note_idle_keys(draft: Draft, settings: LoraSettings | None, names: Sequence[str]) -> None:
    if settings is None:
        return
    unmatched, shadowed = idle_keys(settings, list(dict.fromkeys(names)))
    for key in unmatched:
        text = (
            "{modules}: matches no module of this file, so it changed nothing. A key is a regular expression that must "
            "cover the end of a module's path from a dot on: `q_proj` does, `proj` and `layers.0` do not."
        )
        draft.note("pattern-unmatched", "warning", text, key)
    for key in shadowed:
        text = "{modules}: an earlier key takes every module that this one matches. The first match wins."
        draft.note("pattern-shadowed", "warning", text, key)


def _skip_others(draft: Draft, names: Sequence[str]) -> None:
    text = "{modules}: stored whole beside the adapter, not as factors; left out."
    for name in names:
        path = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.|$)", "", _clean(name))
        leaf = path.rsplit(".", 1)[-1]
        module = path.removesuffix(".weight").removesuffix(".bias")
        if "trainable_tokens" in path or "token_adapter" in path:
            reason = "rows of an embedding table that were trained as they are (trainable_token_indices)"
        elif leaf == "bias":
            reason = "a bias, not a product of factors"
        else:
            reason = "a whole weight, not a product of factors (modules_to_save, or a saved embedding)"
        draft.skip(module, reason)
        draft.note("modules-to-save", "info", text, module)
