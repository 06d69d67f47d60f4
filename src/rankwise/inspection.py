"""`inspect`: open a source, take the spectrum of every module, and say what was found.

In: an adapter, or a tuned checkpoint and its base. Out: a spectra/1 record.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from typing import Literal

from rankwise import criteria, spectra
from rankwise.checkpoints import open_source
from rankwise.checkpoints.model import Adapter, Checkpoint, LoraModule
from rankwise.deltas import Selection, align_names, modules_in, pair_checkpoints, read_deltas, selection
from rankwise.errors import NothingToMeasureError, ShapeMismatchError, UsageError, WrongKindError
from rankwise.findings import find
from rankwise.linalg import checked_device, default_device, energy_of, one_thread
from rankwise.records import Finding, ModuleSpectrum, Skipped, SpectraRecord, SpectraSummary, now, version

Progress = Callable[[str, int, int], None]
"""Called with (module, number done, number in all) before each module."""

Source = str | PathLike[str]


def inspect(
    source: Source,
    *,
    base: Source | None = None,
    modules: str | None = None,
    skip: str | None = None,
    values: int | None = None,
    device: str | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> SpectraRecord:
    """Measure what an update is made of: the spectrum of every module, with rounding told from signal.

    Args:
        source: an adapter, or a tuned checkpoint; folder, file, hub id or URL.
        base: for a checkpoint, the one before fine-tuning; for an adapter, the model it is for, which adds
            the relative norm.
        modules: regular expression; only modules whose path it is found in.
        skip: regular expression; not the modules whose path it is found in.
        values: compute only so many singular values of a delta (a randomised route, faster where this is
            few); figures that need the rest are None. None computes all. Adapters always give all.
        device: "cpu", or a torch device such as "cuda:0" for the spectra of deltas. None means cuda for
            deltas where torch is installed and sees one, else cpu. Adapters are always done on the CPU.
        seed: of the randomised route and of the noise estimate.
        command: argv to write into the record.
        progress: called before each module.

    Returns:
        A spectra/1 record.

    Raises:
        RankwiseError: the source cannot be read, or is not what it should be; see `rankwise.errors`.
    """
    if values is not None and values < 1:
        raise UsageError(f"--values must be 1 or more, got {values}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must be from 0 to {2**63 - 1}, got {seed}")
    wanted = selection(modules, skip)
    chosen = "cpu" if device is None else checked_device(device)
    with open_source(source) as opened:
        if isinstance(opened, Adapter):  # factors are small: always on the CPU, and without torch
            kind: Literal["adapter", "delta"] = "adapter"
            measured, skipped, findings = _adapter(opened, base, wanted, progress)
        else:
            if base is None:
                raise WrongKindError(
                    f"{fspath(source)} is a full checkpoint, not an adapter; a fine-tune is measured against its base: "
                    "rankwise inspect TUNED --base BASE"
                )
            kind = "delta"
            chosen = default_device() if device is None else chosen
            options = spectra.Options(values, chosen, seed)
            with _open_base(base) as before:
                measured, skipped, findings = _delta(before, opened, wanted, options, progress)
    if not measured and not findings:
        raise NothingToMeasureError(
            f"{fspath(source)}: no module is left to measure ({len(skipped)} skipped). "
            + (f"The first: {skipped[0].module}: {skipped[0].reason}" if skipped else "Check --modules and --skip.")
        )
    marked, found = find(measured, findings)
    return SpectraRecord(
        format=SpectraRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else _call(source, base, modules, skip, values, device, seed),
        device=chosen if kind == "delta" else "cpu",
        seed=seed,
        source=fspath(source),
        base=None if base is None else fspath(base),
        kind=kind,
        modules=marked,
        skipped=tuple(skipped),
        summary=_summary(marked, found),
    )


def _open_base(base: Source) -> Checkpoint:
    opened = open_source(base, want="checkpoint")
    if isinstance(opened, Adapter):  # `want` refuses adapters: this is for the type checker
        opened.close()
        raise WrongKindError(f"{fspath(base)} is an adapter; the base must be a full checkpoint")
    return opened


def _call(source: Source, base: Source | None, *rest: object) -> tuple[str, ...]:
    """Spell a call from Python as the command that does the same."""
    words = ["rankwise", "inspect", fspath(source)]
    named = zip(("base", "modules", "skip", "values", "device", "seed"), (base, *rest), strict=True)
    for name, value in named:
        if value is not None and not (name == "seed" and value == 0):
            words += [f"--{name}", str(value)]
    return tuple(words)


Measured = tuple[list[ModuleSpectrum], list[Skipped], tuple[Finding, ...]]


def _base_names(before: Checkpoint, base: Source, modules: Sequence[LoraModule]) -> dict[str, str]:
    """Map every module that the base holds to its tensor there; experts map to their stack."""
    stacks = {m.module: _expert(m.module)[0] for m in modules}
    wanted = dict.fromkeys(name + end for name in stacks.values() for end in (".weight", ""))
    aligned = align_names(before.names(), list(wanted))
    if not aligned:
        raise WrongKindError(
            f"none of the adapter's {len(modules)} modules is in {fspath(base)} (the adapter has "
            f"{modules[0].module}; the base has {_example(before)}): it is not the model it was trained on"
        )
    found = {module: aligned.get(stack + ".weight", aligned.get(stack)) for module, stack in stacks.items()}
    return {module: tensor for module, tensor in found.items() if tensor is not None}


def _expert(module: str) -> tuple[str, int | None]:
    """Split the module of an expert into its stack's name and its index.

    >>> _expert("mlp.experts.down_proj[3]")
    ('mlp.experts.down_proj', 3)
    """
    found = re.fullmatch(r"(.*)\[(\d+)\]", module)
    return (found[1], int(found[2])) if found else (module, None)


def _norm(before: Checkpoint, name: str, module: LoraModule) -> float | None:
    """Read one base weight and return its Frobenius norm, or None where it is not finite."""
    shape = before.info(name).shape
    index = _expert(module.module)[1]
    own = shape[1:] if index is not None else shape
    flat = (own[0], math.prod(own[1:])) if own else (0, 0)
    if (index is not None and index >= shape[0]) or module.shape not in (flat, flat[::-1]):
        raise ShapeMismatchError(module.module, shape, module.shape)
    weight = before.read(name) if index is None else before.read(name)[index]
    energy = energy_of(weight.reshape(flat))
    return math.sqrt(energy) if math.isfinite(energy) else None


def _adapter(opened: Adapter, base: Source | None, wanted: Selection, progress: Progress | None) -> Measured:
    chosen = [m for m in opened.modules if wanted.wants(m.module)]
    if not chosen and opened.modules:
        raise NothingToMeasureError(
            f"--modules and --skip leave none of the {len(opened.modules)} modules; the first is "
            f"{opened.modules[0].module}"
        )
    measured = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        names: dict[str, str] = {}
        if base is not None and chosen:
            before = stack.enter_context(_open_base(base))
            names = _base_names(before, base, chosen)
        for done, module in enumerate(chosen):
            if progress is not None:
                progress(module.module, done, len(chosen))
            norm = _norm(before, names[module.module], module) if module.module in names else None
            measured.append(spectra.adapter_spectrum(module, *opened.read_factors(module), norm))
    return measured, list(opened.skipped), tuple(opened.findings)


def _delta(
    before: Checkpoint, tuned: Checkpoint, wanted: Selection, options: spectra.Options, progress: Progress | None
) -> Measured:
    pairing = pair_checkpoints(before, tuned, wanted)
    total = sum(len(modules_in(pair, wanted)) for pair in pairing.pairs)
    measured: list[ModuleSpectrum] = []
    for pair in pairing.pairs:
        for delta in read_deltas(before, tuned, pair, wanted):
            if progress is not None:
                progress(delta.module, len(measured), total)
            measured.append(spectra.delta_spectrum(delta, options))
    findings = (*before.findings, *tuned.findings, *pairing.findings)
    if not measured and not pairing.skipped:
        raise NothingToMeasureError(
            "no weight of the two checkpoints has the same name and passes --modules and --skip; "
            f"the base has {_example(before)}, the tuned checkpoint {_example(tuned)}"
        )
    return measured, list(pairing.skipped), findings if measured else ()


def _example(checkpoint: Checkpoint) -> str:
    names = checkpoint.names()
    return f"{len(names)} tensors such as {names[0]}" if names else "no tensors"


def _summary(measured: Sequence[ModuleSpectrum], findings: tuple[Finding, ...]) -> SpectraSummary:
    """Take all modules together: every mean is over the modules where the figure is known."""
    curves = [
        criteria.Spectrum(m.module, m.shape, m.singular_values, m.energy, m.complete) for m in measured if m.energy
    ]
    longest = max((min(m.shape) if m.r is None else m.r for m in measured), default=0)
    ranks = [2**k for k in range(longest.bit_length()) if 2**k <= longest]
    return SpectraSummary(
        modules=len(measured),
        params=sum(math.prod(m.shape) for m in measured),
        energy_by_rank={str(r): _mean([criteria.energy_share(c, r) for c in curves]) for r in ranks},
        effective_rank_mean=_mean([m.effective_rank for m in measured if m.energy]),
        rank_90_mean=_mean([m.rank_90 for m in measured if m.energy]),
        findings=findings,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where there is nothing or something unknown among it."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
