"""When a run has become worse than no training: planted curves, noise, and what is kept."""

from __future__ import annotations

import math
import random

import pytest

from rankwise.tuning.divergence import DivergenceWatch

torch = pytest.importorskip("torch", reason="torch comes with the train extra")


def model(value: float = 1.0) -> torch.nn.Module:
    made = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        made.weight.fill_(value)
    return made


def feed(watch: DivergenceWatch, losses: list[float]) -> int | None:
    """Return the step at which the watch calls divergence, and None where it does not."""
    for i, loss in enumerate(losses):
        if watch.see(i + 1, loss, 1.0, model(float(i + 1))):
            return i + 1
    return None


CURVES: dict[str, tuple[list[float], tuple[int, int] | None]] = {
    "falls": ([3 * 0.95**i for i in range(100)], None),
    "flat": ([3.0] * 100, None),
    "a spike that heals": ([3 * 0.95**i for i in range(50)] + [9.0] * 4 + [0.2] * 46, None),
    "rises from the start": ([3.0 + 0.2 * i for i in range(100)], (8, 40)),
    "falls, then leaves": ([3.0 * 0.9**i for i in range(40)] + [9.0] * 60, (43, 80)),
    "falls, then gives half back": ([3.0, 2.0, 1.0] + [2.3] * 97, None),
    "jumps above the base and stays": ([3.0, 2.9] + [3.4] * 98, (8, 20)),
    "not a number": ([3.0, 2.0, math.nan, 1.0], (3, 3)),
    "infinite": ([3.0, math.inf], (2, 2)),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves(name: str) -> None:
    losses, wanted = CURVES[name]
    at = feed(DivergenceWatch(100, base_loss=3.0), losses)
    assert (at is None) == (wanted is None)
    assert wanted is None or at is None or wanted[0] <= at <= wanted[1]


@pytest.mark.parametrize("steps", [12, 30, 100])
@pytest.mark.parametrize("sd", [0.1, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_noise_is_not_divergence(steps: int, sd: float, known: bool) -> None:
    """A run that learns slowly, or nothing, under batch noise: at most 1 of 40 is called diverged."""
    rng = random.Random(steps)
    called = 0
    for _ in range(40):
        gain = rng.choice((0.0, 0.5))
        losses = [2.0 - gain * i / steps + rng.gauss(0, sd) for i in range(steps)]
        called += feed(DivergenceWatch(steps, base_loss=2.0 if known else None), losses) is not None
    assert called <= 1


def test_batches_that_alternate_are_not_divergence() -> None:
    losses = [14.0 + 5.0 * (-1) ** i for i in range(60)]
    assert feed(DivergenceWatch(60, base_loss=14.0), losses) is None


def test_a_gradient_that_is_no_number_is_divergence() -> None:
    watch = DivergenceWatch(10)
    assert watch.see(1, 2.0, math.nan, model())
    assert watch.reason is not None
    assert "gradient norm is nan" in watch.reason


def test_the_last_good_weights_come_back() -> None:
    watch = DivergenceWatch(20, base_loss=3.0)
    assert feed(watch, [3.0, 2.0, 1.0] + [9.0] * 17) is not None
    made = model(99.0)
    watch.restore(made)
    assert watch.good_step == 3
    assert torch.equal(made.weight, torch.full((2, 2), 3.0))
    assert watch.reason is not None
    assert "above the 3 of the untuned base" in watch.reason
    assert "that of step 3" in watch.reason


def test_a_resumed_run_that_diverges_at_once_keeps_the_checkpoint() -> None:
    watch = DivergenceWatch(100, base_loss=3.0)
    watch.resume(10, [(i, 3.0 - 0.1 * i) for i in range(1, 16)], model(10.0))
    assert watch.see(11, math.nan, 1.0, model(11.0))
    made = model(99.0)
    watch.restore(made)
    assert watch.good_step == 10
    assert torch.equal(made.weight, torch.full((2, 2), 10.0))


def test_weights_that_are_no_numbers_are_never_the_good_ones() -> None:
    watch = DivergenceWatch(10)
    watch.see(1, 2.0, 1.0, model(1.0))
    assert watch.see(2, 1.9, 1.0, model(math.nan))
    assert watch.good_step == 1
    assert watch.reason is not None
    assert "the adapter holds NaN or Inf" in watch.reason
