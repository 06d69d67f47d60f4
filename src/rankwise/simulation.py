"""The "LoRA assumption" walk-through, re-created: a style-like and a fact-like update, planted.

In: spectra to plant, a seed, ranks and alpha. Out: a simulation/1 record: how much of each update a rank
holds, the two scalings, and what multiplying a truncated SVD by a scaling does and does not show.

The recipe is that of the walk-through published by MarkTechPost on 2026-04-27 (notebook
LoRA_Assumption.ipynb, A. Islam): NumPy's legacy generator with seed 42; for each update a left and a right
standard normal, orthonormalised by QR, singular values in between, then iid noise of 0.01 on top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rankwise import criteria
from rankwise.errors import SpectrumSpecError, UsageError
from rankwise.records import (
    ScaledError,
    ScaleRow,
    SimulatedUpdate,
    SimulationRecord,
    SimulationRow,
    now,
    version,
)
from rankwise.scaling import scaling

Matrix = NDArray[np.float64]
Svd = tuple[Matrix, Matrix, Matrix]
"""U, sigma and V' of a matrix."""

STYLE: Final = "linear:5:0.5:4"
FACTS: Final = "linear:3:0.5"
RANKS: Final = (2, 4, 8, 16, 32, 48)
SCALE_RANKS: Final = (1, 4, 8, 16, 32, 64)

MOST_RANK: Final = 1 << 31
"""Largest rank of the table of scalings: far past any model, and an exact float."""

TINIEST: Final = 1e-290
"""Least energy of an update: below it the squares of the smaller values are no longer floats."""

MOST_CHARACTERS: Final = 1 << 20
"""Longest spectrum file read: 4096 values need a tenth of it, and a device file has no end."""

NOTES: Final = (
    "Scaling collapse is not a loss of capacity: B and A are trained through the factor, so every update of "
    "rank r or less is within reach at any factor above zero, and the scaled error here is no property of "
    "LoRA but of the captured energy E and the factor s alone: err^2 = 1 - E s (2 - s).",
    "Scaling collapse is a change of the learning dynamics: the same optimizer and learning rate move the "
    "adapter by less (or by more) as the rank rises, by how much depends on the optimizer, the init and the "
    "data, and `rankwise check MODEL DATA` measures it.",
)


class LoraApproximation(NamedTuple):
    """A truncated SVD times a scaling, and its distance from the delta it came from.

    Attributes:
        approximation: shape (out_features, in_features), float64.
        relative_error: Frobenius norm of the difference over that of the delta; dimensionless.
    """

    approximation: Matrix
    relative_error: float


