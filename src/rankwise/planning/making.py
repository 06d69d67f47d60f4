"""`plan`: choose a rank for every module, give it its alpha, and say why.

In: a spectra/1 record, or anything `inspect` takes. Out: a plan/1 record.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

import msgspec
import numpy as np

from rankwise.deltas import selection
from rankwise.errors import NothingToMeasureError, OutOfReachError, RecordError, UsageError
from rankwise.inspection import Progress, inspect
from rankwise.planning import comparing, wording
from rankwise.planning.choosing import Chosen, choose
from rankwise.planning.modules import Unit, Update, units_of, updates_of, weights_of
from rankwise.planning.options import check_scale, checked_choice, checked_weights, within_cap
from rankwise.records import (
    LeftOut,
    Optimality,
    PlanChoice,
    PlannedModule,
    PlanRecord,
    SpectraRecord,
    UniformRank,
    from_json,
    now,
    version,
)
from rankwise.runtimes import padded_rank, runtime
from rankwise.scaling import alpha_for
from rankwise.scaling import scaling as factor_of

Source = str | PathLike[str]

DEFAULT_SCALE = 1.0
"""Factor on B A where none is asked for: under alpha / r that is lora_alpha = r, a whole number at every rank."""


def plan(
    source: SpectraRecord | Source,
    *,
    base: Source | None = None,
    budget: int | str | None = None,
    energy: float | None = None,
    relative_error: float | None = None,
    signal: bool = False,
    rank: int | None = None,
    min_rank: int = 0,
    max_rank: int | None = None,
    multiple_of: int = 1,
    fuse: bool = False,
    per_module: bool = False,
    relative: bool = False,
    weights: Mapping[str, float] | Source | None = None,
    within_signal: bool = False,
    modules: str | None = None,
    skip: str | None = None,
    embeddings: bool = False,
    serve: str | None = None,
    scaling: str = "lora",
    scale: float | None = None,
    lora_alpha: float | None = None,
    reference_rank: int | None = None,
    learning_rate: float | None = None,
    device: str | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> PlanRecord:
    """Choose a rank and an alpha for every module of an update.

    Exactly one of `budget`, `energy`, `relative_error`, `signal` and `rank` says how. Under the first three the sum of
    squared errors over all modules is minimised; see `rankwise.allocation` for what is exact.

    Args:
        source: a spectra/1 record or its file, or what `inspect` takes: an adapter, or a tuned checkpoint.
        base: the checkpoint before fine-tuning, where `source` is a tuned one.
        budget: parameters ("2M" is two millions), or "rank:N": what rank N in all planned modules would cost.
        energy: share of the energy to keep, in (0, 1], for the fewest parameters.
        relative_error: largest norm(dW - dW_r) / norm(dW) allowed, for the fewest parameters.
        signal: take the directions above the noise edge of each module.
        rank: the same rank in all modules.
        min_rank: least rank of every module with an update; 0 lets modules be left out.
        max_rank: largest rank of any module.
        multiple_of: ranks are multiples of it, or the whole smaller side of a weight.
        fuse: one rank for weights that runtimes join: q/k/v, gate/up.
        per_module: every module reaches `energy` or `relative_error` by itself, instead of all together.
        relative: count every module's energy as 1, whatever its size.
        weights: regular expression -> factor on the squared error of modules it is found in; or a JSON file of that.
        within_signal: directions at or under the noise edge count for nothing.
        modules: regular expression; only modules whose path it is found in.
        skip: regular expression; not the modules whose path it is found in.
        embeddings: plan embeddings and output heads of a full fine-tune too.
        serve: name of a runtime; ranks stay within its cap, and a finding says what it would do with them.
        scaling: rule of the factor on B A: "lora", "rslora" or "unscaled".
        scale: the factor on B A in every module. Default: 1.
        lora_alpha: instead of `scale`: the alpha that means this factor at `reference_rank`.
        reference_rank: rank at which `lora_alpha` is read. Default: N of `rank` or `budget="rank:N"`, else the
            uniform rank whose parameters are nearest to the plan's.
        learning_rate: written into the plan; a spectrum does not say it.
        device: as in `inspect`.
        seed: as in `inspect`.
        command: argv to write into the record.
        progress: called before each module that is inspected.

    Returns:
        A plan/1 record. Modules that get no rank are in `left_out`.

    Raises:
        RankwiseError: the source cannot be read, or the choice is impossible; see `rankwise.errors`.

    >>> import rankwise
    >>> rankwise.plan("adapter", budget="rank:8", energy=0.9)
    Traceback (most recent call last):
    ...
    rankwise.errors.UsageError: say in one way how ranks are chosen: ... got --budget and --energy
    """
    asked = {name: value for name, value in locals().items() if name not in ("source", "command", "progress")}
    patterns = checked_weights(weights)
    if serve is not None:
        max_rank = within_cap(serve, rank, max_rank)
    choice = checked_choice(
        budget=budget,
        energy=energy,
        relative_error=relative_error,
        signal=signal,
        rank=rank,
        min_rank=min_rank,
        max_rank=max_rank if rank is None else None,
        multiple_of=multiple_of,
        fuse=fuse,
        per_module=per_module,
        within_signal=within_signal,
        relative=relative,
        weighted=bool(patterns),
    )
    check_scale(scaling, scale, lora_alpha, reference_rank, learning_rate)
    wanted = selection(modules, skip)
    spectra = _spectra(source, base=base, modules=modules, skip=skip, device=device, seed=seed, progress=progress)
    updates, left_out, unit = updates_of(spectra, wanted, embeddings=embeddings)
    if not updates:
        raise NothingToMeasureError(
            f"{spectra.source}: no module is left to plan. "
            + ("; ".join(wording.left_out_words(left_out)) or "Check --modules and --skip.")
        )
    given = weights_of(updates, patterns, relative=relative)
    updates = [dataclasses.replace(u, weight=w) for u, w in zip(updates, given, strict=True)]
    units = units_of(updates, fuse=fuse)
    chosen = choose(choice, budget, updates, units)
    if not any(chosen.ranks):
        raise OutOfReachError(_nothing(choice, chosen, updates))
    made = _Made(spectra, choice, chosen, tuple(updates), tuple(units), unit)
    beside = comparing.uniform_within(updates, choice, chosen.budget or made.params)
    factor, reference = _factor(choice, scaling, scale, lora_alpha, reference_rank, beside.r if beside else 1)
    planned = _modules(made, scaling, factor)
    record = _record(made, planned, beside, scaling, tuple(left_out))
    record = msgspec.structs.replace(
        record,
        command=tuple(command) if command is not None else (_call(source, asked),),
        learning_rate=learning_rate,
        scale=factor,
        reference_rank=reference,
        max_lora_rank=_served(serve, planned),
    )
    served = None if serve is None else wording.serving(planned, scaling, serve, record.max_lora_rank or 0)
    found = [*wording.findings(record, chosen, spectra, updates), *([served] if served else [])]
    record = msgspec.structs.replace(record, findings=wording.worst_first(found))
    return msgspec.structs.replace(record, why=wording.why(record, chosen, spectra, updates))


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    """What a record is written from; `unit` is what a sigma of 1 was in the spectra's own unit."""

    spectra: SpectraRecord
    choice: PlanChoice
    chosen: Chosen
    updates: tuple[Update, ...]
    units: tuple[Unit, ...]
    unit: float

    @property
    def params(self) -> int:
        return sum(r * u.cost for r, u in zip(self.chosen.ranks, self.updates, strict=True))

    @property
    def energies(self) -> dict[str, float | None]:
        return {m.module: m.energy for m in self.spectra.modules}


