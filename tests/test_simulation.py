"""The published walk-through to the printed digit, the closed form behind it, and spectra of one's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planting import planted
from rankwise.criteria import Spectrum, rank_for_energy
from rankwise.errors import ScalingError, SpectrumSpecError, UsageError
from rankwise.records import SimulationRecord
from rankwise.scaling import SCALINGS, scaling
from rankwise.simulation import SPECTRA, lora_approximation, planted_spectrum, simulate


@pytest.fixture(scope="module")
def published() -> SimulationRecord:
    return simulate()


def rows_of(record: SimulationRecord, update: str) -> dict[int, Any]:
    return {row.rank: row for row in record.updates[update].rows}


# rank: energy style, energy facts (percent), errors: style a/r, facts a/r, facts a/sqrt(r), plain facts,
# plain style; as printed in the published notebook, the last two and row 48 of the energy computed since
PRINTED = {
    2: ("88.9", "7.7", "6.608", "2.165", "3.016", "0.961", "0.333"),
    4: ("99.2", "14.9", "2.989", "1.482", "2.858", "0.922", "0.092"),
    8: ("99.3", "28.3", "1.000", "1.000", "2.620", "0.847", "0.081"),
    16: ("99.6", "50.8", "0.064", "0.701", "2.251", "0.701", "0.064"),
    32: ("99.9", "80.8", "0.501", "0.628", "1.701", "0.438", "0.034"),
    48: ("100.0", "95.4", "0.667", "0.686", "1.297", "0.215", "0.012"),
}


@pytest.mark.parametrize("rank", sorted(PRINTED))
def test_every_printed_row_comes_out(published: SimulationRecord, rank: int) -> None:
    style, facts = rows_of(published, "style")[rank], rows_of(published, "facts")[rank]
    made = (
        f"{100 * style.energy_share:.1f}",
        f"{100 * facts.energy_share:.1f}",
        f"{style.scaled_error.lora:.3f}",
        f"{facts.scaled_error.lora:.3f}",
        f"{facts.scaled_error.rslora:.3f}",
        f"{facts.truncation_error:.3f}",
        f"{style.truncation_error:.3f}",
    )
    assert made == PRINTED[rank]


def test_the_rows_are_the_printed_ones_and_no_others(published: SimulationRecord) -> None:
    for update in ("style", "facts"):
        assert [row.rank for row in published.updates[update].rows] == sorted(PRINTED)
    assert list(published.updates) == ["style", "facts"]


def test_the_printed_singular_values_come_out(published: SimulationRecord) -> None:
    def first_five(name: str) -> list[str]:
        return [f"{v:.2f}" for v in published.updates[name].singular_values[:5]]

    assert first_five("style") == ["4.99", "3.50", "2.01", "0.52", "0.14"]
    assert first_five("facts") == ["3.00", "2.96", "2.91", "2.87", "2.84"]


def test_the_printed_scalings_come_out(published: SimulationRecord) -> None:
    assert [row.rank for row in published.scales] == [1, 4, 8, 16, 32, 64]
    assert [f"{row.lora:g}" for row in published.scales] == ["16", "4", "2", "1", "0.5", "0.25"]
    assert [f"{row.rslora:.4g}" for row in published.scales] == ["16", "8", "5.657", "4", "2.828", "2"]


def test_norms_and_ranks_come_out(published: SimulationRecord) -> None:
    style, facts = published.updates["style"], published.updates["facts"]
    assert f"{math.sqrt(style.energy):.3f}" == "6.467"
    assert f"{math.sqrt(facts.energy):.2f}" == "15.20"
    assert f"{style.stable_rank:.2f}" == "1.68"
    assert f"{facts.stable_rank:.1f}" == "25.7"
    for update, wanted in ((style, (3, 3, 4)), (facts, (41, 48, 58))):
        spectrum = Spectrum("planted", update.shape, update.singular_values, update.energy)
        assert tuple(rank_for_energy(spectrum, f) for f in (0.9, 0.95, 0.99)) == wanted
        assert (update.rank_90, update.rank_99) == (wanted[0], wanted[2])


def test_the_entropy_of_the_values_themselves_comes_out_too(published: SimulationRecord) -> None:
    """Notes on the walk-through give 11.8 and 58.3, which is Roy and Vetterli's definition, not ours."""
    for name, wanted in (("style", "11.8"), ("facts", "58.3")):
        sigma = np.asarray(published.updates[name].singular_values)
        p = sigma / sigma.sum()
        assert f"{np.exp(-(p * np.log(p)).sum()):.1f}" == wanted
        q = sigma**2 / (sigma**2).sum()
        # the same entropy, summed in another order: 64 terms of rounding
        assert published.updates[name].effective_rank == pytest.approx(np.exp(-(q * np.log(q)).sum()), rel=1e-12)


