"""Why these ranks, in sentences that can be checked, and what speaks against them.

In: a plan without its words. Out: its `why` and its findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rankwise.planning.choosing import Chosen
from rankwise.planning.modules import Update
from rankwise.records import Finding, LeftOut, PlannedModule, PlanRecord, SpectraRecord
from rankwise.runtimes import runtime
from rankwise.scaling import alpha_for

FORMULAS: Final = {"lora": "alpha / r", "rslora": "alpha / sqrt(r)", "unscaled": "alpha"}

ALIKE: Final = 0.97
"""Planned over uniform error at equal parameters from which a plan is hardly worth its trouble."""


def _names(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _modules(n: int) -> str:
    return f"{n:,} module" + ("" if n == 1 else "s")


def _error(value: float | None) -> str:
    return "one that the values on file do not say" if value is None else f"{value:.3g}"


def _asked(record: PlanRecord, n: int) -> str:
    """Return what was asked for."""
    choice = record.choice
    if choice is None:
        return ""
    if choice.kind == "budget":
        of = f", what {choice.text.replace(':', ' ')} in all {_modules(n)} would cost" if ":" in choice.text else ""
        return f"Asked for: the lowest squared error within {record.budget or 0:,} parameters{of}."
    each = "in every module by itself" if choice.per_module else "over all modules together"
    above = any(m.signal_rank is not None and m.r > m.signal_rank for m in record.modules)
    below = choice.kind == "rank" and any(m.r < (choice.value or 0) for m in record.modules)
    asked = {
        "energy": f"{choice.text} of the energy {each}, for the fewest parameters",
        "relative_error": f"a relative error of at most {choice.text} {each}, for the fewest parameters",
        "signal": "every direction above the noise edge of its module, "
        + ("and those that the ranks allowed, or shared, add to them" if above else "and no other"),
        "rank": f"rank {choice.text} in every module" + (", or the whole smaller side of a weight" if below else ""),
    }
    return f"Asked for: {asked.get(choice.kind, choice.kind)}."


def _limits(record: PlanRecord) -> str:
    c = record.choice
    if c is None:
        return ""
    parts = [f"at least {c.min_rank} in every module"] if c.min_rank else []
    parts += [f"at most {c.max_rank}"] if c.max_rank is not None else []
    parts += [f"multiples of {c.multiple_of} (or the whole smaller side of a weight)"] if c.multiple_of > 1 else []
    parts += ["one rank for weights that runtimes join (q/k/v, gate/up)"] if c.fuse else []
    parts += ["one rank for all experts of a weight"] if any("[*]" in (m.group or "") for m in record.modules) else []
    parts += ["directions at or under the noise edge count for nothing"] if c.within_signal else []
    return f"Ranks: {'; '.join(parts)}." if parts else ""


def _how(record: PlanRecord, chosen: Chosen) -> str:
    """Return how the ranks were found, and how good they are."""
    best = record.optimality
    if record.choice is not None and record.choice.per_module:
        return (
            "The same share of every module, whatever its size and energy, is not the lowest error for its parameters: "
            "a budget over all modules is cheaper for the same error."
        )
    if best is None or chosen.problem is None:
        return ""
    weighted = _weighted(record)
    factor = "w * " if weighted else ""
    stepped = record.choice is not None and record.choice.multiple_of > 1
    step = "step between two ranks" if stepped or any(m.group for m in record.modules) else "direction"
    said = (
        f"Every {step} is an item: it saves {factor}sigma^2 of squared error and costs (in + out) parameters a rank. "
        f"All {chosen.problem.items:,} items, of all modules, were sorted by what they save for a parameter and taken "
        "from the top"
    )
    said += f", down to {best.level:.3g} a parameter." if best.level else "; all of them were taken."
    if record.choice and record.choice.relative:
        said += (
            " The weight w of a module is one over its energy (and --weights), so that every module counts the same."
        )
    elif weighted:
        said += " The weights w are those of --weights."
    if best.exact and best.level == 0:
        return said
    if best.exact:
        said += " What the cut left was settled exactly: no ranks that these options allow "
        said += "keep more within the budget." if best.params_bound is None else "reach it for fewer parameters."
    elif best.params_bound is None:
        said += (
            f" What the cut left was filled item by item; no ranks within the budget keep more than "
            f"{best.share_bound:.6%} of what is counted, this plan keeps {best.kept_share:.6%}."
        )
    else:
        said += f" No ranks that reach it cost less than {best.params_bound:,} parameters."
    return said


def _beside(record: PlanRecord) -> str:
    """Return plan and uniform rank side by side."""
    error = "that the values on file do not say" if record.relative_error is None else f"of {record.relative_error:.3g}"
    plan = f"The plan has {record.params:,} parameters and a relative error {error}"
    if record.choice is not None and record.choice.kind == "rank":
        return plan + "."
    flat, same = record.uniform, record.uniform_same_error
    said = plan
    if flat is not None:
        said += f"; uniform rank {flat.r}, {flat.params:,} parameters, has {_error(flat.relative_error)}"
    if same is not None and same != flat:
        said += (
            f". To leave no more, a uniform rank has to be {same.r}: {same.params:,} parameters, "
            f"{same.params / max(record.params, 1):.2f} times as many, with {_error(same.relative_error)}"
        )
    return said + (". These errors count energy as it is, without the weights w." if _weighted(record) else ".")


def _weighted(record: PlanRecord) -> bool:
    """Tell whether something else than the sum of all squared errors was minimised."""
    return record.choice is not None and (record.choice.relative or record.choice.weighted)


def _scales(record: PlanRecord, adapter_scale: float | None) -> str:
    if record.scale is None:
        return ""
    alphas = sorted({m.lora_alpha for m in record.modules})
    span = f"{alphas[0]:.6g}" if len(alphas) == 1 else f"{alphas[0]:.6g} to {alphas[-1]:.6g}"
    said = (
        f"The factor on B A is {record.scale:.6g} in every module: lora_alpha goes with the rank ({span}), so that "
        f"{FORMULAS.get(record.rule, record.rule)} is the same everywhere; a rank pattern without its alpha pattern "
        "would change it."
    )
    if record.reference_rank is not None:
        alpha = alpha_for(record.rule, record.scale, record.reference_rank)
        said += f" It is what lora_alpha = {alpha:.6g} means at rank {record.reference_rank}."
    if adapter_scale is not None and abs(adapter_scale - record.scale) > 1e-9 * adapter_scale:
        said += f" The adapter itself was trained at {adapter_scale:.6g}; --scale {adapter_scale:.6g} would keep that."
    return said


def why(record: PlanRecord, chosen: Chosen, spectra: SpectraRecord, updates: Sequence[Update]) -> str:
    """Return the reasons of a plan."""
    scales = {m.scaling for m in spectra.modules if m.scaling is not None}
    what = "these spectra are of an adapter" if spectra.kind == "adapter" else "these spectra are of tuned - base"
    parts = [
        _asked(record, len(updates)),
        _limits(record),
        _how(record, chosen),
        _beside(record),
        _scales(record, next(iter(scales)) if len(scales) == 1 else None),
        "The learning rate is the one given."
        if record.learning_rate is not None
        else "The learning rate is null: a spectrum does not say it (--learning-rate writes one in).",
        f"What is kept is energy of the weights: {what}, and a direction with little of it may still matter to the "
        "task.",
    ]
    return " ".join(p for p in parts if p)


def findings(record: PlanRecord, chosen: Chosen, spectra: SpectraRecord, updates: Sequence[Update]) -> list[Finding]:
    """Return what speaks against a plan."""
    # what is wrong with the spectra is wrong with their plan; of rounding the plan speaks in its own figures
    found = [f for f in spectra.summary.findings if f.level != "info" and f.code != "rounding-limited"]
    makers = (
        _noise(record),
        _signal_ends(record, chosen),
        _capped(record, chosen, updates),
        _ends_at_r(record, spectra),
        _error_alone(record, spectra),
    )
    found += [f for f in makers if f is not None]
    if record.params >= sum(m.shape[0] * m.shape[1] for m in record.modules):
        text = (
            "The planned factors have at least as many parameters as the weights they change: at these ranks full "
            "fine-tuning, or keeping tuned - base itself, is cheaper."
        )
        found.append(Finding(code="no-low-rank", level="warning", text=text))
    alike = _alike(record)
    return [*found, *([alike] if alike else [])]


def worst_first(found: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return findings with errors before warnings before notes."""
    return tuple(sorted(found, key=lambda f: ("error", "warning", "info").index(f.level)))


