"""What is worth saying about a set of spectra: each rule a small function, all rules in one table.

In: the modules of a spectra record. Out: findings with a code, a level and words. A page for every code
stands in `docs/reference/findings.md`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from rankwise.records import Finding, Level, ModuleSpectrum

Modules = Sequence[ModuleSpectrum]

Hit = tuple[Finding, Modules]
"""A finding and the modules that it concerns."""

FLAT: Final = 0.3
"""sigma_r / sigma_1 above which a spectrum counts as cut off before it fell."""

LEAST_RANK: Final = 4
"""Below this rank a spectrum has too few values to show a fall."""

UNRELATED: Final = 1.0
"""Relative norm above which tuned - base is larger than the base: sqrt(2) for unrelated weights."""

_ORDER: Final[dict[Level, int]] = {"error": 0, "warning": 1, "info": 2}


def _names(modules: Iterable[ModuleSpectrum], most: int = 3) -> str:
    names = [m.module for m in modules]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _share(some: Modules, everything: Modules) -> str:
    return f"{len(some)} of {len(everything)} modules"


def never_trained(modules: Modules) -> Hit | None:
    """Every delta is zero: B was never moved, or the two checkpoints are the same."""
    if not modules or any(m.energy != 0 for m in modules):
        return None
    if modules[0].r is not None:
        text = (
            f"All {len(modules)} modules have scaling * B @ A = 0: the adapter changes nothing. LoRA starts from "
            "B = 0, so this is an adapter that was saved before it was trained, or whose training never "
            "reached these weights."
        )
        return Finding(code="never-trained", level="error", text=text), modules
    text = f"All {len(modules)} modules are the same numbers in base and tuned: nothing was trained, or one is a copy."
    return Finding(code="identical", level="error", text=text), modules


def dead_modules(modules: Modules) -> Hit | None:
    """Some modules of an adapter have no delta while others do."""
    dead = [m for m in modules if m.energy == 0]
    trained = [m for m in modules if m.energy]
    if not dead or not trained or modules[0].r is None:
        return None
    text = (
        f"{_share(dead, modules)} have a delta of zero ({_names(dead)}) while others were trained: gradients never "
        "reached them (frozen, skipped by the forward pass, or a modality that the data did not use)."
    )
    return Finding(code="dead-modules", level="warning", text=text), dead


def unchanged_modules(modules: Modules) -> Hit | None:
    """Some modules of a checkpoint pair did not move at all."""
    same = [m for m in modules if m.energy == 0]
    if not same or len(same) == len(modules) or modules[0].r is not None:
        return None
    text = (
        f"{_share(same, modules)} are the same numbers in base and tuned ({_names(same)}): frozen in training, or "
        "every update was smaller than half a unit of the dtype."
    )
    return Finding(code="unchanged-modules", level="info", text=text), same


def not_finite(modules: Modules) -> Hit | None:
    """NaN or Inf in a module: it has no spectrum."""
    broken = [m for m in modules if "not-finite" in m.warnings]
    if not broken:
        return None
    text = (
        f"{_share(broken, modules)} hold NaN or Inf, or numbers whose squares overflow ({_names(broken)}): "
        "the run diverged or the file is damaged. Their figures are null, and the summary leaves them out."
    )
    return Finding(code="not-finite", level="error", text=text), broken


def unrelated(modules: Modules) -> Hit | None:
    """The deltas are larger than the base: the two are no base and fine-tune of one model."""
    norms = [m.relative_norm for m in modules if m.relative_norm is not None]
    if not norms or modules[0].r is not None or statistics.median(norms) < UNRELATED:
        return None
    text = (
        f"tuned - base is as large as the base itself (median relative norm {statistics.median(norms):.2f}; two "
        "independently trained models give 1.41, fine-tuning usually stays below 0.1). The two "
        "checkpoints are not a base and its fine-tune, or one of them was stored in another order or scale."
    )
    return Finding(code="unrelated-checkpoints", level="error", text=text), modules


def rounding_limited(modules: Modules) -> Hit | None:
    """Rounding noise makes up so much of some deltas that energy ranks mislead."""
    limited = [m for m in modules if m.rounding_limited]
    if not limited:
        return None
    text = (
        f"In {_share(limited, modules)} rounding to {limited[0].dtype} makes up enough of tuned - base that the energy "
        "ranks (rank_99 first, then rank_90) and the effective rank count rounding noise. Read the signal rank there: "
        "the number of singular values above the noise edge."
    )
    return Finding(code="rounding-limited", level="warning", text=text), limited


def _with_spectrum(modules: Modules) -> list[ModuleSpectrum]:
    """Return the adapter modules whose spectrum has enough values to have a shape."""
    return [
        m
        for m in modules
        if m.r is not None and m.energy and LEAST_RANK <= m.r <= len(m.singular_values) and m.r < min(m.shape)
    ]


def rank_limited(modules: Modules) -> Hit | None:
    """The spectrum is cut off at r before it falls: the rank was the limit."""
    able = _with_spectrum(modules)
    flat = [m for m in able if m.singular_values[-1] > FLAT * m.singular_values[0]]
    if not able or 2 * len(flat) < len(able):
        return None
    text = (
        f"In {_share(flat, modules)} the smallest singular value is more than {FLAT:.0%} of the largest: the "
        "spectrum is cut off at r before it falls. The rank may have been the limit, or B and A are close to random "
        "factors (barely trained, or noise), whose spectrum is flat too; a run at a higher rank shows which. How "
        "scaling and learning rate have to follow is what `rankwise check` measures."
    )
    return Finding(code="rank-limited", level="warning", text=text), flat


def unused_directions(modules: Modules) -> Hit | None:
    """Few directions hold nearly all the energy. Never a reason by itself to lower r."""
    able = [m for m in _with_spectrum(modules) if m.rank_99 is not None]
    few = [m for m in able if m.rank_99 is not None and m.r is not None and 2 * m.rank_99 <= m.r]
    if not able or 2 * len(few) < len(able):
        return None
    text = (
        f"In {_share(few, modules)} half of the r directions or fewer hold 99 % of the energy. That means one of "
        "two things which this file cannot tell apart: these directions were enough for the task, or the "
        "others were starved by a small scaling or learning rate. `rankwise check --adapter` tests which."
    )
    return Finding(code="unused-directions", level="info", text=text), few


FINDINGS: Final[dict[str, Callable[[Modules], Hit | None]]] = {
    "never-trained": never_trained,
    "not-finite": not_finite,
    "unrelated-checkpoints": unrelated,
    "rounding-limited": rounding_limited,
    "dead-modules": dead_modules,
    "rank-limited": rank_limited,
    "unchanged-modules": unchanged_modules,
    "unused-directions": unused_directions,
}
"""Rule name -> function of the modules giving a finding with its modules, or None."""


def find(modules: Modules, others: Iterable[Finding] = ()) -> tuple[tuple[ModuleSpectrum, ...], tuple[Finding, ...]]:
    """Apply every rule.

    Args:
        modules: all modules measured.
        others: findings of the readers, which have marked their modules already.

    Returns:
        The modules with the codes of the findings that concern them, and all findings, worst first.
    """
    hits = [hit for rule in FINDINGS.values() if (hit := rule(modules)) is not None]
    codes: dict[str, list[str]] = {}
    for finding, concerned in hits:
        for module in concerned:
            codes.setdefault(module.module, []).append(finding.code)
    marked = tuple(
        msgspec.structs.replace(m, warnings=tuple(dict.fromkeys((*m.warnings, *codes.get(m.module, ())))))
        for m in modules
    )
    found = [*others, *(finding for finding, _ in hits)]
    return marked, tuple(sorted(found, key=lambda f: _ORDER[f.level]))
