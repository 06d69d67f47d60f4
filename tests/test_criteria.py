"""Ranks and shares of a spectrum: closed forms, and the same properties over the whole table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.criteria import (
    CRITERIA,
    Spectrum,
    effective_rank,
    energy_share,
    rank_for_energy,
    rank_for_relative_error,
    stable_rank,
)
from rankwise.errors import CriterionError

NAMES = sorted(CRITERIA)
PARAMETERS = {"energy": (0.01, 0.5, 0.9, 0.99, 1.0), "relative_error": (0.99, 0.5, 0.1, 0.01, 0.0)}
"""Criterion -> parameters from the least demanding to the most."""


def spectrum_of(values: list[float], *, energy: float | None = None, full: bool = True) -> Spectrum:
    total = math.fsum(v * v for v in values) if energy is None else energy
    return Spectrum("layers.0.q_proj", (max(1, len(values)), 4096), tuple(values), total, full)


spectra = st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=40).map(
    lambda values: spectrum_of(sorted(values, reverse=True))
)


def test_every_criterion_is_tested() -> None:
    assert sorted(PARAMETERS) == NAMES


@pytest.mark.parametrize(("fraction", "rank"), [(0.3, 1), (0.36, 1), (0.5, 2), (0.9, 6), (0.99, 11), (0.999, 16)])
def test_geometric_spectrum_has_a_closed_form(fraction: float, rank: int) -> None:
    """sigma_i = 0.8**i keeps 1 - 0.64**r of the energy: r = ceil(log(1 - fraction) / log(0.64))."""
    values = [0.8**i for i in range(200)]  # 0.64**200 = 1e-39: as good as endless
    assert math.ceil(round(math.log(1 - fraction) / math.log(0.64), 9)) == rank
    assert rank_for_energy(spectrum_of(values), fraction) == rank


@pytest.mark.parametrize(("error", "rank"), [(0.8, 1), (0.5, 4), (0.1, 11), (0.01, 21)])
def test_geometric_spectrum_has_a_closed_form_for_the_error(error: float, rank: int) -> None:
    """The error left by rank r is 0.8**r."""
    values = [0.8**i for i in range(200)]
    assert rank_for_relative_error(spectrum_of(values), error) == rank


def test_flat_spectrum_needs_its_share_of_the_directions() -> None:
    flat = spectrum_of([2.0] * 10)
    assert [rank_for_energy(flat, f) for f in (0.1, 0.11, 0.5, 0.95, 1.0)] == [1, 2, 5, 10, 10]
    assert effective_rank(flat) == pytest.approx(10, rel=1e-14)  # ten equal terms: a few roundings
    assert stable_rank(flat) == 10
    assert [energy_share(flat, r) for r in (0, 5, 10)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", [[0.0] * 8, []], ids=["zeros", "no values"])
def test_every_criterion_gives_rank_zero_to_a_zero_delta(name: str, values: list[float]) -> None:
    for parameter in PARAMETERS[name]:
        assert CRITERIA[name](spectrum_of(values), parameter) == 0


@pytest.mark.parametrize("name", NAMES)
@given(spectrum=spectra)
def test_every_criterion_is_monotone_and_within_the_shape(name: str, spectrum: Spectrum) -> None:
    ranks = [CRITERIA[name](spectrum, parameter) for parameter in PARAMETERS[name]]
    assert ranks == sorted(ranks)
    assert ranks[0] >= 1
    assert ranks[-1] <= min(spectrum.shape)


@pytest.mark.parametrize("name", NAMES)
@given(spectrum=spectra, power=st.integers(min_value=-40, max_value=40))
def test_every_criterion_ignores_the_scale(name: str, spectrum: Spectrum, power: int) -> None:
    """A power of two scales every float exactly, so even ties stay ties."""
    scaled = Spectrum(
        spectrum.module,
        spectrum.shape,
        tuple(v * 2.0**power for v in spectrum.singular_values),
        spectrum.total_energy * 4.0**power,
    )
    for parameter in PARAMETERS[name]:
        assert CRITERIA[name](scaled, parameter) == CRITERIA[name](spectrum, parameter)
    assert stable_rank(scaled) == stable_rank(spectrum)
    assert effective_rank(scaled) == effective_rank(spectrum)


@given(spectrum=spectra, fraction=st.floats(min_value=0.01, max_value=0.999))
def test_the_energy_rank_is_the_smallest_that_holds_the_share(spectrum: Spectrum, fraction: float) -> None:
    rank = rank_for_energy(spectrum, fraction)
    # the criterion itself allows 1e-12 for the rounding of the sum
    assert energy_share(spectrum, rank) >= fraction * (1 - 2e-12)  # type: ignore[operator]
    assert rank == 1 or energy_share(spectrum, rank - 1) < fraction * (1 + 2e-12)  # type: ignore[operator]


@given(spectrum=spectra)
def test_the_two_criteria_agree_where_the_error_is_that_of_the_energy(spectrum: Spectrum) -> None:
    assert rank_for_relative_error(spectrum, 0.5) == rank_for_energy(spectrum, 0.75)  # 1 - 0.5**2, exactly


def test_full_spectrum_reaches_everything_even_if_the_norm_was_rounded_up() -> None:
    assert rank_for_energy(Spectrum("planted", (2, 4), (1.0, 1.0), 2.0000002), fraction=1.0) == 2


def test_zeros_at_the_end_add_no_rank() -> None:
    assert rank_for_energy(Spectrum("planted", (4, 4), (1.0, 1.0, 0.0, 0.0), 2.0000002), fraction=1.0) == 2


def test_cut_off_spectrum_says_what_to_do() -> None:
    cut = Spectrum("layers.0.q_proj", (4096, 4096), (3.0, 1.0), total_energy=20.0, is_full=False)
    assert rank_for_energy(cut, 0.45) == 1
    assert rank_for_energy(cut, 0.5) == 2
    words = r"layers\.0\.q_proj: the 2 .* hold 50\.0% .* short of 90\.0%.*--values"
    with pytest.raises(CriterionError, match=words):
        rank_for_energy(cut, 0.9)
    with pytest.raises(CriterionError, match=r"short of 99\.0%.*--values"):
        rank_for_relative_error(cut, 0.1)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.0000001, math.nan, math.inf])
def test_shares_outside_their_range_are_refused(fraction: float) -> None:
    with pytest.raises(CriterionError, match=r"energy fraction must be in \(0, 1\]"):
        rank_for_energy(spectrum_of([1.0]), fraction)


@pytest.mark.parametrize("error", [1, -0.1, math.nan, math.inf])
def test_errors_outside_their_range_are_refused(error: float) -> None:
    with pytest.raises(CriterionError, match=r"relative error must be in \[0, 1\)"):
        rank_for_relative_error(spectrum_of([1.0]), error)


@pytest.mark.parametrize(
    ("values", "energy", "words"),
    [
        ((1.0, 2.0), 5.0, "not sorted"),
        ((2.0, math.nan, 1.0), 5.0, "negative or not finite"),
        ((math.inf, 1.0), 5.0, "negative or not finite"),
        ((1.0, -0.5), 1.25, "negative or not finite"),
        ((1.0,), math.nan, "energy must be finite"),
        ((1.0,), math.inf, "energy must be finite"),
        ((1.0,), -1.0, "energy must be finite"),
    ],
)
def test_what_is_no_spectrum_is_refused_at_the_door(values: tuple[float, ...], energy: float, words: str) -> None:
    with pytest.raises(CriterionError, match=rf"^layers\.0\.q_proj: .*{words}"):
        Spectrum("layers.0.q_proj", (8, 8), values, energy)


@given(spectrum=spectra)
def test_effective_rank_is_the_exponential_of_the_entropy(spectrum: Spectrum) -> None:
    """Against numpy, in another order of operations: log and exp of 40 terms, 1e-12 is ample."""
    squares = np.square(np.asarray(spectrum.singular_values))
    p = squares / squares.sum()
    assert effective_rank(spectrum) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-12)


def test_effective_rank_has_a_closed_form_for_a_geometric_spectrum() -> None:
    """p_i = (1 - q) q**i has the entropy -ln(1 - q) - q ln(q) / (1 - q); here q = 0.64."""
    q = 0.64
    wanted = math.exp(-math.log(1 - q) - q * math.log(q) / (1 - q))
    assert effective_rank(spectrum_of([0.8**i for i in range(200)])) == pytest.approx(wanted, rel=1e-12)


def test_effective_rank_takes_the_entropy_of_energies_not_of_values() -> None:
    """Of (2, 1): p = (0.8, 0.2) gives 1.649; the entropy of the values themselves would give 1.890."""
    assert effective_rank(spectrum_of([2.0, 1.0])) == pytest.approx(1.6493848, rel=1e-7)


@given(spectrum=spectra)
def test_stable_and_effective_rank_are_within_the_shape(spectrum: Spectrum) -> None:
    stable, effective = stable_rank(spectrum), effective_rank(spectrum)
    assert stable is not None
    assert effective is not None
    assert 1 <= stable <= min(spectrum.shape) * (1 + 1e-12)  # the energy is a rounded sum
    assert 1 - 1e-12 <= effective <= len(spectrum.singular_values)
    assert stable <= effective * (1 + 1e-12)  # the entropy is at least -log of the largest share


def test_ranks_of_a_zero_delta_are_unknown_and_not_a_number() -> None:
    for values in ([0.0, 0.0], []):
        assert stable_rank(spectrum_of(values)) is None
        assert effective_rank(spectrum_of(values)) is None
        assert energy_share(spectrum_of(values), 1) is None


def test_zeros_do_not_count_as_directions() -> None:
    assert effective_rank(spectrum_of([1.0, 0.0, 0.0])) == 1.0
    assert stable_rank(spectrum_of([1.0, 0.0, 0.0])) == 1.0


def test_values_far_below_the_first_neither_raise_nor_count() -> None:
    """(1e-200)**2 is no float: its share is zero, and 0 * log(0) must not be taken."""
    assert effective_rank(Spectrum("planted", (2, 2), (1.0, 1e-200), 1.0)) == 1.0
    assert effective_rank(Spectrum("planted", (2, 2), (1e150, 1e-10), 1e300)) == 1.0


def test_stable_rank_is_never_below_one_for_a_rounded_energy() -> None:
    assert stable_rank(Spectrum("planted", (2, 2), (1.0, 0.0), 0.9999999)) == 1.0


def test_a_cut_off_spectrum_has_a_stable_rank_but_no_effective_rank() -> None:
    cut = spectrum_of([3.0, 1.0], energy=18.0, full=False)
    assert stable_rank(cut) == 2.0
    assert effective_rank(cut) is None


def test_energy_shares_at_the_edges() -> None:
    full = spectrum_of([3.0, 1.0], energy=10.0000001)
    assert energy_share(full, 0) == 0.0
    assert energy_share(full, 1) == pytest.approx(0.9, rel=1e-7)  # the energy above is 1e-8 too large
    assert energy_share(full, 2) == 1.0, "all values hold everything, however the energy was rounded"
    assert energy_share(full, 10**9) == 1.0
    cut = spectrum_of([3.0, 1.0], energy=20.0, full=False)
    assert energy_share(cut, 2) == 0.5
    assert energy_share(cut, 3) is None, "a cut-off list does not know"
    assert energy_share(spectrum_of([3.0, 1.0], energy=9.9999999, full=False), 2) == 1.0
    with pytest.raises(CriterionError, match="0 or more"):
        energy_share(full, -1)