def test_at_a_scaling_of_two_the_error_is_one_for_every_matrix(rng: np.random.Generator) -> None:
    for shape in ((8, 8), (5, 40), (40, 5)):
        delta = rng.standard_normal(shape)
        for r in (1, 3, 5):
            # E s (2 - s) vanishes at s = 2; what is left is the rounding of one SVD
            assert lora_approximation(delta, r, 2.0 * r, "lora").relative_error == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rule", sorted(SCALINGS))
@settings(max_examples=30, deadline=None)
@given(
    sigma=st.lists(st.floats(0.01, 10), min_size=6, max_size=6),
    r=st.integers(1, 6),
    alpha=st.floats(0.01, 100),
)
def test_the_closed_form_is_what_the_matrices_say(rule: str, sigma: list[float], r: int, alpha: float) -> None:
    """err^2 = 1 - E s (2 - s), for every matrix, rank, alpha and rule."""
    ordered = sorted(sigma, reverse=True)
    delta = planted(np.random.default_rng(0), (9, 7), ordered)
    s = scaling(rule, alpha, r)
    share = sum(v * v for v in ordered[:r]) / sum(v * v for v in ordered)
    measured = lora_approximation(delta, r, alpha, rule).relative_error
    # squares, as a root takes the rounding of a near-zero square to its own size; 1 + s^2 bounds the terms
    assert measured**2 == pytest.approx(1 - share * s * (2 - s), abs=1e-12 * (1 + s * s))


@pytest.mark.parametrize("alpha", [1.0, 16.0, 100.0])
def test_the_record_holds_the_measured_error_beside_its_closed_form(alpha: float) -> None:
    record = simulate(size=24, ranks=[1, 2, 3, 8, 23], lora_alpha=alpha, spectrum="power:1")
    for update in record.updates.values():
        for row in update.rows:
            assert row.closed_form.lora == pytest.approx(row.scaled_error.lora, abs=1e-9)
            assert row.closed_form.rslora == pytest.approx(row.scaled_error.rslora, abs=1e-9)
            assert row.truncation_error == pytest.approx(math.sqrt(1 - row.energy_share), abs=1e-12)


def test_the_whole_rank_leaves_no_truncation_error() -> None:
    row = simulate(size=8, style="linear:1:1", ranks=[8], lora_alpha=8.0).updates["style"].rows[0]
    assert (row.energy_share, row.truncation_error) == (1.0, 0.0)
    assert row.scaled_error.lora < 1e-7, "at a scaling of one nothing is left but rounding"


def test_without_noise_the_planted_values_come_back() -> None:
    record = simulate(size=32, noise=0.0, style="linear:5:1:5", facts="exponential:4:2", ranks=[4])
    # one QR and one SVD in float64 are good to about 1e-15 of the largest value
    assert record.updates["style"].singular_values[:5] == pytest.approx((5, 4, 3, 2, 1), abs=1e-13)
    assert record.updates["style"].singular_values[5:] == pytest.approx([0.0] * 27, abs=1e-13)
    wanted = [2 * math.exp(-i / 4) for i in range(32)]
    assert record.updates["facts"].singular_values == pytest.approx(wanted, abs=1e-13)


def test_seeds_make_the_numbers_and_nothing_else_does() -> None:
    np.random.seed(1)  # the global state must neither matter nor change
    state = np.random.get_state()[1].tolist()  # type: ignore[index]
    one, again = simulate(seed=7, size=16, ranks=[2]), simulate(seed=7, size=16, ranks=[2])
    other = simulate(seed=8, size=16, ranks=[2])
    assert one.updates == again.updates
    assert one.updates["style"].singular_values != other.updates["style"].singular_values
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]


