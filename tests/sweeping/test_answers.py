"""What a grid says, against planted truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import row

from rankwise.records import SweepRun
from rankwise.sweeping.answers import answer, apart, edge_of, estimate, score_of
from rankwise.sweeping.sentences import findings, sentences

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RANKS = (4, 16, 64)


def grid(
    bits: Callable[[int, float, int], float | None],
    *,
    ranks: Sequence[int] = RANKS,
    rates: Sequence[float] = RATES,
    seeds: int = 3,
    rule: str = "rslora",
) -> list[SweepRun]:
    return [row(r, rule, lr, s, bits(r, lr, s)) for r in ranks for lr in rates for s in range(seeds)]


def peak(best: Callable[[int], float], height: Callable[[int], float], noise: float = 0.01) -> Callable[..., float]:
    """A parabola in log(rate) around each rank's best one, with a small wobble by seed."""

    def bits(rank: int, rate: float, seed: int) -> float:
        return height(rank) - math.log(rate / best(rank)) ** 2 + noise * (seed - 1)

    return bits


def test_the_interval_is_the_t_interval() -> None:
    """1, 2, 3: 2 -+ 4.30265 (t of 2 degrees of freedom at 97.5 %) * 1 / sqrt(3)."""
    found = estimate([1.0, None, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.ci == pytest.approx((2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3)))
    assert estimate([5.0]).ci is None
    assert estimate([]).mean is None


def test_best_rates_and_an_effect_that_is_there() -> None:
    found = answer(grid(peak(lambda rank: 1e-3, lambda rank: float(rank))))
    assert found.score == "bits"
    assert [(b.rank, b.learning_rate, b.on_edge) for b in found.best] == [(r, 1e-3, False) for r in RANKS]
    widest = found.effects[0]
    assert (widest.at, widest.low_rank, widest.high_rank, widest.verdict) == ("best", 4, 64, "helps")
    assert widest.difference.mean == pytest.approx(60.0)
    assert all(effect.verdict == "helps" for effect in found.effects)
    told = sentences(found)
    assert "from rank 4 to 64 raising the rank helps: recalled bits +60 (+60 to +60, 3 seeds)" in told[0]
    assert "helps at 0.0001, 0.0003, 0.001, 0.003 and 0.01" in told[0]


def test_an_effect_the_other_way_round() -> None:
    found = answer(grid(peak(lambda rank: 1e-3, lambda rank: -float(rank))))
    assert {effect.verdict for effect in found.effects} == {"hurts"}
    assert "raising the rank hurts" in sentences(found)[0]


def test_of_losses_the_lower_one_is_better() -> None:
    cells = [row(r, "lora", lr, s, None, loss=5 - math.log(r) + 0.001 * s, exact_share=None)
             for r in RANKS for lr in (1e-3, 3e-3) for s in range(3)]  # fmt: skip
    found = answer(cells)
    assert found.score == "loss"
    assert found.effects[0].verdict == "helps"
    assert found.effects[0].difference.mean == pytest.approx(-math.log(16))


def test_nothing_is_claimed_from_one_seed() -> None:
    found = answer(grid(peak(lambda rank: 1e-3, lambda rank: float(rank)), seeds=1))
    assert {effect.verdict for effect in found.effects} == {"undecided"}
    assert all(set(b.tied) == set(RATES) - {1e-3} for b in found.best)
    assert found.exponents[0].ci is None
    assert "one-seed" in {finding.code for finding in findings(found, grid(lambda *_: 1.0, seeds=1))}


def test_a_difference_seed_by_seed_is_not_enough_where_the_scores_overlap() -> None:
    """Each seed gains exactly 1, but the seeds are 100 apart."""
    found = answer(grid(lambda rank, rate, seed: 100.0 * seed + math.log(rank, 4), rates=(1e-3,)))
    assert found.effects[0].difference.ci == pytest.approx((2.0, 2.0))
    assert {effect.verdict for effect in found.effects} == {"undecided"}
    assert "undecided" in sentences(found)[0]


@given(st.lists(st.floats(-100, 100), min_size=18, max_size=18))
def test_no_verdict_where_intervals_overlap(values: list[float]) -> None:
    it = iter(values)
    found = answer(grid(lambda *_: next(it), ranks=(4, 16, 64), rates=(1e-3, 1e-2)))
    scores = {(p.rank, p.learning_rate): p.score for p in found.points}
    for effect in found.effects:
        low = scores[effect.low_rank, effect.low_learning_rate]
        high = scores[effect.high_rank, effect.high_learning_rate]
        if not apart(low, high):
            assert effect.verdict == "undecided"
        elif effect.verdict != "undecided":
            assert (effect.verdict == "helps") == ((high.mean or 0) > (low.mean or 0))
    text = " ".join(sentences(found))
    if all(effect.verdict == "undecided" for effect in found.effects):
        assert "raising the rank helps:" not in text
        assert "raising the rank hurts:" not in text


def test_the_edge_is_that_of_the_rates_tried() -> None:
    at_edge = answer(grid(peak(lambda rank: {4: 1e-4, 16: 1e-3, 64: 1e-2}[rank], lambda rank: 1.0)))
    assert [(b.edge, b.on_edge) for b in at_edge.best] == [("lowest", True), (None, False), ("highest", True)]
    (finding,) = (f for f in findings(at_edge, []) if f.code == "best-rate-on-edge")
    assert "rank 4, rslora: 0.0001 (lowest); rank 64, rslora: 0.01 (highest)" in finding.text
    assert "that this may change with more rates" in sentences(at_edge)[0]


def test_a_rate_that_diverges_bounds_the_grid_and_is_not_called_best() -> None:
    cells = grid(peak(lambda rank: 1e-2, lambda rank: 1.0), ranks=(4,))
    cells = [row(c.rank, c.scaling, c.learning_rate, c.seed, c.bits, status="diverged")
             if (c.learning_rate, c.seed) == (1e-2, 1) else c for c in cells]  # fmt: skip
    found = answer(cells)
    (best,) = found.best
    assert (best.learning_rate, best.on_edge) == (3e-3, False), "the rate above it was tried, and is too high"
    point = next(p for p in found.points if p.learning_rate == 1e-2)
    assert (point.done, point.diverged, point.eligible) == (2, 1, False)
    assert not point.on_front


def test_a_mean_of_fewer_seeds_does_not_win_by_chance() -> None:
    cells = [c for c in grid(peak(lambda rank: 1e-3, lambda rank: 1.0), ranks=(4,)) if c.learning_rate < 1e-2]
    found = answer([*cells, row(4, "rslora", 1e-2, 0, 99.0)])
    assert found.best[0].learning_rate == 1e-3


@pytest.mark.parametrize(("values", "edge"), [((1.0,), "only"), ((1.0, 2.0), "lowest"), ((0.5, 1.0, 2.0), None)])
def test_edges(values: tuple[float, ...], edge: str | None) -> None:
    assert edge_of(1.0, values) == edge


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.0, 0.5])
def test_the_exponent_of_the_best_rate(slope: float) -> None:
    """On a grid that holds each rank's best rate exactly, the slope is exact; the interval knows the grid's step."""
    ranks = (1, 4, 16)
    rates = [1e-3 * 2.0**k for k in range(-6, 7)]
    found = answer(grid(peak(lambda rank: 1e-3 * rank**slope, lambda rank: 1.0, noise=0.0), ranks=ranks, rates=rates))
    (exponent,) = found.exponents
    assert exponent.exponent == pytest.approx(slope, abs=1e-12)
    # weights of three ranks a factor 4 apart are -1, 0, 1 over 2 ln 4; half a step of a grid of 2 is ln 2 / 2
    assert exponent.from_grid == pytest.approx(math.log(2) / (2 * math.log(4)))
    assert exponent.ci == pytest.approx((slope - exponent.from_grid, slope + exponent.from_grid))
    told = next(s for s in sentences(found) if "goes like" in s)
    assert ("it falls" in told) == (slope < -0.25)
    assert ("it rises" in told) == (slope > 0.25)


