"""The modules to plan: what each direction of each would add, which are left out and why, which share one rank.

In: the modules of a spectra record. Out: `Update`s in a common unit, and groups of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rankwise.deltas import Selection
from rankwise.errors import UsageError
from rankwise.records import LeftOut, ModuleSpectrum, SpectraRecord

Floats = NDArray[np.float64]

TABLE: Final = re.compile(
    r"(.*\.)?(shared|w[tp]e|(tok_|word_|token_|position_|token_type_)?embeddings?|embed_(tokens|positions|in))"
)
"""Embedding tables, by the names that models of transformers give them."""

HEAD: Final = re.compile(r"output|(.*\.)?(lm_head|embed_out)")
"""Output heads: linear layers, tied to the table in many models."""

LEAST_WEIGHT, MOST_WEIGHT = 1e-12, 1e12
"""Weights between which a sum of weighted energies in float64 still counts what the lightest module adds."""

STACKED: Final = re.compile(r"(.*)\[\d+\]")
"""One expert of a 3-D weight, as records name it."""

FUSED: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wi_0", "wi_1"),
)
"""Last names of weights that runtimes join into one matrix: they read the same input."""


@dataclass(frozen=True, slots=True)
class Update:
    """The update of one module, energies in units of the largest sigma^2 of all modules.

    Attributes:
        module: dotted path.
        shape: (out_features, in_features).
        energies: (known,), sigma^2, largest first, zeros at the end left away.
        left: (known + 1,), the energy outside the first 0, 1, ... directions.
        complete: whether every value past the end is zero.
        signal_rank: number of values above the noise edge, or None.
        rounding_limited: whether rounding makes up much of this update.
        weight: factor on its squared error.
    """

    module: str
    shape: tuple[int, int]
    energies: Floats
    left: Floats
    complete: bool
    signal_rank: int | None
    rounding_limited: bool
    weight: float = 1.0

    @property
    def cost(self) -> int:
        """Parameters of one rank."""
        return sum(self.shape)

    @property
    def most(self) -> int:
        """Largest rank that reaches anything."""
        return min(self.shape)

    @property
    def total(self) -> float:
        """All of its energy."""
        return float(self.left[0])

    def left_at(self, rank: int) -> float | None:
        """Return the energy outside the first `rank` directions; None where a cut-off list does not say."""
        if rank < len(self.left):
            return float(self.left[rank])
        return 0.0 if self.complete else None

    def kept_share(self, rank: int) -> float | None:
        """Return the share of the energy in the first `rank` directions, or None where it is not known."""
        left = self.left_at(rank)
        return None if left is None else min(1.0, max(0.0, 1.0 - left / self.total))


@dataclass(frozen=True, slots=True)
class Unit:
    """What one rank is chosen for.

    Attributes:
        name: of the group, or None for a module by itself.
        members: places in the list of updates.
    """

    name: str | None
    members: tuple[int, ...]


def updates_of(
    record: SpectraRecord, wanted: Selection, *, embeddings: bool
) -> tuple[list[Update], list[LeftOut], float]:
    """Return the updates that a plan is made for, what is left out, and the unit of sigma.

    Args:
        record: spectra.
        wanted: which modules were asked for; the others are no part of the plan and are not named.
        embeddings: whether embeddings and output heads of a full fine-tune are planned as well.
    """
    asked = [m for m in record.modules if wanted.wants(m.module)]
    unit = max((m.singular_values[0] for m in asked if m.singular_values and m.energy is not None), default=0.0)
    updates, left_out = [], []
    for m in asked:
        reason = _reason(m, embeddings=embeddings or record.kind == "adapter")
        update = _update(m, unit) if reason is None else None
        if update is not None and not len(update.energies):
            reason = "beside the largest update it is too small for float64: below 1e-160 of it"
        if update is not None and reason is None:
            updates.append(update)
        else:
            left_out.append(LeftOut(module=m.module, shape=m.shape, reason=reason or "", energy=m.energy))
    return updates, left_out, unit


def _reason(module: ModuleSpectrum, *, embeddings: bool) -> str | None:
    """Return why a module gets no rank whatever is chosen, or None."""
    if module.energy is None:
        return "its update is not finite"
    if not any(module.singular_values):
        return "its update is zero" if module.complete or module.energy == 0 else "none of its values is known"
    if not embeddings and is_embedding(module.module):
        return "an embedding or output head; --embeddings plans these too"
    return None


def is_embedding(module: str) -> bool:
    """Tell an embedding or output head by its name: large, tied in many models, refused by several runtimes."""
    return TABLE.fullmatch(module) is not None or HEAD.fullmatch(module) is not None


def _update(module: ModuleSpectrum, unit: float) -> Update:
    values = np.asarray(module.singular_values, dtype=np.float64) / unit
    energies = values * values
    energies = energies[: int(np.count_nonzero(energies))]
    # of a complete list the values themselves say what is left: the energy is measured apart, to 1e-6, and would put
    # a floor of 1e-3 under every relative error
    outside = 0.0 if module.complete else max((module.energy or 0.0) / unit / unit - float(energies.sum()), 0.0)
    left = np.concatenate((np.cumsum(energies[::-1])[::-1], [0.0])) + outside
    return Update(
        module=module.module,
        shape=module.shape,
        energies=energies,
        left=left,
        complete=module.complete,
        signal_rank=module.signal_rank,
        rounding_limited=module.rounding_limited,
    )


def weights_of(updates: Sequence[Update], patterns: Mapping[str, float], *, relative: bool) -> list[float]:
    """Return the factor on the squared error of every module; the last pattern that is found in its path decides.

    Raises:
        UsageError: a pattern is no regular expression, matches nothing, or its weight is no number or out of range.
    """
    weights = [1.0 / u.total if relative else 1.0 for u in updates]
    given: list[float] = [1.0] * len(updates)
    for pattern, weight in patterns.items():
        fits = (
            isinstance(weight, int | float) and not isinstance(weight, bool) and LEAST_WEIGHT <= weight <= MOST_WEIGHT
        )
        if not fits:
            raise UsageError(
                f"--weights: {pattern!r} has the weight {weight!r:.40}; wanted a number from {LEAST_WEIGHT:g} to "
                f"{MOST_WEIGHT:g}"
            )
        try:
            searched = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--weights: {pattern!r} is no regular expression: {error}") from error
        hits = [place for place, u in enumerate(updates) if searched.search(u.module)]
        if not hits:
            raise UsageError(
                f"--weights: {pattern!r} is found in none of the {len(updates)} modules; the first is "
                f"{updates[0].module}"
            )
        for place in hits:
            given[place] = float(weight)
    return [a * b for a, b in zip(weights, given, strict=True)]


def units_of(updates: Sequence[Update], *, fuse: bool) -> list[Unit]:
    """Return what one rank is chosen for: experts of one weight always, fused weights where asked, else a module.

    The experts of a 3-D weight share a rank because the weight has one in every trainer. Weights are fused where
    they have the same parent and read the same number of inputs.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for place, update in enumerate(updates):
        groups.setdefault(_group_key(update, fuse=fuse), []).append(place)
    return [Unit(name if len(members) > 1 else None, tuple(members)) for (name, _), members in groups.items()]


def _group_key(update: Update, *, fuse: bool) -> tuple[str, int]:
    stack = STACKED.fullmatch(update.module)
    if stack:
        return stack[1] + "[*]", update.shape[1]
    if fuse:
        for names in FUSED:
            found = re.fullmatch(rf"(.*?[._]|)({'|'.join(names)})", update.module)
            if found:
                return f"{found[1]}{{{','.join(names)}}}", update.shape[1]
    return update.module, update.shape[1]
