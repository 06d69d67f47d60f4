"""Band route against numpy's singular values in float64."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.linalg

from rankwise import bands

Array = Any


@pytest.fixture(params=["two-stage", "eigvalsh"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Force one route and check that it was the one taken."""
    two_stage = request.param == "two-stage"
    if two_stage and not bands.fast_route():
        pytest.skip("no LAPACK with dsytrd_sb2st here")
    monkeypatch.setattr(bands, "SMALLEST_TWO_STAGE", 0 if two_stage else 1 << 30)
    taken: list[str] = []
    slow, fast = scipy.linalg.eigvalsh, bands._two_stage_values
    monkeypatch.setattr(scipy.linalg, "eigvalsh", lambda *a, **k: (taken.append("eigvalsh"), slow(*a, **k))[1])
    monkeypatch.setattr(bands, "_two_stage_values", lambda *a: (taken.append("two-stage"), fast(*a))[1])
    yield request.param
    assert set(taken) == {request.param}


def check(matrix: Array) -> Array:
    """Hold the values to numpy's; return them.

    The Gram matrix and its eigenvalues are within n eps sigma_1^2, so a value is within
    n eps sigma_1^2 / (2 sigma): for n = 1600, 2e-7 relative at 1e-3 of the largest, 500 times below the
    contract's 1e-4, and sqrt(n eps) = 6e-7 sigma_1 for a value of zero.
    """
    found = bands.gram_or_band_values(matrix)
    wanted = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert found.dtype == np.float64
    assert found.shape == wanted.shape
    assert np.all(np.diff(found) <= 0)
    matters = wanted > 1e-3 * wanted[0]
    np.testing.assert_allclose(found[matters], wanted[matters], rtol=2e-7)
    np.testing.assert_allclose(found[~matters], wanted[~matters], rtol=0, atol=1e-6 * wanted[0])
    return found


def planted(rows: int, n: int, sigma: Array, *, seed: int = 0) -> Array:
    """Return a float64 matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, n)))[0]
    right = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (left * sigma) @ right.T


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 64), (257, 257), (400, 100), (129, 128), (1000, 320)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gaussian(route: str, shape: tuple[int, int], dtype: Any) -> None:
    check(np.random.default_rng(1).standard_normal(shape).astype(dtype))


@pytest.mark.parametrize("shape", [(1600, 1600), (2500, 833)])
def test_several_hundred_columns_and_a_ragged_last_panel(route: str, shape: tuple[int, int]) -> None:
    check(np.random.default_rng(2).standard_normal(shape).astype(np.float32))


def test_column_major_and_strided_views(route: str) -> None:
    stored = np.random.default_rng(3).standard_normal((300, 700)).astype(np.float32)
    np.testing.assert_array_equal(check(stored.T), check(np.asfortranarray(stored.T)))
    check(stored.T[::2, ::3])
    check(stored.T[:, ::-1])


@pytest.mark.parametrize("lowest", [1e-2, 1e-3, 1e-6])
def test_graded_spectrum(route: str, lowest: float) -> None:
    check(planted(500, 400, np.geomspace(1, lowest, 400)))


def test_half_of_the_values_at_a_thousandth(route: str) -> None:
    """A cluster is what float32 loses: noise of 1e-7 of the largest spreads it by 1e-4 of its own value."""
    sigma = np.repeat([1.0, 1.001e-3], 200)
    np.testing.assert_allclose(check(planted(400, 400, sigma)), sigma, rtol=2e-7)


def test_low_rank_and_noise(route: str) -> None:
    rng = np.random.default_rng(4)
    low = rng.standard_normal((600, 8)) @ rng.standard_normal((8, 400))
    check((low + 1e-2 * rng.standard_normal((600, 400))).astype(np.float32))


def test_rank_deficient_with_columns_of_zeros(route: str) -> None:
    """Panels of zeros have no reflectors: 12 values are left, and the others are rounding."""
    rng = np.random.default_rng(5)
    matrix = rng.standard_normal((300, 12)) @ rng.standard_normal((12, 260))
    matrix[:, 40:200] = 0.0
    found = check(matrix)
    assert found[11] > 0.1 * found[0]


def test_identity_is_exact(route: str) -> None:
    """Nothing is rounded: Gram matrix, panels and rotations of the identity are the identity."""
    np.testing.assert_array_equal(bands.gram_or_band_values(np.eye(200, dtype=np.float32)), np.ones(200))


@pytest.mark.parametrize("shape", [(0, 0), (4, 0), (1, 1), (300, 200)])
def test_zero_matrix(shape: tuple[int, int]) -> None:
    np.testing.assert_array_equal(bands.gram_or_band_values(np.zeros(shape, np.float32)), np.zeros(shape[1]))


@pytest.mark.parametrize(
    ("exponent", "dtype"), [(-100, np.float32), (100, np.float32), (-900, np.float64), (1000, np.float64)]
)
def test_a_power_of_two_changes_nothing_but_the_scale(route: str, exponent: int, dtype: Any) -> None:
    """2**-100 = 8e-31 squares to below float32's range, and 2**1000 to above float64's."""
    matrix = np.random.default_rng(6).standard_normal((200, 150)).astype(np.float32).astype(dtype)
    found = bands.gram_or_band_values(np.ldexp(matrix, exponent))
    np.testing.assert_array_equal(np.ldexp(found, -exponent), bands.gram_or_band_values(matrix))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale(route: str, scale: float) -> None:
    check((scale * np.random.default_rng(7).standard_normal((200, 150))).astype(np.float32))


def test_grid_of_bfloat16_differences(route: str) -> None:
    """Deltas of bfloat16 checkpoints are few steps of 2**-8 of the weight, and mostly zero."""
    rng = np.random.default_rng(8)
    check((np.round(rng.standard_normal((500, 300)) * 0.6) * 2.0**-12).astype(np.float32))


def test_the_input_is_left_alone(route: str) -> None:
    matrix = np.random.default_rng(9).standard_normal((200, 150)).astype(np.float32)
    before = matrix.copy()
    bands.gram_or_band_values(matrix)
    np.testing.assert_array_equal(matrix, before)


def test_routes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract leaves 1e-4; both are float64 on the same Gram matrix, 1e-9 at 1e-3 of the largest."""
    matrix = planted(700, 640, np.geomspace(1, 1.1e-3, 640)).astype(np.float32)
    found = []
    for smallest in (0, 1 << 30):
        monkeypatch.setattr(bands, "SMALLEST_TWO_STAGE", smallest)
        found.append(bands.gram_or_band_values(matrix))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-8)