def test_no_exponent_from_best_rates_on_the_edge_or_from_two_ranks() -> None:
    at_edge = answer(grid(peak(lambda rank: 1e-2 if rank == 64 else 1e-3, lambda rank: 1.0)))
    (exponent,) = at_edge.exponents
    assert (exponent.exponent, exponent.ci, exponent.ranks) == (None, None, (4, 16))
    assert exponent.left_out == {"64": "the best rate of a seed lies on the highest rate tried"}
    assert "cannot be fitted" in " ".join(sentences(at_edge))
    one_rate = answer(grid(lambda *_: 1.0, rates=(1e-3,)))
    assert set(one_rate.exponents[0].left_out.values()) == {"only one rate was tried"}


def test_the_front_is_what_no_other_setting_beats() -> None:
    figures = {4: (10.0, 0.1), 8: (20.0, 0.3), 16: (15.0, 0.4), 32: (30.0, 0.9)}  # 16 is beaten by 8
    cells = [row(r, "lora", 1e-3, s, bits, forgetting=lost) for r, (bits, lost) in figures.items() for s in range(2)]
    found = answer(cells)
    assert [p.rank for p in found.points if p.on_front] == [4, 8, 32]
    assert sentences(found)[-1].startswith("Of 4 settings, 3 are beaten by no other")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_the_front_against_all_pairs(figures: list[tuple[int, int]]) -> None:
    cells = [row(k + 1, "lora", 1e-3, 0, float(up), forgetting=float(down)) for k, (up, down) in enumerate(figures)]
    on = {p.rank for p in answer(cells).points if p.on_front}
    for k, (up, down) in enumerate(figures):
        beaten = any(u >= up and d <= down and (u, d) != (up, down) for u, d in figures)
        assert (k + 1 in on) == (not beaten)


