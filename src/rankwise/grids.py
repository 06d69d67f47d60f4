"""The grids of a checkpoint pair: where the values of two tensors stand, and what rounding to them leaves.

In: two tensors of one module and their difference. Out: steps of the grids, the energy that rounding to them
leaves, and other updates rounded to them. numpy alone; blocks of rows, never a second copy of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

BLOCK_ENTRIES: Final = 1 << 19  # entries handled at a time, 2 MiB in float32: they stay in the cache
ONE_STEP: Final = np.float32(3.5)  # a step of the grid over the deviation of its errors, sqrt(12), and a little


def block_energy(block: Floats) -> float:
    """Return the squared Frobenius norm of a block, summed in float64."""
    return float(np.square(block, dtype=np.float64).sum())


def widened(block: NDArray[Any], wide: Any) -> NDArray[Any]:
    """Return a copy in float32 or float64. bfloat16 is the upper half of float32: a shift is five times as fast."""
    if block.dtype != ml_dtypes.bfloat16:
        return block.astype(wide)
    bits = block.view(np.uint16).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).astype(wide, copy=False)


def row_blocks(shape: tuple[int, ...], entries: int = BLOCK_ENTRIES) -> Iterator[slice]:
    """Yield slices of rows that hold about `entries` entries each, one row at least."""
    step = max(1, entries // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


class Pair:
    """Two tensors, the grids that their values stand on, and sums over their difference."""

    def __init__(self, base: NDArray[Any], tuned: NDArray[Any], delta: Floats) -> None:
        self.base, self.tuned, self.delta = base, tuned, delta
        self.bits, base_bits = mantissa_bits(tuned), mantissa_bits(base)
        self.least, self.base_least = finest_step(tuned, self.bits), finest_step(base, base_bits)
        self.base_bits: int | None = None
        if base_bits < self.bits and self._base_was_rounded(base_bits):
            self.base_bits = base_bits
        same, leaps, self.energy, self.grid_energy, self.tallest = 0, 0, 0.0, 0.0, 0.0
        unsigned = f"u{base.dtype.itemsize}"
        for rows in row_blocks(delta.shape):
            equal = delta[rows] == 0
            if base.dtype == tuned.dtype:
                equal = base[rows].view(unsigned) == tuned[rows].view(unsigned)
            same += int(np.count_nonzero(equal))
            size, noise = np.abs(delta[rows]), self.grid_noise(rows)
            leaps += int(np.count_nonzero(size > noise * ONE_STEP))
            self.tallest = max(self.tallest, float(size.max(initial=0.0)))
            self.energy += block_energy(size)
            self.grid_energy += block_energy(noise)
        self.unchanged = same / max(1, delta.size)
        self.leaps = leaps / max(1, delta.size - same)  # share of the moves that is longer than one step

    def grid_noise(self, rows: slice) -> Floats:
        """Return the standard deviation of uniform rounding errors, ulp / sqrt(12), of some rows."""
        step = ulp(self.tuned[rows].astype(np.float32), self.bits, self.least)
        if self.base_bits is not None:
            step = np.hypot(step, ulp(self.base[rows].astype(np.float32), self.base_bits, self.base_least))
        return np.asarray(step * np.float32(1 / math.sqrt(12)), np.float32)

    def _base_was_rounded(self, bits: int) -> bool:
        """Ask whether a base on a coarser grid can be the rounding of the weights `tuned` started from.

        If it is, every magnitude of the difference carries ulp**2 / 12 at least, but for the spread of a sum of
        few squares (0.9 / sqrt(entries), of which four are allowed), and in float8 for the closer grid below every
        power of two. A base that was exact (a model trained in float32 from a bfloat16 file) leaves less than that
        on its largest weights.
        """
        found, expected, entries = self._by_magnitude(self.delta, bits, self.base_least)
        main = expected > 0.02 * expected.sum()
        least = (0.8 if bits > 3 else 0.5) - 3.6 / np.sqrt(entries[main])
        pooled = found.sum() > ((0.9 if bits > 3 else 0.6) - 3.6 / math.sqrt(self.delta.size)) * expected.sum()
        return bool(pooled and (found[main] > least * expected[main]).all())

    def scales_with_grid(self, residual: Floats) -> bool:
        """Ask whether a residual is one multiple of the grid's variance at every magnitude of the weights."""
        found, expected, _ = self._by_magnitude(residual, self.bits, self.least)
        main = expected > 0.1 * expected.sum()
        ratio = found[main] / expected[main]
        return bool(ratio.max() < 1.3 * ratio.min())

    def _by_magnitude(
        self, residual: Floats, bits: int, least: np.float32
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Sum the energy of `residual`, ulp**2 / 12 and the entries per binade of the base; each of shape (256,)."""
        found, expected, entries = np.zeros(256), np.zeros(256), np.zeros(256)
        for rows in row_blocks(residual.shape):
            weights = self.base[rows].astype(np.float32)
            exponents = (weights.view(np.uint32) >> 23 & 0xFF).ravel()
            found += np.bincount(exponents, np.square(residual[rows], dtype=np.float64).ravel(), 256)
            step = ulp(weights, bits, least).ravel()
            expected += np.bincount(exponents, np.square(step, dtype=np.float64) / 12.0, 256)
            entries += np.bincount(exponents, minlength=256)
        return found, expected, entries

    def rounded(self, rows: slice, update: Floats) -> Floats:
        """Return round(W + update) - W of some rows, on the tuned grid; ties away from zero."""
        weights = self.base[rows].astype(np.float32)
        total = np.asarray(weights + update, np.float32).view(np.uint32)
        if drop := 23 - self.bits:
            total += np.uint32(1 << (drop - 1))
            total &= np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
        return np.asarray(total.view(np.float32) - weights)

    def outliers(self, least: float) -> tuple[NDArray[Any], NDArray[Any]]:
        """Find moves larger than `least` and of one step, of their own grid or of the module's typical one.

        The second: arithmetic with larger numbers, a merge undone, moves a weight near zero by their steps.

        Returns:
            Row and column numbers.
        """
        found = [np.zeros((0, 2), np.intp)]
        typical = np.float32(math.sqrt(self.grid_energy / self.delta.size))
        for rows in row_blocks(self.delta.shape):
            size = np.abs(self.delta[rows])
            step = np.maximum(self.grid_noise(rows), typical) * ONE_STEP
            found.append(np.argwhere((size > least) & (size <= step)) + np.array([rows.start, 0]))
        i, j = np.concatenate(found).T
        return i, j


def ulp(weights: Floats, bits: int, least: np.float32) -> Floats:
    """Return the spacing 2**(exponent - bits) of a grid at each weight, `least` where it gets no finer."""
    power = (weights.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    return np.asarray(np.maximum(power * np.float32(2.0**-bits), least), np.float32)


def finest_step(tensor: NDArray[Any], bits: int) -> np.float32:
    """Return the smallest step of the grid that a tensor's values stand on: its subnormal numbers."""
    if tensor.dtype.name.startswith("float8"):
        return np.float32(ml_dtypes.finfo(tensor.dtype).smallest_subnormal)  # type: ignore[no-untyped-call]
    return np.float32(2.0**-24 if tensor.dtype.name == "float16" or bits == 10 else 2.0**-149)


def mantissa_bits(tensor: NDArray[Any]) -> int:
    """Return the mantissa bits that the values of a tensor use, whatever dtype they are stored in."""
    seen = 0
    for rows in row_blocks(tensor.shape):
        seen |= int(np.bitwise_or.reduce(tensor[rows].astype(np.float32).view(np.uint32), axis=None))
    seen &= 0x7FFFFF
    if seen == 0:  # powers of two or zeros tell nothing about the grid
        return {"bfloat16": 7, "float16": 10}.get(tensor.dtype.name, 23)
    return 23 - ((seen & -seen).bit_length() - 1)
