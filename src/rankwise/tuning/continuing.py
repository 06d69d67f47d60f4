"""How to go on from an adapter: where a way of going on begins, its steps, and the loss that it comes to.

In: an adapted model, rows of tokens, a move. Out: nats a target token. All moves begin from the same function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.errors import UnsupportedAdapterError
from rankwise.tuning.probing.adapting import order_of, pull_mean
from rankwise.tuning.probing.passes import TokenRow, target_bits, token_bits

WARMUP: Final = 5
"""Steps in which the rate rises: Adam's moments begin anew."""


@dataclass(frozen=True, slots=True)
class Move:
    """A way of going on: "as it is", or a factor on "scale", "rank" or "rate"."""

    name: str
    factor: int = 1

    @property
    def scale(self) -> int:
        """Factor on the scale."""
        return self.factor if self.name == "scale" else 1

    @property
    def rank(self) -> int:
        """Factor on the rank."""
        return self.factor if self.name == "rank" else 1

    @property
    def rate(self) -> int:
        """Factor on the rate."""
        return self.factor if self.name == "rate" else 1


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted layer and its factors as they were loaded: A (r, in), B (out, r)."""

    name: str
    layer: Any
    a: Any
    b: Any
    scaling: float


def layers_of(tuned: Any) -> tuple[Layer, ...]:
    """Return the adapted layers with copies of their factors; refuse what is more than s B A."""
    from peft.tuners.lora import LoraLayer

    found = []
    for name, module in tuned.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if hasattr(module, "parameter_name"):  # PEFT's ParamWrapper: factors of all experts in one
            raise UnsupportedAdapterError(
                f"{name} has an adapter of stacked experts; the counter-test goes on from plain LoRA on linear layers "
                "only. Train one without target_parameters to test the others."
            )
        if "default" not in module.lora_A or module.use_dora.get("default", False):
            kind = "DoRA" if module.use_dora.get("default", False) else "an adapter of an embedding"
            raise UnsupportedAdapterError(
                f"{name} has {kind}; the counter-test goes on from plain LoRA on linear layers (A, B and a scale) only"
            )
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        if a.ndim != 2 or b.ndim != 2:
            raise UnsupportedAdapterError(f"{name} is a convolution; the counter-test goes on from linear layers only")
        found.append(Layer(name, module, a.detach().clone(), b.detach().clone(), float(module.scaling["default"])))
    return tuple(found)


def place(start: Sequence[Layer], move: Move, *, seed: int) -> list[Any]:
    """Put every layer where a move begins; return the weights to train."""
    import torch
    from torch import nn

    draw = torch.Generator().manual_seed(seed)
    weights = []
    for layer in start:
        r, into = layer.a.shape
        out = layer.b.shape[0]
        more = min(r * move.rank, min(out, into)) - r
        a, b = layer.a, layer.b / move.scale
        if move.rank > 1 and more > 0:
            bound = 1 / math.sqrt(into)  # PEFT's: kaiming_uniform with a = sqrt(5)
            rows = (2 * torch.rand(more, into, generator=draw) - 1) * bound
            a = torch.cat([a, rows.to(a)])
            b = torch.cat([b, b.new_zeros(out, more)], dim=1)
        for factors, value in ((layer.layer.lora_A, a), (layer.layer.lora_B, b)):
            factors["default"].weight = nn.Parameter(value.clone())
            weights.append(factors["default"].weight)
        layer.layer.scaling["default"] = layer.scaling * move.scale
    return weights


def take_steps(
    model: Any, weights: list[Any], rows: Sequence[TokenRow], *, steps: int, size: int, rate: float, seed: int
) -> None:
    """Take the steps. The order of the rows hangs on the seed alone, so that all moves see the same batches."""
    import torch

    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    for step, numbers in enumerate(order_of(len(rows), steps=steps, size=min(size, len(rows)), seed=seed), start=1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / WARMUP)
        pull_mean(model, rows, numbers)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def loss_of(model: Any, rows: Sequence[TokenRow]) -> float:
    """Return nats a target token."""
    bits = token_bits(model, rows)
    tokens = sum(len(row.targets) for row in rows)
    return (
        math.log(2) * math.fsum(target_bits(row, each) for row, each in zip(rows, bits, strict=True)) / max(1, tokens)
    )