def test_failed_runs_are_missing_seeds() -> None:
    cells = grid(lambda rank, rate, seed: rank + 0.1 * seed, rates=(1e-3, 3e-3))
    cells[0] = row(4, "rslora", 1e-3, 0, None, status="failed", error="ValueError: no")
    found = answer(cells)
    assert found.score == "bits", "what a failed run lacks changes nothing"
    point = next(p for p in found.points if (p.rank, p.learning_rate) == (4, 1e-3))
    assert (point.runs, point.done, point.failed) == (3, 2, 1)
    (finding,) = (f for f in findings(found, cells) if f.code == "runs-failed")
    assert "1 of 18 runs failed" in finding.text
    assert "ValueError: no" in finding.text


def test_a_grid_without_a_run_that_is_done_says_nothing_and_breaks_nothing() -> None:
    cells = [row(r, "lora", 1e-3, 0, None, status="diverged") for r in RANKS]
    found = answer(cells)
    assert [b.learning_rate for b in found.best] == [None] * 3
    assert found.effects == ()
    assert "cannot be told" in sentences(found)[0]


def test_bits_a_parameter() -> None:
    found = answer(grid(lambda rank, rate, seed: 200.0 * rank, rates=(1e-3,)))
    assert [b.bits_per_param.mean for b in found.best] == pytest.approx([2.0] * 3)
    assert any("bits a trainable parameter" in sentence for sentence in sentences(found))


def test_what_runs_are_compared_by() -> None:
    assert score_of([row(4, "lora", 1e-3, 0, 1.0)]) == "bits"
    assert score_of([row(4, "lora", 1e-3, 0, 1.0), row(4, "lora", 1e-3, 1, None)]) == "exact_share"
    assert score_of([row(4, "lora", 1e-3, 0, None, exact_share=None)]) == "loss"
    assert score_of([]) == "loss"
