"""The truncated SVD: within 1.001 of the optimum on every kind of spectrum, and a certificate that never overstates."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from planting import planted
from rankwise.adapters import truncation
from rankwise.adapters.truncation import (
    CHANCE,
    PROBES,
    SMALLEST_RANDOM,
    START_SHARE,
    Truncation,
    residual_energy,
    ritz_error,
    truncate,
)

PROMISED = 1.001
FLOOR = 1e-6
"""Relative error below which float32 entries are not told from zero, as the docstring of `truncate` says."""

N = 320  # columns: more than SMALLEST_RANDOM, so that the randomised route is tried

SPECTRA = {
    "flat": np.ones(N),
    "power-law": np.arange(1.0, N + 1) ** -0.5,
    "steep": np.arange(1.0, N + 1) ** -1.5,
    "gapped": np.r_[np.linspace(1.5, 0.15, 24), np.full(N - 24, 0.004)],
    "geometric": 0.9 ** np.arange(N),
    "steps": np.repeat([1.0, 0.3, 0.1, 0.03], N // 4),
    "one direction": np.r_[1.0, np.full(N - 1, 1e-4)],
    "zero-padded": np.r_[np.linspace(1, 0.1, 20), np.zeros(N - 20)],
}
SIZES = {"tiny numbers": 1e-22, "usual": 1e-3, "huge numbers": 1e15}


def _best(delta: NDArray[np.float32], rank: int) -> float:
    """Return the relative error of the truncated SVD in float64."""
    sigma = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    return float(np.sqrt(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2)))


def _error(delta: NDArray[np.float32], found: Truncation) -> float:
    """Measure the relative error in float64, another way than `truncate` does."""
    wide = delta.astype(np.float64)
    return float(np.linalg.norm(wide - found.b.astype(np.float64) @ found.a.astype(np.float64)) / np.linalg.norm(wide))


def _check(delta: NDArray[np.float32], rank: int, found: Truncation) -> None:
    best, error = _best(delta, rank), _error(delta, found)
    assert error <= PROMISED * best + FLOOR
    assert found.relative_error == pytest.approx(error, rel=1e-4, abs=FLOOR)  # float32 products of the measurement
    assert found.best_relative_error <= best * (1 + 1e-4) + FLOOR
    assert found.best_relative_error >= error / PROMISED - FLOOR
    assert found.energy == pytest.approx(float(np.sum(delta.astype(np.float64) ** 2)), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 8, 24, 40])
@pytest.mark.parametrize("name", sorted(SPECTRA))
def test_error_is_within_the_promise_of_the_optimum(name: str, rank: int, rng: np.random.Generator) -> None:
    delta = planted(rng, (500, N), SPECTRA[name]).astype(np.float32)
    _check(delta, rank, truncate(delta, rank))


@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize("shape", [(N, 700), (700, N), (N, N), (60, 41), (41, 60), (1, 50), (50, 1)])
def test_every_shape_and_size_of_numbers(shape: tuple[int, int], size: str, rng: np.random.Generator) -> None:
    """Wide, tall, square and thin; squares of the entries would underflow or overflow float32."""
    count = min(shape)
    delta = (SIZES[size] * planted(rng, shape, np.arange(1.0, count + 1) ** -0.8)).astype(np.float32)
    rank = min(12, count)
    found = truncate(delta, rank)
    assert found.a.shape == (rank, shape[1])
    assert found.b.shape == (shape[0], rank)
    _check(delta, rank, found)


@pytest.mark.parametrize("tail", [2e-4, 7e-5, 5e-5, 4e-5])
@pytest.mark.parametrize("heads", [1, 3])
def test_small_errors_are_held_to_the_promise_too(heads: int, tail: float, rng: np.random.Generator) -> None:
    """Sums of float32 products are off by more than such errors leave; the residual that was measured decides."""
    rest = np.r_[np.full(15, 3.0), np.ones(300 - heads - 15)]
    rest *= tail * np.sqrt(heads) / np.linalg.norm(rest)
    delta = planted(rng, (330, 300), np.r_[np.ones(heads), rest]).astype(np.float32)
    best = _best(delta, 16)
    for seed in range(3):
        found = truncate(delta, 16, seed=seed)
        assert _error(delta, found) <= PROMISED * best  # no floor: 1e-6 would hide a ratio of 1.02 here
        assert found.best_relative_error <= best * (1 + 1e-4)
        assert found.relative_error <= PROMISED * found.best_relative_error


@pytest.mark.parametrize("weak", [3.0, 1.02, 0.5])
def test_directions_of_single_entries_are_found(weak: float, rng: np.random.Generator) -> None:
    """Singular vectors along the axes, the last one kept of any strength: the most that sampling could miss."""
    sigma = np.r_[np.full(15, 3.0), weak, np.full(N - 16, 0.05)]
    delta = np.zeros((400, N), np.float32)
    delta[rng.permutation(400)[:N], rng.permutation(N)] = sigma
    for seed in range(8):
        _check(delta, 16, truncate(delta, 16, seed=seed))


def test_bf16_pairs(rng: np.random.Generator) -> None:
    base = rng.standard_normal((500, N)).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) + planted(rng, (500, N), np.linspace(3, 1, 10))).astype(ml_dtypes.bfloat16)
    delta = tuned.astype(np.float32) - base.astype(np.float32)
    for rank in (10, 30):
        _check(delta, rank, truncate(delta, rank))


def test_pure_noise_takes_the_exact_route(rng: np.random.Generator) -> None:
    """Without structure the top of the spectrum has no gap at all: the hardest case for the certificate."""
    delta = rng.standard_normal((400, N)).astype(np.float32)
    found = truncate(delta, 32)
    _check(delta, 32, found)


def test_both_routes_are_taken_somewhere(rng: np.random.Generator) -> None:
    steep = planted(rng, (500, N), SPECTRA["geometric"]).astype(np.float32)
    assert truncate(steep, 16).route == "subspace"
    assert truncate(steep, N // 2).route == "exact"
    small = planted(rng, (90, SMALLEST_RANDOM // 4), 0.9 ** np.arange(64.0)).astype(np.float32)
    assert truncate(small, 4).route == "exact"


def test_full_rank_leaves_nothing(rng: np.random.Generator) -> None:
    delta = rng.standard_normal((40, 30)).astype(np.float32)
    found = truncate(delta, 99)
    assert found.a.shape == (30, 30)
    assert _error(delta, found) < FLOOR


def test_known_energy_spares_the_probe(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = planted(rng, (500, N), SPECTRA["geometric"]).astype(np.float32)
    held = float(np.sum(np.linalg.svd(delta.astype(np.float64), compute_uv=False)[:16] ** 2))
    monkeypatch.setattr(truncation, "_probe", None)
    found = truncate(delta, 16, held=held)
    assert found.route == "subspace"
    _check(delta, 16, found)


@pytest.mark.parametrize("route", ["subspace", "exact"])
def test_factors_are_balanced_sorted_and_signed(route: str, rng: np.random.Generator) -> None:
    delta = planted(rng, (500, N), SPECTRA["geometric"]).astype(np.float32)
    found = truncate(delta, 12 if route == "subspace" else 150)
    assert found.route == route
    np.testing.assert_allclose(np.sum(found.a**2, axis=1), found.sigma, rtol=1e-5)
    np.testing.assert_allclose(np.sum(found.b**2, axis=0), found.sigma, rtol=1e-5)
    assert (np.diff(found.sigma) <= 0).all()
    other = truncate(-delta, found.a.shape[0])  # the sign goes to the side that carries no rule
    np.testing.assert_allclose(other.b @ other.a, -(found.b @ found.a), atol=1e-5)


def test_sigma_are_the_singular_values(rng: np.random.Generator) -> None:
    wanted = SPECTRA["gapped"][:24]
    found = truncate(planted(rng, (500, N), SPECTRA["gapped"]).astype(np.float32), 24)
    np.testing.assert_allclose(found.sigma, wanted, rtol=1e-5)


def test_equal_seeds_give_equal_bytes(rng: np.random.Generator) -> None:
    delta = planted(rng, (500, N), SPECTRA["power-law"]).astype(np.float32)
    first, second = truncate(delta, 16, seed=3), truncate(delta, 16, seed=3)
    assert first.a.tobytes() == second.a.tobytes()
    assert first.b.tobytes() == second.b.tobytes()


def test_a_bad_start_is_not_certified(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that misses the strongest direction altogether: the probe, which has its own, finds it."""
    left, right = np.linalg.qr(rng.standard_normal((500, N)))[0], np.linalg.qr(rng.standard_normal((N, N)))[0]
    delta = ((left * SPECTRA["geometric"]) @ right.T).astype(np.float32)
    usual = np.random.Generator.standard_normal

    class Blind:
        """A generator whose first draw has no share of the first direction."""

        def __init__(self, seed: int) -> None:
            self.inner, self.draws = np.random.Generator(np.random.PCG64(seed)), 0

        def standard_normal(self, shape: tuple[int, int], dtype: type = np.float64) -> NDArray[np.float32]:
            block = usual(self.inner, shape)
            self.draws += 1
            if self.draws == 1:
                block -= np.outer(right[:, 0], right[:, 0] @ block)
            return block.astype(np.float32)

    monkeypatch.setattr(truncation.np.random, "default_rng", Blind)
    _check(delta, 16, truncate(delta, 16))


