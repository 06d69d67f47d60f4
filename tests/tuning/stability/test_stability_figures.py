"""From rows to exponents, verdicts and advice: planted power laws come out, and what is missing is left out by rule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from stability_toys import grid

from rankwise.errors import RankwiseError, UsageError
from rankwise.records import StabilityRow
from rankwise.scaling import SCALINGS, scaling
from rankwise.tuning.stability.advice import advice_of, flat_exponent, rule_exponent, transfers_of
from rankwise.tuning.stability.exponents import Fit, exponent, mean_of, slopes
from rankwise.tuning.stability.settings import LINEARITY, Cell, Grid, settle
from rankwise.tuning.stability.starts import STARTS
from rankwise.tuning.stability.statistics import STATISTICS, Measured
from rankwise.tuning.stability.stepping import OPTIMIZERS
from rankwise.tuning.stability.verdicts import cells_of, findings_of, last_verdicts, verdict_of

MODULES = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj")
TILT = {"q_proj": 0.1, "up_proj": -0.1}


def planted(chosen: Grid, e: dict[str, float], *, noise: float = 0.0, step: int = 1) -> list[StabilityRow]:
    """Rows whose branch goes like rank^(e + tilt of the module + noise of the seed), the rest by rules of their own."""
    rng = np.random.default_rng(5)
    tilts = {seed: noise * rng.standard_normal() for seed in chosen.seeds}
    rows = []
    for cell in chosen.cells():
        for place, module in enumerate(MODULES):
            power = e[cell.rule] + TILT[module.rsplit(".", 1)[-1]] + tilts[cell.seed]
            rms = 0.01 * (1 + place) * cell.rank**power
            rows.append(
                StabilityRow(
                    rule=cell.rule,
                    optimizer=cell.optimizer,
                    init=cell.init,
                    rank=cell.rank,
                    seed=cell.seed,
                    step=step,
                    module=module,
                    branch_rms=rms,
                    relative_rms=rms / 2,
                    update_rms=rms * cell.rank**0.25,
                    grad_norm_A=0.0,
                    grad_norm_B=3 * cell.rank**-0.5,
                    loss=2.0,
                )
            )
    return rows


E = {"lora": -0.5, "rslora": 0.0, "unscaled": 0.5}
ADAM = grid(optimizer=("adamw",))


# --- exponents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-1.5, -0.5, 0.0, 0.69])
def test_a_planted_power_comes_back(power: float) -> None:
    ranks = (4, 16, 32, 256)
    logs = np.log([[7.0 * r**power for r in ranks]])
    assert slopes(ranks, logs)[0] == pytest.approx(power, abs=1e-12)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """2,000 draws of five seeds: 95 % to within three standard deviations of a binomial (0.5 % each)."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        fit = mean_of(rng.standard_normal(5) + 0.3)
        assert fit.interval is not None
        held += fit.interval[0] <= 0.3 <= fit.interval[1]
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_too_few_seeds_have_no_interval() -> None:
    assert exponent((4, 16), np.log([[1.0, 2.0]])).interval is None
    assert exponent((4, 16), np.empty((0, 2))) == Fit(None, None, 0)


# --- verdicts -----------------------------------------------------------------------------------------------

VERDICTS = [
    ((-0.05, 0.05), "stable"),
    ((-0.1, 0.1), "stable"),
    ((0.05, 0.15), "undecided"),
    ((-0.3, 0.3), "undecided"),
    ((0.101, 0.5), "growing"),
    ((-0.5, -0.101), "collapsing"),
    (None, "undecided"),
]


@pytest.mark.parametrize(("interval", "expected"), VERDICTS)
def test_the_interval_and_the_band_decide(interval: Any, expected: str) -> None:
    fit = Fit(None if interval is None else sum(interval) / 2, interval, 5)
    assert verdict_of(fit, 0.1, diverged=0) == expected
    assert verdict_of(fit, 0.1, diverged=1) == "undecided"


