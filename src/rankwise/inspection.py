"""`inspect`: open a source, take the spectrum of every module, and say what was found.

In: an adapter, or a tuned checkpoint and its base. Out: a spectra/1 record.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from typing import Final, Literal

from rankwise import criteria, spectra
from rankwise.checkpoints import open_source
from rankwise.checkpoints.locate import everywhere
from rankwise.checkpoints.model import Adapter, Checkpoint, LoraModule
from rankwise.deltas import (
    Pair,
    Selection,
    align_names,
    modules_in,
    pair_checkpoints,
    pair_memory,
    read_deltas,
    selection,
)
from rankwise.errors import (
    NothingToMeasureError,
    ShapeMismatchError,
    UsageError,
    WrongKindError,
    without_secrets,
)
from rankwise.findings import find
from rankwise.linalg import checked_device, default_device, energy_of, one_thread
from rankwise.records import Finding, ModuleSpectrum, Skipped, SpectraRecord, SpectraSummary, now, version
from rankwise.spreading import Work, device_of_workers, spread, told

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
    cluster: str | None = None,
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
            deltas where torch is installed and sees one, else cpu; with `cluster` it means cpu. Adapters are always
            done on the CPU.
        seed: of the randomised route and of the noise estimate.
        cluster: address of a Ray cluster: its workers read and measure the modules, with the same result. "local"
            starts one on this machine. Every source must be readable under this name on every node.
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
    chosen = device_of_workers(device) if cluster is not None else "cpu" if device is None else checked_device(device)
    with open_source(source) as opened:
        if isinstance(opened, Adapter):  # factors are small: always on the CPU, and without torch
            kind: Literal["adapter", "delta"] = "adapter"
            measured, skipped, findings = _adapter(opened, base, wanted, cluster, progress)
        else:
            if base is None:
                raise WrongKindError(
                    f"{fspath(source)} is a full checkpoint, not an adapter; a fine-tune is measured against its base: "
                    "rankwise inspect TUNED --base BASE"
                )
            kind = "delta"
            chosen = default_device() if device is None and cluster is None else chosen
            options = spectra.Options(values, chosen, seed)
            with _open_base(base) as before:
                measured, skipped, findings = _delta(before, opened, wanted, options, cluster, progress)
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
        command=tuple(command)
        if command is not None
        else _call(source, base, modules, skip, values, device, seed, cluster),
        device=chosen if kind == "delta" else "cpu",
        seed=seed,
        source=without_secrets(fspath(source)),
        base=None if base is None else without_secrets(fspath(base)),
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
    named = zip(("base", "modules", "skip", "values", "device", "seed", "cluster"), (base, *rest), strict=True)
    for name, value in named:
        if value is not None and not (name == "seed" and value == 0):
            words += [f"--{name}", str(value)]
    return tuple(without_secrets(word) for word in words)


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


@dataclass(frozen=True, slots=True)
class _Adapted:
    """An adapter, and the base it is for where that was given."""

    adapter: Adapter
    base: Checkpoint | None


Named = tuple[LoraModule, str | None]
"""A module, and its tensor in the base."""


def _adapter_spectra(opened: _Adapted, modules: Sequence[Named]) -> Iterator[ModuleSpectrum]:
    """Measure modules that are stored in one pair of tensors."""
    for module, tensor in modules:
        norm = None if tensor is None or opened.base is None else _norm(opened.base, tensor, module)
        yield spectra.adapter_spectrum(module, *opened.adapter.read_factors(module), norm)


def _open_adapter(source: str, base: str | None) -> _Adapted:
    opened = open_source(source, want="adapter")
    if not isinstance(opened, Adapter):  # `want` refuses checkpoints: this is for the type checker
        raise WrongKindError(f"{source} is a full checkpoint")
    return _Adapted(opened, None if base is None else _open_base(base))


TOGETHER: Final = 8
"""Modules of an adapter that a worker is sent at a time: one takes some milliseconds, and so does sending it."""


def _adapter(
    opened: Adapter, base: Source | None, wanted: Selection, cluster: str | None, progress: Progress | None
) -> Measured:
    chosen = [m for m in opened.modules if wanted.wants(m.module)]
    if not chosen and opened.modules:
        raise NothingToMeasureError(
            f"--modules and --skip leave none of the {len(opened.modules)} modules; the first is "
            f"{opened.modules[0].module}"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        names: dict[str, str] = {}
        before = None
        if base is not None and chosen:
            before = stack.enter_context(_open_base(base))
            names = _base_names(before, base, chosen)
        spelled = None if base is None else fspath(base)
        stored: dict[str, list[Named]] = {}  # the experts of a stack share a pair of tensors, which is read once
        for module in chosen:
            stored.setdefault(opened.stored(module)[0].name, []).append((module, names.get(module.module)))
        tasks = [tuple(modules) for modules in stored.values()]
        work = Work(
            _adapter_spectra,
            _Adapted(opened, before),
            lambda: partial(_open_adapter, everywhere(opened.source), None if spelled is None else everywhere(spelled)),
            one_thread=True,
        )
        workers = stack.enter_context(spread(cluster, "--cluster"))
        results = workers.flat_map(work, tasks, name=lambda task: task[0][0].module, together=TOGETHER)
        ordered = [module.module for task in tasks for module, _ in task]
        found = {m.module: m for m in told(results, ordered, progress)}
    return [found[m.module] for m in chosen], list(opened.skipped), tuple(opened.findings)


@dataclass(frozen=True, slots=True)
class _Compared:
    """Two checkpoints, and what is measured of their deltas."""

    before: Checkpoint
    tuned: Checkpoint
    wanted: Selection
    options: spectra.Options


def _delta_spectra(opened: _Compared, pair: Pair) -> Iterator[ModuleSpectrum]:
    for delta in read_deltas(opened.before, opened.tuned, pair, opened.wanted):
        yield spectra.delta_spectrum(delta, opened.options)


def _open_compared(base: str, tuned: str, wanted: Selection, options: spectra.Options) -> _Compared:
    checked_device(options.device)
    return _Compared(_open_base(base), _open_base(tuned), wanted, options)


def _delta(
    before: Checkpoint,
    tuned: Checkpoint,
    wanted: Selection,
    options: spectra.Options,
    cluster: str | None,
    progress: Progress | None,
) -> Measured:
    pairing = pair_checkpoints(before, tuned, wanted)
    tasks = [(pair, names) for pair in pairing.pairs if (names := modules_in(pair, wanted))]
    opened = _Compared(before, tuned, wanted, options)
    measured: list[ModuleSpectrum] = []
    if tasks:
        work = Work(
            _delta_spectra,
            opened,
            lambda: partial(_open_compared, everywhere(before.source), everywhere(tuned.source), wanted, options),
            gpu=options.device != "cpu",
        )
        with spread(cluster, "--cluster") as workers:
            results = workers.flat_map(work, [t for t, _ in tasks], name=lambda pair: pair.module, memory=pair_memory)
            measured = list(told(results, [name for _, names in tasks for name in names], progress))
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
