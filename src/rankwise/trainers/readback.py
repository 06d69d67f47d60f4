"""What was written is read again and compared with the plan, module by module.

In: a job, and the readings of its files. Out: what each module gets, and what it was compared with; or an error that
names the first module that would get something else. First by PEFT's rules as `checkpoints.patterns` states them, then
by PEFT itself where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.checkpoints import Adapter, open_source
from rankwise.errors import ReadBackError
from rankwise.trainers.alphas import real_alphas, rule_of
from rankwise.trainers.model import AdapterReading, Asked, ExportedModule, Given, Job, Reading
from rankwise.trainers.real_peft import ask_peft

SAME = 1e-9
"""Relative: two ways to compute one scale from the same alpha and rank differ by rounding alone."""


def compare(job: Job, readings: Sequence[Reading], *, exact: bool) -> tuple[ExportedModule, ...]:
    """Return what every module gets, out of the first file that says it.

    Args:
        job: the plan, the modules that have to stay without an adapter, and the tolerance.
        readings: one a file.
        exact: whether scales have to be equal; else they may differ by the tolerance.

    Raises:
        ReadBackError: a rank or a scale differs, a module is left out or one too many is selected, or an entry selects
            nothing.
    """
    allowed = SAME if exact else max(SAME, job.tolerance * (1 + SAME))
    found: tuple[ExportedModule, ...] = ()
    for reading in readings:
        if isinstance(reading, AdapterReading):
            _same_path(reading, job)
            continue
        given = {m.module: reading.gives(m.module, stack=m.experts > 0) for m in job.modules}
        extras = [name for name in job.idle if reading.gives(name) is not None]
        extras += [name for name in job.idle_stacks if reading.gives(name, stack=True) is not None]
        extra = next(iter(extras), None)
        judge(job.modules, given, extra, reading.file, allowed)
        idle = reading.idle_keys([m.module for m in job.layers], [m.module for m in job.stacks])
        if idle:
            raise ReadBackError(f"{reading.file}: {idle[0]} selects no planned module ({len(idle)} such entries)")
        found = found or tuple(_exported(m, given[m.module]) for m in job.modules)
    if not found:  # all of it lies in the adapter folder
        alphas = real_alphas(job, rule_of(job, rslora=True))
        return tuple(ExportedModule(m.module, m.r, alphas[m.module], m.scaling, 0.0) for m in job.modules)
    return found


def _exported(asked: Asked, given: Given | None) -> ExportedModule:
    if given is None:  # `judge` has refused it
        raise ReadBackError(f"{asked.module} gets no adapter")
    return ExportedModule(asked.module, given.r, given.lora_alpha, given.scaling, given.scaling / asked.scaling - 1)


def _same_path(reading: AdapterReading, job: Job) -> None:
    if reading.adapter != job.adapter:
        raise ReadBackError(f"{reading.file} names the adapter {reading.adapter!r}; it was given as {job.adapter!r}")


def judge(
    modules: Sequence[Asked], given: Mapping[str, Given | None], extra: str | None, file: str, allowed: float
) -> None:
    """Refuse what is not the plan.

    Args:
        modules: what is asked.
        given: module -> what it gets, or None.
        extra: a module outside the plan that gets an adapter, or None.
        file: for the message.
        allowed: relative difference that a scale may have.

    Raises:
        ReadBackError: something differs.
    """
    if extra is not None:
        raise ReadBackError(
            f"{file} gives an adapter to {extra}, which is not planned. Two modules whose names end alike cannot be "
            "told apart by this trainer; plan both, or leave both out."
        )
    wrong = []
    for asked in modules:
        got = given[asked.module]
        if got is None or got.r != asked.r or not math.isclose(got.scaling, asked.scaling, rel_tol=allowed):
            what = "no adapter" if got is None else f"rank {got.r} at scale {got.scaling:.8g}"
            wrong.append(f"{asked.module} gets {what}, planned is rank {asked.r} at scale {asked.scaling:.8g}")
    if wrong:
        raise ReadBackError(f"{file} is not the plan in {len(wrong)} of {len(modules)} modules; first: {wrong[0]}")


def compare_with_peft(
    job: Job, readings: Sequence[Reading], build: Callable[[], Any], *, exact: bool
) -> tuple[str, ...]:
    """Compare what PEFT itself gives to each layer; return the files that PEFT was asked about.

    Args:
        job: the plan.
        readings: one a file; those that no LoraConfig is made of are passed over.
        build: makes a fresh model on the meta device; PEFT changes it.
        exact: as `compare`.

    Raises:
        ReadBackError: a rank or a scale differs, or a module outside the plan got an adapter.
    """
    allowed = SAME if exact else max(SAME, job.tolerance * (1 + SAME))
    asked_about = []
    for reading in readings:
        config = reading.peft_config()
        if config is None:
            continue
        layers = ask_peft(build(), config, reading.file)
        planned = {m.module for m in job.modules}
        extra = next((name for name in layers if name not in planned), None)
        given = {name: Given(r, math.nan, scale) for name, (r, scale) in layers.items()}
        file = f"{reading.file}, as PEFT reads it,"
        judge(job.modules, {name: given.get(name) for name in planned}, extra, file, allowed)
        asked_about.append(reading.file)
    return tuple(asked_about)


def compare_adapter(modules: Sequence[Asked], folder: Path) -> None:
    """Compare an adapter folder with the plan: names, shapes, ranks and scales out of its own tensors and config.

    Raises:
        ReadBackError: something differs.
    """
    with open_source(folder, want="adapter") as adapter:
        if not isinstance(adapter, Adapter):
            raise ReadBackError(f"{folder} is no adapter")
        found = {m.module: m for m in adapter.modules}
    modules = [one for m in modules for one in _one_by_one(m)]
    planned = {m.module: m for m in modules}
    extra = next((name for name in found if name not in planned), None)
    given = {
        name: Given(m.r, m.lora_alpha or math.nan, m.scaling)
        for name, m in found.items()
        if m.scaling is not None and (name not in planned or _fits(planned[name], m.shape))
    }
    judge(modules, {name: given.get(name) for name in planned}, extra, str(folder), SAME)


def _one_by_one(asked: Asked) -> list[Asked]:
    """Return the experts of a stacked parameter, as adapters are read; or the module itself."""
    if not asked.experts:
        return [asked]
    return [replace(asked, module=f"{asked.module}[{index}]") for index in range(asked.experts)]


def _fits(asked: Asked, shape: Sequence[int]) -> bool:
    """Compare shapes; models store their experts in either orientation."""
    return tuple(shape) == asked.shape or (asked.experts > 0 and tuple(shape) == asked.shape[::-1])
