"""The work on one module: read it, subtract, choose a rank, factor, cast, measure.

In: a pair of weights, or all parameters of one module of experts. Out: the tensors of an adapter, and what they lost.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from rankwise.adapters.choosing import Choice, Need
from rankwise.adapters.layout import Spot
from rankwise.adapters.peft_folder import Placed, expert_tensors, factor_tensors
from rankwise.adapters.truncation import Truncation, residual_energy, truncate
from rankwise.checkpoints.model import Checkpoint
from rankwise.deltas import Delta, Pair, Selection, read_deltas
from rankwise.errors import UsageError
from rankwise.linalg import energy_of
from rankwise.records import ExtractedModule, NotExtracted

Array = NDArray[Any]

DTYPE_NAMES: Final[dict[str, Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}


REFIT: Final = 8
"""Rank over in_features, inverse, from which B is fitted to the rounded A."""


class Moments(Protocol):
    """Second moments of the inputs of modules, for calibration."""

    def moment(self, module: str, features: int) -> Array | None:
        """Return the mean of x x' over the inputs of a module, (in, in), or None where it was not measured."""

    def held_out(self, module: str, features: int) -> Array | None:
        """Return the same over inputs that the factors are not fitted to."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is worked on at one time: one weight, or the parameters of one module of experts, innermost first."""

    key: str
    members: tuple[tuple[Pair, Spot], ...]


@dataclass(slots=True)
class Made:
    """What came of one unit.

    Attributes:
        key: of the unit.
        placed: what is in the adapter.
        modules: for the record.
        energies: (energy of the delta, energy of what is missed) of each of `modules`.
        left_out: for the record.
        unchanged: number of weights that are equal bit by bit.
        params: entries of the factors.
        dtypes: of the factors.
    """

    key: str
    placed: list[Placed] = field(default_factory=list)
    modules: list[ExtractedModule] = field(default_factory=list)
    energies: list[tuple[float, float]] = field(default_factory=list)
    left_out: list[NotExtracted] = field(default_factory=list)
    unchanged: int = 0
    params: int = 0
    dtypes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return all of it as JSON types."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_facts(cls, key: str, facts: Mapping[str, Any]) -> Made:
        """Return what `facts` was made of."""
        return msgspec.convert({**facts, "key": key}, cls)


@dataclass(frozen=True, slots=True)
class _Changed:
    """A delta that is finite and not zero."""

    delta: Delta
    difference: Array  # (out_features, in_features) of the layer: turned where the file has it the other way
    energy: float
    need: Need


