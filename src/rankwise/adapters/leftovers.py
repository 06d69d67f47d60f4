"""What low rank does not carry: norms, biases, resized tables, and what was not asked for.

In: two checkpoints, and what the adapter holds already. Out: modules stored whole, and the tensors that changed and
are left out, each with its reason and its size. What is equal bit by bit is only counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.adapters.layout import selects_only
from rankwise.adapters.peft_folder import PREFIX, Placed
from rankwise.adapters.staging import Staging
from rankwise.checkpoints import open_source
from rankwise.checkpoints.locate import everywhere
from rankwise.checkpoints.model import Checkpoint
from rankwise.deltas import FLOATS, PEAK_REST, Selection, module_of
from rankwise.errors import WrongKindError
from rankwise.grids import row_blocks
from rankwise.linalg import energy_of
from rankwise.records import NotExtracted, Skipped, WholeModule
from rankwise.spreading import Work, Workers

Array = NDArray[Any]

ONE_DIMENSION: Final = "a norm or a bias: no matrix"
OF_ADAPTED: Final = "a bias of an adapted layer: no factor holds it, and `modules_to_save` would take the whole layer"
RESIZED: Final = "resized"
ADDED: Final = "in the tuned checkpoint alone: the base has nothing that it could be added to"
NOT_FINITE: Final = "infinity or NaN in one of the checkpoints"

TOGETHER: Final = 8
"""Tensors that a worker is sent at a time: most of them are norms and biases."""

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
class _Tensor:
    """A tensor that no unit handles: its names in the tuned checkpoint, the base and the adapter, and why."""

    tuned: str
    base: str
    name: str
    reason: str


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

    def take(self, placed: Sequence[Placed], staging: Staging | None, workers: Workers) -> Rest:
        """Compare what is left, and store whole modules where asked.

        Args:
            placed: what the adapter holds as factors.
            staging: where whole modules are put; None stores none.
            workers: where tensors are compared: tables that no unit handles are the largest of all.
        """
        rest = Rest()
        sources = self._before.source, self._after.source
        work = Work(_compare, (self._before, self._after), lambda: partial(_open, *map(everywhere, sources)))
        tensors = self._tensors()
        found = workers.flat_map(
            work, tensors, name=lambda one: module_of(one.tuned), memory=self._memory, together=TOGETHER
        )
        changes = [change for change in found if change is not None]
        rest.unchanged += len(tensors) - len(changes)
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

    def _tensors(self) -> list[_Tensor]:
        """Return the tensors that are wanted, and that no unit handles."""
        return [
            _Tensor(tuned, base, self._on_base[tuned], self.reasons.get(tuned) or self._reason(tuned))
            for tuned, base in self._aligned.items()
            if tuned not in self.handled and self._wanted.wants(module_of(tuned))
        ]

    def _memory(self, one: _Tensor) -> int:
        """Return about how many bytes it takes to compare one tensor: both as stored, and blocks of them."""
        info = self._after.info(one.tuned)
        return 2 * math.prod(info.shape) * (8 if "64" in info.dtype else 4 if "32" in info.dtype else 2) + PEAK_REST

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


def _compare(opened: tuple[Checkpoint, Checkpoint], one: _Tensor) -> Iterator[_Change | None]:
    """Compare one tensor; None where it is equal."""
    yield _change(*opened, one)


def _change(before: Checkpoint, after: Checkpoint, one: _Tensor) -> _Change | None:
    here, there = after.info(one.tuned), before.info(one.base)
    if here.shape != there.shape:
        sound = here.dtype not in FLOATS or math.isfinite(energy_of(after.read(one.tuned)))
        return _Change(one.tuned, one.name, RESIZED if sound else NOT_FINITE, None, None)
    first, second = before.read(one.base), after.read(one.tuned)
    if first.dtype == second.dtype and np.array_equal(_bits(first), _bits(second)):
        return None
    no_numbers = here.dtype not in FLOATS or there.dtype not in FLOATS
    if no_numbers or "quantised" in one.reason or "scale" in one.reason:
        return _Change(one.tuned, one.name, one.reason, None, None)
    energy, base_energy = _energies(first, second)
    if energy == 0.0:  # another dtype, the same numbers
        return None
    if not (math.isfinite(energy) and math.isfinite(base_energy)):
        return _Change(one.tuned, one.name, NOT_FINITE, None, None)
    return _Change(one.tuned, one.name, one.reason, energy, base_energy)


def _open(base: str, tuned: str) -> tuple[Checkpoint, Checkpoint]:
    before, after = (open_source(source, want="checkpoint") for source in (base, tuned))
    if not (isinstance(before, Checkpoint) and isinstance(after, Checkpoint)):  # `want` sees to it
        raise WrongKindError(f"{base} and {tuned} are not both full checkpoints")
    return before, after


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
