"""The best low-rank factors of a dense delta, with a certificate.

In: one delta, and a rank. Out: two factors, the error they leave, and a bound below which no factors of that rank can
bring it.

The route is a randomised subspace in float32 (Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithm 4.4) that
stops as soon as it is known to be good enough. How that is known, own derivation: with orthonormal Q (m, q) and
W (n, q) that span the iterates, W the right vectors of Q'T and S its values, T is in these bases

    [ X S   0   ]        F  = what T W has outside of Q, measured
    [ F     T22 ]        mu = the largest eigenvalue of T22' T22

and by Young's inequality T'T lies below the block-diagonal matrix of S^2 + (1 + 1/eta) F'F and (1 + eta) T22'T22, for
every eta > 0. By Ky Fan no rank k holds more energy than the k largest of these eigenvalues together. S and F are
measured; mu is bounded by a block Krylov probe of T22 that fails with a chance of `CHANCE`, whatever T is (Kuczynski &
Wozniakowski 1992, doi:10.1137/0613066, here for a block: the start has a chi-squared share of the wanted direction).
Where the bound is not met soon, as on noise without any structure, the exact route takes over: the Gram matrix in
float64 and its eigenvectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.grids import row_blocks
from rankwise.linalg import BLOCK_ENTRIES, energy_of, torch_device

Array = NDArray[Any]

GOAL: Final = 1.0005
"""Error over the best possible at which the iteration stops: half of what is promised is left to rounding."""

PROMISED: Final = 1.001
"""Error over the best possible that factors may have; more, measured on them, and the exact route takes over."""

OVERSAMPLING: Final = 64
MAX_PASSES: Final = 6
SMALLEST_RANDOM: Final = 256
"""Columns below which the exact route is faster; the probe's bound also counts on this many."""

PROBES: Final = 16
PROBE_STEPS: Final = 12
CHANCE: Final = 1e-9
START_SHARE: Final = 0.566
"""The value that a chi-squared variable of `PROBES` degrees falls below with a chance of `CHANCE`, rounded down."""

RESOLVED: Final = 1e-9
"""Share of the energy (3e-5 of the norm) below which float32 products no longer tell a residual."""

ROUNDING: Final = 1e-6
"""Share of the energy that sums of float32 products may be off by: what is left over by subtraction is at least it."""

Route = Literal["subspace", "exact"]


@dataclass(frozen=True, slots=True)
class Truncation:
    """Two factors of one delta.

    Attributes:
        a: shape (rank, in_features), float32 or float64: sqrt(sigma) times the right vectors.
        b: shape (out_features, rank): the left vectors times sqrt(sigma).
        sigma: the values that the factors hold, largest first, float64.
        energy: squared Frobenius norm of the delta, summed in float64.
        residual: squared Frobenius norm of delta - B @ A, measured on them.
        least: no rank of this size leaves less than this; unit of `residual`.
        route: how they were found.
    """

    a: Array
    b: Array
    sigma: Array
    energy: float
    residual: float
    least: float
    route: Route

    @property
    def relative_error(self) -> float:
        """Return norm(D - B A) / norm(D), Frobenius."""
        return math.sqrt(self.residual / self.energy) if self.energy > 0 else 0.0

    @property
    def best_relative_error(self) -> float:
        """Return the bound below which no factors of this rank can bring the relative error."""
        return math.sqrt(min(self.least, self.residual) / self.energy) if self.energy > 0 else 0.0


