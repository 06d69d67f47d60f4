"""What an adapter is converted by: one unit a pair of stored factors, a stack of experts together.

In: an open adapter. Out: units, each with its modules, its scale and the names that formats know it by. Reads headers
alone; a unit's factors are read when they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from rankwise.adapters.parts import DTYPES, Array
from rankwise.checkpoints.experts import parameters_of
from rankwise.checkpoints.model import Adapter, LoraModule, ModuleKind
from rankwise.checkpoints.peft import PREFIX, module_path, pattern_name
from rankwise.errors import TensorError

NUMPY: Final = {name: dtype for dtype, name in DTYPES.items()}
"""The name of a dtype in a header -> numpy's."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One module of an adapter, or one stack of experts.

    Attributes:
        name: dotted path; of experts, that of the stack.
        modules: the module, or one entry an expert.
        path: of its tensors, as the format stores it; of PEFT without one prefix.
        key: the name that PEFT's patterns are matched with; None where the file does not tell it.
        parameter: whether PEFT wrapped a parameter here (`target_parameters`), not a layer.
        kernel: of a convolution.
        groups: of a convolution; 1 elsewhere.
        dtypes: storage dtypes of A and B.
    """

    name: str
    modules: tuple[LoraModule, ...]
    path: str
    key: str | None
    parameter: bool
    kernel: tuple[int, ...]
    groups: int
    dtypes: tuple[str, str]

    @property
    def first(self) -> LoraModule:
        """The module, or the first expert: rank, alpha and scale are the same for all of a stack."""
        return self.modules[0]

    @property
    def kind(self) -> ModuleKind:
        """What the delta is added to."""
        return self.first.kind

    @property
    def r(self) -> int:
        """Rank; of experts, of each."""
        return self.first.r

    @property
    def scaling(self) -> float:
        """The factor on B @ A.

        Raises:
            TensorError: it is not known; `carrying.refuse` has told so in better words before.
        """
        if self.first.scaling is None:
            raise TensorError(f"the scaling of {self.name} is not known")
        return self.first.scaling


def units_of(adapter: Adapter) -> tuple[Unit, ...]:
    """Return the units of an adapter, in the order of the file."""
    stacks: dict[tuple[str, str], list[LoraModule]] = {}
    for module in adapter.modules:
        a, b = adapter.stored(module)
        stacks.setdefault((a.name, b.name), []).append(module)
    peft = adapter.format == "peft"
    targets = (adapter.config or {}).get("target_parameters") if peft else None
    parameters = parameters_of([module_path(a) for a, _ in stacks], targets or ())
    units = []
    for (name, _), modules in stacks.items():
        a, b = adapter.stored(modules[0])
        path = module_path(name)
        parameter = parameters.get(path) if peft else None
        own = stack_name(modules[0].module)
        key: str | None = pattern_name(path) if peft else own
        if parameter is not None:
            key = f"{key}.{parameter.name}" if parameter.name else None
        conv = modules[0].kind == "conv"
        units.append(
            Unit(
                name=own,
                modules=tuple(modules),
                path=path.removeprefix(PREFIX) if peft else own,
                key=key,
                parameter=parameter is not None,
                kernel=a.shape[2:] if conv else (),
                groups=a.shape[0] // b.shape[1] if conv else 1,
                dtypes=(a.dtype, b.dtype),
            )
        )
    return tuple(units)


def stack_name(module: str) -> str:
    """Return the name of the stack that an expert is of; other names unchanged.

    >>> stack_name("mlp.experts.down_proj[3]"), stack_name("mlp.up_proj")
    ('mlp.experts.down_proj', 'mlp.up_proj')
    """
    return re.sub(r"\[\d+\]$", "", module)


def read_unit(adapter: Adapter, unit: Unit) -> list[tuple[Array, Array]]:
    """Read (A, B) of every module of a unit.

    Raises:
        TensorError: a factor holds NaN or infinity.
    """
    pairs = [adapter.read_factors(module) for module in unit.modules]
    for module, (a, b) in zip(unit.modules, pairs, strict=True):
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise TensorError(
                f"{module.module}: its factors hold NaN or infinity: the training diverged or the file is damaged. "
                "There is no function to keep; nothing was written. Convert an earlier checkpoint."
            )
    return pairs


def ungrouped(b: Array, groups: int) -> Array:
    """Return the B of a grouped convolution as it is stored, (out, r / groups), out of the block diagonal."""
    out, r = b.shape
    rows, wide = out // groups, r // groups
    return np.concatenate([b[g * rows : (g + 1) * rows, g * wide : (g + 1) * wide] for g in range(groups)])


def names(units: Sequence[Unit], most: int = 3) -> str:
    """Return the names of some units, in a message."""
    shown = ", ".join(u.name for u in units[:most])
    return shown + (f" and {len(units) - most} more" if len(units) > most else "")
