"""The table of scaling rules: every rule passes the same properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import ScalingError
from rankwise.scaling import SCALINGS, alpha_for, scaling

RULES = sorted(SCALINGS)

alphas = st.floats(min_value=1e-6, max_value=1e6)
ranks = st.integers(min_value=1, max_value=1 << 20)

BAD_NUMBERS = [0, 0.0, -1.0, math.nan, math.inf, -math.inf, True, "16", None, 10**400]


def test_the_table_has_the_rules_of_the_contract() -> None:
    assert RULES == ["lora", "rslora", "unscaled"]


@pytest.mark.parametrize("rule", RULES)
@given(alpha=alphas, r=ranks)
def test_every_rule_is_finite_and_positive(rule: str, alpha: float, r: int) -> None:
    factor = scaling(rule, alpha, r)
    assert isinstance(factor, float)
    assert math.isfinite(factor)
    assert factor > 0


@pytest.mark.parametrize("rule", RULES)
@given(alpha=alphas)
def test_every_rule_gives_alpha_at_rank_one(rule: str, alpha: float) -> None:
    assert scaling(rule, alpha, 1) == alpha


@pytest.mark.parametrize("rule", RULES)
@given(alpha=alphas, r=ranks)
def test_alpha_comes_back_from_its_scaling(rule: str, alpha: float, r: int) -> None:
    # three roundings of half a unit each: 4 * 2**-53 bounds them
    assert alpha_for(rule, scaling(rule, alpha, r), r) == pytest.approx(alpha, rel=4 * 2**-53, abs=0)


@pytest.mark.parametrize("rule", RULES)
@given(alpha=alphas, r=ranks)
def test_every_rule_is_linear_in_alpha(rule: str, alpha: float, r: int) -> None:
    assert scaling(rule, 2 * alpha, r) == 2 * scaling(rule, alpha, r)  # doubling is exact in floats


@pytest.mark.parametrize(("rule", "exponent"), [("lora", -1.0), ("rslora", -0.5), ("unscaled", 0.0)])
def test_each_rule_has_its_power_of_the_rank(rule: str, exponent: float) -> None:
    """From r = 4 to r = 1024 every factor is a power of two: the ratio is exact."""
    assert scaling(rule, 3.0, 1024) / scaling(rule, 3.0, 4) == 256.0**exponent


def test_from_rank_1_to_64_lora_falls_to_a_quarter_and_rslora_to_two() -> None:
    assert [scaling("lora", 16, r) for r in (1, 64)] == [16.0, 0.25]
    assert [scaling("rslora", 16, r) for r in (1, 64)] == [16.0, 2.0]
    assert [scaling("unscaled", 16, r) for r in (1, 64)] == [16.0, 16.0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", BAD_NUMBERS, ids=repr)
def test_bad_alphas_are_refused(rule: str, alpha: float) -> None:
    with pytest.raises(ScalingError, match=r"^lora_alpha must be a finite number above 0, got "):
        scaling(rule, alpha, 4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wanted", BAD_NUMBERS, ids=repr)
def test_bad_scalings_have_no_alpha(rule: str, wanted: float) -> None:
    with pytest.raises(ScalingError, match=r"^a scaling must be a finite number above 0, got "):
        alpha_for(rule, wanted, 4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("r", [0, -1, True, False, 4.0, math.nan, "4", None], ids=repr)
def test_bad_ranks_are_refused(rule: str, r: int) -> None:
    with pytest.raises(ScalingError, match=r"^the rank must be an integer of 1 or more, got "):
        scaling(rule, 16.0, r)
    with pytest.raises(ScalingError, match=r"^the rank must be an integer of 1 or more, got "):
        alpha_for(rule, 2.0, r)


@pytest.mark.parametrize("rule", ["LoRA", "", "none", ["lora"], None], ids=repr)
def test_unknown_rules_are_refused_with_the_known_ones(rule: str) -> None:
    with pytest.raises(ScalingError, match=r"unknown scaling rule .*: lora, rslora, unscaled$"):
        scaling(rule, 16.0, 4)


def test_numpy_integers_are_ranks() -> None:
    """`for r in 2 ** np.arange(7)` is how people loop over ranks."""
    assert [scaling("lora", 16, r) for r in 2 ** np.arange(7)] == [16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25]


def test_a_factor_that_is_no_float_is_refused() -> None:
    with pytest.raises(ScalingError, match="no float above 0"):
        scaling("lora", 5e-324, 4)  # the smallest float, divided
    with pytest.raises(ScalingError, match="no float above 0"):
        scaling("rslora", 1.0, 10**400)  # a rank past the largest float
    with pytest.raises(ScalingError, match="lora_alpha of a scaling must be a finite number"):
        alpha_for("lora", 1e308, 64)
