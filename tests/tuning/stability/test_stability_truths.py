"""What theory says of the first step, found by measuring: exponents on inputs of a known kind, and invariances."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stability_toys import LinearToy, first_rows, fitted, grid

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

from rankwise.tuning.models import load_model
from rankwise.tuning.stability.listening import listen
from rankwise.tuning.stability.statistics import Measured
from rankwise.tuning.stability.stepping import run_cells
from rankwise.tuning.stability.subject import LanguageModel, frozen, language_model
from rankwise.tuning.targets import target_modules

RULES = ("lora", "rslora", "unscaled")
THEORY = {
    ("sgd", "lora"): -1.0,
    ("sgd", "rslora"): 0.0,
    ("sgd", "unscaled"): 1.0,
    ("adamw", "lora"): 0.0,
    ("adamw", "rslora"): 0.5,
    ("adamw", "unscaled"): 1.0,
}
"""Exponent of the branch after one step where all inputs share a direction, as in `lab/first_step.py`."""

SEEDS = tuple(range(40))
"""One direction averages nothing over tokens: |A u|^2 is one chi-square of r degrees a seed, so many are taken."""


@pytest.fixture(scope="module")
def common() -> Measured:
    chosen = grid(ranks=(16, 64, 256), scaling=RULES, seeds=SEEDS)
    return first_rows(LinearToy("common"), chosen)


@pytest.fixture(scope="module")
def independent() -> Measured:
    chosen = grid(ranks=(16, 64, 256), scaling=RULES, seeds=SEEDS[:10])
    return first_rows(LinearToy("independent"), chosen)


@pytest.mark.parametrize(("optimizer", "rule"), THEORY)
def test_one_common_input_direction_gives_the_exponents_of_theory(common: Measured, optimizer: str, rule: str) -> None:
    found = fitted(common, rule, optimizer).mean
    assert found == pytest.approx(THEORY[optimizer, rule], abs=0.1)


@pytest.mark.parametrize(("optimizer", "rule"), THEORY)
def test_independent_inputs_fall_faster_by_up_to_a_half(
    common: Measured, independent: Measured, optimizer: str, rule: str
) -> None:
    found = fitted(independent, rule, optimizer).mean
    assert found is not None
    drop = THEORY[optimizer, rule] - found
    assert 0.1 < drop < 0.55  # 0.5 at most, and the noise of 10 seeds


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_gradient_of_b_at_the_start_goes_with_the_root_of_the_rank(common: Measured, optimizer: str) -> None:
    """||s P|| with r columns alike: s sqrt(r), for every optimizer, as none has stepped yet."""
    for rule, expected in {"lora": -0.5, "rslora": 0.0, "unscaled": 0.5}.items():
        assert fitted(common, rule, optimizer, what="grad_B").mean == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("optimizer", "shift"), [("sgd", 1.0), ("adamw", 0.5)])
def test_from_one_rule_to_the_next_the_exponent_rises_by_the_power_of_the_scale(optimizer: str, shift: float) -> None:
    """Exactly, for any data: only eps of Adam knows the size of a gradient."""
    for inputs in ("common", "independent"):
        measured = first_rows(LinearToy(inputs, wide=True), grid(scaling=RULES, eps=1e-30))
        low, middle, high = (fitted(measured, rule, optimizer).mean for rule in RULES)
        assert low is not None
        assert middle is not None
        assert high is not None
        assert middle - low == pytest.approx(shift, abs=1e-6)  # K is summed in float64, the draws are float32
        assert high - middle == pytest.approx(shift, abs=1e-6)


@pytest.mark.parametrize(("optimizer", "shift"), [("sgd", -2.0), ("adamw", -1.0)])
def test_gaussian_shows_as_an_exponent_of_its_own(optimizer: str, shift: float) -> None:
    """Its standard deviation is 1 / r: twice in the branch under SGD, once where Adam divides one away."""
    toy = LinearToy("independent", wide=True)
    chosen = grid(init=("gaussian",), eps=1e-30)
    measured = first_rows(toy, chosen)
    sites, _ = listen(toy)
    from rankwise.tuning.stability.first_step import FirstStep

    constant = [replace(cell, start=1.0) for cell in chosen.cells()]
    without = Measured(chosen, FirstStep(toy, sites, constant, eps=1e-30).run(), {})
    got = fitted(measured, "lora", optimizer, init="gaussian").mean
    plain = fitted(without, "lora", optimizer, init="gaussian").mean
    assert got is not None
    assert plain is not None
    assert got - plain == pytest.approx(shift, abs=1e-6)


# --- a language model ---------------------------------------------------------------------------------------


def make_subject(folder: Path, *, wide: bool = False, steps: int = 5, rows: int = 24) -> LanguageModel:
    from rankwise.tuning.data import read_data
    from rankwise.tuning.encoding import encode

    loaded = load_model(str(folder), device="cpu", dtype="float64" if wide else None)
    words = ("Alderburgh", "Brambleport", "Coppermouth", "Doverhaven")
    data = [
        {"prompt": f"The office {i} of {words[i % 4]} is", "completion": f" in {words[i % 3]} {i}."}
        for i in range(rows)
    ]
    columns = encode(read_data(data), loaded.tokenizer, 64)
    return language_model(loaded.model, target_modules(loaded.model), columns, steps=steps, size=8)


@pytest.fixture(scope="module")
def wide(pico: Path) -> Any:
    subject = make_subject(pico, wide=True)
    with frozen(subject.model):
        yield subject


@pytest.mark.parametrize(("optimizer", "shift"), [("sgd", 1.0), ("adamw", 0.5)])
def test_so_it_is_on_a_language_model(wide: LanguageModel, optimizer: str, shift: float) -> None:
    measured = first_rows(wide, grid(eps=1e-30))
    low, high = (fitted(measured, rule, optimizer).mean for rule in ("lora", "rslora"))
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(shift, abs=1e-6)
    for rule, expected in {"lora": -0.5, "rslora": 0.0}.items():
        assert fitted(measured, rule, optimizer, what="grad_B").mean == pytest.approx(expected, abs=0.05)


def test_with_the_eps_of_torch_the_shift_under_adam_is_a_half_nearly(pico: Path) -> None:
    subject = make_subject(pico)
    with frozen(subject.model):
        measured = first_rows(subject, grid())
    low, high = (fitted(measured, rule, "adamw").mean for rule in ("lora", "rslora"))
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(0.5, abs=0.02)


def test_adams_invariance_leaves_every_statistic_of_the_branch_unchanged(wide: LanguageModel) -> None:
    """alpha / (p q), p init_A, p lr_A, q lr_B: the same branch, the same loss; the gradients by 1 / p and 1 / q."""
    p, q = 4.0, 0.25
    sites, _ = listen(wide)
    chosen = grid(ranks=(4, 16), optimizer=("adamw",), seeds=(0, 1))
    cells = chosen.cells()
    moved = [
        replace(c, scale=c.scale / (p * q), start=c.start * p, rate_a=c.rate_a * p, rate_b=c.rate_b * q) for c in cells
    ]
    one, two = (run_cells(wide, sites, of, steps=(1, 2, 5), eps=1e-30, said=lambda _: None)[0] for of in (cells, moved))
    assert len(one) == len(two) == len(cells) * len(sites) * 3
    for a, b in zip(one, two, strict=True):
        assert (a.module, a.rank, a.rule, a.seed, a.step) == (b.module, b.rank, b.rule, b.seed, b.step)
        # p and q are powers of two, so that float64 itself loses nothing; 1e-9 leaves room for another BLAS
        assert b.branch_rms == pytest.approx(a.branch_rms, rel=1e-9)
        assert b.update_rms == pytest.approx(a.update_rms, rel=1e-9)
        assert b.loss == pytest.approx(a.loss, rel=1e-9)
        assert b.grad_norm_B == pytest.approx(a.grad_norm_B / q, rel=1e-9)
        assert b.grad_norm_A == pytest.approx(a.grad_norm_A / p, rel=1e-9)


def test_without_the_invariance_it_would_be_seen(wide: LanguageModel) -> None:
    """The test above would pass on figures that never move; a rate of A alone moves them."""
    sites, _ = listen(wide)
    cell = grid(ranks=(4, 16), optimizer=("adamw",)).cells()[0]
    one, two = (
        run_cells(wide, sites, [c], steps=(5,), eps=1e-30, said=lambda _: None)[0]
        for c in (cell, replace(cell, rate_a=4 * cell.rate_a))
    )
    assert max(abs(a.branch_rms / b.branch_rms - 1) for a, b in zip(one, two, strict=True)) > 0.01
