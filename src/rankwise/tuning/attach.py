"""LoRA on a model: the one place where ranks, alphas and a rule become a PEFT config, and where traps are named.

In: settings, and the names and shapes of the modules to adapt. Out: a `LoraConfig`, the scale of every group, findings.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rankwise.errors import UsageError
from rankwise.records import Finding, GroupScale
from rankwise.scaling import scaling
from rankwise.tuning.groups import group_modules
from rankwise.tuning.options import DEFAULT_ALPHA, INITS, Settings

if TYPE_CHECKING:
    from peft import LoraConfig

T = TypeVar("T")

FALLEN: Final = 0.5
"""A scale at or below this, with alpha left at its default, is named."""


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapter of one module.

    Attributes:
        shape: (out_features, in_features) of the weight.
        r: rank.
        lora_alpha: alpha, in the rule's own meaning.
        scaling: the factor on B @ A.
    """

    shape: tuple[int, int]
    r: int
    lora_alpha: float
    scaling: float

    @property
    def params(self) -> int:
        """Entries of A and B."""
        return self.r * sum(self.shape)


def lay_out(settings: Settings, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Lora]:
    """Return the adapter of every module that gets one.

    Args:
        settings: ranks, alphas, the rule, or a plan.
        shapes: module -> (out_features, in_features), of the modules asked for.

    Raises:
        UsageError: the plan and the model do not agree.
    """
    rule = settings.scaling
    if settings.planned is None:
        factor = scaling(rule, settings.lora_alpha, settings.rank)
        return {m: Lora(shape, settings.rank, settings.lora_alpha, factor) for m, shape in shapes.items()}
    laid = {}
    for m in settings.planned.modules:
        if m.r == 0:
            continue
        if m.module not in shapes:
            raise UsageError(f"{settings.options.plan}: the model has no linear layer {m.module}, which the plan names")
        if tuple(m.shape) != shapes[m.module]:
            raise UsageError(
                f"{settings.options.plan}: {m.module} has shape {tuple(m.shape)} in the plan and "
                f"{shapes[m.module]} in the model; the plan was made for another model"
            )
        laid[m.module] = Lora(shapes[m.module], m.r, m.lora_alpha, scaling(rule, m.lora_alpha, m.r))
    return laid


def lora_config(settings: Settings, laid: Mapping[str, Lora]) -> LoraConfig:
    """Return PEFT's config; read back, it gives every module the rank and the scaling of `laid`.

    Keys of patterns are full names, escaped and anchored, so that none can match two modules: PEFT takes the first
    that matches, and sorts them when it saves. PEFT has no rule `unscaled`; alpha times r under alpha / r is the same.
    """
    from peft import LoraConfig

    unscaled = settings.scaling == "unscaled"
    alphas = {m: lora.lora_alpha * lora.r if unscaled else lora.lora_alpha for m, lora in laid.items()}
    rank = Counter(lora.r for lora in laid.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    key = {m: "^" + re.escape(m) for m in laid}
    options = settings.options
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=_plain(alpha),
        use_rslora=settings.scaling == "rslora",
        target_modules=list(laid),
        rank_pattern={key[m]: lora.r for m, lora in laid.items() if lora.r != rank},
        alpha_pattern={key[m]: _plain(a) for m, a in alphas.items() if a != alpha},
        lora_dropout=options.lora_dropout,
        init_lora_weights=INITS[options.init],
    )


def _plain(alpha: float) -> float | int:
    """Write a whole alpha as an integer: some readers of the config take nothing else."""
    return int(alpha) if alpha == int(alpha) else alpha


def check_attached(model: Any, laid: Mapping[str, Lora]) -> None:
    """Refuse a model on which PEFT did not do what was asked: names, ranks and scales are read back.

    Raises:
        UsageError: a module is missing, one too many, or has another rank or scale.
    """
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.r:
            found[name] = (module.r["default"], module.scaling["default"])
    wrong = [
        f"{m}: got {found.get(m)}, wanted {(laid[m].r, laid[m].scaling) if m in laid else None}"
        for m in sorted(set(found) | set(laid))
        if m not in found
        or m not in laid
        or found[m][0] != laid[m].r
        or not math.isclose(found[m][1], laid[m].scaling, rel_tol=1e-9)
    ]
    if wrong:
        raise UsageError(f"PEFT gave (rank, scale) other than asked, in {len(wrong)} modules; first {wrong[0]}")


def group_scales(laid: Mapping[str, Lora]) -> tuple[GroupScale, ...]:
    """Return what LoRA is on every group of modules; a figure that differs within a group is None."""
    rows = []
    for group, modules in group_modules(laid).items():
        members = [laid[m] for m in modules]
        rows.append(
            GroupScale(
                group=group,
                modules=len(members),
                r=_same([lora.r for lora in members]),
                lora_alpha=_same([lora.lora_alpha for lora in members]),
                scaling=_same([lora.scaling for lora in members]),
                params=sum(lora.params for lora in members),
            )
        )
    return tuple(rows)


def _same(values: list[T]) -> T | None:
    return values[0] if len(set(values)) == 1 else None


def traps(settings: Settings, laid: Mapping[str, Lora]) -> tuple[Finding, ...]:
    """Name what commonly goes wrong with rank, alpha and rule, with the figure that matters.

    They warn, and do not judge: whether a small scale starves training depends on optimizer, rate and data.
    """
    found: list[Finding] = []
    low, high = min(lora.scaling for lora in laid.values()), max(lora.scaling for lora in laid.values())
    rank, alpha, rule = settings.rank, settings.lora_alpha, settings.scaling
    if settings.planned is None and rule == "lora" and not settings.alpha_given and low <= FALLEN:
        text = (
            f"alpha is at its default of {DEFAULT_ALPHA:g} while r is {rank}: the scale is {low:g}. Under alpha / r it "
            f"falls as the rank rises, and at the same learning rate less is learnt. Give --lora-alpha {rank} for a "
            f"scale of 1, --scaling rslora for {scaling('rslora', alpha, rank):.3g}, or a higher learning rate."
        )
        found.append(Finding(code="alpha-left-at-default", level="warning", text=text))
    if settings.planned is None and rule == "rslora" and settings.alpha_given and alpha == 2 * rank:
        text = (
            f"alpha = 2 r is a habit of alpha / r, where it gives a scale of 2; under alpha / sqrt(r) it gives "
            f"{high:.3g} at r = {rank}. Give --lora-alpha {2 * math.sqrt(rank):.3g} for a scale of 2."
        )
        found.append(Finding(code="alpha-2r-with-rslora", level="warning", text=text))
    if settings.options.init == "gaussian":
        text = (
            "PEFT's gaussian init gives A a standard deviation of 1 / r, so that the branch shrinks with the rank a "
            "second time, on top of the scaling rule; the default init does not depend on r."
        )
        found.append(Finding(code="gaussian-init", level="warning", text=text))
    above = [m for m, lora in laid.items() if lora.r > min(lora.shape)]
    if above:
        text = (
            f"r is above the smaller side of the weight in {len(above)} of {len(laid)} modules, first {above[0]} of "
            f"shape {laid[above[0]].shape}: the ranks past it cost parameters and reach no further update."
        )
        found.append(Finding(code="rank-above-shape", level="warning", text=text))
    return tuple(found)