def test_a_third_update_leaves_the_published_two_as_they_are(published: SimulationRecord) -> None:
    record = simulate(spectrum="power:1:2:8")
    assert list(record.updates) == ["style", "facts", "planted"]
    assert {k: record.updates[k] for k in ("style", "facts")} == published.updates
    assert record.updates["planted"].planted == "power:1:2:8"


def test_the_record_says_how_it_was_made(published: SimulationRecord) -> None:
    assert (published.seed, published.size, published.noise, published.lora_alpha) == (42, 64, 0.01, 16.0)
    assert (published.device, published.command) == ("cpu", ("rankwise.simulate",))
    assert published.updates["style"].planted == "linear:5:0.5:4"
    assert any("not a loss of capacity" in note for note in published.notes)
    assert SimulationRecord.from_json(published.to_json()) == published


def test_numpy_ranks_are_written_as_whole_numbers() -> None:
    record = simulate(size=16, ranks=2 ** np.arange(3), scale_ranks=2 ** np.arange(3))
    assert SimulationRecord.from_json(record.to_json()) == record


OUT_OF_RANGE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "size 1": ({"size": 1}, UsageError, "size must be from 2 to 4096, got 1"),
    "size 4097": ({"size": 4097}, UsageError, "size must be from 2 to 4096"),
    "size 1e9": ({"size": 10**9}, UsageError, "size must be from 2 to 4096"),
    "noise < 0": ({"noise": -0.1}, UsageError, "noise must be a finite number"),
    "noise nan": ({"noise": math.nan}, UsageError, "noise must be a finite number"),
    "noise inf": ({"noise": math.inf}, UsageError, "noise must be a finite number"),
    "noise 1e308": (
        {"noise": 1e308},
        UsageError,
        "style: the squares of spectrum .* past what a float holds",
    ),
    "spectrum 1e200": ({"facts": "linear:1e200:1"}, UsageError, "facts: .* past what a float holds"),
    "spectrum 1e-200": ({"style": "linear:1e-200:0", "noise": 0.0}, UsageError, "past what a float holds"),
    "seed -1": ({"seed": -1}, UsageError, "seed must be from 0 to 4294967295, got -1"),
    "seed 2^32": ({"seed": 2**32}, UsageError, "seed must be from 0 to 4294967295"),
    "rank 0": ({"ranks": [4, 0]}, UsageError, "ranks must be from 1 to 64, got 0"),
    "rank 65": ({"ranks": [65]}, UsageError, "ranks must be from 1 to 64, got 65"),
    "no ranks": ({"ranks": []}, UsageError, "ranks: wanted at least one whole number"),
    "no scale ranks": ({"scale_ranks": []}, UsageError, "scale ranks: wanted at least one whole number"),
    "scale rank 0": ({"scale_ranks": [0]}, UsageError, "scale ranks must be from 1 to"),
    "scale rank 10^30": ({"scale_ranks": [10**30]}, UsageError, "scale ranks must be from 1 to"),
    "scale rank 1.5": ({"scale_ranks": [1.5]}, ScalingError, "the rank must be an integer"),
    "alpha 0": ({"lora_alpha": 0.0}, ScalingError, "lora_alpha must be a finite number above 0"),
    "alpha nan": ({"lora_alpha": math.nan}, ScalingError, "lora_alpha must be a finite number above 0"),
}


@pytest.mark.parametrize("name", sorted(OUT_OF_RANGE))
def test_numbers_out_of_range_are_refused(name: str) -> None:
    options, error, words = OUT_OF_RANGE[name]
    with pytest.raises(error, match=words):
        simulate(**options)


def test_the_largest_rank_and_the_smallest_size_are_taken() -> None:
    assert [r.rank for r in simulate(size=2, style="linear:1:1", ranks=[1, 2]).updates["style"].rows] == [
        1,
        2,
    ]


# --- lora_approximation -------------------------------------------------------------------------------------


def test_the_approximation_is_the_scaled_best_one() -> None:
    made = lora_approximation([[3.0, 0.0], [0.0, 4.0]], r=1, alpha=3.0, rule="lora")
    # 3 x the leading direction, whose value is 4; floats of one 2 x 2 SVD
    np.testing.assert_allclose(made.approximation, [[0.0, 0.0], [0.0, 12.0]], atol=1e-14)
    assert made.relative_error == pytest.approx(math.sqrt(9 + 64) / 5, rel=1e-14)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)])
