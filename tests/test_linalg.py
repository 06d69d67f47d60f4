"""Singular values against numpy's dense float64 SVD, at the accuracy of the public contract."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from planting import planted, planted_factors
from rankwise import linalg
from rankwise.errors import DeviceError, MissingDependencyError
from rankwise.linalg import energy_of, factored_values, leading_values, matrix_values

Array = NDArray[np.floating]

SHAPES = [(40, 12), (12, 40), (16, 16), (1, 9), (9, 1), (1, 1)]
TALL_OR_WIDE = [(200, 64), (64, 200), (128, 128)]


def oracle(matrix: Array) -> Array:
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


def assert_contract(found: Array, wanted: Array) -> None:
    """1e-4 relative above 1e-3 of the largest: the public contract, and nothing looser."""
    assert found.dtype == np.float64
    assert np.all(np.diff(found) <= 0)
    matters = wanted > 1e-3 * wanted[0]
    np.testing.assert_allclose(found[matters], wanted[matters], rtol=1e-4, atol=0)


# --- energy -------------------------------------------------------------------------------------------------


def test_energy_is_summed_in_float64() -> None:
    """12 million float32 entries of 1.1: a running float32 sum stops growing far too early."""
    matrix = np.full((3000, 4000), 1.1, dtype=np.float32)
    wanted = 12_000_000 * float(np.float32(1.1)) ** 2
    # the running sum in float32 is what a naive loop, or one accumulator of a GPU kernel, would give
    running = np.cumsum(np.square(matrix).ravel(), dtype=np.float32)[-1]
    assert abs(running / wanted - 1) > 1e-3, "the case must show the difference"
    # equal terms may all round one way: 2**21 of them in a block, half a unit each, is 2.3e-10
    assert energy_of(matrix) == pytest.approx(wanted, rel=3e-10)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_energy_is_that_of_the_stored_numbers(rng: np.random.Generator, shape: tuple[int, int], dtype: type) -> None:
    matrix = rng.standard_normal(shape).astype(dtype)
    wanted = sum(float(v) ** 2 for v in matrix.ravel())
    assert energy_of(matrix) == pytest.approx(wanted, rel=1e-13)
    assert energy_of(matrix.T) == pytest.approx(wanted, rel=1e-13)


def test_energy_of_float16_does_not_overflow_in_float16() -> None:
    assert energy_of(np.full((4, 4), 60000, dtype=np.float16)) == 16 * float(np.float16(60000)) ** 2


def test_energy_goes_over_blocks_without_losing_rows(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((37, 11))
    monkeypatch.setattr(linalg, "BLOCK_ENTRIES", 50)  # four rows a block, and a last one of one
    assert len(list(linalg.row_blocks(matrix.shape, linalg.BLOCK_ENTRIES))) == 10
    assert energy_of(matrix) == pytest.approx(float(np.sum(matrix**2)), rel=1e-13)


# --- factors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 2, 8, 60])  # 60 is above every dimension
@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
def test_factors_have_the_values_of_their_product(
    rng: np.random.Generator, shape: tuple[int, int], r: int, scaling: float
) -> None:
    a, b = rng.standard_normal((r, shape[1])), rng.standard_normal((shape[0], r))
    found = factored_values(a, b, scaling)
    wanted = oracle(scaling * b @ a)
    assert found.complete
    assert found.sigma.shape == (min(r, *shape),)
    # both routes are backward stable: 1e-13 of the largest value is a hundred roundings
    np.testing.assert_allclose(found.sigma, wanted[: min(r, *shape)], atol=1e-13 * wanted[0])
    assert found.energy == pytest.approx(float(np.sum(wanted**2)), rel=1e-12)


@pytest.mark.parametrize("shape", [(64, 24), (24, 64)])
def test_planted_factors_come_back(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    sigma = [7.0, 3.0, 1.0, 1e-3]
    a, b = planted_factors(rng, shape, sigma, scaling=0.5)
    found = factored_values(a, b, 0.5)
    # the mixing matrix of the planting has a condition number of some tens
    np.testing.assert_allclose(found.sigma, sigma, atol=1e-13 * 7 * 100)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_factors_of_short_dtypes_are_taken_as_stored(rng: np.random.Generator, dtype: type) -> None:
    a = rng.standard_normal((4, 30)).astype(dtype).astype(np.float32)
    b = rng.standard_normal((20, 4)).astype(dtype).astype(np.float32)
    found = factored_values(a, b, 2.0)
    wanted = oracle(2.0 * b.astype(np.float64) @ a.astype(np.float64))[:4]
    np.testing.assert_allclose(found.sigma, wanted, rtol=1e-12)  # float64 from here on, not float32's 1e-6


def test_a_zero_b_gives_zeros_and_not_noise(rng: np.random.Generator) -> None:
    found = factored_values(rng.standard_normal((4, 9)), np.zeros((7, 4)), 2.0)
    assert found.sigma.tolist() == [0.0] * 4
    assert found.energy == 0.0
    assert found.complete


@pytest.mark.parametrize("size", [1e-18, 1e18, 1e37])
def test_factors_of_any_float32_magnitude_keep_their_digits(rng: np.random.Generator, size: float) -> None:
    a = (rng.random((3, 10)) * size).astype(np.float32)
    b = (rng.random((8, 3)) * size).astype(np.float32)
    wanted = oracle((b.astype(np.float64) / size) @ (a.astype(np.float64) / size))[:3]
    np.testing.assert_allclose(factored_values(a, b, 1.0).sigma / size / size, wanted, atol=1e-13 * wanted[0])


def test_float64_factors_that_overflow_say_so() -> None:
    """An infinite energy and no values: the caller reports it; numbers would be made up."""
    found = factored_values(np.full((2, 4), 1e200), np.full((3, 2), 1e200), 1.0)
    assert found.sigma.size == 0
    assert not np.isfinite(found.energy)
    assert not found.complete


# --- whole matrices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, *TALL_OR_WIDE, (200, 1500)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_matrices_keep_the_contract(rng: np.random.Generator, shape: tuple[int, int], dtype: type) -> None:
    matrix = rng.standard_normal(shape).astype(dtype)
    found = matrix_values(matrix)
    assert found.complete
    assert found.sigma.shape == (min(shape),)
    assert_contract(found.sigma, oracle(matrix))
    assert found.energy == pytest.approx(float(np.sum(matrix.astype(np.float64) ** 2)), rel=1e-6)


@pytest.mark.parametrize("shape", [*TALL_OR_WIDE, (800, 780)])
def test_values_down_to_a_thousandth_are_better_than_float32_would_allow(
    rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    """Planted over four decades; the squares span eight, which a float32 Gram matrix would lose."""
    sigma = np.geomspace(1, 1e-4, min(shape))
    matrix = planted(rng, shape, sigma)
    found = matrix_values(matrix).sigma
    matters = sigma > 1e-3
    # 1e-15 sigma_1^2 / sigma^2 is the bound of the Gram route: 1e-9 at a thousandth, times the size
    np.testing.assert_allclose(found[matters], sigma[matters], rtol=1e-7)


def test_the_large_and_the_small_route_agree(rng: np.random.Generator) -> None:
    """A zero column more must add a zero value and change no other, whichever route each size takes."""
    matrix = rng.standard_normal((800, 767)).astype(np.float32)
    wider = np.hstack([matrix, np.zeros((800, 1), dtype=np.float32)])
    small, large = matrix_values(matrix).sigma, matrix_values(wider).sigma
    np.testing.assert_allclose(large[:-1], small, rtol=1e-9)  # both float64 on the squares
    assert large[-1] <= 1e-7 * large[0], "below 1e-7 of the largest all is rounding"


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_magnitude_does_not_matter(rng: np.random.Generator, size: float) -> None:
    base = rng.standard_normal((60, 40))
    matrix = (base * size).astype(np.float32)
    assert_contract(matrix_values(matrix).sigma / size, oracle(matrix.astype(np.float64) / size))


def test_degenerate_matrices() -> None:
    assert matrix_values(np.zeros((5, 3), dtype=np.float32)).sigma.tolist() == [0.0] * 3
    # one direction: the others are zero up to 1e-7 of it, the root of the rounding of its square
    found = matrix_values(np.ones((50, 20), dtype=np.float32)).sigma
    assert found[0] == pytest.approx(np.sqrt(1000), rel=1e-12)
    assert np.all(found[1:] <= 1e-7 * found[0])
    np.testing.assert_allclose(matrix_values(3 * np.eye(30, dtype=np.float32)).sigma, 3.0, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), seed=st.integers(0, 99))
def test_any_shape_keeps_the_contract(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    found = matrix_values(matrix)
    assert_contract(found.sigma, oracle(matrix))
    assert float(np.sum(found.sigma**2)) == pytest.approx(found.energy, rel=1e-12)


def test_matrices_are_left_alone(rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((200, 100)).astype(np.float32)
    before = matrix.copy()
    matrix_values(matrix)
    leading_values(matrix, 4)
    energy_of(matrix)
    np.testing.assert_array_equal(matrix, before)


# --- leading values -----------------------------------------------------------------------------------------

N = 320
TAIL = np.full(N - 16, 1e-3)
LEADING = {
    "geometric": 0.9 ** np.arange(N),
    "slow power": 1.0 / np.sqrt(np.arange(1, N + 1)),
    "flat": np.ones(N),
    "nearly flat": np.linspace(1, 0.9, N),
    "cluster at the cut": np.concatenate([np.full(24, 1.0), np.full(N - 24, 0.2)]),
    "pairs": np.repeat(0.8 ** np.arange(N // 2), 2),
    "sixteen over a floor": np.concatenate([np.geomspace(1, 1e-2, 16), TAIL]),
    "rank 4": np.concatenate([[4.0, 3.0, 2.0, 1.0], np.zeros(N - 4)]),
    "one": np.concatenate([[1.0], np.full(N - 1, 1e-6)]),
}


@pytest.mark.parametrize("name", sorted(LEADING))
@pytest.mark.parametrize("shape", [(N, N), (500, N), (N, 500)])
def test_leading_values_keep_the_contract(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> None:
    """Whichever route was taken: randomised where it converges, exact where it does not (flat spectra)."""
    matrix = planted(rng, shape, LEADING[name]).astype(np.float32)
    wanted = oracle(matrix)
    found = leading_values(matrix, 16, seed=1)
    assert found.sigma.shape == (16,)
    assert_contract(found.sigma, wanted[:16])
    assert found.energy == pytest.approx(float(np.sum(wanted**2)), rel=1e-6), "of the whole, not of the sixteen"
    assert not found.complete


def test_both_routes_are_taken_above(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    exact: list[int] = []
    real = linalg.matrix_values
    monkeypatch.setattr(linalg, "matrix_values", lambda m, **o: exact.append(1) or real(m, **o))
    leading_values(planted(rng, (N, N), LEADING["geometric"]).astype(np.float32), 16)
    assert not exact, "a falling spectrum must not need the exact route"
    # not the perfectly flat one, of which every subspace is as good as another
    leading_values(planted(rng, (N, N), LEADING["nearly flat"]).astype(np.float32), 16)
    assert exact, "one without gaps must"


def test_leading_values_at_the_edges(rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((300, 200)).astype(np.float32)
    wanted = oracle(matrix)
    for count in (1, 17, 199):
        found = leading_values(matrix, count)
        assert found.sigma.shape == (count,)
        assert not found.complete
        assert_contract(found.sigma, wanted[:count])
    for count in (200, 10**9):
        found = leading_values(matrix, count)
        assert found.sigma.shape == (200,)
        assert found.complete


def test_equal_seeds_give_equal_values(rng: np.random.Generator) -> None:
    matrix = planted(rng, (N, N), LEADING["geometric"]).astype(np.float32)
    first, again = leading_values(matrix, 8, seed=5), leading_values(matrix, 8, seed=5)
    np.testing.assert_array_equal(first.sigma, again.sigma)


def test_leading_values_of_a_zero_matrix_are_zero() -> None:
    assert leading_values(np.zeros((N, N), dtype=np.float32), 4).sigma.tolist() == [0.0] * 4


# --- devices ------------------------------------------------------------------------------------------------


def test_a_device_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"device 'cuda' needs torch.*pip install 'rankwise\[train\]'"):
        matrix_values(np.eye(3, dtype=np.float32), device="cuda")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(DeviceError, match="is not there"):
        linalg.torch_device(device)


def test_torch_is_asked_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch on a machine without a GPU: no library needed to see the refusal."""

    class FakeCuda:
        is_available = staticmethod(lambda: False)
        device_count = staticmethod(lambda: 0)

    class FakeDevice:
        def __init__(self, name: str) -> None:
            if not name.startswith(("cpu", "cuda")):
                raise RuntimeError("Invalid device string")
            self.type, self.index = name.split(":")[0], None

    fake = type(sys)("torch")
    fake.cuda, fake.device = FakeCuda, FakeDevice  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", fake)
    for device in ("cuda", "cuda:0", "tpu"):
        with pytest.raises(DeviceError, match=f"device '{device}' is not there"):
            leading_values(np.eye(3, dtype=np.float32), 2, device=device)