def test_the_probe_finds_what_the_block_has_missed(rng: np.random.Generator) -> None:
    """The excess is None as long as a direction as strong as the kept ones is outside."""
    sigma = np.r_[1.0, np.full(N - 1, 0.01)]
    delta = planted(rng, (400, N), sigma).astype(np.float32)
    operand = truncation._Operand(delta, "cpu")
    u, _, v = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    keep = np.arange(1, 31)  # all but the first
    left, right = u[:, keep].astype(np.float32), np.ascontiguousarray(v[keep].T).astype(np.float32)
    assert truncation._probe(operand, left, right, rng, lambda mu: mu, 0.5) is None
    whole = np.arange(30)
    left, right = u[:, whole].astype(np.float32), np.ascontiguousarray(v[whole].T).astype(np.float32)
    found = truncation._probe(operand, left, right, rng, lambda mu: mu, 0.5)
    assert found is not None
    assert found >= 1e-4 * (1 - 1e-3)  # an upper bound on the largest of the rest, 0.01^2


def test_ritz_error_bounds_what_block_krylov_misses(rng: np.random.Generator) -> None:
    """Over many matrices and starts, the stated error is never exceeded: its chance is 1e-9."""
    size = 300
    for values in (np.linspace(0, 1, size), np.r_[np.full(size - 1, 0.9), 1.0], np.arange(1.0, size + 1) ** -0.5):
        for _ in range(5):
            basis = np.linalg.qr(rng.standard_normal((size, PROBES)))[0]
            span = basis
            for steps in range(1, 9):
                top = float(np.linalg.eigvalsh((span * values[:, None]).T @ span)[-1])
                assert values.max() * (1 - ritz_error(size, steps)) <= top * (1 + 1e-9)
                span = np.linalg.qr(np.concatenate([span, values[:, None] * span[:, -PROBES:]], axis=1))[0]


def test_the_constant_is_the_quantile() -> None:
    special = pytest.importorskip("scipy.special")
    quantile = 2 * special.gammaincinv(PROBES / 2, CHANCE)
    assert 0.9 * quantile < START_SHARE <= quantile


def test_residual_counts_the_cast(rng: np.random.Generator) -> None:
    delta = planted(rng, (80, 60), [3.0, 2.0, 1.0]).astype(np.float32)
    found = truncate(delta, 3)
    a, b = found.a.astype(ml_dtypes.bfloat16), (found.b / 4).astype(ml_dtypes.bfloat16)
    wanted = np.linalg.norm(delta - 4.0 * b.astype(np.float64) @ a.astype(np.float64)) ** 2
    assert residual_energy(delta, a, b, 4.0) == pytest.approx(float(wanted), rel=1e-4)
    assert wanted > 100 * found.residual
