"""How A begins: nested draws, so that a larger rank starts from the same first rows.

In: an init, a seed, a module's place and size. Out: the unit draw of A as numpy, and its factor at a rank. What this
leaves out of the noise is what makes five seeds enough: ranks of one seed differ in the rows added, not in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Start:
    """An init of A that is iid in its entries.

    Attributes:
        draw: (generator, rows, in_features) -> the unit draw, (rows, in_features); rows drawn one after the other.
        factor: rank -> what the unit draw is multiplied with.
    """

    draw: Callable[[np.random.Generator, int, int], NDArray[np.float32]]
    factor: Callable[[int], float]


def _kaiming(rng: np.random.Generator, rows: int, features: int) -> NDArray[np.float32]:
    """Uniform within 1 / sqrt(in_features): kaiming_uniform_ with a = sqrt(5), as PEFT resets lora_A."""
    draw = rng.random((rows, features), dtype=np.float32)
    return (2 * draw - 1) / np.float32(features**0.5)


def _normal(rng: np.random.Generator, rows: int, features: int) -> NDArray[np.float32]:
    return rng.standard_normal((rows, features), dtype=np.float32)


STARTS: Final[dict[str, Start]] = {
    "default": Start(_kaiming, lambda _: 1.0),
    "gaussian": Start(_normal, lambda r: 1 / r),  # PEFT: normal_(lora_A, std=1 / r)
}
"""Name, as in `train --init`, -> how A begins. B is zero in all of them."""


def unit_draw(init: str, rows: int, features: int, *, seed: int, place: int) -> NDArray[np.float32]:
    """Return the unit draw of A of one module, (rows, features).

    The first rows are the same however many are asked for.

    Args:
        init: a name in `STARTS`.
        rows: rank.
        features: in_features.
        seed: of the run.
        place: number of the module, so that modules of one shape do not share their A.
    """
    return STARTS[init].draw(np.random.default_rng([seed, place]), rows, features)
