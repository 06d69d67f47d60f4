"""A linear layer with inputs of a known kind, in the place of a language model; and grids for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rankwise.tuning.stability.exponents import Fit, exponent
from rankwise.tuning.stability.first_step import FirstStep
from rankwise.tuning.stability.listening import listen
from rankwise.tuning.stability.settings import BAND, Grid
from rankwise.tuning.stability.statistics import Measured


class LinearToy:
    """One frozen layer, y = W x, with the loss -mean(y . target): the gradient of the output is the target.

    "common": every input is the same direction, and the measuring inputs too. "independent": Gaussian inputs, others
    for measuring.
    """

    def __init__(self, inputs: str, *, width: int = 256, rows: int = 64, seed: int = 0, wide: bool = False) -> None:
        import torch

        rng = np.random.default_rng(seed)
        draw = [rng.standard_normal((rows, width)) for _ in range(2)]
        if inputs == "common":
            direction = rng.standard_normal(width)
            draw = [np.outer(1 + 0.1 * rng.random(rows), direction) for _ in range(2)]
        dtype = torch.float64 if wide else torch.float32
        self.x, self.held_out = (torch.tensor(d, dtype=dtype) for d in draw)
        weight = rng.standard_normal((width, width)) / np.sqrt(width)
        self.target = self.x @ torch.tensor(weight, dtype=dtype)
        self.layer = torch.nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False)
        self.copies_seen: list[int] = []

    @property
    def modules(self) -> Mapping[str, Any]:
        return {"layers.0.self_attn.q_proj": self.layer}

    def losses(self, step: int, copies: int) -> Any:
        self.copies_seen.append(copies)
        y = self.layer(self.x.repeat(copies, 1)).view(copies, *self.x.shape)
        return -(y * self.target).sum(dim=2).mean(dim=1)

    def probe(self) -> None:
        import torch

        with torch.no_grad():
            self.layer(self.held_out)

    def probe_rows(self) -> Any:
        return None

    def most_copies(self) -> int:
        return 64


def grid(**changed: Any) -> Grid:
    fields: dict[str, Any] = {
        "ranks": (4, 16, 64),
        "scaling": ("lora", "rslora"),
        "optimizer": ("adamw", "sgd"),
        "init": ("default",),
        "rates": {"adamw": 1e-3, "sgd": 1e-2},
        "steps": (1,),
        "seeds": (0, 1, 2),
        "lora_alpha": 16.0,
        "batch_size": 8,
        "band": BAND,
        "reference_rank": 4,
    }
    return Grid(**(fields | changed))


def first_rows(subject: Any, chosen: Grid) -> Measured:
    """Return the first step by the closed form, ready to be fitted."""
    sites, _ = listen(subject)
    return Measured(chosen, FirstStep(subject, sites, chosen.cells(), eps=chosen.eps).run(), {})


def fitted(measured: Measured, rule: str, optimizer: str, *, init: str = "default", what: str = "rms") -> Fit:
    logs = measured.logs((rule, optimizer, init), 1, "all", what)
    return exponent(measured.grid.ranks, logs.values)