class Working:
    """What all units share."""

    def __init__(
        self,
        before: Checkpoint,
        after: Checkpoint,
        wanted: Selection,
        choice: Choice,
        options: Mapping[str, Any],
        moments: Moments | None,
    ) -> None:
        self.before, self.after, self.wanted, self.choice = before, after, wanted, choice
        self.device, self.seed = str(options["device"]), int(options["seed"])
        self.dtype: str | None = options["dtype"]
        self.moments = moments

    def work(self, unit: Unit) -> tuple[Made, dict[str, Array]]:
        """Return what came of a unit, and its tensors."""
        made = Made(unit.key)
        tensors: dict[str, Array] = {}
        stacks = []
        for pair, spot in unit.members:
            if spot.kind == "expert":
                stacks.append((pair, spot, self._experts(pair, spot, made)))
            else:
                tensors |= self._matrix(pair, spot, made)
        there = [(pair, spot, pairs) for pair, spot, pairs in stacks if pairs]
        for depth, (_, _, pairs) in enumerate(there):  # innermost first: it has the most wrappers around it
            path = unit.key + ".base_layer" * (len(there) - 1 - depth)
            tensors |= expert_tensors(path, pairs)
        made.params = sum(int(t.size) for t in tensors.values())
        made.dtypes = sorted({str(t.dtype) for t in tensors.values()})
        return made, tensors

    def _matrix(self, pair: Pair, spot: Spot, made: Made) -> dict[str, Array]:
        """Work on one weight that is no stack."""
        for delta in read_deltas(self.before, self.after, pair, self.wanted):
            changed = self._changed(delta, spot, made)
            if changed is None:
                continue
            if changed.need.rank == 0:
                made.left_out.append(_left_out(changed))
                continue
            a, b = self._factor(changed, changed.need.rank, spot, pair.dtype, made)
            alpha = made.modules[-1].lora_alpha
            name = f"{spot.name}.weight" if spot.parameter else spot.name
            made.placed.append(
                Placed(name, "expert" if spot.parameter else spot.kind, a.shape[0], alpha, pair.transposed)
            )
            tensors = factor_tensors(spot.name, spot.kind, a, b, kernel=spot.kernel)
            return tensors | self._tied(spot, a, b, made) if spot.tied else tensors
        return {}

    def _tied(self, spot: Spot, a: Array, b: Array, made: Made) -> dict[str, Array]:
        """Give the head that is the same table the same factors, as the linear layer that it is."""
        made.placed.append(Placed(spot.tied, "linear", a.shape[0], made.placed[-1].lora_alpha))
        note = f"tied to {spot.name}: the same factors"
        made.modules.append(msgspec.structs.replace(made.modules[-1], module=spot.tied, kind="linear", notes=(note,)))
        return factor_tensors(spot.tied, "linear", a, b)

    def _experts(self, pair: Pair, spot: Spot, made: Made) -> list[tuple[Array, Array]]:
        """Work on a stack: PEFT takes one rank for all experts, so each gets the largest that one needs."""
        stack = list(read_deltas(self.before, self.after, pair, self.wanted))
        whole = Made(made.key)
        found = {d.module: c for d in stack if (c := self._changed(d, spot, whole)) is not None}
        made.left_out += whole.left_out
        rank = max((c.need.rank for c in found.values()), default=0)
        if not found:
            made.unchanged += bool(stack) and whole.unchanged == len(stack)
            return []
        if rank == 0:
            made.left_out += [_left_out(c) for c in found.values()]
            return []
        shape = pair.shape[:0:-1] if spot.turned else pair.shape[1:]  # (out, in)
        kind = self._stored(pair.dtype)
        empty = np.zeros((rank, shape[1]), kind), np.zeros((shape[0], rank), kind)
        pairs = []
        for index in range(pair.shape[0]):
            changed = found.get(f"{pair.module}[{index}]")
            pairs.append(empty if changed is None else self._factor(changed, rank, spot, pair.dtype, made))
        alpha = max(
            (m for m in made.modules if m.module.rpartition("[")[0] == spot.name), key=lambda m: m.lora_alpha
        ).lora_alpha
        made.placed.append(Placed(spot.name, "expert", rank, alpha))
        return pairs

    def _changed(self, delta: Delta, spot: Spot, made: Made) -> _Changed | None:
        """Subtract, and choose a rank; None where there is nothing to carry, which is noted."""
        if delta.unchanged:  # before any arithmetic
            made.unchanged += 1
            return None
        difference = delta.subtract()
        energy = energy_of(difference)
        if not math.isfinite(energy):
            reason = "infinity or NaN in one of the checkpoints, or a difference that float32 cannot hold"
            made.left_out.append(NotExtracted(module=delta.module, reason=reason, relative_norm=None, energy=None))
            return None
        if energy == 0.0:
            if np.array_equal(delta.base, delta.tuned):  # zeros of either sign, or another dtype
                made.unchanged += 1
            else:  # float64 holds differences that float32 does not
                reason = "rank 0: the difference is below what float32 can hold"
                left = NotExtracted(module=delta.module, reason=reason, relative_norm=None, energy=None)
                made.left_out.append(left)
            return None
        need = self.choice.need(delta, difference, energy, seed=self.seed, device=self.device)
        return _Changed(delta, difference.T if spot.turned else difference, energy, need)

    def _stored(self, dtype: str) -> Any:
        """Return the dtype of the factors of a module whose weight has this one."""
        own = {"F64": "float64", "F32": "float32", "F16": "float16"}.get(dtype, "bfloat16")
        return DTYPE_NAMES[self.dtype or own]

    def _factor(self, changed: _Changed, rank: int, spot: Spot, dtype: str, made: Made) -> tuple[Array, Array]:
        """Return (A, B) as they are stored, and note the module."""
        delta, difference, need = changed.delta, changed.difference, changed.need
        module = delta.module if spot.kind != "expert" else spot.name + delta.module[delta.module.rindex("[") :]
        rank = min(rank, *difference.shape) if spot.kind != "expert" else rank
        held = need.held if rank == need.rank else None
        found = truncate(
            difference,
            rank,
            energy=changed.energy,
            held=held,
            seed=self.seed ^ zlib.crc32(module.encode()),
            device=self.device,
        )
        alpha, scale = self.choice.scale(delta.module, rank)
        kind = self._stored(dtype)
        plain = cast(found, difference, kind, scale, refit=True)
        a, b = plain
        errors: tuple[float | None, float | None] = (None, None)
        uncast = found.residual
        moment = None if self.moments is None else self.moments.moment(module, int(difference.shape[1]))
        if moment is not None:
            from rankwise.adapters.calibration import output_energy, truncate_outputs

            better = truncate_outputs(difference, moment, rank, seed=self.seed, device=self.device)
            a, b = cast(better, difference, kind, scale, refit=False)
            uncast = better.residual
            test = None if self.moments is None else self.moments.held_out(module, int(difference.shape[1]))
            of_all = 0.0 if test is None else output_energy(difference, test)
            if test is not None and of_all > 0:
                ours, theirs = (output_energy(difference, test, *f, scale) / of_all for f in ((a, b), plain))
                errors = math.sqrt(ours), math.sqrt(theirs)
        missed = residual_energy(difference, a, b, scale)
        if not math.isfinite(missed):
            raise UsageError(
                f"{module}: its factors do not fit into {kind}, whose largest number is {ml_dtypes.finfo(kind).max}; "  # type: ignore[no-untyped-call]
                "use --dtype bfloat16 or float32"
            )
        base_energy = energy_of(delta.base)
        notes = [need.note] if need.note else []
        if rank > need.rank:
            notes.append(f"rank {need.rank} was raised to {rank}, that of another expert of this parameter")
        made.energies.append((changed.energy, missed))
        made.modules.append(
            ExtractedModule(
                module=module,
                kind=spot.kind,
                shape=(int(difference.shape[0]), int(difference.shape[1])),
                r=rank,
                lora_alpha=alpha,
                scaling=scale,
                relative_norm=math.sqrt(changed.energy / base_energy) if 0 < base_energy < math.inf else None,
                kept_energy_share=max(1 - missed / changed.energy, 0.0),
                relative_error=math.sqrt(missed / changed.energy),
                relative_error_uncast=math.sqrt(uncast / changed.energy),
                least_relative_error=found.best_relative_error,
                route=found.route,
                output_error=errors[0],
                output_error_plain=errors[1],
                notes=tuple(notes),
            )
        )
        return a, b


