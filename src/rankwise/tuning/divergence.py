"""Divergence: when a loss has left for good, and the last adapter from before.

In: logged losses. Out: a verdict in words, and copies of the trainable weights while all was well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

LOST: Final = 0.5
"""A loss that has given back this share of what it had gained is leaving."""

SLACK: Final = 0.1
"""Nats per token that are noise, on top of that."""

PATIENCE_SHARE: Final = 0.1
PATIENCE_LEAST: Final = 3
"""It has left when it stays so for this share of the run, and for at least so many points."""


@dataclass
class DivergenceWatch:
    """Watches the logged loss of one run.

    Diverged means: the loss, the gradient or a weight is no finite number; or, for a tenth of the run, the loss stands
    above its lowest value by half of all it had gained and a tenth of a nat. A spike that heals is not divergence.

    Attributes:
        total_steps: of the run.
        reason: why the run is held to have diverged, or None.
        good_step: step of the last point at which all was well.
        good: trainable weights at that point, on the CPU.
    """

    total_steps: int
    reason: str | None = None
    good_step: int = 0
    good: dict[str, Any] = field(default_factory=dict)
    _first: float | None = None
    _lowest: float = math.inf
    _since: int | None = None
    _points: int = 0

    def see(self, step: int, loss: float, grad_norm: float | None, model: Any) -> bool:
        """Take in one logged loss, a mean since the point before; return whether the run has diverged."""
        if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
            self.reason = f"at step {step} {what}; the adapter kept is that of step {self.good_step}"
            return True
        if not self._finite_weights(model):
            self.reason = (
                f"at step {step} the adapter holds NaN or Inf; the adapter kept is that of step {self.good_step}"
            )
            return True
        if self._first is None:
            self._first = loss
        self._lowest = min(self._lowest, loss)
        bar = self._lowest + LOST * (self._first - self._lowest) + SLACK
        if loss <= bar:
            self._since, self._points = None, 0
            self._keep(step, model)
            return False
        self._points += 1
        if self._since is None:
            self._since = step
        long = step - self._since >= PATIENCE_SHARE * self.total_steps
        if not (long and self._points >= PATIENCE_LEAST):
            return False
        self.reason = (
            f"the loss was {self._first:.3g} at first and {self._lowest:.3g} at best, and since step {self._since} it "
            f"has stayed above {bar:.3g}; at step {step} it is {loss:.3g}. "
            f"The adapter kept is that of step {self.good_step}"
        )
        return True

    def _keep(self, step: int, model: Any) -> None:
        self.good_step = step
        self.good = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}

    @staticmethod
    def _finite_weights(model: Any) -> bool:
        """Tell whether every trainable weight is finite; one read of the device."""
        import torch

        sums = [p.detach().float().abs().amax() for p in model.parameters() if p.requires_grad and p.numel()]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())

    def restore(self, model: Any) -> None:
        """Put the last good weights back; the initial ones where there were none, since B is zero there."""
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
