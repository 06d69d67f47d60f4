"""From a spectrum to numbers: energy ranks, stable rank, effective rank.

In: singular values, largest first, and the energy measured on the delta itself. Out: ranks and shares.
Plain Python floats, which are float64: a criterion must not lose a tail to float32.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rankwise.errors import CriterionError


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one delta, full or cut off.

    Attributes:
        module: dotted path of the weight, for messages.
        shape: (out_features, in_features).
        singular_values: largest first; as many as were computed.
        total_energy: squared Frobenius norm, measured on the delta itself, so that a cut-off list cannot
            inflate a share.
    """

    module: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    total_energy: float
    is_full: bool = True

    def __post_init__(self) -> None:
        values = self.singular_values
        if any(not math.isfinite(v) or v < 0 for v in values):
            raise CriterionError(f"{self.module}: a singular value is negative or not finite")
        if any(a < b for a, b in itertools.pairwise(values)):
            raise CriterionError(f"{self.module}: the singular values are not sorted, largest first")
        if not math.isfinite(self.total_energy) or self.total_energy < 0:
            raise CriterionError(f"{self.module}: the energy must be finite and >= 0, got {self.total_energy}")


def rank_for_energy(spectrum: Spectrum, fraction: float) -> int:
    """Return the smallest rank that keeps `fraction` of the energy of a weight delta.

    Energy is the sum of squared singular values, the squared Frobenius norm. The best rank-r
    approximation leaves ||dW - dW_r||_F / ||dW||_F = sqrt(1 - energy kept): to keep 0.99 of the energy
    still costs a relative error of 0.1.

    Args:
        spectrum: of one delta of shape (out_features, in_features), full or cut off.
        fraction: share of the energy to keep, in (0, 1]; dimensionless.

    Returns:
        A rank in [1, min(shape)], or 0 for a delta of zero.

    Raises:
        CriterionError: `fraction` is outside (0, 1], or a cut-off spectrum is too short to reach it.

    Source:
        Eckart & Young (1936), doi:10.1007/BF02288367. The rule of a float `rank` in PEFT's
        `convert_to_lora`; not kohya's `sv_cumulative`, which sums sigma itself.

    >>> rank_for_energy(Spectrum("q_proj", (3, 8), (3.0, 1.0, 0.0), total_energy=10.0), fraction=0.9)
    1
    """
    if not 0 < fraction <= 1:
        raise CriterionError(f"energy fraction must be in (0, 1], got {fraction}")
    wanted = fraction * spectrum.total_energy
    if wanted == 0:
        return 0
    kept = 0.0
    for rank, sigma in enumerate(spectrum.singular_values, start=1):
        if sigma == 0:
            return rank - 1  # nothing more to gain: the sum rounded just below the total
        kept += sigma * sigma
        # the energy is measured apart from the values (to 1e-6): a full sum may end just below it
        if kept >= wanted * (1 - 1e-12):
            return rank
    if spectrum.is_full:
        return len(spectrum.singular_values)
    raise CriterionError(
        f"{spectrum.module}: the {len(spectrum.singular_values)} singular values on file hold "
        f"{kept / spectrum.total_energy:.1%} of the energy, short of {fraction:.1%}; "
        "run `rankwise inspect` again with a larger --values"
    )


def rank_for_relative_error(spectrum: Spectrum, error: float) -> int:
    """Return the smallest rank whose best approximation has at most this relative error.

    The relative error is ||dW - dW_r||_F / ||dW||_F = sqrt(1 - energy share), so 0.1 asks for 99 % of
    the energy. Source: Eckart & Young (1936), doi:10.1007/BF02288367.

    Args:
        spectrum: of one delta.
        error: in [0, 1); dimensionless.

    Raises:
        CriterionError: `error` is outside [0, 1), or a cut-off spectrum is too short to reach it.

    >>> rank_for_relative_error(Spectrum("q_proj", (3, 8), (3.0, 1.0, 0.0), total_energy=10.0), 0.4)
    1
    """
    if not 0 <= error < 1:
        raise CriterionError(f"relative error must be in [0, 1), got {error}")
    return rank_for_energy(spectrum, 1 - error * error)


CRITERIA: Final[dict[str, Callable[[Spectrum, float], int]]] = {
    "energy": rank_for_energy,
    "relative_error": rank_for_relative_error,
}
"""Criterion name -> function of (spectrum, parameter) giving a rank."""


def stable_rank(spectrum: Spectrum) -> float | None:
    """Return energy / sigma_1^2, or None for a delta of zero. In [1, min(shape)]; not an integer.

    Source: Rudelson & Vershynin (2007), doi:10.1145/1255443.1255449, section 1.

    >>> stable_rank(Spectrum("q_proj", (2, 2), (2.0, 1.0), total_energy=5.0))
    1.25
    """
    if not spectrum.singular_values or spectrum.singular_values[0] == 0:
        return None
    largest = spectrum.singular_values[0]
    if largest**2 < sys.float_info.min:  # the squares underflow: measure in units of the largest
        return math.fsum((value / largest) ** 2 for value in spectrum.singular_values)
    return max(1.0, spectrum.total_energy / largest**2)


def effective_rank(spectrum: Spectrum) -> float | None:
    """Return exp(entropy of p), p_i = sigma_i^2 / energy; None for a delta of zero or a cut-off list.

    The entropy is of the energies, as in the public contract; Roy & Vetterli (2007), EUSIPCO, definition
    1, take it of the singular values themselves, which gives larger numbers for the same delta.

    >>> effective_rank(Spectrum("q_proj", (2, 2), (1.0, 1.0), total_energy=2.0))
    2.0
    """
    if not spectrum.is_full:
        return None
    energies = [v * v for v in spectrum.singular_values if v * v > 0]
    total = math.fsum(energies)
    if total == 0:
        return None
    entropy = -math.fsum((e / total) * math.log(e / total) for e in energies if e / total > 0)
    return min(math.exp(entropy), float(len(energies)))


def energy_share(spectrum: Spectrum, rank: int) -> float | None:
    """Return the share of the energy in the `rank` largest directions, in [0, 1].

    None where a cut-off list does not reach that rank, or the delta is zero.

    Raises:
        CriterionError: the rank is negative.

    >>> energy_share(Spectrum("q_proj", (3, 8), (3.0, 1.0, 0.0), total_energy=10.0), 1)
    0.9
    """
    if rank < 0:
        raise CriterionError(f"a rank must be 0 or more, got {rank}")
    if spectrum.total_energy == 0:
        return None
    if rank >= len(spectrum.singular_values):
        if spectrum.is_full:
            return 1.0
        if rank > len(spectrum.singular_values):
            return None
    kept = math.fsum(v * v for v in spectrum.singular_values[:rank])
    return min(1.0, kept / spectrum.total_energy)