def cast(found: Truncation, difference: Array, kind: Any, scale: float, *, refit: bool) -> tuple[Array, Array]:
    """Return the factors in a dtype, each divided by the root of the scale.

    In 16 bits B is fitted anew to A as it was rounded, by least squares. That mends what rounding did within the rows
    of A, a share rank / in_features of it, so it is done where this is a part worth its cost.

    Args:
        found: factors of scale 1.
        difference: shape (out_features, in_features), what they stand for.
        kind: dtype to store.
        scale: the factor on B @ A.
        refit: whether the error that counts is that of the weights.
    """
    root = math.sqrt(scale)
    with np.errstate(over="ignore"):  # the caller looks for what is not finite
        a, b = (found.a / root).astype(kind), (found.b / root).astype(kind)
    worth = REFIT * a.shape[0] >= a.shape[1]
    if not (refit and worth) or kind.itemsize > 2 or not np.isfinite(a).all():
        return a, b
    wide = a.astype(np.float64)
    core = wide @ wide.T
    roots = np.sqrt(np.diag(core))
    if not roots.all():  # a direction that underflowed, or a delta of lower rank
        return a, b
    core /= np.outer(roots, roots)  # rows of A have norms over the whole range of sigma
    image = (difference @ a.astype(difference.dtype).T).astype(np.float64) / roots  # (out, r)
    try:
        with np.errstate(over="ignore"):
            fitted = (np.linalg.solve(core, image.T).T / roots / scale).astype(kind)
    except np.linalg.LinAlgError:
        return a, b
    better = residual_energy(difference, a, fitted, scale) < residual_energy(difference, a, b, scale)
    return (a, fitted) if better else (a, b)


def _left_out(changed: _Changed) -> NotExtracted:
    base = energy_of(changed.delta.base)
    return NotExtracted(
        module=changed.delta.module,
        reason=changed.need.reason or "rank 0",
        relative_norm=math.sqrt(changed.energy / base) if 0 < base < math.inf else None,
        energy=changed.energy,
    )