def lora_approximation(delta: ArrayLike, r: int, alpha: float, rule: str) -> LoraApproximation:
    """Multiply the best rank-r approximation of a delta by the scaling of a rule.

    This is the quantity of the published walk-through. It is no model of a trained LoRA, whose factors
    are learnt through the scaling: the error is sqrt(1 - E s (2 - s)), a function of the captured energy
    E and the factor s alone, and 1 at s = 2 for every matrix.

    Args:
        delta: shape (out_features, in_features), finite, not zero.
        r: rank, from 1 to min(shape).
        alpha: lora_alpha, > 0.
        rule: "lora" (alpha / r), "rslora" (alpha / sqrt(r)) or "unscaled".

    Returns:
        The approximation and its relative error.

    Raises:
        UsageError: the delta is no finite 2-D matrix, is zero, or r is above min(shape).
        ScalingError: alpha or the rule is out of range.

    >>> lora_approximation([[3.0, 0.0], [0.0, 4.0]], r=1, alpha=1.0, rule="lora").relative_error
    0.6
    """
    matrix = np.asarray(delta, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape or not np.isfinite(matrix).all() or not matrix.any():
        raise UsageError(f"delta must be a finite, non-zero 2-D matrix, got shape {matrix.shape}")
    factor = scaling(rule, alpha, r)
    if r > min(matrix.shape):
        raise UsageError(f"rank {r} is above min(shape) = {min(matrix.shape)} of the delta")
    return _scaled_cut(matrix, np.linalg.svd(matrix, full_matrices=False), int(r), factor)


def _scaled_cut(matrix: Matrix, svd: Svd, r: int, factor: float) -> LoraApproximation:
    left, sigma, right = svd
    approximation = factor * (left[:, :r] * sigma[:r]) @ right[:r]  # (out_features, in_features)
    error = np.linalg.norm(matrix - approximation) / np.linalg.norm(matrix)
    return LoraApproximation(approximation, float(error))


def _numbers(spec: str, words: Sequence[str], at_most: int) -> list[float]:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise SpectrumSpecError(f"spectrum {spec!r}: {':'.join(words)!r} is not a list of numbers") from None
    if not 1 <= len(numbers) <= at_most or not all(math.isfinite(n) for n in numbers):
        raise SpectrumSpecError(f"spectrum {spec!r}: wanted 1 to {at_most} finite numbers after the name")
    return numbers


def _count(spec: str, given: float, size: int) -> int:
    if given != int(given) or not 1 <= given <= size:
        raise SpectrumSpecError(
            f"spectrum {spec!r}: the number of directions must be a whole number from 1 to the size {size}, "
            f"got {given:g}; a larger --size makes room for more"
        )
    return int(given)


def _linear(spec: str, words: Sequence[str], size: int) -> list[float]:
    """linear:TOP:BOTTOM[:COUNT]: COUNT values equally spaced from TOP to BOTTOM."""
    numbers = _numbers(spec, words, 3)
    if len(numbers) < 2:
        raise SpectrumSpecError(f"spectrum {spec!r}: linear needs a top and a bottom, as in linear:5:0.5:4")
    count = _count(spec, numbers[2] if len(numbers) == 3 else size, size)
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are refused by the caller
        return [float(v) for v in np.linspace(numbers[0], numbers[1], count)]


def _power(spec: str, words: Sequence[str], size: int) -> list[float]:
    """power:EXPONENT[:TOP[:COUNT]]: TOP * i^-EXPONENT for i = 1, 2, ..."""
    exponent, top, count = [*_numbers(spec, words, 3), *[1.0, float(size)][len(words) - 1 :]]
    try:
        return [top * i**-exponent for i in range(1, _count(spec, count, size) + 1)]
    except OverflowError:
        raise SpectrumSpecError(
            f"spectrum {spec!r}: exponent {exponent:g} gives values past the largest float"
        ) from None


def _exponential(spec: str, words: Sequence[str], size: int) -> list[float]:
    """exponential:LENGTH[:TOP[:COUNT]]: TOP * exp(-(i - 1) / LENGTH) for i = 1, 2, ..."""
    length, top, count = [*_numbers(spec, words, 3), *[1.0, float(size)][len(words) - 1 :]]
    if length <= 0:
        raise SpectrumSpecError(f"spectrum {spec!r}: the decay length must be above 0, got {length:g}")
    return [top * math.exp(-i / length) for i in range(_count(spec, count, size))]


SPECTRA: Final[dict[str, Callable[[str, Sequence[str], int], list[float]]]] = {
    "linear": _linear,
    "power": _power,
    "exponential": _exponential,
}
"""Name in front of the first colon of `--spectrum` -> function of (spec, words, size)."""


def _from_file(spec: str) -> list[float]:
    path = Path(spec)
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise SpectrumSpecError(
            f"spectrum {spec!r} is no recipe ({', '.join(f'{n}:...' for n in SPECTRA)}) "
            f"and cannot be read as a file: {reason}"
        ) from None
    if len(text) > MOST_CHARACTERS:
        raise SpectrumSpecError(f"spectrum file {spec} is longer than {MOST_CHARACTERS} characters: it is no spectrum")
    try:
        values: Any = json.loads(text) if text.lstrip().startswith("[") else text.replace(",", " ").split()
        return [float(value) for value in values]
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise SpectrumSpecError(
            f"spectrum file {spec}: wanted singular values as numbers separated by spaces, commas or lines, "
            "or one JSON list"
        ) from None


def planted_spectrum(spec: str, size: int) -> tuple[float, ...]:
    """Return the singular values that a recipe names, largest first.

    Args:
        spec: `linear:TOP:BOTTOM[:COUNT]`, `power:EXPONENT[:TOP[:COUNT]]`,
            `exponential:LENGTH[:TOP[:COUNT]]`, or the path of a file with one number a line or a JSON list.
        size: number of rows and columns of the matrix; at most this many values fit.

    Raises:
        SpectrumSpecError: the recipe or the file is not one, or its values are negative, not finite, all
            zero or too many.

    >>> planted_spectrum("linear:5:0.5:4", 64)
    (5.0, 3.5, 2.0, 0.5)
    """
    name, _, rest = spec.partition(":")
    values = SPECTRA[name](spec, rest.split(":"), size) if name in SPECTRA else _from_file(spec)
    if any(not math.isfinite(v) or v < 0 for v in values) or not any(values):
        raise SpectrumSpecError(f"spectrum {spec!r}: singular values must be finite, >= 0 and not all zero")
    if len(values) > size:
        raise SpectrumSpecError(f"spectrum {spec!r} has {len(values)} values; a {size} x {size} matrix has {size}")
    return tuple(sorted(values, reverse=True))


def _plant(values: Sequence[float], size: int, noise: float, rng: np.random.RandomState) -> Matrix:
    """Draw an update with these singular values plus noise, in the order of the published recipe."""
    count = len(values)
    left = np.linalg.qr(rng.standard_normal((size, count)))[0]  # (size, count)
    right = np.linalg.qr(rng.standard_normal((size, count)))[0]  # (size, count)
    update: Matrix = (left * np.asarray(values)) @ right.T + noise * rng.standard_normal((size, size))
    return update


@dataclass(frozen=True, slots=True)
class _Recipe:
    size: int
    noise: float
    lora_alpha: float
    ranks: tuple[int, ...]


def _row(delta: Matrix, svd: Svd, spectrum: criteria.Spectrum, rank: int, lora_alpha: float) -> SimulationRow:
    share = criteria.energy_share(spectrum, rank) or 0.0
    measured, closed = {}, {}
    for rule in ("lora", "rslora"):
        factor = scaling(rule, lora_alpha, rank)
        measured[rule] = _scaled_cut(delta, svd, rank, factor).relative_error
        closed[rule] = math.sqrt(max(0.0, 1 - share * factor * (2 - factor)))
    return SimulationRow(
        rank=rank,
        energy_share=share,
        truncation_error=math.sqrt(max(0.0, 1 - share)),
        scaled_error=ScaledError(**measured),
        closed_form=ScaledError(**closed),
    )


def _measure(name: str, spec: str, recipe: _Recipe, rng: np.random.RandomState) -> SimulatedUpdate:
    with np.errstate(over="ignore", invalid="ignore"):
        delta = _plant(planted_spectrum(spec, recipe.size), recipe.size, recipe.noise, rng)
        energy = float(np.sum(delta * delta))
    if not TINIEST < energy < math.inf:
        raise UsageError(
            f"{name}: the squares of spectrum {spec!r} with noise {recipe.noise:g} are past what a float holds; "
            "scale both nearer to 1"
        )
    svd: Svd = np.linalg.svd(delta)
    spectrum = criteria.Spectrum(name, delta.shape, tuple(map(float, svd[1])), energy)
    return SimulatedUpdate(
        planted=spec,
        shape=(recipe.size, recipe.size),
        singular_values=spectrum.singular_values,
        energy=spectrum.total_energy,
        stable_rank=criteria.stable_rank(spectrum),
        effective_rank=criteria.effective_rank(spectrum),
        rank_90=criteria.rank_for_energy(spectrum, 0.9),
        rank_99=criteria.rank_for_energy(spectrum, 0.99),
        rows=tuple(_row(delta, svd, spectrum, rank, recipe.lora_alpha) for rank in recipe.ranks),
    )


def simulate(
    *,
    style: str = STYLE,
    facts: str = FACTS,
    spectrum: str | None = None,
    size: int = 64,
    noise: float = 0.01,
    lora_alpha: float = 16.0,
    ranks: Sequence[int] = RANKS,
    scale_ranks: Sequence[int] = SCALE_RANKS,
    seed: int = 42,
    command: Sequence[str] | None = None,
) -> SimulationRecord:
    """Plant a style-like and a fact-like update and measure what each rank holds of them.

    The defaults are those of the published walk-through, whose figures come out to the printed digit.
    That style is low-rank and facts are not is put in by the two spectra: this shows what follows from
    it, not that it is so. `rankwise inspect` measures real updates.

    Args:
        style: recipe of the style spectrum, see `planted_spectrum`.
        facts: recipe of the facts spectrum.
        spectrum: recipe of a third update, "planted", drawn after the other two.
        size: rows and columns of each update, 2 to 4096.
        noise: standard deviation of the iid noise on every entry, >= 0.
        lora_alpha: alpha of both rules, > 0.
        ranks: ranks of the energy and error rows; those above `size` are refused.
        scale_ranks: ranks of the table of scalings.
        seed: of NumPy's legacy generator, 0 to 2^32 - 1.
        command: argv to write into the record.

    Raises:
        UsageError: a number is out of range.
        SpectrumSpecError: a recipe cannot be read.
        ScalingError: alpha is not a positive number.

    >>> record = simulate()
    >>> [round(row.energy_share, 3) for row in record.updates["style"].rows if row.rank == 8]
    [0.993]
    """
    if not 2 <= size <= 4096:
        raise UsageError(f"size must be from 2 to 4096, got {size}")
    if not math.isfinite(noise) or noise < 0:
        raise UsageError(f"noise must be a finite number of 0 or more, got {noise}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    for flag, given, most in (("ranks", ranks, size), ("scale ranks", scale_ranks, MOST_RANK)):
        if len(given) == 0:
            raise UsageError(f"{flag}: wanted at least one whole number, such as 4,16,64")
        for rank in given:
            if not 1 <= rank <= most:
                raise UsageError(f"{flag} must be from 1 to {most}, got {rank}")
    scales = tuple(
        ScaleRow(rank=int(r), lora=scaling("lora", lora_alpha, r), rslora=scaling("rslora", lora_alpha, r))
        for r in scale_ranks
    )
    recipe = _Recipe(size, noise, lora_alpha, tuple(int(r) for r in ranks))
    rng = np.random.RandomState(seed)
    specs = {"style": style, "facts": facts} | ({} if spectrum is None else {"planted": spectrum})
    return SimulationRecord(
        format=SimulationRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else ("rankwise.simulate",),
        device="cpu",
        seed=seed,
        lora_alpha=lora_alpha,
        size=size,
        noise=noise,
        scales=scales,
        updates={name: _measure(name, spec, recipe, rng) for name, spec in specs.items()},
        notes=NOTES,
    )
