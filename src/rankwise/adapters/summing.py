"""What is worth saying about an extraction: findings, worst first.

In: what was extracted and what was not. Out: findings with a code, a level and words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from rankwise.adapters.choosing import Choice
from rankwise.adapters.layout import is_old_expert
from rankwise.checkpoints.model import Checkpoint
from rankwise.deltas import Pairing
from rankwise.records import ExtractedModule, Finding, Level, NotExtracted

MUCH: Final = 0.01
"""Share of the squared norm of all changes that, left out, is worth a warning."""

CAST: Final = 1.05
"""Error after the cast over the error before it, from which the dtype is the larger part of what can be mended."""

POOR: Final = 0.5
"""Relative error of a module above which less than three quarters of its energy is kept."""

MISSED: Final = 1.01
"""Relative error over the one asked for, from which the cast has missed what was asked for."""

_ORDER: Final[dict[Level, int]] = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True, slots=True)
class Names:
    """What is known of the two checkpoints beside the weights."""

    differ: bool
    pairing: Pairing
    before: Checkpoint
    after: Checkpoint


def _list(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def findings(
    modules: Sequence[ExtractedModule],
    left_out: Sequence[NotExtracted],
    choice: Choice,
    names: Names,
    carried: float | None,
) -> tuple[Finding, ...]:
    """Return all findings of one extraction, worst first.

    Args:
        modules: what is in the adapter as factors.
        left_out: what changed and is not.
        choice: how ranks were chosen.
        names: of the two checkpoints.
        carried: share of the squared norm of all changes that is in the adapter.
    """
    found = [*names.before.findings, *names.after.findings, *names.pairing.findings]
    rules: tuple[Callable[[], Finding | None], ...] = (
        lambda: _not_carried(left_out, carried),
        lambda: _not_finite(left_out),
        lambda: _poor(modules),
        lambda: _lossy_cast(modules),
        lambda: _goal_missed(modules, choice),
        lambda: _no_edge(modules, choice),
        lambda: _capped(modules),
        lambda: _rank_zero(left_out),
        lambda: _tied(modules),
        lambda: _other_names(names),
        lambda: _old_experts(modules, choice),
    )
    found += [finding for rule in rules if (finding := rule()) is not None]
    return tuple(sorted(found, key=lambda f: _ORDER[f.level]))


def _not_carried(left_out: Sequence[NotExtracted], carried: float | None) -> Finding | None:
    if not left_out:
        return None
    kinds: dict[str, list[NotExtracted]] = {}
    for n in left_out:
        kinds.setdefault(n.reason, []).append(n)
    parts = []
    for reason, members in kinds.items():
        norms = [n.relative_norm for n in members if n.relative_norm is not None]
        size = f", relative norm up to {max(norms):.2g}" if norms else ""
        parts.append(f"{len(members)} ({_list([n.module for n in members], 2)}{size}): {reason}")
    text = f"{len(left_out)} tensors changed and are not in the adapter. " + "; ".join(parts) + "."
    if carried is not None:
        text += f" The adapter carries {carried:.2%} of the squared norm of all that changed"
        unknown = sum(n.energy is None for n in left_out)
        text += f", without {unknown} whose change has no norm." if unknown else "."
    return Finding(code="left-out", level="warning", text=text)


def _not_finite(left_out: Sequence[NotExtracted]) -> Finding | None:
    broken = [n.module for n in left_out if "NaN" in n.reason]
    if not broken:
        return None
    text = f"{_list(broken)}: infinity or NaN in one of the checkpoints; the module is not in the adapter."
    return Finding(code="not-finite", level="error", text=text)


def _poor(modules: Sequence[ExtractedModule]) -> Finding | None:
    poor = [m for m in modules if m.relative_error_uncast > POOR]  # what the cast loses is told apart
    if not poor:
        return None
    worst = max(poor, key=lambda m: m.relative_error_uncast)
    text = (
        f"{len(poor)} of {len(modules)} modules lose more than half of their delta's norm; the most is "
        f"{worst.relative_error_uncast:.1%} in {worst.module} at rank {worst.r}, where no factors of that rank lose "
        f"less than {worst.least_relative_error:.1%}. The update is not of low rank there, or it is mostly rounding: "
        "look at it with `rankwise inspect`."
    )
    return Finding(code="low-rank-misses", level="warning", text=text)


def _lossy_cast(modules: Sequence[ExtractedModule]) -> Finding | None:
    lossy = [m for m in modules if m.relative_error > CAST * m.relative_error_uncast and m.relative_error > 1e-6]
    if not lossy:
        return None
    worst = max(lossy, key=lambda m: m.relative_error)
    text = (
        f"The dtype of the factors adds to the error of {len(lossy)} modules; in {worst.module} it is "
        f"{worst.relative_error:.2g} where float32 factors have {worst.relative_error_uncast:.2g}. "
        "--dtype float32 keeps that."
    )
    lost = worst.relative_error > POOR >= worst.relative_error_uncast  # float16 that underflowed
    return Finding(code="cast-error", level="warning" if lost else "info", text=text)


def _goal_missed(modules: Sequence[ExtractedModule], choice: Choice) -> Finding | None:
    if choice.kind not in ("energy", "relative-error"):
        return None
    wanted = float(choice.wanted or 0.0)
    most = wanted if choice.kind == "relative-error" else math.sqrt(1 - wanted)
    missed = [m for m in modules if m.relative_error > MISSED * most and m.relative_error > 1e-6]
    if not missed:
        return None
    worst = max(missed, key=lambda m: m.relative_error)
    text = (
        f"--{choice.kind} {wanted:g} allows a relative error of {most:.2g}; after the cast {len(missed)} of "
        f"{len(modules)} modules have more, up to {worst.relative_error:.2g} in {worst.module}, which has "
        f"{worst.relative_error_uncast:.2g} before it. --dtype float32 keeps what was asked for."
    )
    return Finding(code="goal-missed", level="warning", text=text)


def _no_edge(modules: Sequence[ExtractedModule], choice: Choice) -> Finding | None:
    full = [m for m in modules if m.r == min(m.shape)]
    if choice.kind != "signal" or not full:
        return None
    text = (
        f"{len(full)} of {len(modules)} modules ({_list([m.module for m in full])}) are above the noise edge in every "
        "direction, so their factors are complete and larger than the weight. That is so for pairs stored in float32, "
        "whose rounding is small: choose by --energy or --relative-error there."
    )
    return Finding(code="all-signal", level="warning", text=text)


def _capped(modules: Sequence[ExtractedModule]) -> Finding | None:
    cut = [m.module for m in modules if any("was cut" in note for note in m.notes)]
    if not cut:
        return None
    text = (
        f"The rank was cut to the smaller side of the weight in {len(cut)} modules ({_list(cut)}): they are complete."
    )
    return Finding(code="rank-capped", level="info", text=text)


def _rank_zero(left_out: Sequence[NotExtracted]) -> Finding | None:
    zero = [n.module for n in left_out if n.reason.startswith(("rank 0", "no singular value"))]
    if not zero:
        return None
    text = f"{len(zero)} modules need no rank and are not in the adapter: {_list(zero)}."
    return Finding(code="rank-zero", level="info", text=text)


def _tied(modules: Sequence[ExtractedModule]) -> Finding | None:
    heads = [m for m in modules if any(note.startswith("tied to") for note in m.notes)]
    if not heads:
        return None
    text = (
        f"{heads[0].module} is {heads[0].notes[0]}. PEFT adds an adapter of a table to the lookup alone, so the head "
        "has its own copy of the factors. PEFT warns of this when it loads; do not merge the adapter into a model that "
        "goes on tying the two, or both copies are added to one table."
    )
    return Finding(code="tied-head", level="warning", text=text)


def _other_names(names: Names) -> Finding | None:
    if not names.differ:
        return None
    text = (
        "Base and tuned checkpoint name their weights differently. The adapter has the base's names; where one name is "
        "the other with a prefix before it, it has the longer, which is that of the model with its head."
    )
    return Finding(code="names-differ", level="info", text=text)


def _old_experts(modules: Sequence[ExtractedModule], choice: Choice) -> Finding | None:
    experts = [m for m in modules if is_old_expert(m.module)]
    if not experts:
        return None
    ranks = {m.r for m in experts}
    if len(ranks) == 1 and choice.kind == "rank":
        return None
    text = (
        f"{len(experts)} experts are stored one by one and get {len(ranks)} different ranks. Transformers 5 stacks "
        "them, and PEFT can then load only one rank for all experts of the model: use --rank for such a runtime."
    )
    return Finding(code="expert-ranks", level="warning", text=text)
