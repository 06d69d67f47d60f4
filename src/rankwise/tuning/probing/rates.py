"""A ramp of learning rates: where does this model, on these data, at this rank and rule, stop getting better?

In: a model, rows, a rank, a rule and an alpha. Out: the loss at every rate of one short run in which the rate rises.

The range test of Smith (2017, arXiv:1506.01186) on an adapter, with every loss taken on its batch before the step: on
rows that it has not seen, as long as there are enough for all steps. It finds the cliff of a first few dozen steps,
from which a rate to start with is a fixed part; what a long run with a schedule bears may be higher or lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.tuning.borrowing import borrowed
from rankwise.tuning.probing.adapting import BATCH, order_of, pull_mean, wrapped
from rankwise.tuning.probing.passes import Said, TokenRow

LOWEST: Final = 1e-5
HIGHEST: Final = 1.0
FACTOR: Final = 10 ** (1 / 12)
"""From step to step: twelve steps a decade."""

SPENT: Final = 1.5
"""The ramp ends where the smoothed loss is so many times its lowest."""

SMOOTH: Final = 0.7
"""Weight of the past in the smoothed loss."""


@dataclass(frozen=True, slots=True)
class RatePoint:
    """One step of the ramp.

    Attributes:
        learning_rate: of the step.
        loss: nats a target token of the batch, before the step.
        smoothed: the same, averaged over the past.
    """

    learning_rate: float
    loss: float
    smoothed: float


def ramp(
    model: Any,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    *,
    rank: int,
    scaling: str,
    lora_alpha: float,
    seed: int,
    said: Said | None = None,
) -> tuple[RatePoint, ...]:
    """Raise the rate until the loss has left for good.

    Args:
        model: a causal LM without an adapter; comes back as it was.
        names: modules to adapt.
        rows: examples.
        rank: r of every module.
        scaling: rule.
        lora_alpha: alpha of every module.
        seed: of A and of the order of the rows.
        said: told after every step.
    """
    import torch
    from peft import LoraConfig

    steps = 1 + round(math.log(HIGHEST / LOWEST, FACTOR))
    points: list[RatePoint] = []
    with borrowed(model) as lent, torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=lora_alpha * rank if scaling == "unscaled" else lora_alpha,  # PEFT has no such rule
            use_rslora=scaling == "rslora",
            target_modules=list(names),
        )
        tuned = wrapped(lent, config)
        weights = [p for p in tuned.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=LOWEST, weight_decay=0.0)
        order = order_of(len(rows), steps=steps, size=min(BATCH, len(rows)), seed=seed)
        smoothed = lowest = math.nan
        for step, numbers in enumerate(order):
            rate = LOWEST * FACTOR**step
            optimizer.param_groups[0]["lr"] = rate
            value = pull_mean(tuned, rows, numbers)
            smoothed = value if not points else SMOOTH * smoothed + (1 - SMOOTH) * value
            lowest = smoothed if not points else min(lowest, smoothed)
            if not math.isfinite(value):
                break
            points.append(RatePoint(rate, value, smoothed))
            if smoothed > SPENT * lowest:
                break
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if said is not None:
                said(step + 1)
    return tuple(points)
