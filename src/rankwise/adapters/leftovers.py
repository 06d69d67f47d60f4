"""What low rank does not carry: norms, biases, resized tables, and what was not asked for.

In: two checkpoints, and what the adapter holds already. Out: modules stored whole, and the tensors that changed and
are left out, each with its reason and its size. What is equal bit by bit is only counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.adapters.layout import selects_only
from rankwise.adapters.peft_folder import PREFIX, Placed
from rankwise.adapters.staging import Staging
from rankwise.checkpoints.model import Checkpoint
from rankwise.deltas import FLOATS, Selection, module_of
from rankwise.grids import row_blocks
from rankwise.linalg import energy_of
from rankwise.records import NotExtracted, Skipped, WholeModule

Array = NDArray[Any]

ONE_DIMENSION: Final = "a norm or a bias: no matrix"
OF_ADAPTED: Final = "a bias of an adapted layer: no factor holds it, and `modules_to_save` would take the whole layer"
RESIZED: Final = "resized"
ADDED: Final = "in the tuned checkpoint alone: the base has nothing that it could be added to"
NOT_FINITE: Final = "infinity or NaN in one of the checkpoints"

_NOT_COMPARED: Final = ("lm_head", "embed_out", ".masked_bias", ".attn.bias", ".inv_freq", ".position_ids")
"""Ends of what one side may store and the other not, without a difference: tied heads and buffers."""


@dataclass(slots=True)
class Rest:
    """What became of the tensors that are not in factors."""

    whole: list[WholeModule] = field(default_factory=list)
    whole_energy: float = 0.0
    keys: list[str] = field(default_factory=list)
    left_out: list[NotExtracted] = field(default_factory=list)
    unchanged: int = 0


@dataclass(frozen=True, slots=True)
class _Change:
    """A tensor that is not the same in both, with the squared norms of the delta and of the base where they exist."""

    tuned: str
    name: str
    reason: str
    energy: float | None
    base_energy: float | None

    @property
    def relative_norm(self) -> float | None:
        if self.energy is None or not self.base_energy or not math.isfinite(self.energy + self.base_energy):
            return None
        return math.sqrt(self.energy / self.base_energy)


class Leftovers:
    """The tensors of both checkpoints that no unit handles.

    Attributes:
        reasons: tuned tensor -> why it is not adapted.
        handled: tuned tensors that units handle.
    """

    def __init__(
        self,
        before: Checkpoint,
        after: Checkpoint,
        aligned: Mapping[str, str],
        on_base: Mapping[str, str],
        wanted: Selection,
        skipped: Sequence[Skipped],
    ) -> None:
        self._before, self._after = before, after
        self._aligned, self._on_base, self._wanted = aligned, on_base, wanted
        self._skipped = {s.module: s.reason for s in skipped}
        self.reasons: dict[str, str] = {}
        self.handled: set[str] = set()

    def take(self, placed: Sequence[Placed], staging: Staging | None) -> Rest:
        """Compare what is left, and store whole modules where asked.

        Args:
            placed: what the adapter holds as factors.
            staging: where whole modules are put; None stores none.
        """
        rest = Rest()
        changes = [c for tuned, base in self._aligned.items() if (c := self._change(tuned, base, rest)) is not None]
        adapted = {p.module.removesuffix(".weight") for p in placed}
        paths = {module_of(name) if name.endswith(".weight") else name.rpartition(".")[0] for name in self._names()}
        groups: dict[str, list[_Change]] = {}
        for change in changes:
            owner, _, leaf = change.name.rpartition(".")
            fits = leaf in ("weight", "bias") and owner and change.reason in (ONE_DIMENSION, RESIZED)
            if owner in adapted:
                rest.left_out.append(_left(change, OF_ADAPTED if leaf == "bias" else change.reason))
            elif not fits or staging is None:
                rest.left_out.append(_left(change, change.reason))
            elif not selects_only(owner, paths):
                reason = f"{change.reason}; its path ends others' paths, so PEFT would store those too"
                rest.left_out.append(_left(change, reason))
            else:
                groups.setdefault(owner, []).append(change)
        if staging is not None:
            for owner, members in groups.items():
                self._store(owner, members, staging, rest)
        rest.left_out += self._added()
        return rest

    def _added(self) -> list[NotExtracted]:
        """Name what only the tuned checkpoint holds, such as new layers."""
        names = [n for n in self._after.names() if n not in self._aligned]
        modules = [m for n in names if self._wanted.wants(m := module_of(n)) and not m.endswith(_NOT_COMPARED)]
        return [NotExtracted(module=m, reason=ADDED, relative_norm=None, energy=None) for m in modules]

    def _names(self) -> Sequence[str]:
        return list(self._on_base.values())

    def _change(self, tuned: str, base: str, rest: Rest) -> _Change | None:
        """Compare one tensor; None where it is handled, not wanted, or equal."""
        if tuned in self.handled or not self._wanted.wants(module_of(tuned)):
            return None
        after, before = self._after.info(tuned), self._before.info(base)
        name = self._on_base[tuned]
        reason = self.reasons.get(tuned) or self._reason(tuned)
        if after.shape != before.shape:
            sound = after.dtype not in FLOATS or math.isfinite(energy_of(self._after.read(tuned)))
            return _Change(tuned, name, RESIZED if sound else NOT_FINITE, None, None)
        one, two = self._before.read(base), self._after.read(tuned)
        if one.dtype == two.dtype and np.array_equal(_bits(one), _bits(two)):
            rest.unchanged += 1
            return None
        if after.dtype not in FLOATS or before.dtype not in FLOATS or "quantised" in reason or "scale" in reason:
            return _Change(tuned, name, reason, None, None)
        energy, base_energy = _energies(one, two)
        if energy == 0.0:  # another dtype, the same numbers
            rest.unchanged += 1
            return None
        if not (math.isfinite(energy) and math.isfinite(base_energy)):
            return _Change(tuned, name, NOT_FINITE, None, None)
        return _Change(tuned, name, reason, energy, base_energy)

    def _reason(self, tuned: str) -> str:
        if len(self._after.info(tuned).shape) < 2 and self._after.info(tuned).dtype in FLOATS:
            return ONE_DIMENSION
        return self._skipped.get(module_of(tuned), "no weight of a layer")

    def _store(self, owner: str, members: Sequence[_Change], staging: Staging, rest: Rest) -> None:
        """Put one module as it is in the tuned checkpoint, with all its tensors."""
        names = {n: t for t, n in self._on_base.items() if n.rpartition(".")[0] == owner}
        tensors = {PREFIX + name: self._after.read(tuned) for name, tuned in names.items()}
        key = f"whole:{owner}"
        if staging.facts(key) is None:
            staging.put(key, tensors, {})
        rest.keys.append(key)
        energies = [m.energy for m in members]
        bases = [m.base_energy for m in members]
        relative = None
        if all(e is not None for e in energies) and (base := math.fsum(b for b in bases if b is not None)) > 0:
            relative = math.sqrt(math.fsum(e for e in energies if e is not None) / base)
        rest.whole_energy += math.fsum(e for e in energies if e is not None)
        rest.whole.append(
            WholeModule(
                module=owner,
                tensors=tuple(name.rpartition(".")[2] for name in names),
                params=sum(int(t.size) for t in tensors.values()),
                relative_norm=relative,
            )
        )


def _left(change: _Change, reason: str) -> NotExtracted:
    return NotExtracted(
        module=module_of(change.name), reason=reason, relative_norm=change.relative_norm, energy=change.energy
    )


def _bits(array: Array) -> Array:
    """Return the bit patterns: -0.0 and 0.0 differ, a NaN is equal to itself."""
    return np.atleast_1d(array).view(f"u{array.dtype.itemsize}") if array.dtype != bool else array


def _energies(one: Array, two: Array) -> tuple[float, float]:
    """Return the squared norms of two - one and of one, a block at a time in float64."""
    flat = [a.reshape(a.shape[0] if a.ndim else 1, -1) for a in (one, two)]
    energy = base = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in row_blocks(flat[0].shape):
            first, second = (f[rows].astype(np.float64) for f in flat)
            energy += float(np.sum((second - first) ** 2))
            base += float(np.sum(first**2))
    return energy, base