def _noise(record: PlanRecord) -> Finding | None:
    """Ranks past the noise edge where rounding is much of the update."""
    past = [m for m in record.modules if m.rounding_limited and m.signal_rank is not None and m.r > m.signal_rank]
    if not past:
        return None
    spent = sum((m.r - (m.signal_rank or 0)) * sum(m.shape) for m in past)
    text = (
        f"In {len(past)} of {_modules(len(record.modules))} ({_names([m.module for m in past])}) the plan spends "
        f"{spent:,} parameters on directions at or under the noise edge: rounding of the checkpoint, not training, and "
        "energy shares count it. --within-signal spends nothing there; --signal takes what stands above."
    )
    return Finding(code="noise-in-plan", level="warning", text=text)


def _signal_ends(record: PlanRecord, chosen: Chosen) -> Finding | None:
    if chosen.reached or record.choice is None:
        return None
    if record.optimality is None:  # every module by itself
        value = record.choice.value or 0.0
        share = value if record.choice.kind == "energy" else 1 - value * value
        short = [m.module for m in record.modules if (m.kept_energy_share or 0.0) < share * (1 - 1e-9)]
        short += [item.module for item in record.left_out if item.counted]
        text = (
            f"In {_modules(len(short))} ({_names(short)}) all directions above the noise edge together keep less than "
            f"was asked ({record.choice.text}). The plan takes them all there and stops; the rest is at or under the "
            "edge."
        )
        return Finding(code="signal-ends-first", level="warning", text=text)
    text = (
        f"All directions above the noise edge together keep {record.optimality.kept_share:.1%} of what is counted, "
        f"short of what was asked ({record.choice.text}). The plan takes them all and stops; the rest is at or under "
        "the edge."
    )
    return Finding(code="signal-ends-first", level="warning", text=text)


