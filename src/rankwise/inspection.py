"""`inspect`: open a source, take the spectrum of every module, and say what was found.

In: an adapter, or a tuned checkpoint and its base. Out: a spectra/1 record.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Literal

from rankwise import criteria, spectra
from rankwise.checkpoints import open_source
from rankwise.checkpoints.model import Adapter, Checkpoint, LoraModule
from rankwise.deltas import Selection, align_names, matrices_in, module_of, pair_checkpoints, read_deltas, selection
from rankwise.errors import NothingToMeasureError, ShapeMismatchError, UsageError, WrongKindError
from rankwise.findings import find
from rankwise.linalg import energy_of, one_thread, torch_device
from rankwise.records import Finding, ModuleSpectrum, Skipped, SpectraRecord, SpectraSummary, now, version

Progress = Callable[[str, int, int], None]
"""Called with (module, number done, number in all) before each module."""

Source = str | PathLike[str]

_GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, ROCm, WSL


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
        device: "cpu", or a torch device such as "cuda:0" for the spectra of deltas. None means cuda where
            torch is loaded already and sees one, else cpu.
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
    chosen = _device(device)
    with open_source(source) as opened:
        if isinstance(opened, Adapter):
            kind: Literal["adapter", "delta"] = "adapter"
            measured, skipped, findings = _adapter(opened, base, wanted, progress)
        else:
            if base is None:
                raise WrongKindError(
                    f"{fspath(source)} is a full checkpoint, not an adapter; a fine-tune is measured against its base: "
                    "rankwise inspect TUNED --base BASE"
                )
            kind = "delta"
            options = spectra.Options(values, chosen, seed)
            with _open_base(base) as before:
                measured, skipped, findings = _delta(before, opened, wanted, options, progress)
    if not measured and not findings:
        raise NothingToMeasureError(
            f"{fspath(source)}: no module is left to measure ({len(skipped)} skipped). "
            + (f"The first: {skipped[0].module}: {skipped[0].reason}" if skipped else "Check --modules and --skip.")
        )
    return SpectraRecord(
        format=SpectraRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else ("rankwise.inspect", fspath(source)),
        device=chosen if kind == "delta" else "cpu",
        seed=seed,
        source=fspath(source),
        base=None if base is None else fspath(base),
        kind=kind,
        modules=tuple(measured),
        skipped=tuple(skipped),
        summary=_summary(measured, findings),
    )


def _device(asked: str | None) -> str:
    """Return the device to compute deltas on; torch is imported only where a GPU may be."""
    if asked is None:
        if importlib.util.find_spec("torch") is None or not any(Path(p).exists() for p in _GPU_NODES):
            return "cpu"
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked != "cpu":
        torch_device(asked)
    return asked


def _open_base(base: Source) -> Checkpoint:
    opened = open_source(base, want="checkpoint")
    if isinstance(opened, Adapter):  # `want` refuses adapters: this is for the type checker
        opened.close()
        raise WrongKindError(f"{fspath(base)} is an adapter; the base must be a full checkpoint")
    return opened


Measured = tuple[list[ModuleSpectrum], list[Skipped], tuple[Finding, ...]]


def _base_names(before: Checkpoint, base: Source, modules: Sequence[LoraModule]) -> dict[str, str]:
    """Map every module that the base holds to its tensor there."""
    aligned = align_names(before.names(), [m.module + ".weight" for m in modules])
    if not aligned:
        raise WrongKindError(
            f"none of the adapter's {len(modules)} modules is in {fspath(base)} (the adapter has "
            f"{modules[0].module}; the base has {_example(before)}): it is not the model it was trained on"
        )
    return {module_of(name): tensor for name, tensor in aligned.items()}


def _norm(before: Checkpoint, name: str, module: LoraModule) -> float | None:
    """Read one base weight and return its Frobenius norm, or None where it is not finite."""
    shape = before.info(name).shape
    if math.prod(shape) != math.prod(module.shape):
        raise ShapeMismatchError(module.module, shape, module.shape)
    energy = energy_of(before.read(name).reshape(shape[0], -1))
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
    total = sum(len(matrices_in(pair)) for pair in pairing.pairs)
    measured: list[ModuleSpectrum] = []
    for pair in pairing.pairs:
        for delta in read_deltas(before, tuned, pair):
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


def _summary(measured: Sequence[ModuleSpectrum], others: Sequence[Finding]) -> SpectraSummary:
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
        findings=find(measured, others),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where there is nothing or something unknown among it."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
