"""What a user asked of a training run, the presets, and the defaults that fill the rest.

In: flags. Out: a `Settings` in which nothing is left open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rankwise.errors import UsageError
from rankwise.records import PlanRecord, read_record
from rankwise.scaling import SCALINGS

ALL_LINEAR: Final = "all-linear"

INITS: Final[dict[str, bool | str]] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
"""Name -> PEFT's `init_lora_weights`. "default": A Kaiming uniform, of a size that does not depend on r, B zero."""

INITS_REFUSED: Final = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")
"""PEFT's inits that change the base or need data: the file is then not an update of the base that was given."""

OPTIMIZERS: Final[dict[str, str]] = {"adamw": "adamw_torch", "sgd": "sgd", "adafactor": "adafactor"}
"""Short name -> the word of transformers, whose other words are taken as well."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Values for a kind of job, each open to override.

    Attributes:
        rank: r.
        scaling: rule.
        target_modules: which layers.
        epochs: passes over the data.
        why: the reason, in words.
    """

    rank: int
    scaling: str
    target_modules: str
    epochs: float
    why: str


PRESETS: Final[dict[str, Preset]] = {
    "persona": Preset(8, "lora", ALL_LINEAR, 3.0, "a change of tone or format needs few directions"),
    "knowledge": Preset(64, "rslora", ALL_LINEAR, 20.0, "facts need many directions, and many exposures each"),
}

DEFAULT_PRESET: Final = "knowledge"
DEFAULT_ALPHA: Final = 16.0
DEFAULT_RATE: Final = 2e-4
TINY_RATE: Final = 3e-3
DEFAULT_BATCH: Final = 32
DEFAULT_LENGTH: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The flags of `train`; None means not set. `rankwise.train` says what each means."""

    preset: str | None = None
    rank: int | None = None
    lora_alpha: float | None = None
    scaling: str | None = None
    plan: str | None = None
    target_modules: str | tuple[str, ...] | None = None
    init: str = "default"
    lora_dropout: float = 0.0
    optimizer: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = DEFAULT_BATCH
    gradient_accumulation: int = 1
    max_length: int | None = None
    packing: bool = False
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`Options` with every gap filled, as far as that needs neither model nor data.

    Attributes:
        alpha_given: whether alpha was asked for rather than the default.
        rank_given: the same for the rank.
        planned: the plan, read.
    """

    options: Options
    rank: int
    lora_alpha: float
    scaling: str
    target_modules: str | tuple[str, ...]
    learning_rate: float
    epochs: float
    alpha_given: bool
    rank_given: bool
    planned: PlanRecord | None


def settle(options: Options, model: object) -> Settings:
    """Fill the gaps of a user's options and refuse what cannot be.

    The order: a flag, then the plan, then the preset (knowledge, where none is named), then the defaults.

    Raises:
        UsageError: a value is out of its range, unknown, or contradicts another.
        RecordError: the plan cannot be read.
    """
    _check_numbers(options)
    if options.target_modules is not None and not any(options.target_modules):
        raise UsageError("--target-modules is empty; name layers, or write all-linear, or leave it out")
    preset = PRESETS[_known("--preset", options.preset or DEFAULT_PRESET, tuple(PRESETS))]
    planned = None if options.plan is None else read_record(Path(options.plan), PlanRecord)
    if planned is not None and (options.rank is not None or options.lora_alpha is not None or options.target_modules):
        raise UsageError(
            "--plan fixes rank, alpha and modules; leave out --rank, --lora-alpha and --target-modules, or the plan"
        )
    if planned is not None and not any(m.r > 0 for m in planned.modules):
        raise UsageError(f"{options.plan}: no module of this plan has a rank above 0; there is nothing to train")
    scaling = options.scaling or (planned.rule if planned else preset.scaling)
    _known("--scaling", scaling, tuple(SCALINGS))
    if planned is not None and scaling != planned.rule:
        raise UsageError(f"{options.plan} is made for the rule {planned.rule}; --scaling {scaling} contradicts it")
    rate = options.learning_rate
    if rate is None and planned is not None:
        rate = planned.learning_rate
    if rate is None:
        rate = TINY_RATE if model == "rankwise:tiny" else DEFAULT_RATE
    first = next((m for m in planned.modules if m.r > 0), None) if planned else None
    return Settings(
        options=options,
        rank=first.r if first else options.rank or preset.rank,
        lora_alpha=first.lora_alpha if first else options.lora_alpha or DEFAULT_ALPHA,
        scaling=scaling,
        target_modules=options.target_modules or preset.target_modules,
        learning_rate=rate,
        epochs=options.epochs if options.epochs is not None else preset.epochs,
        alpha_given=options.lora_alpha is not None or planned is not None,
        rank_given=options.rank is not None or planned is not None,
        planned=planned,
    )


def _known(flag: str, value: str, names: tuple[str, ...]) -> str:
    if value not in names:
        raise UsageError(f"{flag}: there is no {value!r}; there are: {', '.join(names)}")
    return value


def _check_numbers(o: Options) -> None:
    """Refuse numbers outside their range, before anything is loaded."""
    wholes = {
        "--rank": (o.rank, 1),
        "--steps": (o.steps, 1),
        "--batch-size": (o.batch_size, 1),
        "--gradient-accumulation": (o.gradient_accumulation, 1),
        "--max-length": (o.max_length, 2),
    }
    for flag, (value, least) in wholes.items():
        if value is not None and value < least:
            raise UsageError(f"{flag} must be {least} or more, got {value}")
    if not 0 <= o.seed < 2**32:  # numpy's and transformers' range
        raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {o.seed}")
    above = {"--lora-alpha": o.lora_alpha, "--learning-rate": o.learning_rate, "--epochs": o.epochs}
    for flag, number in above.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise UsageError(f"{flag} must be a finite number above 0, got {number}")
    for flag, number in {"--weight-decay": o.weight_decay, "--max-grad-norm": o.max_grad_norm}.items():
        if not (math.isfinite(number) and number >= 0):
            raise UsageError(f"{flag} must be 0 or more, got {number}")
    for flag, share in {"--lora-dropout": o.lora_dropout, "--warmup": o.warmup}.items():
        if not 0 <= share < 1:
            raise UsageError(f"{flag} is a share, from 0 to below 1, got {share}")
    if o.steps is not None and o.epochs is not None:
        raise UsageError("--steps and --epochs both say how long to train; give one")
    if o.batch_size % o.gradient_accumulation:
        raise UsageError(
            f"--batch-size {o.batch_size} counts all examples of a step and must be a multiple of "
            f"--gradient-accumulation {o.gradient_accumulation}"
        )
    if o.init in INITS_REFUSED:
        raise UsageError(
            f"--init {o.init} changes the base weights or reads data first, so that the saved adapter alone is not "
            f"the update; train does not offer it. There are: {', '.join(INITS)}"
        )
    _known("--init", o.init, tuple(INITS))
