"""When a loss has left for good: planted curves, and what is kept."""

from __future__ import annotations

import math

import pytest

from rankwise.tuning.divergence import DivergenceWatch

torch = pytest.importorskip("torch", reason="torch comes with the train extra")


def model(value: float = 1.0) -> torch.nn.Module:
    made = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        made.weight.fill_(value)
    return made


def feed(watch: DivergenceWatch, losses: list[float], every: int = 1) -> int | None:
    """Return the step at which the watch calls divergence, and None where it does not."""
    for i, loss in enumerate(losses):
        step = (i + 1) * every
        if watch.see(step, loss, 1.0, model(float(step))):
            return step
    return None


CURVES: dict[str, tuple[list[float], int | None]] = {
    "falls": ([3 * 0.95**i for i in range(100)], None),
    "flat": ([2.0] * 100, None),
    "flat and noisy": ([2.0 + 0.09 * (-1) ** i for i in range(100)], None),
    "a spike that heals": ([3 * 0.95**i for i in range(50)] + [9.0] * 8 + [0.2] * 42, None),
    "rises from the start": ([2.0 + 0.2 * i for i in range(100)], 12),
    "falls, then leaves": ([3.0 * 0.9**i for i in range(40)] + [5.0] * 60, 51),
    "falls, then gives half back": ([3.0, 2.0, 1.0] + [2.3] * 97, 14),
    "falls, then gives a third back": ([3.0, 2.0, 1.0] + [1.7] * 97, None),
    "not a number": ([3.0, 2.0, math.nan, 1.0], 3),
    "infinite": ([3.0, math.inf], 2),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves(name: str) -> None:
    losses, wanted = CURVES[name]
    assert feed(DivergenceWatch(100), losses) == wanted


def test_a_gradient_that_is_no_number_is_divergence() -> None:
    watch = DivergenceWatch(10)
    assert watch.see(1, 2.0, math.nan, model())
    assert watch.reason is not None
    assert "gradient norm is nan" in watch.reason


def test_the_last_good_weights_come_back() -> None:
    watch = DivergenceWatch(20)
    at = feed(watch, [3.0, 2.0, 1.0] + [9.0] * 17)
    assert at is not None
    made = model(99.0)
    watch.restore(made)
    assert watch.good_step == 3
    assert torch.equal(made.weight, torch.full((2, 2), 3.0))
    assert watch.reason is not None
    assert "since step 4" in watch.reason
    assert "step 3" in watch.reason


def test_weights_that_are_no_numbers_are_never_the_good_ones() -> None:
    watch = DivergenceWatch(10)
    watch.see(1, 2.0, 1.0, model(1.0))
    assert watch.see(2, 1.9, 1.0, model(math.nan))
    assert watch.good_step == 1
    assert watch.reason is not None
    assert "the adapter holds NaN or Inf" in watch.reason
