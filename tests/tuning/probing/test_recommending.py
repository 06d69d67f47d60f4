"""Capacity and recommendation: closed forms, and what the evidence must not be stretched to."""

from __future__ import annotations

import math

import pytest

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
    assert ranks[0] == 8
    assert ranks[-1] == 128, "no more than the smaller side"


def test_facts_style_and_nothing_are_told_apart() -> None:
    assert job_of(5400, 17000, 1800) == "facts"
    assert job_of(3200, 456_000, 1440) == "style"
    assert job_of(50, 60, 100) == "nothing"
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


def test_a_wide_interval_asks_for_a_higher_rank() -> None:
    made, decided, sweep = plan(evidence(3e3, exposures=9.0))
    assert not decided
    rank = made.modules[0].r
    assert made.params == rank * 768
    assert sweep[-1].rank >= rank


def test_the_users_rule_and_alpha_stay() -> None:
    found = evidence(1e3)
    start = start_of("facts", found.capacity, SHAPES, scaling="lora", lora_alpha=32.0)
    made, _, _ = recommend(start, SHAPES, found, HEAD, ("data", "model"))
    assert (made.rule, made.modules[0].lora_alpha) == ("lora", 32.0)
    assert made.modules[0].scaling == pytest.approx(32.0 / made.modules[0].r)
