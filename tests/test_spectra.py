"""From factors and deltas to entries of a record: what was planted must come back."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from planting import planted, planted_factors
from rankwise.checkpoints.model import LoraModule
from rankwise.deltas import Delta
from rankwise.records import ModuleSpectrum
from rankwise.spectra import Options, adapter_spectrum, delta_spectrum

Array = NDArray[Any]
BF16 = ml_dtypes.bfloat16
SIGMA = (8.0, 4.0, 2.0, 1.0)  # squares 64, 16, 4, 1: together 85


def lora_module(a: Array, b: Array, **changed: Any) -> LoraModule:
    fields: dict[str, Any] = {
        "module": "layers.0.q_proj",
        "shape": (b.shape[0], a.shape[1]),
        "kind": "linear",
        "r": a.shape[0],
        "lora_alpha": 8.0,
        "scaling": 2.0,
        "rule": "lora",
        "dtype": "F32",
    }
    return LoraModule(**(fields | changed))


def as_delta(base: Array, tuned: Array, *, unchanged: bool = False) -> Delta:
    return Delta("layers.0.q_proj", base, tuned, unchanged)


def nulls_of(entry: ModuleSpectrum) -> list[str]:
    return [name for name in entry.__struct_fields__ if getattr(entry, name) is None]


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_a_planted_adapter_comes_back(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    a, b = (f.astype(np.float32) for f in planted_factors(rng, shape, SIGMA, scaling=2.0))
    entry = adapter_spectrum(lora_module(a, b), a, b, None)
    # the factors were rounded to float32 once: 6e-8 of their size, tens of times that for the mixing
    assert entry.singular_values == pytest.approx(SIGMA, rel=1e-5)
    assert entry.energy == pytest.approx(85, rel=1e-5)
    assert (entry.rank_90, entry.rank_99) == (2, 4)  # 80 / 85 = 94 %, 84 / 85 = 98.8 %
    assert entry.stable_rank == pytest.approx(85 / 64, rel=1e-5)
    p = np.array([64, 16, 4, 1]) / 85
    assert entry.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert (entry.module, entry.shape, entry.r, entry.dtype) == ("layers.0.q_proj", shape, 4, "F32")
    assert (entry.lora_alpha, entry.scaling, entry.rule, entry.warnings) == (8.0, 2.0, "lora", ())
    assert entry.complete
    assert nulls_of(entry) == ["relative_norm", "unchanged_share", "noise_edge", "signal_rank"]


def test_the_product_is_scaled_and_the_base_norm_divides(rng: np.random.Generator) -> None:
    a, b = planted_factors(rng, (12, 9), SIGMA)
    once = adapter_spectrum(lora_module(a, b, scaling=1.0), a, b, 100.0)
    thrice = adapter_spectrum(lora_module(a, b, scaling=3.0), a, b, 100.0)
    assert once.singular_values == pytest.approx(SIGMA, rel=1e-12)
    assert thrice.singular_values == pytest.approx([3 * v for v in SIGMA], rel=1e-12)
    assert thrice.energy == pytest.approx(9 * 85, rel=1e-12)
    assert once.relative_norm == pytest.approx(math.sqrt(85) / 100, rel=1e-12)
    assert thrice.effective_rank == pytest.approx(once.effective_rank, rel=1e-12)


@pytest.mark.parametrize("norm", [None, 0.0])
def test_without_a_base_norm_there_is_no_relative_norm(rng: np.random.Generator, norm: float | None) -> None:
    a, b = planted_factors(rng, (12, 9), SIGMA)
    assert adapter_spectrum(lora_module(a, b), a, b, norm).relative_norm is None


def test_an_unknown_scaling_gives_the_values_of_the_bare_product(rng: np.random.Generator) -> None:
    a, b = planted_factors(rng, (12, 9), SIGMA)
    module = lora_module(a, b, scaling=None, rule=None, lora_alpha=None, warnings=("unknown-scaling",))
    entry = adapter_spectrum(module, a, b, None)
    assert entry.singular_values == pytest.approx(SIGMA, rel=1e-12)
    assert (entry.scaling, entry.rule, entry.lora_alpha) == (None, None, None)
    assert entry.warnings == ("unknown-scaling",), "the reader's warnings are kept"


def test_an_untrained_adapter_is_zero_and_said_so(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((4, 9)), np.zeros((12, 4))
    entry = adapter_spectrum(lora_module(a, b), a, b, 10.0)
    assert entry.singular_values == (0.0,) * 4
    assert (entry.energy, entry.rank_90, entry.rank_99, entry.relative_norm) == (0.0, 0, 0, 0.0)
    assert (entry.stable_rank, entry.effective_rank) == (None, None)
    assert entry.warnings == (), "the findings mark it, with the other modules in view"


@pytest.mark.parametrize("where", ["a", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_factors_that_are_not_finite_give_nulls(rng: np.random.Generator, where: str, value: float) -> None:
    a, b = planted_factors(rng, (12, 9), SIGMA)
    (a if where == "a" else b)[1, 1] = value
    entry = adapter_spectrum(lora_module(a, b), a, b, 10.0)
    assert_unknown(entry)
    assert (entry.r, entry.lora_alpha, entry.scaling) == (4, 8.0, 2.0), "what the header says stays known"


def test_float64_factors_that_overflow_give_nulls() -> None:
    a, b = np.full((2, 9), 1e200), np.full((12, 2), 1e200)
    assert_unknown(adapter_spectrum(lora_module(a, b), a, b, 10.0))


def assert_unknown(entry: ModuleSpectrum) -> None:
    assert entry.singular_values == ()
    assert entry.complete is False
    figures = ("energy", "stable_rank", "effective_rank", "rank_90", "rank_99", "relative_norm", "noise_edge")
    assert [getattr(entry, name) for name in figures] == [None] * len(figures)
    assert (entry.signal_rank, entry.rounding_limited) == (None, False)
    assert entry.warnings == ("not-finite",)


# --- deltas -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_a_planted_delta_comes_back(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    base = rng.standard_normal(shape)
    entry = delta_spectrum(as_delta(base, base + planted(rng, shape, SIGMA)), Options())
    # float64 in, one rounding of the difference to float32: 6e-8 an entry, so a norm of 6e-8 * 8
    assert entry.singular_values[:4] == pytest.approx(SIGMA, rel=1e-6)
    assert max(entry.singular_values[4:]) < 1e-5
    assert entry.energy == pytest.approx(85, rel=1e-6)
    assert (len(entry.singular_values), entry.complete) == (40, True)
    assert (entry.rank_90, entry.rank_99) == (2, 4)
    assert entry.relative_norm == pytest.approx(math.sqrt(85) / np.linalg.norm(base), rel=1e-6)
    assert (entry.shape, entry.dtype, entry.warnings) == (shape, "F64", ())
    assert (entry.r, entry.lora_alpha, entry.scaling, entry.rule) == (None, None, None, None)
    assert entry.signal_rank == 4
    assert 0.0 <= (entry.unchanged_share or 0.0) <= 0.01, "hardly an entry stays"


def test_the_energy_is_that_of_the_delta_and_not_of_the_values(rng: np.random.Generator) -> None:
    shape = (200, 180)
    sigma = 0.97 ** np.arange(180)
    base = rng.standard_normal(shape).astype(np.float32)
    tuned = (base + planted(rng, shape, sigma)).astype(np.float32)
    exact = np.linalg.svd(tuned.astype(np.float64) - base, compute_uv=False)
    few, every = (delta_spectrum(as_delta(base, tuned), Options(values=count)) for count in (8, None))
    assert (len(few.singular_values), few.complete) == (8, False)
    assert few.singular_values == pytest.approx(exact[:8], rel=1e-4)
    assert few.energy == pytest.approx(float((exact**2).sum()), rel=1e-6)
    assert few.energy == every.energy
    assert few.stable_rank == pytest.approx(every.stable_rank, rel=2e-4)  # sigma_1 squared
    assert (few.effective_rank, few.rank_90, few.rank_99) == (None, None, None), "8 values do not know them"
    assert every.rank_90 is not None
    assert every.rank_90 > 8


def test_the_signal_rank_is_unknown_where_the_values_end_before_the_signal(rng: np.random.Generator) -> None:
    shape = (300, 280)
    base = rng.standard_normal(shape)
    delta = as_delta(base, base + planted(rng, shape, [4.0, 3.5, 3.0, 2.5, 2.0, 1.5]))
    assert delta_spectrum(delta, Options(values=4)).signal_rank is None
    assert delta_spectrum(delta, Options(values=8)).signal_rank == 6


def test_few_values_know_what_they_hold(rng: np.random.Generator) -> None:
    shape = (200, 180)
    base = rng.standard_normal(shape)
    entry = delta_spectrum(as_delta(base, base + planted(rng, shape, SIGMA)), Options(values=8))
    assert (entry.rank_90, entry.rank_99, entry.effective_rank, entry.complete) == (2, 4, None, False)


def test_an_unchanged_module_is_zero_without_any_decomposition(rng: np.random.Generator) -> None:
    base = rng.standard_normal((6, 5)).astype(BF16)
    entry = delta_spectrum(as_delta(base, base.copy(), unchanged=True), Options(device="a device that is not there"))
    assert (entry.energy, entry.rank_90, entry.rank_99, entry.singular_values) == (0.0, 0, 0, ())
    assert (entry.relative_norm, entry.unchanged_share, entry.noise_edge, entry.signal_rank) == (
        0.0,
        1.0,
        0.0,
        0,
    )
    assert (entry.stable_rank, entry.effective_rank, entry.complete) == (None, None, True)
    assert (entry.warnings, entry.dtype, entry.rounding_limited) == ((), "BF16", False)


def test_an_unchanged_base_of_zeros_has_no_relative_norm() -> None:
    base = np.zeros((3, 3), np.float32)
    entry = delta_spectrum(as_delta(base, base, unchanged=True), Options())
    assert (entry.energy, entry.relative_norm) == (0.0, None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_same_nan_in_both_files_is_no_zero(value: float) -> None:
    base = np.full((3, 3), value, np.float32)
    entry = delta_spectrum(as_delta(base, base, unchanged=True), Options())
    assert (entry.energy, entry.relative_norm, entry.warnings) == (None, None, ("not-finite",))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["base", "tuned", "both"])
def test_deltas_that_are_not_finite_give_nulls(rng: np.random.Generator, value: float, side: str) -> None:
    base, tuned = (rng.standard_normal((6, 5)).astype(np.float32) for _ in range(2))
    for array in {"base": [base], "tuned": [tuned], "both": [base, tuned]}[side]:
        array[2, 3] = value
    entry = delta_spectrum(as_delta(base, tuned), Options())
    assert_unknown(entry)
    assert entry.unchanged_share is None


def test_float64_checkpoints_that_overflow_float32_give_nulls() -> None:
    base = np.zeros((4, 4))
    assert_unknown(delta_spectrum(as_delta(base, base + 1e300), Options()))


def test_a_base_of_zeros_has_no_relative_norm(rng: np.random.Generator) -> None:
    entry = delta_spectrum(as_delta(np.zeros((60, 40)), planted(rng, (60, 40), SIGMA)), Options())
    assert entry.relative_norm is None
    assert entry.energy == pytest.approx(85, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (np.float16, "F16"),
        (BF16, "BF16"),
        (np.float32, "F32"),
        (np.float64, "F64"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_dtypes_are_spelled_as_safetensors_does(rng: np.random.Generator, dtype: Any, word: str) -> None:
    base = rng.standard_normal((6, 5)).astype(dtype)
    assert delta_spectrum(as_delta(base, base, unchanged=True), Options()).dtype == word


def test_rounding_is_told_from_signal(rng: np.random.Generator) -> None:
    """A rank-4 update of 0.1 % in bfloat16: most of the difference is rounding, and it is said."""
    shape = (192, 160)
    base = rng.standard_normal(shape).astype(BF16)
    size = 0.001 * np.linalg.norm(base.astype(np.float64)) / 2
    tuned = (base.astype(np.float64) + planted(rng, shape, [size] * 4)).astype(BF16)
    entry = delta_spectrum(as_delta(base, tuned), Options())
    assert entry.rounding_limited
    assert entry.rank_90 is not None
    assert entry.rank_90 > 20, "the raw energy rank counts rounding"
    assert entry.signal_rank is not None
    assert entry.signal_rank <= 4, "never more directions than were planted"
    assert entry.noise_edge is not None
    assert entry.noise_edge > 0


def test_every_number_is_a_plain_python_number(rng: np.random.Generator) -> None:
    """numpy scalars would leak into JSON and into users' hands."""
    base = rng.standard_normal((60, 40)).astype(np.float32)
    tuned = base + planted(rng, (60, 40), SIGMA).astype(np.float32)
    a, b = planted_factors(rng, (12, 9), SIGMA)
    for entry in (
        delta_spectrum(as_delta(base, tuned), Options()),
        adapter_spectrum(lora_module(a, b), a, b, 2.0),
    ):
        for name in entry.__struct_fields__:
            value = getattr(entry, name)
            for item in value if isinstance(value, tuple) else (value,):
                assert type(item) in (str, int, float, bool, type(None)), name
