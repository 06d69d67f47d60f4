"""PEFT's layout: the tensors of a module, and the adapter_config.json of them all.

In: factors, ranks, alphas. Out: tensors under PEFT's names, and a config that gives every module its rank and scaling
when PEFT reads it (0.10 to 0.21). Held to real PEFT by tests/interop.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rankwise.adapters.parts import Array
from rankwise.checkpoints.model import ModuleKind
from rankwise.errors import UsageError

PREFIX: Final = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Placed:
    """What one module is in the adapter; of a stack of experts, all experts together.

    Attributes:
        module: dotted path without `.weight`; of experts, that of the parameter.
        kind: what the delta is added to.
        r: rank; of experts, of each.
        lora_alpha: alpha in the meaning of the adapter's rule.
        transposed: whether the base stores the weight as (in_features, out_features), as Conv1D of GPT-2 does.
    """

    module: str
    kind: ModuleKind
    r: int
    lora_alpha: float
    transposed: bool = False


def factor_tensors(
    module: str, kind: ModuleKind, a: Array, b: Array, *, kernel: Sequence[int] = ()
) -> dict[str, Array]:
    """Return the tensors of one module under PEFT's names.

    Args:
        module: dotted path without `.weight`.
        kind: "linear", "conv" or "embedding"; for experts see `expert_tensors`.
        a: shape (r, in_features); of a convolution (r, in * kernel); of an embedding (r, embedding_dim).
        b: shape (out_features, r); of an embedding (num_embeddings, r): the delta of the stored table is B @ A.
        kernel: (kh, kw), or fewer or more sides, of a convolution.

    Raises:
        UsageError: the kernel does not fit.
    """
    name = PREFIX + module
    if kind == "embedding":  # PEFT takes the table transposed: its A is (r, num_embeddings)
        return {f"{name}.lora_embedding_A": _own(b.T), f"{name}.lora_embedding_B": _own(a.T)}
    if kind == "conv":
        area = int(np.prod(kernel, dtype=np.int64)) if kernel else 0
        if not area or a.shape[1] % area:
            raise UsageError(f"{module}: a kernel of {tuple(kernel)} does not fit factors of shape {a.shape}")
        a = a.reshape(a.shape[0], a.shape[1] // area, *kernel)
        b = b.reshape(*b.shape, *(1 for _ in kernel))
    return {f"{name}.lora_A.weight": _own(a), f"{name}.lora_B.weight": _own(b)}


def expert_tensors(path: str, pairs: Sequence[tuple[Array, Array]]) -> dict[str, Array]:
    """Return the tensors of a stack of experts: A stacked by expert, B interleaved by direction (`ParamWrapper`).

    Args:
        path: of the module that holds the parameter, with `.base_layer` for each parameter wrapped around it.
        pairs: (A, B) of each expert, A of shape (r, in), B of shape (out, r), all of one rank.
    """
    a = np.concatenate([first for first, _ in pairs])  # (count * r, in)
    b = np.stack([second for _, second in pairs], axis=-1)  # (out, r, count)
    return {f"{PREFIX}{path}.lora_A.weight": _own(a), f"{PREFIX}{path}.lora_B.weight": _own(b.reshape(b.shape[0], -1))}


def _own(array: Array) -> Array:
    return np.ascontiguousarray(array)


def plain(alpha: float) -> float | int:
    """Write a whole alpha as an integer: some readers of the config take nothing else."""
    return int(alpha) if alpha == int(alpha) else alpha


def peft_config(
    placed: Sequence[Placed],
    rule: str,
    *,
    base: str | None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] = (),
    targets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return an adapter_config.json that gives every module its own rank and alpha.

    Keys of the patterns are full names, escaped and anchored by `^`, so that no two can match one module: PEFT takes
    the first key that matches, and sorts them when it saves. PEFT knows the rules `lora` and `rslora`; `unscaled` is
    written as alpha times r under alpha / r, which is the same scaling.

    Args:
        placed: all modules; not empty.
        rule: of all modules; a name in `SCALINGS`.
        base: what `base_model_name_or_path` gets.
        task_type: of PEFT, or None.
        modules_to_save: modules that are stored whole.
        targets: `target_modules` where something shorter than the full names is known to select the same modules.
    """
    alphas = {p.module: p.lora_alpha * p.r if rule == "unscaled" else p.lora_alpha for p in placed}
    rank = Counter(p.r for p in placed).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    key = {p.module: "^" + re.escape(p.module) for p in placed}
    layers = [p for p in placed if p.kind != "expert"]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": plain(alpha),
        "use_rslora": rule == "rslora",
        "rank_pattern": {key[p.module]: p.r for p in placed if p.r != rank},
        "alpha_pattern": {key[m]: plain(a) for m, a in alphas.items() if a != alpha},
        "target_modules": list(targets) if targets is not None else [p.module for p in layers],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(p.transposed for p in layers),
        "init_lora_weights": True,
        "use_dora": False,
        "inference_mode": True,
    }
    if experts := [p.module for p in placed if p.kind == "expert"]:
        config["target_parameters"] = experts
    if modules_to_save:
        config["modules_to_save"] = list(modules_to_save)
    return config