def test_no_matrix_of_that_rank_is_nearer(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    delta = rng.standard_normal(shape)
    best = lora_approximation(delta, 2, 2.0, "lora")
    assert np.linalg.matrix_rank(best.approximation) == 2
    for _ in range(20):
        start = rng.standard_normal((shape[0], 2))
        other = start @ np.linalg.lstsq(start, delta, rcond=None)[0]  # best for this column space
        assert np.linalg.norm(delta - other) / np.linalg.norm(delta) > best.relative_error


def test_the_delta_is_left_alone(rng: np.random.Generator) -> None:
    delta = rng.standard_normal((6, 6)).astype(np.float32)
    before = delta.copy()
    assert lora_approximation(delta, 2, 4.0, "rslora").approximation.dtype == np.float64
    np.testing.assert_array_equal(delta, before)


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        ([1.0, 2.0], "2-D"),
        ([[[1.0]]], "2-D"),
        ([[]], "2-D"),
        ([[0.0, 0.0]], "non-zero"),
        ([[math.nan, 1.0]], "finite"),
        ([[math.inf, 1.0]], "finite"),
    ],
)
def test_what_is_no_delta_is_refused(delta: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        lora_approximation(delta, 1, 1.0, "lora")


def test_ranks_and_rules_out_of_range_are_refused() -> None:
    delta = np.eye(3)
    with pytest.raises(UsageError, match=r"rank 4 is above min\(shape\) = 3"):
        lora_approximation(delta, 4, 1.0, "lora")
    for r, alpha, rule in ((0, 1.0, "lora"), (1, 0.0, "lora"), (1, 1.0, "lorra"), (True, 1.0, "lora")):
        with pytest.raises(ScalingError):
            lora_approximation(delta, r, alpha, rule)


# --- planted spectra ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("linear:5:0.5:4", (5, 3.5, 2, 0.5)),
        ("linear:3:0.5", tuple(3 - 2.5 * i / 5 for i in range(6))),
        ("linear:1:5:3", (5, 3, 1)),  # largest first, whichever way it was written
        ("linear:2:2:1", (2,)),
        ("power:1", tuple(1 / i for i in range(1, 7))),
        ("power:0.5:2", tuple(2 / math.sqrt(i) for i in range(1, 7))),
        ("power:2:3:2", (3, 0.75)),
        ("power:0", (1,) * 6),
        ("exponential:2", tuple(math.exp(-i / 2) for i in range(6))),
        ("exponential:1:5:2", (5, 5 / math.e)),
    ],
)
def test_recipes_give_their_values(spec: str, wanted: tuple[float, ...]) -> None:
    assert planted_spectrum(spec, 6) == pytest.approx(wanted, rel=1e-14)  # a rounding or two per value


def test_every_recipe_is_tested_above() -> None:
    assert sorted(SPECTRA) == ["exponential", "linear", "power"]


REFUSED = {
    "linear": "is not a list of numbers",
    "linear:": "is not a list of numbers",
    "linear:5": "linear needs a top and a bottom",
    "linear:5:x": "is not a list of numbers",
    "linear:5:1:2:3": "wanted 1 to 3 finite numbers",
    "linear:nan:1": "wanted 1 to 3 finite numbers",
    "linear:inf:1": "wanted 1 to 3 finite numbers",
    "linear:5:-1": "must be finite, >= 0 and not all zero",
    "linear:0:0": "must be finite, >= 0 and not all zero",
    "linear:1e308:-1e308": "must be finite, >= 0 and not all zero",
    "linear:5:1:0": "a whole number from 1 to the size 6, got 0",
    "linear:5:1:2.5": "a whole number from 1 to the size 6, got 2.5",
    "linear:5:1:7": "got 7; a larger --size makes room for more",
    "linear:5:1:-3": "a whole number from 1 to the size 6",
    "linear:5:1:1e18": "a whole number from 1 to the size 6",
    "linear:5:1:1e300": "a whole number from 1 to the size 6",
    "power": "is not a list of numbers",
    "power:1:1:1e18": "a whole number from 1 to the size 6",
    "power:1:0": "must be finite, >= 0 and not all zero",
    "power:1:-1": "must be finite, >= 0 and not all zero",
    "power:-1e300": "exponent -1e\\+300 gives values past the largest float",
    "power:1:2:3:4": "wanted 1 to 3 finite numbers",
    "exponential:0": "the decay length must be above 0",
    "exponential:-2": "the decay length must be above 0",
    "exponential:1:1:1e18": "a whole number from 1 to the size 6",
    "lineal:5:1": r"no recipe \(linear:..., power:..., exponential:...\) and cannot be read as a file: No such",
    "": "cannot be read as a file",
    "no\0name": "cannot be read as a file",
}


