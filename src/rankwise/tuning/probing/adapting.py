"""A brief adaptation: a low-rank adapter learns the form of the data until held-out rows stop getting cheaper.

In: a model, rows to learn from, rows to judge by. Out: the model with the adapter of its best moment on it.

This is a measurement and no training run: it has to stop where other rows stop gaining, which no trainer is asked for
here, and nothing of it is kept.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.tuning.borrowing import borrowed, quiet
from rankwise.tuning.probing.passes import (
    Said,
    TokenRow,
    batch_of,
    parts,
    summed_loss,
    target_bits,
    token_bits,
    vocabulary_of,
)

RANK: Final = 4
ALPHA: Final = 16.0
BATCH: Final = 16
JUDGES: Final = 96
"""Held-out rows that say when to stop; all are scored in the end."""

EVERY: Final = 10
"""Steps between two looks at them."""

PATIENCE: Final = 3
"""Looks without a gain before it ends."""

LEAST_GAIN: Final = 0.002
"""Share of the held-out bits that has to be gained for a look to count."""


@dataclass(frozen=True, slots=True)
class Look:
    """Held-out bits a target token after some steps."""

    step: int
    bits_per_token: float


@dataclass(frozen=True, slots=True)
class Adapted:
    """What an adaptation came to.

    Attributes:
        steps: of the moment that is kept; 0 where no step gained anything.
        looks: at held-out rows, the first before any step.
        model: with the adapter on it, in evaluation mode.
    """

    steps: int
    looks: tuple[Look, ...]
    model: Any


def pull_mean(model: Any, rows: Sequence[TokenRow], numbers: Sequence[int]) -> float:
    """Add the gradient of the mean loss of some rows to the weights; return it, nats a target token.

    Rows that do not fit into memory together go one part after another: the sum is the same.
    """
    device = model.get_input_embeddings().weight.device
    targets = max(1, sum(len(rows[i].targets) for i in numbers))
    value = 0.0
    for part in parts(rows, numbers, vocabulary_of(model)):
        loss = summed_loss(model, batch_of(rows, part, device)) / targets
        loss.backward()
        value += float(loss.detach())
    return value


def wrapped(model: Any, config: Any) -> Any:
    """Put an adapter on a model, without PEFT's words about what it turns over in Conv1D layers."""
    from peft import get_peft_model

    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        tuned = get_peft_model(model, config)
    return tuned.eval()  # no dropout: what is judged is what was trained


def order_of(count: int, *, steps: int, size: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Return the rows of every step: all once in a random order before any comes again."""
    rng = random.Random(seed)
    numbers: list[int] = []
    while len(numbers) < steps * size:
        epoch = list(range(count))
        rng.shuffle(epoch)
        numbers += epoch
    return tuple(tuple(numbers[s * size : (s + 1) * size]) for s in range(steps))


@contextlib.contextmanager
def adapted(
    model: Any,
    names: Sequence[str],
    learn: Sequence[TokenRow],
    judge: Sequence[TokenRow],
    *,
    rank: int = RANK,
    learning_rate: float,
    most_steps: int,
    seed: int,
    said: Said | None = None,
) -> Iterator[Adapted]:
    """Lend the model with an adapter that has learnt the form of `learn`; the base comes back untouched.

    Args:
        model: a causal LM without an adapter.
        names: modules to adapt.
        learn: rows to learn from.
        judge: rows to judge by.
        rank: r of every module.
        learning_rate: of AdamW, constant after a warm-up of five steps.
        most_steps: end here at the latest; 0 lends the bare model.
        seed: of A and of the order of the rows.
        said: told after every step.
    """
    import torch
    from peft import LoraConfig

    judges = list(judge)
    if len(judges) > JUDGES:
        judges = random.Random(seed).sample(judges, JUDGES)
    with borrowed(model) as lent, torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=ALPHA, target_modules=list(names))
        tuned = wrapped(lent, config)
        weights = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
        looks = [Look(0, _judged(tuned, judges))]
        best = 0, looks[0].bits_per_token, _copy(weights)
        optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=0.0)
        size = min(BATCH, len(learn))
        missed = 0
        for step, numbers in enumerate(order_of(len(learn), steps=most_steps, size=size, seed=seed), start=1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, step / 5)
            pull_mean(tuned, learn, numbers)
            torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if said is not None:
                said(step)
            if step % EVERY and step != most_steps:
                continue
            looks.append(Look(step, _judged(tuned, judges)))
            now = looks[-1].bits_per_token
            missed = 0 if now < best[1] * (1 - LEAST_GAIN) else missed + 1
            if now < best[1]:
                best = step, now, _copy(weights)
            if missed >= PATIENCE or not math.isfinite(now):
                break
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(best[2][name])
        yield Adapted(best[0], tuple(looks), tuned)


def _copy(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in weights.items()}


def _judged(model: Any, rows: Sequence[TokenRow]) -> float:
    bits = token_bits(model, rows)
    tokens = sum(len(row.targets) for row in rows)
    return math.fsum(target_bits(row, each) for row, each in zip(rows, bits, strict=True)) / max(1, tokens)
