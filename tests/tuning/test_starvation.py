"""What the gains of a counter-test come to: the verdict, its words, and what makes it worth less."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.records import CounterMove
from rankwise.tuning.starvation import findings_of, judge, paired

Gains = tuple[tuple[float, ...] | None, ...]


def moves(*gains: tuple[float, ...] | None, asis: tuple[float, ...] | None = (1.0, 1.0, 1.0)) -> list[CounterMove]:
    """Return the moves of three orders of the batches; each gained so much over going on as it is. None: diverged."""

    def move(name: str, losses: tuple[float | None, ...], gained: tuple[float, ...] | None) -> CounterMove:
        mean, interval = (None, None) if gained is None else paired(gained)
        known = [loss for loss in losses if loss is not None]
        return CounterMove(
            move=name,
            text=name,
            rank=1,
            factor=4.0,
            losses=losses,
            loss=sum(known) / len(known) if known else None,
            gain=mean,
            gain_interval=interval,
        )

    found = [move("as it is", asis or (None, None, None), None)]
    for name, gained in zip(("scale", "rank", "rate"), gains, strict=True):
        if asis is None or gained is None:
            found.append(move(name, (None, None, None), None))
        else:
            found.append(move(name, tuple(a - g for a, g in zip(asis, gained, strict=True)), gained))
    return found


SMALL, NONE = (0.09, 0.1, 0.11), (-0.1, -0.1, -0.1)
LARGE, SAME = (0.49, 0.5, 0.51), (0.5, 0.49, 0.51)


@pytest.mark.parametrize(
    ("gains", "scaling", "verdict"),
    [
        ((LARGE, SMALL, SMALL), 2.0, "starved by scale"),
        ((SMALL, LARGE, SMALL), 2.0, "starved by rank"),
        ((SMALL, SMALL, LARGE), 0.01, "starved by rate"),
        ((LARGE, SMALL, SAME), 0.01, "starved by scale"),
        ((SAME, SMALL, LARGE), 0.01, "starved by scale"),
        ((LARGE, SMALL, SAME), 2.0, "starved by rate"),
        ((SAME, SMALL, LARGE), 2.0, "starved by rate"),
        ((NONE, (0.001, 0.0, 0.002), None), 2.0, "sufficient"),
        (((0.4, -0.2, 0.1), NONE, NONE), 2.0, "undecided"),
    ],
)
def test_the_surest_gain_decides(gains: Gains, scaling: float, verdict: str) -> None:
    assert judge(moves(*gains), 1.5, scaling, least=0.02)[0] == verdict


def test_a_gain_that_is_not_surely_above_what_counts_is_none() -> None:
    """0.1 +- 0.025 over three orders: surely above 0.07, not surely above 0.08."""
    assert judge(moves(SMALL, NONE, NONE), 1.5, 2.0, least=0.07)[0] == "starved by scale"
    assert judge(moves(SMALL, NONE, NONE), 1.5, 2.0, least=0.08)[0] == "undecided"
    assert judge(moves(SMALL, NONE, NONE), 1.5, 2.0, least=0.13)[0] == "sufficient"


def test_a_lead_too_small_to_matter_or_too_unsure_is_a_tie() -> None:
    """Between scale and rate a tie goes by the scale: 2 is not small, so that it is called rate."""
    lead = (LARGE, NONE, tuple(g - 0.01 for g in LARGE))  # in every order, by less than what counts
    assert judge(moves(*lead), 1.5, 2.0, least=0.02)[0] == "starved by rate"
    assert judge(moves(*lead), 1.5, 2.0, least=0.005)[0] == "starved by scale"
    unsure = ((0.9, 1.0, 1.1), NONE, (1.05, 0.95, 0.85))  # 0.05 +- 0.5, where each by itself is sure
    assert judge(moves(*unsure, asis=(3.0, 3.0, 3.0)), 4.0, 2.0, least=0.02)[0] == "starved by rate"


def test_a_move_that_loses_on_average_gains_nothing_however_wide_its_interval() -> None:
    assert judge(moves((-0.2, 0.1, 0.0), NONE, NONE), 1.5, 2.0, least=0.02)[0] == "sufficient"
    assert judge(moves((-0.1, 0.2, 0.0), NONE, NONE), 1.5, 2.0, least=0.02)[0] == "undecided"


def test_where_hardly_any_loss_is_left_there_is_nothing_to_gain() -> None:
    verdict, text = judge(moves(LARGE, NONE, NONE), 0.01, 2.0, least=0.02)
    assert verdict == "sufficient"
    assert "0.01 leaves less to gain than the 0.0200 that counts" in text


def test_gaining_back_what_going_on_lost_is_no_gain() -> None:
    """As it is the loss went from 0.4 to 1.0; 0.5 less than that is still above where it began."""
    verdict, text = judge(moves(LARGE, NONE, NONE), 0.4, 2.0, least=0.02)
    assert verdict == "undecided"
    assert "makes the loss worse" in text
    assert "Give a lower --learning-rate" in text


def test_where_going_on_diverges_nothing_is_decided() -> None:
    verdict, text = judge(moves(LARGE, LARGE, LARGE, asis=None), 1.0, 2.0, least=0.02)
    assert verdict == "undecided"
    assert "diverges" in text


def test_ties_and_lesser_gains_are_told() -> None:
    _, text = judge(moves(LARGE, SAME, SMALL), 1.5, 2.0, least=0.02)
    assert "rank gains as much, as far as these orders tell: take more --seeds" in text
    assert "rate gains 0.1000." in text
    _, text = judge(moves(LARGE, SMALL, SAME), 1.5, 0.1, least=0.02)
    assert "A scale of 0.1 is below 0.25, so it is called scale." in text
    assert "As it is, the loss went from 1.5 to 1." in text


def test_intervals_are_students() -> None:
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303 at two degrees of freedom."""
    mean, interval = paired([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval is not None
    assert interval[1] - interval[0] == pytest.approx(2 * 4.303 / 3**0.5, rel=1e-3)
    assert paired([1.0, float("nan")]) == (None, None)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, None),
        ({"start_loss": 2.1, "asis": 1.0}, "worse-than-base"),
        ({"asis": 1.03}, "going-on-hurts"),
        ({"asis": None}, "going-on-hurts"),
        ({"asis": 1.01}, None),
        ({"gone_on": 9}, "sampled-rows"),
    ],
)
def test_what_makes_it_worth_less_is_named(changed: dict[str, Any], code: str | None) -> None:
    call = {"start_loss": 1.0, "base_loss": 2.0, "asis": 0.9, "gone_on": 10} | changed
    found = findings_of(
        call["start_loss"], call["base_loss"], call["asis"], least=0.02, gone_on=call["gone_on"], count=10
    )
    assert [f.code for f in found] == ([] if code is None else [code])
