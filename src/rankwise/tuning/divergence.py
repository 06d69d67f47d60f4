"""Divergence: when a run has become worse than no training, and the last adapter from before.

In: logged losses. Out: a verdict in words, and copies of the trainable weights while all was well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

SHARE: Final = 0.1
LEAST: Final = 5
"""The mean that is judged is over this share of the run, and over at least so many points."""

SIGMAS: Final = 5.0
FEWEST: Final = 10
SLACK: Final = 0.05
"""It has to stand above the base by so many standard errors of such a mean, and by at least so many nats per token; not
judged on fewer points than `FEWEST`."""


@dataclass
class DivergenceWatch:
    """Watches the logged loss of one run.

    Diverged means: the loss, the gradient or a weight is no finite number; or the mean loss over the last tenth of the
    run is above that of the untuned base by five standard errors, or back at it after it had fallen well
    below. The noise is taken from the differences of
    neighbouring points. A spike that heals is not divergence, nor is a loss that has only stopped falling.

    Attributes:
        total_steps: of the run.
        base_loss: nats per trained token of the untuned model on the training data; None takes the mean of the first
            points instead.
        reason: why the run is held to have diverged, or None.
        good_step: step of the last point that was no worse than the base.
        good: trainable weights at that point, on the CPU.
    """

    total_steps: int
    base_loss: float | None = None
    reason: str | None = None
    good_step: int = 0
    good: dict[str, Any] = field(default_factory=dict)
    _best: float = math.inf
    _points: list[tuple[int, float]] = field(default_factory=list)

    def resume(self, step: int, points: Sequence[tuple[int, float]], model: Any) -> None:
        """Go on at a checkpoint: its weights are good, and the points before it are known."""
        self._points = [(s, loss) for s, loss in points if s <= step and math.isfinite(loss)]
        self._keep(step, model)

    def see(self, step: int, loss: float, grad_norm: float | None, model: Any) -> bool:
        """Take in one logged loss, a mean since the point before; return whether the run has diverged."""
        bad = None
        if not math.isfinite(loss):
            bad = f"the loss is {loss}"
        elif grad_norm is not None and not math.isfinite(grad_norm):
            bad = f"the gradient norm is {grad_norm}"
        elif not _finite_weights(model):
            bad = "the adapter holds NaN or Inf"
        if bad is not None:
            self.reason = f"at step {step} {bad}; the adapter kept is that of step {self.good_step}"
            return True
        self._points.append((step, loss))
        start, margin = self._start(), self._margin()
        if start is None or loss <= (start if math.isinf(self._best) else min(start, self._best + margin)):
            self._keep(step, model)
        window = self._window()
        if start is None or len(self._points) < FEWEST or step - window[0][0] < SHARE * self.total_steps * 0.8:
            return False
        mean = statistics.fmean(value for _, value in window)
        self._best = min(self._best, mean)
        whose = "the untuned base" if self.base_loss is not None else "the first steps"
        if self._best < start - 2 * margin and mean > start - margin:
            self.reason = (
                f"the loss had fallen to {self._best:.3g}, and from step {window[0][0]} to {step} it was {mean:.3g} in "
                f"the mean, back at the {start:.3g} of {whose}. The adapter kept is that of step {self.good_step}"
            )
            return True
        if mean <= start + margin:
            return False
        self.reason = (
            f"from step {window[0][0]} to step {step} the loss was {mean:.3g} in the mean, above the {start:.3g} of "
            f"{whose} by more than the noise ({margin:.2g}). The adapter kept is that of step {self.good_step}"
        )
        return True

    def _window(self) -> list[tuple[int, float]]:
        """Return the last points: a tenth of the run, and not fewer than `LEAST`."""
        last = self._points[-1][0]
        long = sum(step > last - SHARE * self.total_steps for step, _ in self._points)
        return self._points[-max(LEAST, long) :]

    def _start(self) -> float | None:
        if self.base_loss is not None:
            return self.base_loss
        if len(self._points) < 2 * LEAST:
            return None
        return statistics.fmean(loss for _, loss in self._points[:LEAST])

    def _margin(self) -> float:
        losses = [loss for _, loss in self._points]
        if len(losses) < 3:
            return math.inf
        steps = [b - a for a, b in pairwise(losses)]
        sigma = math.sqrt(statistics.fmean(d * d for d in steps) / 2)
        sigma *= 1 + 2 / math.sqrt(len(steps))  # taken from few points it may be low
        error = math.sqrt(1 / len(self._window()) + (0 if self.base_loss is not None else 1 / LEAST))
        return max(SLACK, SIGMAS * sigma * error)

    def _keep(self, step: int, model: Any) -> None:
        self.good_step = step
        self.good = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}

    def restore(self, model: Any) -> None:
        """Put the last good weights back; where there were none, those of the start, at which B is zero."""
        import torch

        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    if name in self.good:
                        p.copy_(self.good[name])
                    elif "lora_B" in name:
                        p.zero_()
                    else:
                        p.nan_to_num_(0.0, 0.0, 0.0)


def _finite_weights(model: Any) -> bool:
    """Tell whether every trainable weight is finite; one read of the device."""
    import torch

    sums = [p.detach().float().abs().amax() for p in model.parameters() if p.requires_grad and p.numel()]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())
