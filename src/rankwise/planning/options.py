"""What was asked of `plan`, checked: the choice, weights, a runtime's cap, and the factor.

In: arguments. Out: the same in the words of the record, or a refusal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from rankwise.errors import ConfigError, UsageError
from rankwise.records import PlanChoice
from rankwise.runtimes import padded_rank, runtime
from rankwise.scaling import SCALINGS


def checked_choice(
    *,
    budget: int | str | None,
    energy: float | None,
    relative_error: float | None,
    signal: bool,
    rank: int | None,
    min_rank: int,
    max_rank: int | None,
    multiple_of: int,
    fuse: bool,
    per_module: bool,
    within_signal: bool,
    relative: bool,
    weighted: bool,
) -> PlanChoice:
    """Return the one choice that was made, in the words of the record.

    Raises:
        UsageError: none or several were made, a number is out of its range, or two options do not go together.
    """
    asked = {
        "--budget": budget,
        "--energy": energy,
        "--relative-error": relative_error,
        "--signal": signal or None,
        "--rank": rank,
    }
    given = [flag for flag, value in asked.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "say in one way how ranks are chosen: --budget PARAMS|rank:N, --energy SHARE, --relative-error X, --signal "
            f"or --rank N; got {' and '.join(given) or 'none of them'}"
        )
    kind = given[0].removeprefix("--").replace("-", "_")
    value = {"energy": energy, "relative_error": relative_error, "rank": rank}.get(kind)
    choice = PlanChoice(
        kind=kind,
        value=None if value is None else float(value),
        text=_text(budget, value),
        per_module=per_module,
        within_signal=within_signal,
        relative=relative,
        weighted=weighted,
        min_rank=min_rank,
        max_rank=max_rank,
        multiple_of=multiple_of,
        fuse=fuse,
    )
    _check_numbers(choice)
    _check_together(given[0], choice)
    return choice


def _text(budget: int | str | None, value: float | None) -> str:
    """Return what was asked for as it was asked: a share of 0.99999999 is not 1, and a rank has no exponent."""
    if budget is not None:
        return str(budget).strip()
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.12g}"


def _check_numbers(choice: PlanChoice) -> None:
    """Refuse numbers outside their range."""
    value = choice.value
    if choice.kind == "energy" and not (value is not None and 0 < value <= 1):
        raise UsageError(f"--energy is a share in (0, 1], got {value}")
    if choice.kind == "relative_error" and not (value is not None and 0 <= value < 1):
        raise UsageError(f"--relative-error must be in [0, 1), got {value}")
    for flag, number, least in (
        ("--rank", value if choice.kind == "rank" else None, 1),
        ("--min-rank", choice.min_rank, 0),
        ("--max-rank", choice.max_rank, 1),
        ("--multiple-of", choice.multiple_of, 1),
    ):
        if number is not None and number < least:
            raise UsageError(f"{flag} must be {least} or more, got {number:g}")
    top = choice.max_rank
    if top is not None and top < choice.min_rank:
        raise UsageError(f"--max-rank {top} is below --min-rank {choice.min_rank}")
    if top is not None and top < choice.multiple_of:
        raise UsageError(f"--max-rank {top} is below --multiple-of {choice.multiple_of}")
    if top is not None and top - top % choice.multiple_of < choice.min_rank:
        raise UsageError(
            f"no multiple of {choice.multiple_of} lies between --min-rank {choice.min_rank} and --max-rank {top}; move "
            "one of the three"
        )


def _check_together(flag: str, choice: PlanChoice) -> None:
    """Refuse options that would change nothing."""
    shaped = {
        "--min-rank": choice.min_rank > 0,
        "--max-rank": choice.max_rank is not None,
        "--multiple-of": choice.multiple_of > 1,
        "--fuse": choice.fuse,
    }
    summed = {"--relative": choice.relative, "--weights": choice.weighted}
    alone = {"--within-signal": choice.within_signal, "--per-module": choice.per_module}
    refused = {
        "--rank": shaped | summed | alone,
        "--signal": summed | alone,
        "--budget": {"--per-module": choice.per_module},
    }.get(flag, summed if choice.per_module else {})
    wrong = [name for name, there in refused.items() if there]
    if wrong:
        under = f"{flag} --per-module" if choice.per_module and flag.startswith(("--energy", "--rel")) else flag
        raise UsageError(f"{' and '.join(wrong)} would change nothing under {under}; leave out one of the two")


def checked_weights(weights: Mapping[str, float] | str | PathLike[str] | None) -> Mapping[str, float]:
    """Return patterns and their weights, read from a JSON file where a path was given."""
    if weights is None or isinstance(weights, Mapping):
        return weights or {}
    path = Path(weights)
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--weights: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--weights: {path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ConfigError(f'--weights: {path} is no object of the form {{"PATTERN": WEIGHT, ...}}')
    return found


def within_cap(serve: str, rank: int | None, max_rank: int | None) -> int | None:
    """Return the largest rank that a runtime takes, and the user allows."""
    accepts = runtime(serve).accepts
    if accepts is None:
        return max_rank
    if rank is not None:
        padded_rank(serve, rank)  # refuses a rank past the cap
    return min(max(accepts), max(accepts) if max_rank is None else max_rank)


def check_scale(
    rule: str, scale: float | None, lora_alpha: float | None, reference_rank: int | None, learning_rate: float | None
) -> None:
    """Refuse a factor, an alpha or a rate that cannot be, or two that say the same.

    Raises:
        UsageError: which, and why.
    """
    if rule not in SCALINGS:
        raise UsageError(f"--scaling: there is no {rule!r}; there are: {', '.join(SCALINGS)}")
    if scale is not None and lora_alpha is not None:
        raise UsageError("--scale and --lora-alpha both say the factor on B A; give one")
    if reference_rank is not None and lora_alpha is None:
        raise UsageError("--reference-rank is the rank at which --lora-alpha is read; give both, or --scale")
    if reference_rank is not None and reference_rank < 1:
        raise UsageError(f"--reference-rank must be 1 or more, got {reference_rank}")
    for flag, number in (("--scale", scale), ("--lora-alpha", lora_alpha), ("--learning-rate", learning_rate)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise UsageError(f"{flag} must be a finite number above 0, got {number}")
