"""One module rewritten: cut, scaled, filled and cast, with what each step cost.

In: the factors of a module, what it needs and what is written. Out: its new factors, and its entry in the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from rankwise.adapters.baking import Need, Written, folded, same_float32
from rankwise.adapters.merging import Joined
from rankwise.adapters.parts import Array
from rankwise.adapters.resizing import Core, decompose, distance, norm_of, pad
from rankwise.adapters.stored_units import NUMPY
from rankwise.checkpoints.model import LoraModule
from rankwise.errors import TensorError
from rankwise.records import ConvertedModule
from rankwise.records.conversion import Setting

Pair = tuple[Array, Array]

STEP: Final = 2.0**-23
"""One step of float32, relative."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The factors of a unit, taken apart where they are to be cut.

    Attributes:
        pairs: (A, B) as they were.
        cores: their SVDs, or nothing where the rank does not fall.
    """

    pairs: Sequence[Pair]
    cores: Sequence[Core]


def taken_apart(pairs: Sequence[Pair]) -> Opened:
    """Return the factors with their SVDs."""
    return Opened(pairs, [decompose(a, b) for a, b in pairs])


def rewrite(
    joined: Joined, opened: Opened, need: Need, written: Written, dtypes: tuple[str, str]
) -> tuple[list[Pair], list[ConvertedModule]]:
    """Return the new factors of every module of a unit, and their entries in the record.

    An update of zero is written with B = 0 and the first rows of A: rounding cannot make anything of a sum that
    cancels, and an adapter before its training stays one that can be trained.

    Args:
        joined: the unit.
        opened: its factors; with SVDs where `need.r` is below their rank.
        need: directions kept, and the factor that is meant.
        written: rank, alpha and factor that are written.
        dtypes: storage dtypes of A and B.

    Raises:
        TensorError: a factor does not fit its dtype.
    """
    factor = need.scaling / written.scaling
    if abs(factor - 1.0) <= STEP:  # less than a rounding of B: left to the scale, and stated
        factor = 1.0
    made, entries = [], []
    for index, (module, (a, b)) in enumerate(zip(joined.unit.modules, opened.pairs, strict=True)):
        core = opened.cores[index] if opened.cores and need.r < a.shape[0] else None
        size = norm_of(a, b) if core is None else float(np.linalg.norm(core.sigma))  # without the scale
        if not size:
            kept_a, kept_b = a[: need.r], np.zeros_like(b[:, : need.r])
        else:
            kept_a, kept_b = (a, b) if core is None else core.cut(need.r)
        new = (_cast(kept_a, dtypes[0], module), _cast(folded(kept_b, factor), dtypes[1], module))
        entries.append(_entry(joined, module, (a, b), new, core, size, need, written))
        made.append(pad(*new, written.r))
    return made, entries


def _cast(factor: Array, dtype: str, module: LoraModule) -> Array:
    """Round to the storage dtype, once.

    Raises:
        TensorError: an entry is too large for it, or all are too small.
    """
    with np.errstate(over="ignore", under="ignore"):
        cast = factor.astype(NUMPY[dtype])
    wide = cast.astype(np.float64)
    lost = not wide.any() and factor.any()
    if lost or not np.isfinite(wide).all():
        what = "no entry is large enough for" if lost else "an entry does not fit into"
        wider = "--dtype float64" if dtype in ("F32", "BF16") else "--dtype bfloat16 or --dtype float32"
        raise TensorError(
            f"{module.module}: {what} {dtype}; the largest is {np.abs(factor).max():.3g}. Nothing was written. Choose "
            f"a wider dtype ({wider}), or leave the scale in the alpha."
        )
    return cast


def _entry(
    joined: Joined,
    module: LoraModule,
    old: Pair,
    new: Pair,
    core: Core | None,
    size: float,
    need: Need,
    written: Written,
) -> ConvertedModule:
    (a, b), (a2, b2) = old, new
    scale, scale2 = need.scaling, written.scaling
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        norm = abs(scale) * size
        exact = not size or (core is None and _same(a, b, a2, b2, scale, scale2))
        if exact:
            error = 0.0
        elif core is None and np.array_equal(a, a2.astype(a.dtype)):
            change = b.astype(np.float64) - b2.astype(np.float64) * (scale2 / scale)  # only B moved
            error = norm_of(a, change) / size
        else:
            error = distance((a, b, 1.0), (a2, b2, scale2 / scale)) / size
    if not (np.isfinite(norm) and np.isfinite(error)):
        raise TensorError(
            f"{module.module}: its update, scaled by {scale:.3g}, is too large for the largest float. Nothing was "
            "written. Convert an earlier checkpoint, or one with a smaller alpha."
        )
    source = module if joined.plain else None
    return ConvertedModule(
        module=module.module,
        shape=module.shape,
        kind=module.kind,
        before=Setting(
            r=joined.r,
            lora_alpha=None if source is None else source.lora_alpha,
            scaling=scale,
            rule=None if source is None else source.rule,
        ),
        after=Setting(r=written.r, lora_alpha=written.lora_alpha, scaling=scale2, rule=written.rule),
        rank=min(need.r, a.shape[0]),
        dtype=_name(a2, b2),
        norm=norm,
        kept_energy_share=1.0 if core is None else core.share(need.r),
        error_before_cast=0.0 if core is None else core.error(need.r),
        relative_error=error,
        exact=exact,
    )


def _same(a: Array, b: Array, a2: Array, b2: Array, scale: float, scale2: float) -> bool:
    """Tell whether two triples are one update in float32: A the same, and scale * B the same.

    Scales may differ in the last bits of float64, in which they were computed, but not in float32, in which they are
    applied. B is the same but for a power of two: with another factor the entries of s B may still be the same numbers,
    but the products with A are rounded otherwise.
    """
    a, b, a2, b2 = (factor.astype(np.float64) for factor in (a, b, a2, b2))
    if not np.array_equal(a, a2):
        return False
    nearest = 2.0 ** round(np.log2(scale / scale2))
    return same_float32(scale, scale2 * nearest) and np.array_equal(b2, b * nearest)


def _name(a: Array, b: Array) -> str:
    names = {dtype: name for name, dtype in NUMPY.items()}
    return names[a.dtype] if a.dtype == b.dtype else f"{names[a.dtype]}, {names[b.dtype]}"