def _capped(record: PlanRecord, chosen: Chosen, updates: Sequence[Update]) -> Finding | None:
    """A signal rank above the cap: cut, and said."""
    if record.choice is None or record.choice.kind != "signal":
        return None
    cut = [
        u.module for u, r in zip(updates, chosen.ranks, strict=True) if u.signal_rank is not None and r < u.signal_rank
    ]
    if not cut:
        return None
    text = (
        f"In {_modules(len(cut))} ({_names(cut)}) more directions stand above the noise edge than the largest rank "
        "allowed; they were cut there."
    )
    return Finding(code="signal-cut", level="warning", text=text)


def _ends_at_r(record: PlanRecord, spectra: SpectraRecord) -> Finding | None:
    """An adapter cannot say what a rank above its own would hold."""
    if spectra.kind != "adapter" or (record.choice is not None and record.choice.kind == "rank"):
        return None
    held = {m.module: m.r for m in spectra.modules if m.r is not None}
    full = [m.module for m in record.modules if m.r >= held.get(m.module, m.r + 1)]
    if not full:
        return None
    text = (
        f"{len(full)} of {_modules(len(record.modules))} ({_names(full)}) keep all directions that the adapter has. "
        "Its spectra end at its own rank: whether more would have been used there, they cannot say."
    )
    return Finding(code="ends-at-adapter-rank", level="info", text=text)


