"""What `check` is asked to compare, without gaps.

In: flags. Out: a `Grid`, and the `Cell`s it is made of: one run each, of one rule, optimizer, init, rank
and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rankwise.errors import UsageError
from rankwise.scaling import SCALINGS, scaling
from rankwise.tuning.options import DEFAULT_RATE, TINY_RATE
from rankwise.tuning.stability.starts import STARTS

RANKS: Final = (4, 16, 64)
RULES: Final = ("lora", "rslora")
STEPS: Final = (1, 2, 5, 10, 20)
SEEDS: Final = 5
BATCH: Final = 16
ALPHA: Final = 16.0
BAND: Final = 0.1
"""Exponents from -0.1 to 0.1 are called stable: over a factor of 16 in rank the branch moves by a third at most."""

SGD_RATE: Final = 1e-2
ADAM_EPS: Final = 1e-8
"""torch's default, and what transformers passes on."""

LINEARITY: Final[dict[str, int]] = {"adamw": 1, "sgd": 2}
"""Optimizer -> p: the first step's branch goes like s^p in the factor s on B @ A. SGD's gradient of B carries an s of
its own; Adam divides it away."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: an adapter of one rank on every module, from one draw of A.

    Attributes:
        rule: name in `SCALINGS`.
        optimizer: name in `LINEARITY`.
        init: name in `STARTS`.
        rank: r of every module.
        seed: of the draw of A.
        scale: the factor s on B @ A.
        start: the factor on the unit draw of A.
        rate_a: learning rate of A.
        rate_b: learning rate of B.
    """

    rule: str
    optimizer: str
    init: str
    rank: int
    seed: int
    scale: float
    start: float
    rate_a: float
    rate_b: float

    @property
    def kind(self) -> tuple[str, str, str]:
        """What exponents are fitted for: rule, optimizer and init."""
        return self.rule, self.optimizer, self.init


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """All that is compared.

    Attributes:
        ranks: ascending.
        scaling: rules.
        optimizer: optimizers.
        init: how A begins.
        rates: optimizer -> learning rate, constant over the steps.
        steps: after which the branch is measured, ascending.
        seeds: of the draws of A.
        lora_alpha: alpha of every cell.
        batch_size: examples a step.
        band: exponents within +-band are stable.
        reference_rank: whose learning rate is carried to the others.
        eps: of Adam.
    """

    ranks: tuple[int, ...]
    scaling: tuple[str, ...]
    optimizer: tuple[str, ...]
    init: tuple[str, ...]
    rates: dict[str, float]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    lora_alpha: float
    batch_size: int
    band: float
    reference_rank: int
    eps: float = ADAM_EPS

    def cell(self, kind: tuple[str, str, str], rank: int, seed: int, rate: float | None = None) -> Cell:
        """Return one cell; `rate` in place of the grid's own."""
        rule, optimizer, init = kind
        rate = self.rates[optimizer] if rate is None else rate
        return Cell(
            rule,
            optimizer,
            init,
            rank,
            seed,
            scale=scaling(rule, self.lora_alpha, rank),
            start=STARTS[init].factor(rank),
            rate_a=rate,
            rate_b=rate,
        )

    def kinds(self) -> Iterator[tuple[str, str, str]]:
        """Yield every (rule, optimizer, init)."""
        for optimizer in self.optimizer:
            for init in self.init:
                for rule in self.scaling:
                    yield rule, optimizer, init

    def cells(self) -> tuple[Cell, ...]:
        """Return every cell."""
        return tuple(self.cell(kind, rank, seed) for kind in self.kinds() for rank in self.ranks for seed in self.seeds)


def settle(
    model: object,
    *,
    ranks: Sequence[int],
    scaling: str | Sequence[str],
    optimizer: str | Sequence[str],
    init: str | Sequence[str],
    learning_rate: float | None,
    steps: Sequence[int],
    seeds: int,
    lora_alpha: float,
    batch_size: int,
    band: float,
    reference_rank: int | None,
    seed: int,
) -> Grid:
    """Fill the gaps and refuse what cannot be; see `rankwise.check` for the arguments.

    Raises:
        UsageError: a value is out of its range or unknown.
    """
    chosen = _wholes("--ranks", ranks)
    if len(chosen) < 2:
        raise UsageError(f"--ranks: an exponent needs two different ranks at least, got {', '.join(map(str, ranks))}")
    reference = chosen[0] if reference_rank is None else reference_rank
    if reference not in chosen:
        raise UsageError(f"--reference-rank {reference} is not among --ranks {', '.join(map(str, chosen))}")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise UsageError(f"--seeds is a number of draws of A, 1 or more; got {seeds!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"--batch-size must be a whole number of 1 or more, got {batch_size!r}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")
    for flag, value in {"--lora-alpha": lora_alpha, "--learning-rate": learning_rate, "--band": band}.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{flag} must be a finite number above 0, got {value}")
    inits = _words("--init", init, tuple(STARTS), hint=_START_HINT)
    adam = TINY_RATE if model == "rankwise:tiny" else DEFAULT_RATE
    defaults = {"adamw": adam, "sgd": SGD_RATE}
    optimizers = _words("--optimizer", optimizer, tuple(LINEARITY))
    return Grid(
        ranks=chosen,
        scaling=_words("--scaling", scaling, tuple(SCALINGS)),
        optimizer=optimizers,
        init=inits,
        rates={name: defaults[name] if learning_rate is None else float(learning_rate) for name in optimizers},
        steps=_wholes("--steps", steps),
        seeds=tuple(range(seed, seed + seeds)),
        lora_alpha=float(lora_alpha),
        batch_size=batch_size,
        band=float(band),
        reference_rank=reference,
    )


_START_HINT: Final = (
    "check begins from B = 0, as LoRA does; inits that give B values of its own have no first step here"
)


def _wholes(flag: str, given: Sequence[int]) -> tuple[int, ...]:
    """Return whole numbers of 1 or more, each once, ascending."""
    if not given:
        raise UsageError(f"{flag} is empty; give whole numbers such as 4,16,64")
    wrong = [n for n in given if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if wrong:
        raise UsageError(f"{flag}: wanted whole numbers of 1 or more, got {wrong[0]!r}")
    return tuple(sorted(set(given)))


def _words(flag: str, given: str | Sequence[str], known: tuple[str, ...], hint: str = "") -> tuple[str, ...]:
    """Return words, each once, in their order."""
    words = tuple(dict.fromkeys([given] if isinstance(given, str) else given))
    if not words:
        raise UsageError(f"{flag} is empty; there are: {', '.join(known)}")
    for word in words:
        if word not in known:
            more = f" ({hint})" if hint else ""
            raise UsageError(f"{flag}: there is no {word!r} in check; there are: {', '.join(known)}{more}")
    return words