def _record(
    made: _Made,
    planned: tuple[PlannedModule, ...],
    beside: UniformRank | None,
    rule: str,
    left_out: tuple[LeftOut, ...],
) -> PlanRecord:
    """Return the record with its figures, and without its words."""
    spectra, choice, chosen, updates = made.spectra, made.choice, made.chosen, made.updates
    error = comparing.relative_error(updates, chosen.ranks)
    same = None if choice.kind == "rank" else comparing.uniform_reaching(updates, choice, error)
    extra = [p.r for p in (beside, same) if p is not None]
    return PlanRecord(
        format=PlanRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=(),
        device="cpu",
        seed=spectra.seed,
        rule=rule,
        modules=planned,
        params=made.params,
        budget=chosen.budget,
        relative_error=error,
        learning_rate=None,
        why="",
        source=spectra.source,
        base=spectra.base,
        kind=spectra.kind,
        choice=choice,
        optimality=_optimality(chosen, 1.0 if choice.relative else made.unit * made.unit),
        uniform=beside,
        uniform_same_error=same,
        curve=tuple(comparing.curve(updates, made.units, chosen, choice, extra)),
        left_out=(*left_out, *_chosen_out(made)),
    )


def _call(source: SpectraRecord | Source, asked: Mapping[str, object]) -> str:
    """Spell a call from Python."""
    what = "spectra" if isinstance(source, SpectraRecord) else repr(fspath(source))
    defaults = plan.__kwdefaults__ or {}
    words = [f"{name}={value!r}" for name, value in asked.items() if value != defaults.get(name)]
    return f"rankwise.plan({', '.join([what, *words])})"


