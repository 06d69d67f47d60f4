"""Adapters of parameters rather than layers: PEFT's `target_parameters`, made for stacked experts.

In: the module paths of a file and the config's `target_parameters`. Out: which parameter each pair of
factors belongs to, and one expert's factors out of the stack. PEFT 0.17 to 0.21, tuners/lora/layer.py,
`ParamWrapper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rankwise.checkpoints.model import Array

_DECLARED: Final = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "w3", "down_proj", "w2")
"""Order in which models declare the parameters of their experts; PEFT wraps them in that order."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that PEFT wrapped.

    Attributes:
        name: its name in the module, or "" where the file leaves several open.
    """

    name: str


def parameters_of(paths: Sequence[str], targets: Sequence[str]) -> dict[str, Parameter]:
    """Return path -> parameter, for the paths that `target_parameters` wrapped.

    Several parameters of one module are wrapped around each other, the one declared first innermost; a
    path has one `.base_layer` for each wrapper around its own. The file holds no more than that, so the order
    of declaration is taken from the models that are known.

    Args:
        paths: of modules, as stored.
        targets: entries such as "mlp.experts.down_proj".
    """
    found: dict[str, Parameter] = {}
    for outer in {_strip(path): None for path in paths}:
        names = [t.rpartition(".")[2] for t in targets if _targeted(outer, t)]
        if not names:
            continue
        nested = sorted((p for p in paths if _strip(p) == outer), key=len, reverse=True)  # innermost first
        names = list(dict.fromkeys(names))
        if len(names) == 1 and len(nested) == 1:
            order = names
        elif len(names) == len(nested) and all(n in _DECLARED for n in names):
            order = sorted(names, key=_DECLARED.index)
        else:
            order = [""] * len(nested)
        found.update({path: Parameter(name) for path, name in zip(nested, order, strict=True)})
    return found


def wrapping_order(names: Sequence[str]) -> list[str] | None:
    """Return the parameters of one module in the order in which PEFT wraps them, innermost first; None if unknown."""
    if len(names) < 2:
        return list(names)
    return sorted(names, key=_DECLARED.index) if all(name in _DECLARED for name in names) else None


def _strip(path: str) -> str:
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _targeted(path: str, target: str) -> bool:
    """PEFT compares "module.parameter" with the target, or with its end from a dot on."""
    module = target.rpartition(".")[0]
    return bool(module) and (path == module or path.endswith(f".{module}"))


def split(a: Array, b: Array, *, index: int, count: int) -> tuple[Array, Array]:
    """Return the factors of one expert: A is stacked by expert, B interleaved by direction.

    `ParamWrapper.get_delta_weight` reshapes A (count * r, in) to (count, r, in) and B (out, r * count) to
    (out, r, count).
    """
    r = a.shape[0] // count
    return a[index * r : (index + 1) * r], b[:, index::count]


def stacked(a: Array, b: Array, *, index: int) -> tuple[Array, Array]:
    """Return the factors of one expert of MLX: A (experts, r, in), B (experts, out, r)."""
    return a[index], b[index]
