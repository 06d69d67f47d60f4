"""Capacity and recommendation: closed forms, and what the evidence must not be stretched to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rankwise.scaling import scaling
from rankwise.tuning.probing.capacity import LORA_MOST, OWN, capacity_of, densities, published
from rankwise.tuning.probing.rates import RatePoint
from rankwise.tuning.probing.recommending import Evidence, job_of, recommend, start_of

SHAPES = {"layers.0.q_proj": (128, 128), "layers.0.up_proj": (384, 128)}
HEAD = {"rankwise": "0", "created": "", "command": (), "device": "cpu", "seed": 0}


def evidence(bits: float, job: str = "facts", *, ramp: tuple[RatePoint, ...] = (), exposures: float = 60.0) -> Evidence:
    capacity = capacity_of(bits, exposures, tuple(SHAPES.values()))
    return Evidence(bits, 3 * bits, 100, job, False, capacity, ramp, False, 20.0)  # type: ignore[arg-type]


def plan(found: Evidence):  # type: ignore[no-untyped-def]
    start = start_of(found.job, found.capacity, SHAPES, scaling=None, lora_alpha=None)
    return recommend(start, SHAPES, found, HEAD, ("data", "model"))


def test_published_points_are_met() -> None:
    assert published(100) == 1.0
    assert published(1000) == pytest.approx(2.0)
    assert densities(1000)[:2] == LORA_MOST


@pytest.mark.parametrize("exposures", [1, 5, 9, 21, 50, 60, 99, 100, 300, 999, 1000, 1e5])
def test_densities_rise_with_exposures(exposures: float) -> None:
    low, high, words = densities(exposures)
    more = densities(1.3 * exposures)
    assert 0 < low <= high
    assert more[0] >= low * (1 - 1e-9)
    assert more[1] >= high * (1 - 1e-9)
    assert words


def test_own_points_rise() -> None:
    assert [d.exposures for d in OWN] == sorted(d.exposures for d in OWN)
    assert [d.bits_per_param for d in OWN] == sorted(d.bits_per_param for d in OWN)


@pytest.mark.parametrize("bits", [0.0, 1.0, 1e3, 1e5])
def test_the_ranks_hold_the_bits(bits: float) -> None:
    found = capacity_of(bits, 60, tuple(SHAPES.values()))
    low, high = found.bits_per_param_interval
    assert found.params_per_rank == 128 + 128 + 384 + 128
    assert found.rank_interval[0] <= found.min_rank <= found.rank_interval[1]
    assert found.min_rank * found.params_per_rank * found.bits_per_param >= bits
    assert found.rank_interval[0] == math.ceil(bits / high / found.params_per_rank)
    assert found.rank_interval[1] == math.ceil(bits / low / found.params_per_rank)


def test_more_bits_never_get_less_rank() -> None:
    ranks = [plan(evidence(bits))[0].modules[0].r for bits in (10.0, 1e3, 1e4, 1e5, 1e7)]
    assert ranks == sorted(ranks)
    assert ranks[0] == 64
    assert ranks[-1] == 128, "no more than the smaller side"


def test_facts_style_and_nothing_are_told_apart() -> None:
    assert job_of(5400, 17000, 1800) == "facts"
    assert job_of(3200, 456_000, 1440) == "style"
    assert job_of(50, 60, 100) == "nothing"
    assert job_of(3_712, 117_000, 720, stored=0.35) == "facts", "told in a manner that costs far more than they do"
    assert job_of(2_207, 228_000, 720, stored=0.14) == "style"
    assert job_of(50, 60, 100, stored=0.3) == "nothing"
    assert job_of(900, 30_000, 100) == "facts", "nine bits of news a row are facts, however much form there is beside"


def test_without_a_ramp_nothing_is_decided_and_three_runs_are_named() -> None:
    made, decided, sweep = plan(evidence(1e3))
    assert not decided
    assert len(sweep) == 3
    assert sweep[0].learning_rate == made.learning_rate
    assert sweep[1].learning_rate < made.learning_rate
    assert "not measured here" in made.why
    assert all(m.kept_energy_share is None for m in made.modules)


def test_a_ramp_that_hardly_falls_does_not_decide() -> None:
    flat = tuple(RatePoint(10**-k, 1.9, 1.9 - 0.01 * (k == 2)) for k in (5, 4, 3, 2, 1))
    made, decided, sweep = plan(evidence(1e3, ramp=flat))
    assert made.learning_rate == pytest.approx(1e-2 / 3, rel=0.05)
    assert not decided
    assert sweep


def test_a_clear_ramp_decides_style() -> None:
    clear = tuple(RatePoint(rate, loss, loss) for rate, loss in ((1e-4, 9.0), (1e-3, 5.0), (1e-2, 2.0), (1e-1, 6.0)))
    made, decided, sweep = plan(evidence(10.0, "style", ramp=clear))
    assert decided
    assert sweep == ()
    assert made.learning_rate == pytest.approx(1e-2 / 3, rel=0.05)
    assert (made.rule, made.modules[0].r) == ("lora", 8)


def test_facts_that_do_not_decide_ask_for_a_higher_rank_also_where_the_floor_set_it() -> None:
    for bits, exposures in ((300.0, 9.0), (10.0, 21.0)):
        made, decided, sweep = plan(evidence(bits, exposures=exposures))
        assert not decided
        rank = made.modules[0].r
        assert made.params == rank * 768
        assert sweep[-1].rank == min(4 * rank, 128) > rank
        assert sweep[-1].learning_rate == sweep[0].learning_rate


def test_the_users_rule_and_alpha_stay() -> None:
    found = evidence(1e3)
    start = start_of("facts", found.capacity, SHAPES, scaling="lora", lora_alpha=32.0)
    made, _, _ = recommend(start, SHAPES, found, HEAD, ("data", "model"))
    assert (made.rule, made.modules[0].lora_alpha) == ("lora", 32.0)
    assert made.modules[0].scaling == pytest.approx(32.0 / made.modules[0].r)


def test_a_module_too_small_for_the_rank_gets_what_it_has_room_for_at_the_same_scale() -> None:
    """A router of one output must not decide for the others, and must not be louder than they are."""
    shapes = SHAPES | {"layers.0.gate": (2, 128)}
    found = evidence(300.0)
    for rule in ("lora", "rslora", "unscaled"):
        start = start_of("facts", found.capacity, shapes, scaling=rule, lora_alpha=None)
        assert start.rank == 64
        made, _, _ = recommend(start, shapes, found, HEAD, ("data", "model"))
        assert [m.r for m in made.modules] == [64, 64, 2]
        assert made.params == 64 * 768 + 2 * 130
        for module in made.modules:
            assert module.scaling == pytest.approx(scaling(rule, module.lora_alpha, module.r))
            assert module.scaling == made.scale == pytest.approx(scaling(rule, 16.0, 64))
        assert "1 of 3 are smaller than that" in made.why
    assert "are smaller" not in plan(found)[0].why


def test_where_more_rank_would_be_wanted_than_there_is_the_reason_says_so() -> None:
    assert "would be more than 128, which is the most that these modules can have" in plan(evidence(1e7))[0].why
    wide = {"layers.0.up_proj": (4096, 1024)}
    capacity = capacity_of(1e9, 60, tuple(wide.values()))
    found = Evidence(1e9, 3e9, 100, "facts", False, capacity, (), False, 20.0)
    start = start_of("facts", capacity, wide, scaling=None, lora_alpha=None)
    made, decided, sweep = recommend(start, wide, found, HEAD, ("data", "model"))
    assert made.modules[0].r == 256
    assert "would be more than 256, which is the most that is recommended" in made.why
    assert not decided
    assert sweep[-1].rank == 1024
    assert "would be more" not in plan(evidence(1e3))[0].why


def test_the_reason_of_each_choice_is_given() -> None:
    why = plan(evidence(300.0))[0].why
    for words in (
        "Rank 64: 300 bits need",
        "no less than 64",
        "Rule rslora, alpha 16",
        "Learning rate 0.0002: a usual",
    ):
        assert words in why
    nothing, decided, sweep = plan(evidence(0.0, "nothing"))
    assert decided
    assert sweep == ()
    assert "there is nothing to store" in nothing.why


def test_the_rate_is_a_third_of_the_one_with_the_lowest_smoothed_loss() -> None:
    """The lowest raw loss is a batch's luck."""
    points = [(1e-4, 5.0, 5.0), (1e-3, 1.0, 3.0), (3e-3, 2.5, 2.5), (1e-2, 9.0, 4.0)]
    made, _, _ = plan(evidence(1e3, ramp=tuple(RatePoint(*point) for point in points)))
    assert made.learning_rate == pytest.approx(1e-3)
    assert "5 at the start, 2.5 there, 4 at 0.01" in made.why


def test_on_the_built_in_model_the_usual_rate_is_its_own() -> None:
    found = evidence(1e3)
    assert plan(found)[0].learning_rate == 2e-4
    assert plan(replace(found, tiny=True))[0].learning_rate == 3e-3
