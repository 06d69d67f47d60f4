"""What to say about a conversion: why it was done so, and where the result is right.

In: what was decided and measured. Out: notes, a sentence or two each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rankwise.adapters.formats import Entry
from rankwise.adapters.stored_units import Unit
from rankwise.checkpoints.model import Adapter, TensorInfo
from rankwise.records import ConvertedModule, ServedScale
from rankwise.runtimes import RUNTIMES, Runtime


@dataclass(frozen=True, slots=True)
class Told:
    """What notes are made from.

    Attributes:
        adapters: what went in.
        units: all modules that went in.
        form: format that is written.
        runtime: what it is made for, or None.
        way: how the scale is written: "alone" (each module for itself), "kept", "lora", "padded", "uniform" or "baked".
        modules: what came of them.
        entries: what was written.
        runtimes: what each runtime would do.
        dora: whether magnitudes were carried.
        narrowed: whether the user asked for a dtype that cannot hold what the factors were stored in.
        others: tensors carried that are no magnitudes.
    """

    adapters: Sequence[Adapter]
    units: Sequence[Unit]
    form: str
    runtime: Runtime | None
    way: str
    modules: Sequence[ConvertedModule]
    entries: Sequence[Entry]
    runtimes: Sequence[ServedScale]
    dora: bool
    narrowed: bool
    others: Sequence[TensorInfo]


def notes_of(told: Told) -> tuple[str, ...]:
    """Return all notes, those on the source first."""
    return (
        *_of_sources(told),
        *_of_scale(told),
        *_of_runtime(told),
        *_of_runtimes(told),
        *_of_rounding(told),
        *_of_rest(told),
    )


def _of_sources(told: Told) -> Iterator[str]:
    for adapter in told.adapters:
        for finding in adapter.findings:
            if finding.level == "warning":
                yield f"{adapter.source}: {finding.text}"
    bases = {str((a.config or {}).get("base_model_name_or_path")) for a in told.adapters if a.config is not None}
    if len(bases) > 1:
        yield (
            f"The adapters name different base models ({', '.join(sorted(bases))}). Their sum means something only if "
            "these are the same weights; the first one's name was written."
        )


def _of_scale(told: Told) -> Iterator[str]:
    if told.runtime is None and told.way in ("baked", "uniform"):
        r = told.entries[0].written.r
        low = sum(m.rank < r for m in told.modules)
        if low:
            yield f"{low} of {len(told.modules)} modules were filled with zeros to rank {r}, which changes nothing."
    if told.way == "uniform" and len({u.scaling for u in told.units}) > 1:
        yield (
            f"The {told.form} format has one scale for all modules: {told.entries[0].written.scaling:g}, the most "
            "frequent; what others had besides is folded into B."
        )


_DONE: Final = {
    "kept": "nothing had to change for it",
    "lora": "the alphas were written anew under alpha / r; no scale went into the factors",
    "padded": "all modules were brought to rank {r} with zeros, under one alpha; no scale went into the factors",
    "baked": "the scale was folded into B and all modules were brought to rank {r} with zeros, with lora_alpha = r",
}


def _of_runtime(told: Told) -> Iterator[str]:
    row = told.runtime
    if row is None:
        return
    why = list(_why(row, told))
    done = _DONE[told.way].format(r=told.entries[0].written.r)
    thread = f" See {row.threads[0]}" if row.threads and why else ""
    if why:
        yield f"For {row.name}: it {' and '.join(why)}, so {done}. Read in {row.source} at {row.version}.{thread}"
    else:
        yield f"For {row.name}: {done}. Read in {row.source} at {row.version}."
    r = max(e.written.r for e in told.entries)
    if row.default_cap is not None and r > row.default_cap:
        yield f"{row.name} refuses ranks above {row.default_cap} unless it is told: set {row.cap_flag} to {r} or more."
    for given, taken, what in (
        (told.others, row.takes_modules_to_save, "whole weights beside the factors"),
        ([u for u in told.units if u.kind == "embedding"], row.takes_embeddings, "factors of embedding tables"),
        ([1] if told.dora else [], row.takes_dora, "DoRA's magnitudes"),
    ):
        if given and taken is None:
            yield f"Whether {row.name} loads {what} is not known; this adapter has some."


def _why(row: Runtime, told: Told) -> Iterator[str]:
    """Say what stands in the way of the adapter as it was."""
    if told.way == "kept":
        return
    if not row.uses_rslora and any(u.first.rule == "rslora" for u in told.units):
        yield "ignores use_rslora"
    if told.way == "padded" and row.accepts is not None:
        yield "holds one rank for all modules against its cap, that of the config"
        return
    ranks, scales = {m.rank for m in told.modules}, {u.scaling for u in told.units}
    if len(ranks) > 1 or len(scales) > 1:
        if not row.reads_rank_pattern:
            yield "applies one factor to all modules"
        elif not row.reads_alpha_pattern:
            yield "takes one alpha for all modules, over each one's own rank"
    if row.integer_alpha and any(u.first.lora_alpha not in (None, int(u.first.lora_alpha or 0)) for u in told.units):
        yield "stops at an alpha with a decimal point"


def _of_runtimes(told: Told) -> Iterator[str]:
    if told.form != "peft":
        return
    wrong = [s for s in told.runtimes if s.wrong and (told.runtime is None or s.runtime != told.runtime.name)]
    if wrong:
        ok = ", ".join(["peft", *(s.runtime for s in told.runtimes if s.right)])
        cases = "; ".join(f"{s.runtime} ({_factor(s)} what is meant; {RUNTIMES[s.runtime].threads[0]})" for s in wrong)
        yield f"As written the scale is right in {ok}, and wrong in {cases}. --bake is right in all."
    if len({e.written.r for e in told.entries}) > 1 and told.way != "baked":
        yield (
            "Modules have different ranks. vLLM and SGLang apply one factor to all, llama.cpp one alpha over each "
            "rank: no alphas are right in all of them at once, unless all modules are filled with zeros to one rank "
            "(--bake)."
        )
    largest = max(e.written.r for e in told.entries)
    for row in RUNTIMES.values():
        if row.accepts is not None and largest > max(row.accepts):
            yield f"{row.name} takes no rank above {max(row.accepts)} ({row.cap_flag}); this has {largest}."
    if any(e.written.lora_alpha != int(e.written.lora_alpha) for e in told.entries):
        yield f"Some alphas have decimals, at which Ollama stops ({RUNTIMES['ollama'].threads[0]})."


def _factor(served: ServedScale) -> str:
    low, high = f"{served.lowest:.3g}", f"{served.highest:.3g}"
    return f"{low} times" if low == high else f"{low} to {high} times"


def _of_rounding(told: Told) -> Iterator[str]:
    rounded = [m for m in told.modules if m.relative_error and m.error_before_cast == 0]
    if not rounded:
        return
    worst = max(rounded, key=lambda m: m.relative_error)
    if told.narrowed:
        why = "The dtype that was asked for cannot hold what the factors were stored in."
    elif worst.dtype == "F64" or all(m.before.scaling == m.after.scaling for m in rounded if m.before.rule):
        why = ""  # a last bit of the alpha, or weights of a sum
    else:
        more = "" if worst.dtype == "F32" else " --dtype float32 keeps it near 3e-8."
        why = f"A factor that is no power of two cannot be folded without.{more}"
    yield (
        f"{len(rounded)} of {len(told.modules)} modules are the same but for rounding to {worst.dtype}: a relative "
        f"error of at most {worst.relative_error:.2g} ({worst.module}). {why}"
    ).rstrip()


def _of_rest(told: Told) -> Iterator[str]:
    if zero := sum(not m.norm for m in told.modules):
        yield f"The update of {zero} of {len(told.modules)} modules is zero: they do nothing, before and after."
    if told.dora:
        yield (
            "DoRA: the magnitudes were carried as they are. They act on W + s B A, so what is stated for s B A here is "
            "not the error of the whole update."
        )
    if told.others:
        first = told.others[0].name + (", ..." if len(told.others) > 1 else "")
        yield f"Tensors that are no factors were copied as they are: {len(told.others)} ({first})."