def _spectra(
    source: SpectraRecord | Source,
    *,
    base: Source | None,
    modules: str | None,
    skip: str | None,
    device: str | None,
    seed: int,
    progress: Progress | None,
) -> SpectraRecord:
    """Return spectra: those given, those of a file, or those that `inspect` takes of the source."""
    if isinstance(source, SpectraRecord):
        record, where = source, "the spectra"
    else:
        where, path = fspath(source), Path(source)
        if path.is_file() and path.stat().st_size == 0:
            raise RecordError(f"{where} is empty; wanted a spectra/1 file, or an adapter or checkpoint")
        found = measured(source)
        if found is None:
            return inspect(source, base=base, modules=modules, skip=skip, device=device, seed=seed, progress=progress)
        record = found
    if base is not None:
        raise UsageError("--base is for a checkpoint that has to be inspected; these spectra were measured already")
    _check_spectra(record, where)
    return record


def measured(source: Source) -> SpectraRecord | None:
    """Return the spectra of a file that holds a rankwise record; None where `inspect` has to look.

    Raises:
        RecordError: it is a record of another kind, or cut off.
    """
    text = _record_text(Path(source))
    return None if text is None else from_json(text, SpectraRecord, fspath(source))


def _record_text(path: Path) -> bytes | None:
    """Return what stands in a local file, or pipe, that says it is a rankwise record; else None."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            return head + file.read() if head.lstrip()[:1] == b"{" and b'"rankwise/' in head else None
    except (OSError, ValueError):  # no such file, or no path at all: `inspect` says what is wrong
        return None


def _check_spectra(record: SpectraRecord, where: str) -> None:
    """Refuse spectra that no inspection writes: values that fall out of order, or are negative, or too many."""
    if len({m.module for m in record.modules}) < len(record.modules):
        raise RecordError(f"{where} names a module twice")
    for m in record.modules:
        values = np.asarray(m.singular_values, dtype=np.float64)
        if not np.isfinite(values).all() or (values < 0).any() or (np.diff(values) > 0).any():
            raise RecordError(f"{where}: the singular values of {m.module} are not finite, falling and >= 0")
        if min(m.shape) < 1 or len(values) > min(m.shape):
            raise RecordError(
                f"{where}: {m.module} has {len(values)} singular values, and the shape {m.shape} holds "
                f"{max(min(m.shape), 0)} at most"
            )
        if m.signal_rank is not None and not 0 <= m.signal_rank <= min(m.shape):
            raise RecordError(f"{where}: {m.module} has a signal rank of {m.signal_rank} at the shape {m.shape}")


def _served(serve: str | None, planned: Sequence[PlannedModule]) -> int | None:
    if serve is None or runtime(serve).accepts is None:
        return None
    return padded_rank(serve, max(m.r for m in planned))


def _factor(
    choice: PlanChoice, rule: str, scale: float | None, lora_alpha: float | None, reference: int | None, beside: int
) -> tuple[float, int | None]:
    """Return the factor on B A of all modules, and the rank at which an alpha was read, if one was given."""
    if lora_alpha is None:
        return DEFAULT_SCALE if scale is None else scale, None
    if reference is None:
        named = choice.text.removeprefix("rank:") if choice.kind in ("budget", "rank") else ""
        by_name = choice.kind == "rank" or choice.text.startswith("rank:")
        reference = int(named) if by_name else beside
    return factor_of(rule, lora_alpha, reference), reference


def _modules(made: _Made, rule: str, factor: float) -> tuple[PlannedModule, ...]:
    groups = {place: unit.name for unit in made.units for place in unit.members}
    weighing = made.unit * made.unit if made.choice.relative else 1.0  # energies were in units of the largest sigma^2
    energies = made.energies
    planned = []
    for place, (u, r) in enumerate(zip(made.updates, made.chosen.ranks, strict=True)):
        if r == 0:
            continue
        alpha = alpha_for(rule, factor, r)
        planned.append(
            PlannedModule(
                module=u.module,
                shape=u.shape,
                r=r,
                lora_alpha=alpha,
                scaling=factor_of(rule, alpha, r),
                kept_energy_share=u.kept_share(r),
                energy=energies.get(u.module),
                signal_rank=u.signal_rank,
                rounding_limited=u.rounding_limited,
                weight=u.weight / weighing,
                group=groups[place],
            )
        )
    return tuple(planned)


def _chosen_out(made: _Made) -> list[LeftOut]:
    """Return the modules that were up for choice and got nothing."""
    by_signal = made.choice.kind == "signal" or made.choice.within_signal
    energies = made.energies
    return [
        LeftOut(
            module=u.module,
            shape=u.shape,
            reason="no value stands above its noise edge: an update may be there, and cannot be seen"
            if by_signal and u.signal_rank == 0
            else "each of its directions saves less for a parameter than those that were taken",
            energy=energies.get(u.module),
            counted=True,
        )
        for u, r in zip(made.updates, made.chosen.ranks, strict=True)
        if r == 0
    ]


def _optimality(chosen: Chosen, unit: float) -> Optimality | None:
    """Return how good the choice is; `unit` is what a weighted energy of 1 was in those of the record."""
    made = chosen.allocation
    if made is None:
        return None
    return Optimality(
        level=made.level * unit if math.isfinite(made.level) else None,
        exact=made.exact,
        kept_share=min(made.gain / chosen.total, 1.0),
        share_bound=min(made.gain_bound / chosen.total, 1.0),
        params_bound=made.cost_bound,
    )


def _nothing(choice: PlanChoice, chosen: Chosen, updates: Sequence[Update]) -> str:
    """Return why no module got a rank."""
    if choice.kind == "signal" or (choice.within_signal and not any(u.signal_rank for u in updates)):
        return (
            f"in none of the {len(updates)} modules a singular value stands above the noise edge: what was trained "
            "cannot be told from rounding. --energy and --budget would plan for the rounding"
        )
    if choice.kind in ("energy", "relative_error"):
        what = f"{choice.text} of the energy" if choice.kind == "energy" else f"a relative error of {choice.text}"
        return (
            f"{what} is reached without a rank in any of the {len(updates)} modules; ask for more energy, or less error"
        )
    cheapest = 0 if chosen.problem is None else chosen.problem.cheapest_step
    return (
        f"the budget of {chosen.budget or 0:,} parameters buys no rank in any of the {len(updates)} modules; the "
        f"cheapest step costs {cheapest:,}"
    )