def test_cells_hold_every_group_and_step() -> None:
    measured = Measured(ADAM, planted(ADAM, E, noise=0.001), {})
    cells = cells_of(measured)
    groups = ["all", "attention/early", "attention/late", "mlp/early", "mlp/late"]
    assert [(c.rule, c.group) for c in cells] == [(r, g) for r in ("lora", "rslora") for g in groups]
    by = {(c.rule, c.group): c for c in cells}
    # noise of 0.001 a seed moves a mean of three by less than 0.003
    assert by["lora", "all"].rms_exponent == pytest.approx(-0.5, abs=0.003)
    assert by["lora", "attention/early"].rms_exponent == pytest.approx(-0.4, abs=0.003)
    assert by["lora", "mlp/late"].rms_exponent == pytest.approx(-0.6, abs=0.003)
    assert by["lora", "all"].update_exponent == pytest.approx(-0.25, abs=0.003)
    assert by["lora", "all"].grad_B_exponent == pytest.approx(-0.5, abs=1e-9)
    assert by["lora", "all"].loss_exponent == pytest.approx(0, abs=1e-12)
    assert by["lora", "all"].grad_A_exponent is None, "zero at the first step has no logarithm"
    assert (by["lora", "all"].modules, by["lora", "mlp/late"].modules) == (4, 1)
    assert by["lora", "all"].verdict == "collapsing"
    assert by["rslora", "all"].verdict == "stable"
    assert by["lora", "all"].spread == pytest.approx(16**0.5, rel=0.01)
    relative = by["rslora", "attention/early"].relative_rms_by_rank
    assert relative["4"] == pytest.approx(0.005 * 4**0.1, rel=0.01)
    assert [v.verdict for v in last_verdicts(ADAM, cells)] == ["collapsing", "stable"]
    assert findings_of(measured, {}) == ()


def bent(chosen: Grid, by_rank: dict[int, float]) -> list[StabilityRow]:
    """Planted rows of a flat rule whose branch is multiplied rank by rank."""
    flat = planted(chosen, {"lora": 0.0, "rslora": 0.0}, noise=0.001)
    return [
        replace_row(r, branch_rms=r.branch_rms * by_rank[r.rank], relative_rms=r.relative_rms * by_rank[r.rank])
        for r in flat
        if r.branch_rms and r.relative_rms
    ]


def test_a_line_that_is_flat_through_figures_that_are_not_is_said() -> None:
    """Up by two and down again has no slope, and an interval as narrow as the seeds alike."""
    measured = Measured(ADAM, bent(ADAM, {4: 1.0, 16: 2.0, 64: 1.0}), {})
    cells = cells_of(measured)
    assert cells[0].verdict == "stable", "the verdict is of the band, as it says"
    found = findings_of(measured, {})
    assert [f.code for f in found] == ["bent-over-ranks", "bent-over-ranks"]
    assert "Under lora, adamw, default the exponent after step 1 is stable" in found[0].text
    assert "a factor of 2.00" in found[0].text  # noise of 0.001 in the exponent: 16**0.001 at most
    assert "allows 1.32" in found[0].text, "16 ** 0.1"


def test_what_the_band_allows_is_not_called_bent() -> None:
    measured = Measured(ADAM, bent(ADAM, {4: 1.0, 16: 1.15, 64: 1.3}), {})
    assert cells_of(measured)[0].verdict == "stable", "16 ** 0.095 = 1.3"
    assert findings_of(measured, {}) == ()


def test_the_mean_over_modules_is_geometric() -> None:
    rows = planted(ADAM, E)
    cells = cells_of(Measured(ADAM, rows, {}))
    alone = [r.relative_rms for r in rows if (r.rule, r.rank, r.seed) == ("lora", 16, 0)]
    wanted = math.exp(sum(math.log(v) for v in alone if v) / len(alone))
    assert cells[0].relative_rms_by_rank["16"] == pytest.approx(wanted, rel=1e-12)


def test_a_seed_with_a_diverged_run_is_left_out_whole_and_the_verdict_waits() -> None:
    rows = planted(ADAM, E, noise=0.01)
    lost = ADAM.cell(("lora", "adamw", "default"), 64, 1)
    broken = [r for r in rows if (r.rule, r.rank, r.seed) != ("lora", 64, 1)]
    measured = Measured(ADAM, broken, {lost: 1})
    cells = {(c.rule, c.group): c for c in cells_of(measured)}
    assert (cells["lora", "all"].seeds, cells["lora", "all"].runs_diverged) == (2, 1)
    assert cells["lora", "all"].verdict == "undecided"
    assert cells["rslora", "all"].seeds == 3
    (finding,) = findings_of(measured, {lost: 1})
    assert finding.code == "diverged-in-check"
    assert "1 of 9 runs under lora, adamw, default diverged at learning rate 0.001: rank 64" in finding.text


def test_a_module_that_no_gradient_reaches_is_named_and_in_no_mean() -> None:
    rows = [
        r if r.module != MODULES[0] else replace_row(r, branch_rms=0.0, relative_rms=0.0, update_rms=0.0)
        for r in planted(ADAM, E)
    ]
    measured = Measured(ADAM, rows, {})
    cells = {(c.rule, c.group): c for c in cells_of(measured)}
    assert cells["lora", "all"].modules == 3
    assert cells["lora", "attention/early"].rms_exponent is None
    assert cells["lora", "attention/early"].verdict == "undecided"
    (finding,) = findings_of(measured, {})
    assert finding.code == "silent-modules"
    assert MODULES[0] in finding.text


