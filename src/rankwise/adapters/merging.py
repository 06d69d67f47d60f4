"""Several adapters as one: factors laid side by side, each with its weight, so that the products add up.

In: open adapters and their weights. Out: one list of modules, and the factors of each: A = [A_1; A_2; ...] and
B = [w_1 s_1 B_1, ...] / s_1, so that s_1 B A is the weighted sum. The ranks add; `resizing` cuts them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.adapters.baking import folded
from rankwise.adapters.parts import Array
from rankwise.adapters.stored_units import Unit, read_unit
from rankwise.checkpoints.model import Adapter
from rankwise.errors import UsageError

WIDTH = {"F64": 5, "F32": 4, "BF16": 3, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 0}
"""Of two dtypes, the one with the higher number is taken: bfloat16 over float16 for its range."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """An open adapter, its units and its weight in the sum."""

    adapter: Adapter
    units: tuple[Unit, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class Joined:
    """One module of the result, and where its factors come from.

    Attributes:
        unit: of the first adapter that has it; what names, kernels and kinds are taken from.
        parts: (adapter, its unit, weight).
    """

    unit: Unit
    parts: tuple[tuple[Adapter, Unit, float], ...]

    @property
    def r(self) -> int:
        """Rank of the factors laid side by side."""
        return sum(unit.r for _, unit, _ in self.parts)

    @property
    def scaling(self) -> float:
        """The factor on B @ A; the other adapters' are folded into their part of B."""
        return self.unit.scaling

    @property
    def plain(self) -> bool:
        """Whether it is one adapter's module as it is."""
        return len(self.parts) == 1 and self.parts[0][2] == 1.0

    @property
    def dtypes(self) -> tuple[str, str]:
        """The widest storage dtypes of A and B among the parts."""
        a, b = zip(*(unit.dtypes for _, unit, _ in self.parts), strict=True)
        return max(a, key=WIDTH.__getitem__), max(b, key=WIDTH.__getitem__)


def join(adapters: Sequence[Weighted]) -> list[Joined]:
    """Return the modules of all adapters, those of the first one first.

    Raises:
        UsageError: one module has another shape or kind in two adapters, or none is shared by all.
    """
    found: dict[str, list[tuple[Adapter, Unit, float]]] = {}
    for source in adapters:
        for unit in source.units:
            found.setdefault(unit.name, []).append((source.adapter, unit, source.weight))
    for name, parts in found.items():
        (first, unit, _), *rest = parts
        for adapter, other, _ in rest:
            if _facts(unit) != _facts(other):
                raise UsageError(
                    f"{name} is a {unit.kind} of shape {unit.first.shape} in {first.source} and a {other.kind} of "
                    f"shape {other.first.shape} in {adapter.source}: they are not for one base. Nothing was written."
                )
    for source in adapters[1:]:
        if not any(unit.name in {u.name for u in adapters[0].units} for unit in source.units):
            raise UsageError(
                f"{source.adapter.source} has no module in common with {adapters[0].adapter.source} "
                f"({source.units[0].name} there, {adapters[0].units[0].name} here): bring both to one format first."
            )
    return [Joined(parts[0][1], tuple(parts)) for parts in found.values()]


def _facts(unit: Unit) -> tuple[object, ...]:
    return unit.kind, unit.first.shape, unit.kernel, unit.groups, len(unit.modules)


def read_joined(joined: Joined) -> list[tuple[Array, Array]]:
    """Read the factors of one module, or of every expert: raw where it is `plain`, else side by side.

    Products by a power of two stay in the stored precision; others are taken in float64.
    """
    read = [read_unit(adapter, unit) for adapter, unit, _ in joined.parts]
    if joined.plain:
        return read[0]
    factors = [weight * unit.scaling / joined.scaling for _, unit, weight in joined.parts]
    return [
        (
            np.concatenate([pairs[i][0] for pairs in read]),
            np.concatenate([folded(pairs[i][1], f) for pairs, f in zip(read, factors, strict=True)], axis=1),
        )
        for i in range(len(joined.unit.modules))
    ]