@pytest.mark.parametrize("spec", sorted(REFUSED), ids=repr)
def test_what_is_no_recipe_is_refused(spec: str) -> None:
    with pytest.raises(SpectrumSpecError, match=REFUSED[spec]):
        planted_spectrum(spec, 6)


@pytest.mark.parametrize(
    "text",
    ["3\n2\n1\n", "1 2 3", "1,2,3", "1, 2,\n3\n\n", "[3, 2, 1]", "\n [3.0,\n 2, 1e0]\n", "\ufeff3 2 1"],
    ids=repr,
)
def test_files_give_their_values_largest_first(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sigma.txt"
    path.write_text(text, encoding="utf-8")
    assert planted_spectrum(str(path), 6) == (3.0, 2.0, 1.0)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "must be finite, >= 0 and not all zero"),
    "empty list": (b"[]", "must be finite, >= 0 and not all zero"),
    "negative": (b"3 -1", "must be finite, >= 0 and not all zero"),
    "NaN": (b"3 nan", "must be finite, >= 0 and not all zero"),
    "NaN in JSON": (b"[3, NaN]", "must be finite, >= 0 and not all zero"),
    "infinite": (b"3 1e999", "must be finite, >= 0 and not all zero"),
    "too many": (b"1 " * 7, "has 7 values; a 6 x 6 matrix has 6"),
    "words": (b"sigma\n3\n", "wanted singular values as numbers"),
    "an object": (b'{"sigma": [3]}', "wanted singular values as numbers"),
    "a list of lists": (b"[[3, 2]]", "wanted singular values as numbers"),
    "null": (b"[3, null]", "wanted singular values as numbers"),
    "half a list": (b"[3, 2", "wanted singular values as numbers"),
    "deep": (b"[" * 100_000, "wanted singular values as numbers"),
    "400 digits": (b"[1" + b"0" * 400 + b"]", "wanted singular values as numbers"),
    "binary": (b"\x80\x00\xff\xfe" * 9, "cannot be read as a file: not a text file"),
    "endless": (b"1 " * (1 << 20), "is longer than 1048576 characters"),
}


@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_files_that_hold_no_spectrum_are_refused(tmp_path: Path, name: str) -> None:
    content, words = BAD_FILES[name]
    path = tmp_path / "sigma.txt"
    path.write_bytes(content)
    with pytest.raises(SpectrumSpecError, match=words):
        planted_spectrum(str(path), 6)


def test_a_folder_is_no_spectrum(tmp_path: Path) -> None:
    with pytest.raises(SpectrumSpecError, match=r"cannot be read as a file: (Is a directory|Permission denied)"):
        planted_spectrum(str(tmp_path), 6)


def test_a_spectrum_of_a_file_is_planted(tmp_path: Path) -> None:
    path = tmp_path / "sigma.json"
    path.write_text(json.dumps([4, 2, 1]))
    update = simulate(size=8, noise=0.0, style=str(path), ranks=[1]).updates["style"]
    assert update.singular_values[:3] == pytest.approx((4, 2, 1), rel=1e-14)
    assert update.rows[0].energy_share == pytest.approx(16 / 21, rel=1e-14)


_FORMS: list[Callable[[float], str]] = [lambda x: f"power:{x!r}", lambda x: f"exponential:{x!r}"]


@settings(max_examples=60, deadline=None)
@given(number=st.floats(allow_nan=True, allow_infinity=True), form=st.sampled_from(_FORMS))
def test_any_number_gives_a_spectrum_or_is_refused(number: float, form: Callable[[float], str]) -> None:
    try:
        values = planted_spectrum(form(number), 5)
    except SpectrumSpecError:
        return
    assert len(values) == 5
    assert all(math.isfinite(v) and v >= 0 for v in values)
    assert list(values) == sorted(values, reverse=True)