def _error_alone(record: PlanRecord, spectra: SpectraRecord) -> Finding | None:
    """Unequal ranks for a full fine-tune: the least error of its weights was not the best recall where we looked."""
    if spectra.kind != "delta" or record.choice is None or record.choice.kind in ("rank", "signal"):
        return None
    if len({m.r for m in record.modules}) < 2:
        return None
    text = (
        "These ranks leave the least error of the weights, which need not be the least loss: of three full fine-tunes "
        "of rankwise:tiny on facts, planned ranks left 4 % less error than rank 8 everywhere, and recalled 14 of 46.6 "
        "bits a person where rank 8 everywhere recalled 23. Extract both ways and measure, before you rely on either."
    )
    return Finding(code="error-is-not-loss", level="info", text=text)


def _alike(record: PlanRecord) -> Finding | None:
    """A plan that is no better than one rank for all."""
    point = record.uniform
    if record.choice is None or record.choice.kind in ("rank", "signal") or record.choice.per_module or point is None:
        return None
    if record.relative_error is None or not point.relative_error or _weighted(record) or record.choice.within_signal:
        return None  # where something else was minimised, a larger error of all is no sign against the plan
    # the uniform rank may cost less: compare at its cost, not at the plan's
    same = next((p for p in record.curve if p.r == point.r), None)
    planned = same.planned_error if same is not None and same.planned_error is not None else record.relative_error
    if planned < ALIKE * point.relative_error:
        return None
    text = (
        f"At the parameters of uniform rank {point.r} chosen ranks leave an error of {planned:.3g}, one rank for all "
        f"{point.relative_error:.3g}: here ranks by module buy little, and a uniform rank is simpler to train and "
        "serve."
    )
    return Finding(code="uniform-as-good", level="info", text=text)


def left_out_words(left_out: Sequence[LeftOut]) -> list[str]:
    """Return what was left out, a line a reason."""
    by_reason: dict[str, list[str]] = {}
    for item in left_out:
        by_reason.setdefault(item.reason, []).append(item.module)
    return [f"{_modules(len(names))} left out ({_names(names)}): {reason}" for reason, names in by_reason.items()]


def _times(low: float, high: float) -> str:
    return f"{low:.3g} times" if high - low < 1e-6 * high else f"{low:.3g} to {high:.3g} times"


def serving(record_modules: Sequence[PlannedModule], rule: str, name: str, cap: int) -> Finding | None:
    """Return what a runtime would make of these ranks and alphas, or None where it reads no config of PEFT's."""
    row = runtime(name)
    top = max(record_modules, key=lambda m: m.r)
    said = f"{row.name}: set {row.cap_flag} to {cap} or more. " if row.cap_flag and row.accepts else ""
    if not row.reads_config:
        return None
    # PEFT has no rule `unscaled`; an adapter for it carries alpha * r under alpha / r
    alpha = {m.module: m.lora_alpha * (m.r if rule == "unscaled" else 1) for m in record_modules}
    factors = [
        row.applied(m.r, alpha[m.module], global_r=top.r, global_alpha=alpha[top.module], use_rslora=rule == "rslora")
        / m.scaling
        for m in record_modules
    ]
    low, high = min(factors), max(factors)
    if abs(low - 1) < 1e-6 and abs(high - 1) < 1e-6:
        said += (
            "It applies the planned factor to every module: the factor is the same in all, so that whichever module's "
            "r and lora_alpha stand as the config's own give it."
        )
        return Finding(code="serve-as-planned", level="info", text=said)
    said += (
        f"By its source (read at {row.version}) it would apply {_times(low, high)} the planned factor. Bake the "
        "trained adapter to one rank first (`rankwise convert ADAPTER OUT --bake`)."
    )
    return Finding(code="serve-wrong-scale", level="warning", text=said)
