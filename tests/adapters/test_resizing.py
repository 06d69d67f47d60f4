"""Cutting a product of factors: optimal, without the product; and the errors that are stated are the errors."""

import numpy as np
import pytest

from rankwise.adapters.resizing import decompose, distance, norm_of, pad

SHAPES = [(40, 30, 8), (30, 40, 8), (12, 200, 16), (5, 7, 12), (64, 3, 8), (1, 9, 1)]


def planted(rng, out, inner, sigma):
    """Factors of a product with these singular values, hidden in a badly conditioned mix."""
    r = len(sigma)
    u = np.linalg.qr(rng.standard_normal((out, r)))[0]
    v = np.linalg.qr(rng.standard_normal((inner, r)))[0]
    mix = rng.standard_normal((r, r)) + 3 * np.eye(r)
    return np.linalg.solve(mix, (v * sigma).T), u @ mix


@pytest.mark.parametrize("shape", SHAPES)
def test_the_core_has_the_singular_values_of_the_product(rng, shape) -> None:
    out, inner, r = shape
    a, b = rng.standard_normal((r, inner)), rng.standard_normal((out, r))
    dense = np.linalg.svd(b @ a, compute_uv=False)
    sigma = decompose(a, b).sigma
    assert sigma == pytest.approx(dense[: len(sigma)], rel=1e-12, abs=1e-13)  # two float64 SVDs
    assert dense[len(sigma) :] == pytest.approx(0, abs=1e-12)


def test_planted_values_come_back(rng) -> None:
    sigma = 0.5 ** np.arange(10)
    a, b = planted(rng, 50, 70, sigma)
    assert decompose(a, b).sigma == pytest.approx(sigma, rel=1e-11)  # the mix has a condition of about 10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_is_the_truncated_svd_of_the_product(rng, shape, dtype) -> None:
    out, inner, r = shape
    a, b = rng.standard_normal((r, inner)).astype(dtype), rng.standard_normal((out, r)).astype(dtype)
    product = b.astype(np.float64) @ a.astype(np.float64)
    dense = np.linalg.svd(product, compute_uv=False)
    core = decompose(a, b)
    for rank in {1, r // 2 or 1, r}:
        cut_a, cut_b = core.cut(rank)
        assert (cut_a.shape, cut_b.shape) == ((rank, inner), (out, rank))
        left = np.linalg.norm(product - cut_b @ cut_a)
        best = np.linalg.norm(dense[rank:])
        whole = np.linalg.norm(dense)
        assert left <= best + 1e-12 * whole  # the optimum, to rounding in float64
        assert core.error(rank) == pytest.approx(best / whole, rel=1e-9, abs=1e-13)
        assert core.share(rank) == pytest.approx(np.sum(dense[:rank] ** 2) / whole**2, rel=1e-12)


def test_factors_are_balanced(rng) -> None:
    a, b = decompose(1000 * rng.standard_normal((8, 40)), rng.standard_normal((30, 8)) / 1000).cut(5)
    assert a @ a.T == pytest.approx(b.T @ b, abs=1e-9)


def test_a_product_of_zero_has_no_error_to_speak_of(rng) -> None:
    core = decompose(rng.standard_normal((4, 9)), np.zeros((6, 4)))
    assert core.error(2) == 0
    assert core.share(2) == 1
    assert not core.cut(2)[1].any()


def test_filling_up_changes_no_bit_of_the_product(rng) -> None:
    a, b = rng.standard_normal((3, 9)).astype(np.float32), rng.standard_normal((6, 3)).astype(np.float32)
    wide_a, wide_b = pad(a, b, 8)
    assert (wide_a.shape, wide_b.shape, wide_a.dtype) == ((8, 9), (6, 8), np.float32)
    assert np.array_equal(wide_a[:3], a)
    assert np.array_equal(wide_b[:, :3], b)
    assert not wide_a[3:].any()
    assert not wide_b[:, 3:].any()
    assert pad(a, b, 2)[0] is a


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_and_distances_are_those_of_the_products(rng, shape) -> None:
    out, inner, r = shape
    a, b = rng.standard_normal((r, inner)), rng.standard_normal((out, r))
    a2, b2 = rng.standard_normal((r + 1, inner)), rng.standard_normal((out, r + 1))
    assert norm_of(a, b) == pytest.approx(np.linalg.norm(b @ a), rel=1e-12)
    wanted = np.linalg.norm(0.5 * b @ a + 3 * b2 @ a2)
    assert distance((a, b, 0.5), (a2, b2, -3.0)) == pytest.approx(wanted, rel=1e-12)


def test_a_product_that_cancels_keeps_its_norm(rng) -> None:
    """B = [u, u + 1e-9 w], A = [v; -v]: the Gram matrices alone would lose it."""
    u, w, v = rng.standard_normal((3, 20))
    b, a = np.stack([u, u + 1e-9 * w], axis=1), np.stack([v, -v])
    # absolute accuracy is 1e-16 of norm(B) norm(A), which is 1e-7 of this product
    assert norm_of(a, b) == pytest.approx(1e-9 * np.linalg.norm(w) * np.linalg.norm(v), rel=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12])
def test_small_changes_are_measured_not_lost(rng, size) -> None:
    a, b = rng.standard_normal((6, 50)), rng.standard_normal((40, 6))
    change = size * rng.standard_normal(b.shape)
    wanted = np.linalg.norm(change @ a)
    assert distance((a, b, 2.0), (a, b + change, 2.0)) == pytest.approx(2 * wanted, rel=1e-3)