class _Operand:
    """A tall matrix that is only multiplied, on the CPU or a torch device. What comes in and goes out is numpy."""

    def __init__(self, tall: Array, device: str) -> None:
        self.tall = tall
        self.rows, self.columns = int(tall.shape[0]), int(tall.shape[1])
        self._torch: Any = None
        if device != "cpu":
            self._torch, self._device = torch_device(device)
            self._there = self._torch.from_numpy(np.ascontiguousarray(tall)).to(self._device)

    def times(self, block: Array) -> Array:
        """Return T @ block, (rows, q)."""
        if self._torch is None:
            return np.asarray(self.tall @ block)
        return np.asarray((self._there @ self._sent(block)).cpu().numpy())

    def back_times(self, block: Array) -> Array:
        """Return T' @ block, (columns, q)."""
        if self._torch is None:
            return np.asarray(self.tall.T @ block)
        return np.asarray((self._there.T @ self._sent(block)).cpu().numpy())

    def gram_vectors(self, rank: int) -> Array:
        """Return the `rank` leading right singular vectors, (columns, rank) float64, from T'T in float64."""
        if self._torch is not None:
            wide = self._there.double()
            vectors = self._torch.linalg.eigh(wide.T @ wide)[1]
            return np.ascontiguousarray(vectors[:, -rank:].flip(1).cpu().numpy())
        from scipy.linalg import eigh

        gram = np.zeros((self.columns, self.columns))
        step = max(1, BLOCK_ENTRIES // self.columns)
        for start in range(0, self.rows, step):
            block = self.tall[start : start + step].astype(np.float64)
            gram += block.T @ block
        n = self.columns
        few = None if 2 * rank >= n else [n - rank, n - 1]  # else divide and conquer, which is faster for all of them
        driver = "evd" if few is None else "evr"
        vectors = eigh(gram, subset_by_index=few, driver=driver, overwrite_a=True, check_finite=False)[1]
        return np.ascontiguousarray(vectors[:, -rank:][:, ::-1])

    def _sent(self, block: Array) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(block)).to(self._device, self._there.dtype)