def replace_row(row: StabilityRow, **changed: Any) -> StabilityRow:
    import msgspec

    made: StabilityRow = msgspec.structs.replace(row, **changed)
    return made


def test_one_seed_is_said_to_be_too_few() -> None:
    one = grid(optimizer=("adamw",), seeds=(0,))
    measured = Measured(one, planted(one, E), {})
    assert {c.verdict for c in cells_of(measured)} == {"undecided"}
    assert [f.code for f in findings_of(measured, {})] == ["too-few-seeds"]


# --- advice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", sorted(SCALINGS))
def test_every_rule_is_a_power_of_the_rank(rule: str) -> None:
    g = rule_exponent(rule, (4, 64))
    for rank in (1, 7, 512):
        assert scaling(rule, 3.0, rank) == pytest.approx(3.0 * rank**-g, rel=1e-12)


@pytest.mark.parametrize(("optimizer", "expected"), [("adamw", 0.69), ("sgd", 1 - 1.25 / 2)])
def test_the_flat_scale_follows_from_one_rule_or_from_two(optimizer: str, expected: float) -> None:
    """AdamW with -0.31 under alpha / r is flat at r^-0.69; of two rules the line between them says the same."""
    p = LINEARITY[optimizer]
    e = {"adamw": -0.31, "sgd": -1.25}[optimizer]
    for rules in (("lora",), ("lora", "rslora"), ("rslora", "unscaled")):
        chosen = grid(optimizer=(optimizer,), scaling=rules)
        powers = {"lora": e, "rslora": e + p / 2, "unscaled": e + p}
        measured = Measured(chosen, planted(chosen, powers), {})
        assert flat_exponent(measured, optimizer, "default", 1).mean == pytest.approx(expected, abs=1e-9)


def test_where_the_scale_no_longer_decides_there_is_no_flat_one() -> None:
    measured = Measured(ADAM, planted(ADAM, {"lora": 0.3, "rslora": 0.3}), {})
    assert flat_exponent(measured, "adamw", "default", 1).mean is None
    advice = advice_of(measured, "adamw", "default", ())
    assert advice.exponent is None
    assert "No exponent of the scale would make it flat" in advice.text


def test_advice_names_scale_alphas_and_rates_that_are_flat() -> None:
    measured = Measured(ADAM, planted(ADAM, {"lora": -0.31, "rslora": 0.19}), {})
    transfers = transfers_of(measured, never)
    advice = advice_of(measured, "adamw", "default", transfers)
    assert (advice.rule, advice.step, advice.exponent) == ("rslora", 1, pytest.approx(0.69))
    for rank in ADAM.ranks:
        s = scaling("rslora", advice.lora_alpha_by_rank[str(rank)], rank)
        assert s == pytest.approx(scaling("rslora", 16.0, 4) * (rank / 4) ** -0.69, rel=1e-9)
        assert advice.learning_rate_by_rank[str(rank)] == pytest.approx(1e-3 * (rank / 4) ** -0.19, rel=1e-9)
    assert "r^-0.31 under alpha / r and r^+0.19 under alpha / sqrt(r)" in advice.text
    assert "A scale of r^-0.69 would make it flat" in advice.text
    assert "nor that facts will be recalled" in advice.text


def never(cells: Any, step: int) -> dict[Cell, float | None]:
    raise AssertionError("the first step needs no run")


def test_of_the_first_step_the_proof_is_arithmetic_and_shows_the_worst_rank() -> None:
    rows = [
        replace_row(r, branch_rms=(r.branch_rms or 0) * 1.2) if r.rank == 16 else r
        for r in planted(ADAM, {"lora": -0.5, "rslora": 0.0})
    ]
    lora, rslora = transfers_of(Measured(ADAM, rows, {}), never)
    assert lora.exponent == pytest.approx(-0.5)
    assert lora.proof is not None
    assert (lora.proof.rank, lora.proof.how) == (16, "closed form")
    assert lora.proof.ratio_before == pytest.approx(1.2 * 4**-0.5)
    assert lora.proof.ratio_after == pytest.approx(1.2)
    assert rslora.proof is None, "a rate that stays has nothing to prove"


