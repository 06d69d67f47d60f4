"""How a scale is written down: as an alpha under a rule, or folded into B.

In: the rank and the factor that every module needs. Out: for each the rank, alpha and factor that are written, and what
is left to fold into B. A factor of a power of two folds bit for bit; another is rounded when B is cast, and measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.records import ServedScale
from rankwise.runtimes import RUNTIMES, Runtime
from rankwise.scaling import alpha_for, scaling

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Need:
    """What one unit needs.

    Attributes:
        r: directions that it keeps.
        scaling: the factor on B @ A that is its own.
        before: (rule, lora_alpha, r) of the source, where it says so.
    """

    r: int
    scaling: float
    before: tuple[str, float, int] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What is written for one unit.

    Attributes:
        r: rank of the factors, zeros included.
        lora_alpha: alpha.
        scaling: the factor that follows from them.
        rule: the rule it follows by.
    """

    r: int
    lora_alpha: float
    scaling: float
    rule: str

    @classmethod
    def by_alpha(cls, rule: str, lora_alpha: float, r: int) -> Written:
        """Return what an alpha gives."""
        return cls(r, lora_alpha, scaling(rule, lora_alpha, r), rule)


def exact_alpha(rule: str, wanted: float, r: int) -> float:
    """Return the alpha that gives `wanted` at rank r, to the last bit where there is one.

    alpha_for rounds once, and the rule once more: the neighbours are tried.

    >>> scaling("rslora", exact_alpha("rslora", 0.7, 3), 3)
    0.7
    """
    alpha = alpha_for(rule, wanted, r)
    whole = float(round(alpha))
    up, down = math.nextafter(alpha, math.inf), math.nextafter(alpha, 0.0)
    for candidate in (whole, alpha, up, down):
        if candidate > 0 and scaling(rule, candidate, r) == wanted:
            return candidate
    return alpha


def kept(needs: Sequence[Need], rule: str) -> list[Written]:
    """Keep the factors: every module gets the alpha that gives its factor under the rule, or the one it had."""
    made = []
    for need in needs:
        same = need.before is not None and need.before[::2] == (rule, need.r)
        alpha = need.before[1] if need.before is not None and same else exact_alpha(rule, need.scaling, need.r)
        made.append(Written.by_alpha(rule, alpha, need.r))
    return made


def same_alpha(needs: Sequence[Need], rule: str, lora_alpha: float | None) -> list[Written]:
    """Give every module one alpha, or alpha = r where it is None; the rest is folded into B."""
    return [Written.by_alpha(rule, need.r if lora_alpha is None else lora_alpha, need.r) for need in needs]


def one_rank(needs: Sequence[Need], rank: int, rule: str) -> list[Written]:
    """Fill all modules with zeros to one rank, and keep their factors."""
    return kept([replace(n, r=rank) for n in needs], rule)


def baked(needs: Sequence[Need], rank: int) -> list[Written]:
    """Fill all modules with zeros to one rank, with lora_alpha = r: the factor 1 everywhere."""
    return [Written.by_alpha("lora", float(rank), rank) for _ in needs]


def one_scale(needs: Sequence[Need], rank: int, rule: str) -> list[Written]:
    """Fill all modules with zeros to one rank, and write one factor for all: the most frequent.

    Modules whose factor it is keep theirs to the bit; the others have the ratio folded into B.
    """
    common = Counter(n.scaling for n in needs).most_common(1)[0][0]
    written = Written.by_alpha(rule, exact_alpha(rule, common, rank), rank)
    return [written for _ in needs]


def power_of_two(factor: float) -> bool:
    """Tell whether a factor only moves the exponent."""
    return factor > 0 and math.frexp(factor)[0] == 0.5


def folded(b: Array, factor: float) -> Array:
    """Return factor * B: in its own dtype where that is exact, else in float64."""
    if factor == 1.0:
        return b
    if power_of_two(abs(factor)):
        with np.errstate(over="ignore", under="ignore"):
            moved: Array = b * b.dtype.type(factor)
            if np.array_equal(moved.astype(np.float64), b.astype(np.float64) * factor):
                return moved
    return b.astype(np.float64) * factor


def same_float32(first: float, second: float) -> bool:
    """Tell whether two factors are one number in float32, in which every runtime applies them at most."""
    return bool(np.float32(first) == np.float32(second))


def served(written: Sequence[Written], readers: Mapping[str, bool]) -> list[ServedScale]:
    """Return what runtimes would do with the files.

    Args:
        written: all units.
        readers: the runtimes that read such files, each with whether it finds every module's alpha in the weights.
    """
    found = []
    for name, alpha_stored in readers.items():
        factors = applied(RUNTIMES[name], written, alpha_stored=alpha_stored)
        ratios = [a / w.scaling for a, w in zip(factors, written, strict=True)]
        wrong = sum(not same_float32(ratio, 1.0) for ratio in ratios)
        right = not wrong and loads(RUNTIMES[name], written)
        found.append(ServedScale(runtime=name, right=right, lowest=min(ratios), highest=max(ratios), wrong=wrong))
    return found


def loads(row: Runtime, written: Sequence[Written]) -> bool:
    """Tell whether a runtime takes such ranks and alphas at all."""
    if row.integer_alpha and any(w.lora_alpha != int(w.lora_alpha) for w in written):
        return False
    return row.accepts is None or max(w.r for w in written) <= max(row.accepts)


def applied(row: Runtime, written: Sequence[Written], *, alpha_stored: bool = False) -> list[float]:
    """Return the factor that a runtime applies to each unit.

    The config's own r and alpha are the most frequent ones, as `peft_config` writes them.
    """
    global_r = Counter(w.r for w in written).most_common(1)[0][0]
    global_alpha = Counter(w.lora_alpha for w in written).most_common(1)[0][0]
    return [
        row.applied(
            w.r,
            w.lora_alpha,
            global_r=global_r,
            global_alpha=global_alpha,
            use_rslora=w.rule == "rslora",
            alpha_stored=alpha_stored,
        )
        for w in written
    ]


def right_in(row: Runtime, written: Sequence[Written], *, alpha_stored: bool = False) -> bool:
    """Tell whether a runtime applies what is meant, to every unit, and can read every alpha."""
    if not loads(row, written):
        return False
    factors = applied(row, written, alpha_stored=alpha_stored)
    return all(same_float32(a, w.scaling) for a, w in zip(factors, written, strict=True))


Way = tuple[str, Callable[[], list[Written]]]


def for_runtime(row: Runtime, needs: Sequence[Need], rank: int, rule: str) -> tuple[str, list[Written]]:
    """Return the least change after which a runtime applies what is meant, and its name.

    Args:
        row: the runtime.
        needs: all units.
        rank: the one rank to pad to, if it comes to that.
        rule: the rule of the source.
    """
    ways: tuple[Way, ...] = (
        ("kept", lambda: kept(needs, rule)),
        ("lora", lambda: kept(needs, "lora")),
        ("padded", lambda: one_rank(needs, rank, "lora")),
    )
    mixed = row.accepts is not None and len({n.r for n in needs}) > 1  # a cap is held against one rank for all
    for way, make in ways:
        if mixed and way != "padded":
            continue
        written = make()
        if right_in(row, written):
            return way, written
    return "baked", baked(needs, rank)