def truncate(
    delta: Array,
    rank: int,
    *,
    energy: float | None = None,
    held: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Truncation:
    """Return factors of a rank whose error is within 1.001 of the best possible.

    The best possible is that of the truncated SVD (Eckart & Young 1936, doi:10.1007/BF02288367). Errors below a
    millionth of the delta's norm are what its float32 entries leave, and are not told from zero.

    Args:
        delta: shape (out_features, in_features), float32 or float64, finite, not zero.
        rank: 1 or more; cut to min(shape).
        energy: squared Frobenius norm of the delta where it is known, summed in float64.
        held: the energy of the first `rank` singular values where it is known, which saves the certificate's work.
        seed: of the random start; equal seeds give equal factors.
        device: "cpu" or a torch device.

    Raises:
        DeviceError: the device is not there.
    """
    wide = delta.shape[0] < delta.shape[1]
    tall = delta.T if wide else delta  # (rows, n), n <= rows: the work goes with the smaller side squared
    rank = min(rank, *tall.shape)
    energy = energy_of(delta) if energy is None else energy
    # a power of four near one over the size, so that squares neither vanish nor overflow in float32; exact
    exponent = -2 * (math.frexp(math.sqrt(energy / delta.size))[1] // 2)
    if abs(exponent) > 20:
        tall = np.ldexp(tall, exponent)
    else:
        exponent = 0
    scaled = math.ldexp(energy, 2 * exponent)
    operand = _Operand(tall, device)
    found: tuple[Array, Array, float] | None = None
    if tall.shape[1] >= SMALLEST_RANDOM and rank + OVERSAMPLING <= tall.shape[1] // 3:
        wanted = None if held is None else math.ldexp(held, 2 * exponent)
        found = _subspace(operand, rank, scaled, wanted, np.random.default_rng(seed))
    for route in ("subspace", "exact"):
        if route == "exact":
            found = _exact(operand, rank, scaled)
        if found is None:
            continue
        right, left, excess = found
        a, b, sigma = _balance(right, left)
        half = a.dtype.type(math.ldexp(1.0, -exponent // 2))
        a, b = (b.T * half, a.T * half) if wide else (a * half, b * half)
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        residual = residual_energy(delta, a, b)
        least = max(residual - math.ldexp(excess, -2 * exponent), 0.0)
        if held is not None:
            least = min(max(energy - held, 0.0), residual)
        # the goal was met by sums of float32 products; where little is left they are off, the residual is not
        if route == "subspace" and (residual < RESOLVED * energy or residual > PROMISED**2 * least):
            continue
        return Truncation(a, b, np.ldexp(sigma, -exponent), energy, residual, least, route)
    raise AssertionError("unreachable: the exact route always returns")


def residual_energy(delta: Array, a: Array, b: Array, scaling: float = 1.0) -> float:
    """Return the squared Frobenius norm of delta - scaling * B @ A, a block of rows at a time, summed in float64.

    Args:
        delta: shape (out_features, in_features).
        a: shape (r, in_features), any float dtype: as it is stored.
        b: shape (out_features, r), likewise.
        scaling: the factor on B @ A.
    """
    kind = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
    right = a.astype(kind, copy=False)
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # a float16 that overflowed shows as an infinite error
        for rows in row_blocks(delta.shape, BLOCK_ENTRIES):
            left = np.asarray(b[rows], kind) * np.asarray(scaling, kind)
            rest = np.asarray(delta[rows] - left @ right, kind).ravel()
            total += float(np.dot(wide := rest.astype(np.float64, copy=False), wide))
    return total


def _balance(right: Array, left: Array) -> tuple[Array, Array, Array]:
    """Return (A, B, sigma) from orthonormal right vectors (n, r) and T @ them, (m, r), of orthogonal columns.

    The largest entry of each right vector is made positive, so that the signs do not depend on the route.
    """
    sigma = np.sqrt(np.einsum("ij,ij->j", left, left, dtype=np.float64))
    order = np.argsort(-sigma, kind="stable")
    right, left, sigma = right[:, order], left[:, order], sigma[order]
    peaks = right[np.argmax(np.abs(right), axis=0), np.arange(right.shape[1])]
    signs = np.where(peaks < 0, -1.0, 1.0)
    roots = np.sqrt(sigma)
    kind = right.dtype.type
    outward = np.divide(signs, roots, out=np.zeros_like(roots), where=roots > 0)
    return (right * (signs * roots).astype(kind)).T, left * outward.astype(kind), sigma


def _exact(operand: _Operand, rank: int, energy: float) -> tuple[Array, Array, float]:
    """Return right vectors, T @ them and the excess, from the Gram matrix in float64.

    Rounding turns the vectors by 1e-15 of the largest eigenvalue over the gap; what that can cost is at most
    rank times 1e-15 times the largest eigenvalue: with the largest bounded by the energy, the excess returned.
    """
    vectors = operand.gram_vectors(rank)
    left = np.empty((operand.rows, rank))
    for rows in row_blocks((operand.rows, operand.columns), BLOCK_ENTRIES):
        left[rows] = operand.tall[rows].astype(np.float64) @ vectors
    turn = np.linalg.svd(np.linalg.qr(left, mode="r"))[2].T  # (rank, rank): makes the columns of T V orthogonal
    return vectors @ turn, left @ turn, rank * 1e-15 * energy


def _subspace(
    operand: _Operand, rank: int, energy: float, held: float | None, rng: np.random.Generator
) -> tuple[Array, Array, float] | None:
    """Return right vectors, T @ them and the excess, or None where the passes allowed do not reach the goal."""
    start = rng.standard_normal((operand.columns, rank + OVERSAMPLING), dtype=np.float32)
    image = operand.times(start.astype(operand.tall.dtype, copy=False))
    before = math.inf
    for done in range(1, MAX_PASSES + 1):
        left = _orthonormal(image)  # (m, q)
        basis, triangle = _qr(operand.back_times(left))  # (n, q), (q, q): T' Q
        turn, s, back = np.linalg.svd(triangle.astype(np.float64))
        right = basis @ turn.astype(basis.dtype)  # (n, q): right vectors of Q' T
        image = operand.times(right)  # (m, q)
        outside = image - left @ (back.T * s).astype(left.dtype)  # (m, q): F, for T' u = s v holds exactly
        state = _State.of(s, outside, rank)
        missing = energy - state.captured
        if missing < RESOLVED * energy:
            return None
        excess = _certify(state, operand, left, right, missing, energy, held, rng)
        if excess is not None:
            turned = state.turn.astype(right.dtype)
            return right @ turned, image @ turned, excess
        pace = state.outside / before
        if done >= 3 and pace > 0.7:
            return None  # no gap to speak of: more passes would cost more than the exact route
        before = state.outside
    return None


@dataclass(frozen=True, slots=True)
class _State:
    """What one pass has measured, in the words of the module docstring."""

    squares: Array  # (q,) S^2
    leak: Array  # (q, q) F'F
    captured: float  # energy of T in the `rank` best directions of W
    smallest: float  # the least of their eigenvalues
    turn: Array  # (q, rank): these directions in the basis W
    outside: float  # trace of the leak of these directions

    @classmethod
    def of(cls, s: Array, outside: Array, rank: int) -> _State:
        wide = outside.astype(np.float64)
        leak = wide.T @ wide
        values, vectors = np.linalg.eigh(np.diag(s * s) + leak)
        turn = np.ascontiguousarray(vectors[:, -rank:][:, ::-1])
        best = values[-rank:]
        spilled = float(np.einsum("ij,ik,kj->", turn, leak, turn))
        return cls(s * s, leak, float(best.sum()), float(best[0]), turn, spilled)

    def excess(self, mu: float, rank: int) -> float:
        """Return how much more energy than `captured` any rank k can hold, if T22'T22 is below mu."""
        ratio = self.smallest / mu - 1 if mu > 0 else math.inf
        choices = [min(ratio, 1e6), min(ratio / 2, 1e6)] if ratio > 0.02 else [0.02, 0.1]
        worst = math.inf
        for eta in choices:
            values = np.linalg.eigvalsh(np.diag(self.squares) + (1 + 1 / eta) * self.leak)[-rank:]
            worst = min(worst, float(np.maximum(values, (1 + eta) * mu).sum()) - self.captured)
        return max(worst, 0.0)


def _certify(
    state: _State,
    operand: _Operand,
    left: Array,
    right: Array,
    missing: float,
    energy: float,
    held: float | None,
    rng: np.random.Generator,
) -> float | None:
    """Return a bound on the energy missed for want of better directions, or None where it is not small enough."""
    rank = state.turn.shape[1]
    allowed = (1 - GOAL**-2) * missing
    if held is not None:
        excess = max(held - state.captured, 0.0)
        # the two sums are of float64 and of float32 products: 1e-8 of the energy is what tells them apart
        return excess if excess + 1e-8 * energy <= allowed else None
    rest = max(energy - float(state.squares.sum()) - float(np.trace(state.leak)), 0.0) + ROUNDING * energy
    if state.excess(rest, rank) <= allowed:  # not even all that is left, in one direction
        return state.excess(rest, rank)
    if state.excess(float(state.squares[-1]), rank) > allowed:  # about what the next value is: hopeless at this pass
        return None
    return _probe(operand, left, right, rng, lambda mu: state.excess(mu, rank), allowed)


def _probe(
    operand: _Operand,
    left: Array,
    right: Array,
    rng: np.random.Generator,
    excess_of: Callable[[float], float],
    allowed: float,
) -> float | None:
    """Return the excess once the largest eigenvalue of T22'T22 is known well enough, or None where it is too large."""
    start = rng.standard_normal((operand.columns, PROBES), dtype=np.float32).astype(right.dtype, copy=False)
    basis = np.empty((operand.columns, 0), right.dtype)
    images = np.empty((operand.rows, 0), right.dtype)
    block = _orthonormal(_outside(start, right))
    for steps in range(1, PROBE_STEPS + 1):
        basis = np.concatenate([basis, block], axis=1)
        image = _outside(operand.times(block), left)
        images = np.concatenate([images, image], axis=1)
        low = float(np.linalg.eigvalsh(images.astype(np.float64).T @ images.astype(np.float64))[-1])
        if excess_of(low) > allowed:
            return None  # it is at least this large
        shrunk = ritz_error(operand.columns, steps)
        if shrunk < 1 and (excess := excess_of(low / (1 - shrunk))) <= allowed:
            return excess
        block = _orthonormal(_outside(_outside(operand.back_times(image), right), basis))
    return None


def ritz_error(size: int, steps: int) -> float:
    """Return by what share of itself the largest eigenvalue may exceed the Ritz value of a block Krylov space.

    Take f, a Chebyshev polynomial of degree steps - 1 scaled to [0, (1 - e) lambda], of the one start vector in the
    block that points most to the wanted eigenvector: its share there is at least `START_SHARE`, that of all others at
    most 2 * size. Eigenvalues above (1 - e) lambda cost e, the others their share over f(lambda)^2.

    Args:
        size: of the matrix.
        steps: products with it, and with the start one more block in the basis.

    >>> ritz_error(2048, 12) < 0.13 < ritz_error(2048, 8)
    True
    """
    if steps < 2:
        return 1.0
    best = 1.0
    for e in np.linspace(0.01, 0.99, 99):
        growth = math.cosh((steps - 1) * math.acosh(1 + 2 * e / (1 - e)))
        best = min(best, float(e) + 2 * size / (START_SHARE * growth * growth))
    return best


def _outside(block: Array, basis: Array) -> Array:
    """Return what of a block lies outside of orthonormal columns; twice, which is enough (Kahan's rule)."""
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
    return block


def _orthonormal(block: Array) -> Array:
    return _qr(block)[0]


def _qr(block: Array) -> tuple[Array, Array]:
    """Return Q and R in the dtype of the block: numpy's would be float64, which takes three times as long."""
    from scipy.linalg import qr

    q, r = qr(block, mode="economic", check_finite=False)
    return q, r