def test_of_later_steps_it_is_a_run() -> None:
    chosen = grid(optimizer=("adamw",), steps=(1, 5))
    rows = planted(chosen, E, step=1) + planted(chosen, E, step=5)
    asked = []

    def run(cells: Any, step: int) -> dict[Cell, float | None]:
        asked.append((len(cells), {c.rank for c in cells}, {round(c.rate_b, 9) for c in cells}, step))
        return dict.fromkeys(cells, 0.02)

    lora, _ = transfers_of(Measured(chosen, rows, {}), run)
    assert asked == [(2, {64}, {4e-3}, 5)]
    base = math.exp(np.mean([math.log(0.01 * k) for k in (1, 2, 3, 4)])) * 4**-0.5
    assert lora.proof is not None
    assert (lora.proof.how, lora.proof.seeds, lora.step) == ("steps", 2, 5)
    assert lora.proof.ratio_after == pytest.approx(0.02 / base)


def test_steps_with_diverged_runs_give_no_advice() -> None:
    chosen = grid(optimizer=("adamw",), steps=(1, 5))
    rows = planted(chosen, E, step=1) + planted(chosen, E, step=5)
    lost = chosen.cell(("lora", "adamw", "default"), 64, 0)
    measured = Measured(chosen, rows, {lost: 3})
    lora, rslora = transfers_of(measured, lambda cells, _: dict.fromkeys(cells, 0.01))
    assert (lora.step, rslora.step) == (1, 5)
    assert advice_of(measured, "adamw", "default", (lora, rslora)).step == 1
    gone = Measured(chosen, rows, {lost: 1})
    advice = advice_of(gone, "adamw", "default", ())
    assert (advice.rule, advice.exponent, advice.learning_rate_by_rank) == (None, None, {})
    assert "Give a smaller --learning-rate" in advice.text


# --- settings -----------------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "ranks": (4, 16),
    "scaling": "lora",
    "optimizer": "adamw",
    "init": "default",
    "learning_rate": None,
    "steps": (1,),
    "seeds": 2,
    "lora_alpha": 16.0,
    "batch_size": 8,
    "band": 0.1,
    "reference_rank": None,
    "seed": 0,
}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ranks": (4,)}, "--ranks: an exponent needs two different ranks at least, got 4"),
    ({"ranks": (4, 4)}, "two different ranks"),
    ({"ranks": ()}, "--ranks is empty"),
    ({"ranks": (0, 4)}, "--ranks: wanted whole numbers of 1 or more, got 0"),
    ({"ranks": (2.0, 4)}, "got 2.0"),
    ({"scaling": ("lora", "rs")}, "--scaling: there is no 'rs' in check; there are: lora, rslora, unscaled"),
    ({"scaling": ()}, "--scaling is empty"),
    ({"optimizer": "lion"}, "--optimizer: there is no 'lion'"),
    ({"init": "orthogonal"}, "check begins from B = 0"),
    ({"learning_rate": 0.0}, "--learning-rate must be a finite number above 0"),
    ({"learning_rate": math.nan}, "--learning-rate"),
    ({"lora_alpha": -1.0}, "--lora-alpha"),
    ({"band": 0.0}, "--band"),
    ({"steps": (0, 1)}, "--steps: wanted whole numbers of 1 or more, got 0"),
    ({"steps": ()}, "--steps is empty"),
    ({"seeds": 0}, "--seeds is a number of draws of A, 1 or more; got 0"),
    ({"batch_size": 0}, "--batch-size must be a whole number of 1 or more"),
    ({"batch_size": 2.5}, "--batch-size must be a whole number of 1 or more"),
    ({"reference_rank": 8}, "--reference-rank 8 is not among --ranks 4, 16"),
    ({"seed": -1}, "--seed must be from 0"),
]


@pytest.mark.parametrize(("changed", "said"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        settle("model", **(DEFAULTS | changed))
    assert said in str(caught.value)


def test_settings_are_sorted_and_filled() -> None:
    found = settle("rankwise:tiny", **(DEFAULTS | {"ranks": [64, 4, 64], "optimizer": ["sgd", "adamw"], "seed": 7}))
    assert (found.ranks, found.reference_rank, found.seeds) == ((4, 64), 4, (7, 8))
    assert found.rates == {"sgd": 1e-2, "adamw": 3e-3}
    assert settle("org/model", **DEFAULTS).rates == {"adamw": 2e-4}


def test_tables_agree() -> None:
    assert set(OPTIMIZERS) == set(LINEARITY)
    assert all(start.factor(4) > 0 for start in STARTS.values())
    assert set(STATISTICS.values()) <= set(StabilityRow.__struct_fields__)
    assert issubclass(UsageError, RankwiseError)
    assert replace(ADAM, band=0.2).band == 0.2