@pytest.fixture
def unproven() -> Iterator[None]:
    """Forget what the process found out about its LAPACK, before and after."""
    for cache in (bands.fast_route, bands._lapack):
        cache.cache_clear()
    yield
    for cache in (bands.fast_route, bands._lapack):
        cache.cache_clear()


def check_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "SMALLEST_TWO_STAGE", 0)
    assert not bands.fast_route()
    check(np.random.default_rng(10).standard_normal((300, 250)).astype(np.float32))


def test_no_library(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "_libraries", lambda: iter(["/nonexistent/libopenblas.so"]))
    assert bands._lapack() is None
    check_fallback(monkeypatch)


def test_library_without_the_routine(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands.ctypes, "CDLL", lambda path: object())
    assert bands._lapack() is None
    check_fallback(monkeypatch)


@pytest.mark.parametrize("broken", ["dgemm", "dsymm", "dsyrk", "dsyr2k", "dgeqrt3", "dsytrd_sb2st"])
def test_a_routine_that_does_nothing_is_found_out(unproven: None, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    lapack = bands._lapack()
    if lapack is None:
        pytest.skip("no LAPACK with dsytrd_sb2st here")
    called: list[int] = []
    monkeypatch.setitem(lapack._routines, broken, lambda *a: called.append(len(a)))
    check_fallback(monkeypatch)
    assert called


def test_info_of_lapack_leads_to_the_other_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure after the proof, on one matrix: that matrix takes the other route."""
    lapack = bands._lapack()
    if lapack is None or not bands.fast_route():
        pytest.skip("no LAPACK with dsytrd_sb2st here")

    def fail(*arguments: Any) -> None:
        ctypes.cast(arguments[6], ctypes.POINTER(ctypes.c_int32))[0] = -4

    monkeypatch.setitem(lapack._routines, "dgeqrt3", fail)
    with pytest.raises(ArithmeticError, match="dgeqrt3 gave info -4"):
        lapack.call("dgeqrt3", 1, 1, np.zeros((1, 1)), 1, np.zeros((1, 1)), 1)
    monkeypatch.setattr(bands, "SMALLEST_TWO_STAGE", 0)
    check(np.random.default_rng(11).standard_normal((200, 150)))


def test_threads_are_given_back_and_matrices_may_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "SMALLEST_TWO_STAGE", 0)
    lapack = bands._lapack()
    if lapack is None or lapack._read_threads is None:
        pytest.skip("no OpenBLAS here")
    usual = lapack._read_threads()
    matrices = [np.random.default_rng(i).standard_normal((900, 800)) for i in range(3)]
    found: dict[int, Array] = {}
    workers = [
        threading.Thread(target=lambda i=i: found.update({i: bands.gram_or_band_values(matrices[i])})) for i in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert lapack._read_threads() == usual
    for i, matrix in enumerate(matrices):
        # n eps / 2 over the square of the smallest, 0.03 of the largest: 1e-10
        np.testing.assert_allclose(found[i], np.linalg.svd(matrix, compute_uv=False), rtol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_products(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Up to rounding: the order of sums changes, 2000 eps at the most, and 1e-11 is ten times that."""
    lapack = bands._lapack()
    if lapack is None:
        pytest.skip("no LAPACK with dsytrd_sb2st here")
    rng = np.random.default_rng(12)
    s, copy = np.asfortranarray(rng.standard_normal((640, 640))), np.asfortranarray(rng.standard_normal((640, 50)))
    v, w = (np.asfortranarray(rng.standard_normal((640, bands.BAND))) for _ in range(2))
    whole = np.tril(s) + np.tril(s, -1).T
    with lapack.team() as team:
        team = bands._Team(team.lapack, team.pool, count)
        np.testing.assert_allclose(team.symmetric_product(s, v), whole @ v, rtol=0, atol=1e-11)
        team.subtract_both(s, v, w)
        team.add_gram(s, copy)
    wanted = whole - v @ w.T - w @ v.T + copy @ copy.T
    np.testing.assert_allclose(np.tril(s), np.tril(wanted), rtol=0, atol=1e-11)
