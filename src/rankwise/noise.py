"""Rounding noise of a checkpoint pair: which singular values of a difference are no more than rounding.

In: two tensors of one module, their difference, the singular values of the difference. Out: a `NoiseReading`.
numpy alone at import; temporaries stay near one float32 copy of the tensor, and no full SVD is taken.

Three nulls answer the question, each where the others are blind:

* **sign flips.** What is left of the difference without its k leading directions, every entry with a random
  sign, has the same entry sizes and no structure. Its top singular value is the edge of the noise whatever
  the distribution of the weights (Hong, Sheng and Dobriban, "Selecting the number of components in PCA via
  random signflips", arXiv:2012.02985, apply this to whole data matrices). Single large entries keep their size
  under a flip, so an outlier weight that moved by one step is noise here and not a direction.
* **re-rounding.** Where most entries do not move, the loss follows the update. Adding the k directions to the
  base and rounding again shows it: sigma_1 of round(W + cX) - (W + cX), and the directions past k that
  rounding makes out of k ones.
* **the grid.** A real update of full rank has no structure either. Uniform rounding errors have variance
  ulp**2 / 12, so a residual that carries much more than that is an update, unless it is a fixed multiple of
  ulp**2 at every magnitude, as truncation or two roundings leave it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.grids import BLOCK_ENTRIES, Floats, Pair, block_energy, row_blocks

Factors = tuple[Floats, Floats]
"""Left (m, k), singular values in it, and right (k, n) with orthonormal rows."""

KRYLOV_STEPS: Final = 16  # at a soft edge the Ritz value is low by (pi / 2 / steps)**2 / 2: half a percent
MAX_DEFLATED: Final = 128  # directions taken out for the flips; past them the grid alone sets the edge
ROUNDS: Final = 5  # of counting and taking out; two or three are usual
REFILLS: Final = 2  # rounds in which outliers left out of a fit are replaced by what the fit says
REFITS: Final = 2  # re-rounding fits: the first value past the rank is then within 4 % of its limit
START: Final = 1.75  # times the grid's edge, where the count starts: an error of ulp / 2 is sqrt(3) deviations
STILL: Final = 0.02  # unchanged share below which steps are too small beside the update to distort it
REFIT_ERROR: Final = 0.05  # by which the re-rounded value past the rank may be low
EXCESS: Final = 1.4  # residual energy over the sum of ulp**2 / 12, above which rounding once cannot explain it
MOST_EXCESS: Final = 7.0  # the same ratio, for any rounding: truncation against nearest leaves ulp**2 / 2, which is 6
FEW: Final = 1e-3  # share of moves longer than a step that no real update stays below
RESOLVED: Final = 1e-5  # share of the energy below which a sum of squared values loses what is left
SMALLEST: Final = 1e-18  # root mean square difference whose products underflow in float32


@dataclass(frozen=True, slots=True)
class NoiseReading:
    """What rounding alone explains in the difference of one module.

    Attributes:
        noise_edge: unit of the singular values; those at or below it are rounding. 0.0 for an identical
            pair, None when something is infinite or NaN or below 1e-18 (root mean square difference).
        signal_rank: number of the given singular values above the edge: at most as many as were given.
            None with `noise_edge`.
        unchanged_share: share of the entries that are bit-equal (equal, if the dtypes differ), in [0, 1].
        rounding_limited: whether the values above the edge hold less than the wanted fraction of the energy
            and rounding holds more than the rest: an energy rank then counts directions of rounding.
        noise_energy: squared Frobenius norm of the rounding noise that the difference carries. None with
            `noise_edge`.
    """

    noise_edge: float | None
    signal_rank: int | None
    unchanged_share: float
    rounding_limited: bool
    noise_energy: float | None


def read_noise(
    base: NDArray[Any],
    tuned: NDArray[Any],
    delta: NDArray[np.float32],
    singular_values: Sequence[float] | NDArray[Any],
    *,
    seed: int = 0,
    fraction: float = 0.99,
    accuracy: float = 1e-7,
) -> NoiseReading:
    """Estimate the noise edge and the signal rank of one module from its two tensors.

    Args:
        base: shape (m, n), in its storage dtype: bfloat16, float16, float32 or float64.
        tuned: shape (m, n), likewise; the dtypes may differ.
        delta: shape (m, n), float32: tuned - base.
        singular_values: of delta, largest first; if only the first K are given, the rank is K at most.
        seed: of the random signs and start vectors; equal seeds give equal readings.
        fraction: energy share that the ranks beside this reading use, for `rounding_limited`.
        accuracy: error of `singular_values` relative to the largest; no smaller value counts as signal.
    """
    pair = Pair(base, tuned, np.asarray(delta, np.float32))
    values = np.asarray(singular_values, np.float64)
    if pair.energy == 0.0 or values.size == 0:
        return NoiseReading(0.0, 0, pair.unchanged, False, 0.0)
    if not (SMALLEST**2 < pair.energy / delta.size < math.inf and bool(np.isfinite(values).all())):
        return NoiseReading(None, None, pair.unchanged, False, None)
    edge, noise_energy = _Search(pair, values, np.random.Generator(np.random.SFC64(seed))).edge()
    edge = max(edge, accuracy * float(values[0]))
    rank = _count(values, edge)
    held = float(np.sum(values[:rank] ** 2))
    truncated = rank == values.size < min(delta.shape)  # the tail is unknown: ask the noise alone
    limited = noise_energy > (1.0 - fraction) * pair.energy and (truncated or held < fraction * pair.energy)
    return NoiseReading(edge, rank, pair.unchanged, limited, noise_energy)


def _count(values: NDArray[np.float64], edge: float) -> int:
    return int(np.count_nonzero(values > edge))


class _Search:
    """The search for one edge: the nulls of the module docstring, and which of them decides."""

    def __init__(self, pair: Pair, values: NDArray[np.float64], rng: np.random.Generator) -> None:
        self.pair, self.values, self.rng = pair, values, rng
        self.m, self.n = int(pair.delta.shape[0]), int(pair.delta.shape[1])
        short = min(self.m, self.n)
        # 3 % for the Krylov steps and the fit of the signal directions; the rest is the spread of a top
        # singular value, which falls as size**(-2/3) (Tracy and Widom, doi:10.1007/BF02100489).
        self.margin = 1.03 + 2.0 * short ** (-2 / 3)
        self.most = min(MAX_DEFLATED, short // 4)
        self.draws = 5 if pair.delta.size <= 1 << 16 else 3 if pair.delta.size <= 1 << 18 else 1

    def taken(self, rank: int) -> float:
        """Return the share of the noise energy that fitting `rank` directions leaves, from degrees of freedom."""
        return max((1 - rank / self.m) * (1 - rank / self.n), 0.05)

    def left(self, rank: int) -> float:
        """Return the energy past the first `rank` values, with what the fit of those took of it.

        Where that difference drowns in the error of the values (float32 pairs), the grid's own energy.
        """
        rest = self.pair.energy - float(np.sum(self.values[:rank] ** 2))
        return float(rest / self.taken(rank) if rest > RESOLVED * self.pair.energy else self.pair.grid_energy)

    def edge(self) -> tuple[float, float]:
        """Return the edge, margin included, and the energy of the noise."""
        grid_edge, grid_energy = self.grid_edge()
        start = _count(self.values, START * grid_edge)
        if start <= self.most:
            edge, rank, energy = self.climb(start, grid_edge)
            if rank >= 0.9 * start - 1:  # else: noise had been taken out as signal
                return edge, energy
        edge, rank, energy = self.climb(0, grid_edge)
        if rank <= self.most:
            excess = energy / max(self.pair.grid_energy, 1e-300)
            if self.pair.leaps < FEW or excess <= EXCESS:
                return edge, energy
            residual = self.residual(self.directions(rank, grid_edge))
            if excess <= MOST_EXCESS and self.pair.scales_with_grid(residual):
                return edge, energy
        return grid_edge, grid_energy

    def grid_edge(self) -> tuple[float, float]:
        """Return the edge, margin included, and energy of rounding errors that fill the grid.

        An entry that the update is too small to move loses that update, not a whole step: hence the bound by
        the root mean square of the difference.
        """
        noise = np.empty(self.pair.delta.shape, np.float32)
        typical = np.float32(math.sqrt(self.pair.energy / noise.size))
        energy = 0.0
        for rows in row_blocks(noise.shape):
            np.minimum(self.pair.grid_noise(rows), typical, out=noise[rows])
            energy += block_energy(noise[rows])
        return self.margin * self.flipped(noise), energy

    def climb(self, rank: int, grid_edge: float) -> tuple[float, int, float]:
        """Take out `rank` directions, see how many stand above the rest, and go on until that holds still.

        Returns:
            The edge, margin included; the rank; the energy of the noise.
        """
        edge = lost = energy = 0.0
        for _ in range(ROUNDS):
            factors = self.directions(rank, grid_edge)
            rest = self.residual(factors)
            energy = sum(block_energy(rest[rows]) for rows in row_blocks(rest.shape)) / self.taken(rank)
            edge = self.margin * self.flipped(rest) / math.sqrt(self.taken(rank))
            del rest
            lost = 0.0
            if factors is not None and self.pair.unchanged > STILL:
                lost, made = self.rerounded(factors)
                edge = max(edge, (self.margin + REFIT_ERROR) * made)
            before, rank = rank, _count(self.values, edge)
            if rank == before or rank > self.most:
                break
        fewer = _count(self.values, lost)
        if 0 < fewer < rank and (factors := self.directions(fewer, grid_edge)) is not None:
            less, made = self.rerounded(factors)  # in large modules the distortion of a few makes more
            made *= self.margin + REFIT_ERROR
            if _count(self.values, made) <= fewer:
                edge, lost, rank = max(edge, made), less, fewer
        if rank and edge < lost < self.values[rank - 1]:
            edge = lost  # the part of the update that was lost is rounding too, as long as it hides no signal
        return edge, rank, energy

    def directions(self, rank: int, grid_edge: float) -> Factors | None:
        """Return the leading `rank` directions of the difference, outlier entries of one step left out."""
        delta = self.pair.delta
        if rank == 0:
            return None
        if self.pair.tallest > 0.5 * grid_edge:
            i, j = self.pair.outliers(0.5 * grid_edge)
            delta = delta.copy()
            delta[i, j] = 0.0
            for _ in range(REFILLS):  # they carry signal too: put in what the other entries say
                left, right = _leading(delta, rank, self.rng)
                delta[i, j] = np.einsum("ek,ek->e", left[i], right[:, j].T)
        return _leading(delta, rank, self.rng)

    def residual(self, factors: Factors | None) -> Floats:
        """Return the difference without these directions, a copy that may be written to; shape (m, n)."""
        rest = self.pair.delta.copy()
        return rest if factors is None else _subtract(rest, factors)

    def flipped(self, matrix: Floats) -> float:
        """Return the top singular value of `matrix` under random signs; largest of a few draws if small.

        The signs are written into `matrix`.
        """
        top = 0.0
        for _ in range(self.draws):
            for rows in row_blocks(matrix.shape):
                bits = matrix[rows].view(np.uint32)
                words = self.rng.integers(0, 1 << 32, (len(bits) // 8 + 1, self.n), np.uint32)
                for j in range(8):  # one random word signs eight rows
                    part = bits[j::8]
                    part ^= (words[: len(part)] << np.uint32(j)) & np.uint32(0x80000000)
            top = max(top, _top_value(matrix, self.rng))
        return top

    def rerounded(self, factors: Factors) -> tuple[float, float]:
        """Find an update of this rank whose rounding shows the directions that were read, and round it.

        Dead zones swallow part of an update, most where the weights are large, so the directions of the
        difference are not those of the update. Start from a multiple and add what its rounding lacks, along
        the tangent space of the rank (a Riemannian gradient step of length 1; own construction).

        Returns:
            sigma_1 of the rounding error, and the first singular value past the rank that went in.
        """
        rank = factors[0].shape[1]
        left, right = np.asarray(self.scale(factors) * factors[0], np.float32), factors[1]
        made = np.empty((self.m, self.n), np.float32)
        for step in range(REFITS + 1):
            for rows in row_blocks(made.shape):
                made[rows] = self.pair.rounded(rows, left[rows] @ right)
            if step < REFITS:
                left, right = _tangent_step((left, right), self.pair.delta, made)
        top, basis = _leading(made, rank, self.rng)
        past = _top_value(_subtract(made, (top, basis)), self.rng)
        back = np.concatenate([left, -top], axis=1), np.concatenate([right, basis])
        return _top_value(_subtract(made, back), self.rng), past

    def scale(self, factors: Factors) -> np.float32:
        """Return c with <round(W + cX) - W, X> = <X, X>, by bisection on at most a block of rows."""
        rows = slice(0, None, max(1, self.m * self.n // BLOCK_ENTRIES))
        update: Floats = factors[0][rows] @ factors[1]
        low, high = 0.5, 8.0
        for _ in range(10):
            middle = np.float32(math.sqrt(low * high))
            short = np.vdot(self.pair.rounded(rows, np.asarray(middle * update)) - update, update) < 0
            low, high = (float(middle), high) if short else (low, float(middle))
        return np.float32(math.sqrt(low * high))


def _subtract(matrix: Floats, factors: Factors) -> Floats:
    """Subtract a product from `matrix`, in place, and return it."""
    for rows in row_blocks(matrix.shape):
        matrix[rows] -= factors[0][rows] @ factors[1]
    return matrix


def _tangent_step(factors: Factors, wanted: Floats, made: Floats) -> Factors:
    """Return the best rank-k factors of X + (G projected on the tangent space at X), G = wanted - made."""
    left, right = factors
    rank = left.shape[1]
    basis = np.linalg.qr(left)[0]  # (m, k)
    down = wanted @ right.T - made @ right.T  # (m, k)
    across = basis.T @ wanted - basis.T @ made  # (k, n)
    across -= (across @ right.T) @ right
    tall, core_left = np.linalg.qr(np.concatenate([left + down, basis], axis=1))  # (m, 2k)
    wide, core_right = np.linalg.qr(np.concatenate([right, across]).T)  # (n, 2k)
    u, s, vt = np.linalg.svd(core_left @ core_right.T)
    return np.asarray((tall @ u[:, :rank]) * s[:rank]), np.asarray(vt[:rank] @ wide.T)


def _leading(matrix: Floats, rank: int, rng: np.random.Generator) -> Factors:
    """Return the leading `rank` singular directions by two subspace passes.

    Halko, Martinsson and Tropp (2011), doi:10.1137/090771806, algorithm 4.4.
    """
    width = min(*matrix.shape, rank + 10)
    right = rng.standard_normal((matrix.shape[1], width), np.float32)  # (n, width)
    for _ in range(2):
        left = np.linalg.qr(matrix @ right)[0]  # (m, width)
        right = np.linalg.qr(matrix.T @ left)[0]
    left, triangle = np.linalg.qr(matrix @ right)
    u, s, vt = np.linalg.svd(triangle)
    return np.asarray(left @ (u[:, :rank] * s[:rank])), np.asarray(vt[:rank] @ right.T)


def _top_value(matrix: Floats, rng: np.random.Generator) -> float:
    """Return the top singular value of `matrix` by Lanczos steps on its Gram matrix.

    A Ritz value: never above the truth, and half a percent below it where the spectrum ends in a soft edge.
    Golub and Kahan (1965), doi:10.1137/0702016, with every vector orthogonalised again.
    """
    m, n = matrix.shape
    steps = min(m, n, KRYLOV_STEPS)
    basis, image = np.zeros((steps, n), np.float32), np.zeros((steps, m), np.float32)
    vector: NDArray[Any] = rng.standard_normal((n,), np.float32)
    for j in range(steps):
        for _ in range(2):  # once is not enough in float32
            vector = vector - (basis[:j] @ vector) @ basis[:j]
        length = np.linalg.norm(vector)
        if length == 0:
            break
        basis[j] = vector / length
        image[j] = matrix @ basis[j]
        vector = image[j] @ matrix
    return float(np.linalg.norm(image, 2))
