"""From one delta to its spectrum, with what rounding alone explains of it.

In: the factors of an adapter's module, or one delta of two checkpoints. Out: a `ModuleSpectrum`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise import criteria, linalg
from rankwise.checkpoints.model import LoraModule
from rankwise.deltas import Delta
from rankwise.errors import CriterionError
from rankwise.noise import read_noise
from rankwise.records import ModuleSpectrum

Array = NDArray[Any]

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
DTYPES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


@dataclass(frozen=True, slots=True)
class Options:
    """How spectra are taken.

    Attributes:
        values: how many singular values to compute of a delta, or None for all.
        device: "cpu" or a torch device.
        seed: of the randomised route and of the noise estimate.
    """

    values: int | None = None
    device: str = "cpu"
    seed: int = 0


def _numbers(spectrum: criteria.Spectrum) -> dict[str, Any]:
    """Return every figure that follows from the values and the energy alone."""
    ranks: list[int | None] = []
    for share in (0.9, 0.99):
        try:
            ranks.append(criteria.rank_for_energy(spectrum, share))
        except CriterionError:  # cut off before it holds that share: not known
            ranks.append(None)
    return {
        "singular_values": spectrum.singular_values,
        "complete": spectrum.is_full,
        "energy": spectrum.total_energy,
        "stable_rank": criteria.stable_rank(spectrum),
        "effective_rank": criteria.effective_rank(spectrum),
        "rank_90": ranks[0],
        "rank_99": ranks[1],
    }


_UNKNOWN: dict[str, Any] = {
    "singular_values": (),
    "complete": False,
    "energy": None,
    "stable_rank": None,
    "effective_rank": None,
    "rank_90": None,
    "rank_99": None,
}


def adapter_spectrum(module: LoraModule, a: Array, b: Array, base_norm: float | None) -> ModuleSpectrum:
    """Return the spectrum of scaling * B @ A from its factors; the product is never formed.

    Args:
        module: facts of the module. Where its scaling is unknown the values are those of B @ A.
        a: shape (r, in_features).
        b: shape (out_features, r).
        base_norm: Frobenius norm of the base weight, or None.
    """
    warnings = list(module.warnings)
    finite = bool(np.isfinite(a).all() and np.isfinite(b).all())
    numbers = _UNKNOWN
    if finite:
        values = linalg.factored_values(a, b, 1.0 if module.scaling is None else module.scaling)
        finite = math.isfinite(values.energy)  # float64 factors may overflow
    if finite:
        sigma = tuple(float(v) for v in values.sigma)
        numbers = _numbers(criteria.Spectrum(module.module, module.shape, sigma, values.energy))
    else:
        warnings.append("not-finite")
    energy = numbers["energy"]
    relative = None
    if energy is not None and base_norm and module.scaling is not None:
        relative = math.sqrt(energy) / base_norm
    return ModuleSpectrum(
        module=module.module,
        shape=module.shape,
        r=module.r,
        lora_alpha=module.lora_alpha,
        scaling=module.scaling,
        rule=module.rule,
        dtype=module.dtype,
        relative_norm=relative,
        unchanged_share=None,
        noise_edge=None,
        signal_rank=None,
        rounding_limited=False,
        warnings=tuple(warnings),
        **numbers,
    )


def delta_spectrum(delta: Delta, options: Options) -> ModuleSpectrum:
    """Return the spectrum of tuned - base of one module, and its rounding noise.

    Args:
        delta: two matrices of shape (out_features, in_features).
        options: how many values, where, and with which seed.
    """
    if delta.unchanged:
        whole = linalg.energy_of(delta.base)
        zero = criteria.Spectrum(delta.module, _shape(delta.base), (), 0.0)
        if not math.isfinite(whole):  # the same NaN in both files is no zero
            return _of_delta(delta, _UNKNOWN, None, ["not-finite"], (1.0, None, None, False))
        relative = 0.0 if whole > 0 else None
        return _of_delta(delta, _numbers(zero), relative, [], (1.0, 0.0, 0, False))
    difference = delta.subtract()
    energy = linalg.energy_of(difference)
    if not math.isfinite(energy):
        return _of_delta(delta, _UNKNOWN, None, ["not-finite"], (None, None, None, False))
    base_energy = linalg.energy_of(delta.base)
    relative = math.sqrt(energy / base_energy) if base_energy > 0 else None
    if options.values is None:
        values = linalg.matrix_values(difference, device=options.device)
    else:
        values = linalg.leading_values(difference, options.values, seed=options.seed, device=options.device)
    noise = read_noise(delta.base, delta.tuned, difference, values.sigma, seed=options.seed)
    sigma = tuple(float(v) for v in values.sigma)
    numbers = _numbers(criteria.Spectrum(delta.module, _shape(difference), sigma, energy, values.complete))
    cut_off = not values.complete and noise.signal_rank == len(sigma)  # the next value may be signal too
    signal_rank = None if cut_off else noise.signal_rank
    reading = (noise.unchanged_share, noise.noise_edge, signal_rank, noise.rounding_limited)
    return _of_delta(delta, numbers, relative, [], reading)


def _shape(matrix: Array) -> tuple[int, int]:
    return int(matrix.shape[0]), int(matrix.shape[1])


def _of_delta(
    delta: Delta,
    numbers: dict[str, Any],
    relative_norm: float | None,
    warnings: list[str],
    noise: tuple[float | None, float | None, int | None, bool],
) -> ModuleSpectrum:
    unchanged_share, noise_edge, signal_rank, rounding_limited = noise
    return ModuleSpectrum(
        module=delta.module,
        shape=_shape(delta.base),
        r=None,
        lora_alpha=None,
        scaling=None,
        rule=None,
        dtype=DTYPES.get(str(delta.tuned.dtype), str(delta.tuned.dtype).upper()),
        relative_norm=relative_norm,
        unchanged_share=unchanged_share,
        noise_edge=noise_edge,
        signal_rank=signal_rank,
        rounding_limited=rounding_limited,
        warnings=tuple(warnings),
        **numbers,
    )
