"""The factor on B @ A: one table of rules from (lora_alpha, r) to the scaling, and back.

In: alpha and rank. Out: a positive float. This is the only place where a scaling rule stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Final

from rankwise.errors import ScalingError


def _lora(lora_alpha: float, r: int) -> float:
    """Alpha / r: Hu et al. (2021), arXiv:2106.09685, section 4.1; PEFT's default."""
    return lora_alpha / r


def _rslora(lora_alpha: float, r: int) -> float:
    """Alpha / sqrt(r): Kalajdzievski (2023), arXiv:2312.03732, theorem 3.2; PEFT's `use_rslora`."""
    return lora_alpha / math.sqrt(r)


def _unscaled(lora_alpha: float, r: int) -> float:  # noqa: ARG001 - every rule has the same signature
    """Alpha itself, whatever the rank: MLX's `scale`, and the multiplier of muA (arXiv:2602.06204)."""
    return lora_alpha


SCALINGS: Final[dict[str, Callable[[float, int], float]]] = {
    "lora": _lora,
    "rslora": _rslora,
    "unscaled": _unscaled,
}
"""Rule name -> function of (lora_alpha, r). Every rule is linear in lora_alpha."""


def scaling(rule: str, lora_alpha: float, r: int) -> float:
    """Return the factor on B @ A.

    Args:
        rule: a name in `SCALINGS`: "lora" (alpha / r), "rslora" (alpha / sqrt(r)), "unscaled" (alpha).
        lora_alpha: alpha; dimensionless, finite and > 0.
        r: rank, an integer >= 1.

    Raises:
        ScalingError: the rule is unknown, alpha or r is out of range, or the factor is no positive float.

    >>> scaling("lora", 16, 64), scaling("rslora", 16, 64)
    (0.25, 2.0)
    """
    if not isinstance(rule, str) or rule not in SCALINGS:
        raise ScalingError(f"unknown scaling rule {rule!r}; the rules are: {', '.join(SCALINGS)}")
    if isinstance(r, bool) or not isinstance(r, Integral) or r < 1:
        raise ScalingError(f"the rank must be an integer of 1 or more, got {r!r}")
    alpha = _positive("lora_alpha must be", lora_alpha)
    try:
        factor = SCALINGS[rule](alpha, int(r))
    except OverflowError:  # a rank past the largest float
        factor = 0.0
    if not factor > 0:
        raise ScalingError(f"alpha {alpha:g} is too small for so large a rank: the scaling is no float above 0")
    return factor


def _positive(what: str, value: float) -> float:
    """Return a number as a positive finite float, or refuse it."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer past the largest float
        number = math.inf
    if not math.isfinite(number) or number <= 0:
        raise ScalingError(f"{what} a finite number above 0, got {value!r}")
    return number


def alpha_for(rule: str, wanted: float, r: int) -> float:
    """Return the lora_alpha that gives the scaling `wanted` at rank `r` under `rule`.

    Args:
        rule: a name in `SCALINGS`.
        wanted: the factor on B @ A; dimensionless, finite and > 0.
        r: rank, an integer >= 1.

    Raises:
        ScalingError: as `scaling`.

    >>> alpha_for("rslora", 2.0, 64)
    16.0
    """
    alpha = _positive("a scaling must be", wanted) / scaling(rule, 1.0, r)
    return _positive("the lora_alpha of a scaling must be", alpha)
