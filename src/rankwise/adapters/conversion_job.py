"""One conversion: what goes in, what is decided once for all modules, and the modules one after another.

In: open adapters, OUT and checked options. Out: the files in their place, and the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import numpy as np

from rankwise._version import __version__
from rankwise.adapters import baking, carrying
from rankwise.adapters.baking import Need, Written
from rankwise.adapters.convert_options import Options
from rankwise.adapters.formats import WRITERS, Entry, Result, Setup, Writer
from rankwise.adapters.formats.names import dotted
from rankwise.adapters.kept_ranks import known_ranks, rank_by_values
from rankwise.adapters.merging import Joined, Weighted, join, read_joined
from rankwise.adapters.parts import Array
from rankwise.adapters.rewriting import Opened, rewrite, taken_apart
from rankwise.adapters.staging import Staging
from rankwise.adapters.stored_units import NUMPY, units_of
from rankwise.adapters.telling import Told, notes_of
from rankwise.checkpoints import Adapter, open_source
from rankwise.checkpoints.locate import everywhere, identity
from rankwise.errors import UsageError, WrongKindError, without_secrets
from rankwise.records import ConversionRecord, ConvertedModule, Skipped, now, version
from rankwise.records.conversion import Addend
from rankwise.runtimes import RUNTIMES, Runtime, padded_rank
from rankwise.spreading import Work, Workers, told

Source = str | PathLike[str]

Progress = Callable[[str, int, int], None]
"""Called with (module, number done, number in all) before each module."""

RECORD: Final = "conversion.json"
"""The record, in a folder."""

VLLM_MOST: Final = max(RUNTIMES["vllm"].accepts or (0,))
"""The largest rank that vLLM's cap may be set to."""


Tensors = Mapping[str, Array]
"""Name -> array, as they are written."""

TOGETHER: Final = 8
"""Modules that a worker is sent at a time: one takes some milliseconds, and so does sending it."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What is decided for all units: unit -> rank, what is written where that is known, and path."""

    ranks: dict[str, int]
    written: dict[str, Written]
    paths: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sent:
    """What a worker opens the same job from: sources with their weights, OUT, options."""

    sources: tuple[tuple[str, float], ...]
    out: Path
    options: Options


class Job:
    """One conversion: what goes in, what is decided, and the modules one after another."""

    def __init__(self, opened: Sequence[tuple[Adapter, float]], out: Path, options: Options) -> None:
        """Read the headers and decide everything that does not take the factors.

        Raises:
            RankwiseError: something cannot be converted, or not into this format.
        """
        self.out, self.options = out, options
        self.adapter = opened[0][0]
        self.form = options.form or self.adapter.format
        if self.adapter.format == "cloneofsimo":  # there are no names, whatever is asked for: say that first
            dotted(self.adapter, units_of(self.adapter), options.form or "another format")
        self.writer: Writer = WRITERS[self.form]
        self._check_rule()
        self.folder = self._is_folder()
        merging = len(opened) > 1 or opened[0][1] != 1.0
        self.cargo: list[carrying.Cargo] = []
        sources = []
        for adapter, weight in opened:
            carrying.refuse(adapter)
            cargo = carrying.stow(
                adapter,
                units_of(adapter),
                form=self.form,
                runtime=options.runtime,
                merging=merging,
                drop_others=options.drop_others,
            )
            self.cargo.append(cargo)
            sources.append(Weighted(adapter, cargo.units, weight))
        if not any(c.units for c in self.cargo):
            raise UsageError(f"{self.adapter.source}: nothing is left to write")
        self.sources = sources
        self.joined = join(sources)
        self.ranks = known_ranks(options.choice, self.joined)

    def _check_rule(self) -> None:
        rule = self.options.scaling
        if rule is not None and rule not in self.writer.rules:
            raise UsageError(
                f"the {self.form} format cannot say the rule {rule}; it knows {', '.join(self.writer.rules)}"
            )
        if self.writer.uniform and self.options.one_alpha:
            raise UsageError(f"the {self.form} format has one scale and no alpha; leave --lora-alpha out, or --bake")

    def _is_folder(self) -> bool:
        file = self.out.suffix == ".safetensors"
        if file and self.writer.folder:
            raise UsageError(f"{self.out} names a file; an adapter of the {self.form} format is a folder")
        return not file

    def identity(self, sources: Sequence[Source]) -> dict[str, Any]:
        """Return everything that the result depends on, for `Staging`."""
        plan = self.options.choice.plan
        return {
            "rankwise": __version__,
            "command": "convert",
            "options": repr(self.options),
            "plan": None if plan is None else plan.to_json(),
            "sources": [
                [without_secrets(fspath(s)), w.weight, identity(fspath(s))]
                for s, w in zip(sources, self.sources, strict=True)
            ],
        }

    @property
    def rule(self) -> str:
        """The rule to write where the way of writing does not decide it."""
        if self.options.scaling is not None:
            return self.options.scaling
        own = self.joined[0].unit.first.rule
        return own if own in self.writer.rules else self.writer.rules[0]

    def run(
        self, staging: Staging, command: tuple[str, ...], progress: Progress | None, workers: Workers
    ) -> ConversionRecord:
        """Convert every module, then the rest, and put it in its place."""
        left_out = [skipped for cargo in self.cargo for skipped in cargo.left_out]
        ranks = dict(self.ranks.by_unit)
        together = self.writer.uniform or self.options.bake or self.options.runtime is not None
        if self.options.choice.by_spectrum and together:
            ranks |= self._measured_ranks(progress, workers)
        paths = self.writer.paths(self.adapter, [j.unit for j in self.joined])
        self.way, decided = self._decide(ranks) if together else ("alone", {})
        made = self._made(staging, workers, Decided(ranks, decided, paths))
        entries: list[Entry] = []
        modules: list[ConvertedModule] = []
        lost: list[float] = []
        for done, joined in enumerate(self.joined):
            unit = joined.unit
            if progress is not None:
                progress(unit.name, done, len(self.joined))
            facts = staging.facts(unit.name)
            if facts is None:
                facts, tensors = next(made)
                staging.put(unit.name, tensors, facts)
            if facts["left_out"] is not None:
                left_out.append(Skipped(module=unit.name, reason=facts["left_out"]))
                lost.append(facts["lost"])
                continue
            modules += msgspec.convert(facts["modules"], list[ConvertedModule])
            entries.append(Entry(unit, paths[unit.name], Written(**facts["written"])))
        if not entries:
            self._refuse_nothing()
        return self._finish(staging, command, entries, modules, left_out, lost)

    def _refuse_nothing(self) -> NoReturn:
        raise UsageError(
            f"{self.adapter.source}: every module got rank 0, so that nothing is left to write. That is what an update "
            "of zero asks for, such as that of an adapter before its training; --rank N writes it all the same."
        )

    def _needs(self, joined: Joined, rank: int) -> Need:
        source = joined.unit.first
        before = None
        if joined.plain and source.rule is not None and source.lora_alpha is not None:
            before = (source.rule, source.lora_alpha, source.r)
        return Need(rank, joined.scaling, before)

    def _measured_ranks(self, progress: Progress | None, workers: Workers) -> dict[str, int]:
        """Return the ranks that the spectra ask for, ahead of writing: all modules get the largest."""
        work = Work(_rank_of, self, lambda: partial(_open_job, self._sent()), one_thread=True)
        names = [joined.unit.name for joined in self.joined]
        results = workers.flat_map(work, range(len(names)), name=names.__getitem__, together=TOGETHER)
        ranks = told(results, [f"measuring {name}" for name in names], progress)
        return dict(zip(names, ranks, strict=True))

    def _made(self, staging: Staging, workers: Workers, decided: Decided) -> Iterator[tuple[dict[str, Any], Tensors]]:
        """Yield what is noted and written of each unit that an earlier run has not left."""
        work = Work(_unit_of, (self, decided), lambda: partial(_open_decided, self._sent(), decided), one_thread=True)
        todo = [index for index, joined in enumerate(self.joined) if staging.facts(joined.unit.name) is None]
        return workers.flat_map(work, todo, name=lambda index: self.joined[index].unit.name, together=TOGETHER)

    def _sent(self) -> Sent:
        return Sent(tuple((everywhere(w.adapter.source), w.weight) for w in self.sources), self.out, self.options)

    def rank(self, joined: Joined, opened: Opened) -> int:
        """Return the rank that the spectrum of a unit asks for."""
        ranks = [
            rank_by_values(self.options.choice, module, core.sigma)
            for module, core in zip(joined.unit.modules, opened.cores, strict=True)
        ]
        return min(max(ranks), joined.r)

    def _decide(self, ranks: dict[str, int]) -> tuple[str, dict[str, Written]]:
        """Return how the scale is written and what is written for every unit, where that takes all of them."""
        kept = [j for j in self.joined if ranks[j.unit.name]]
        if not kept:
            self._refuse_nothing()
        needs = [self._needs(j, ranks[j.unit.name]) for j in kept]
        largest = max(n.r for n in needs)
        row = self.options.runtime
        if row is not None:
            rank = padded_rank(row.name, largest)
        else:  # what vLLM's cap can be set to costs little, and is right everywhere
            served = self.options.bake and not self.writer.uniform and largest <= VLLM_MOST
            rank = padded_rank("vllm", largest) if served else largest
        way, written = "baked", baking.baked(needs, rank)
        if self.writer.uniform:
            way = "baked" if self.options.bake else "uniform"
            made = [Written(rank, 1.0, 1.0, "unscaled")] * len(needs) if self.options.bake else None
            written = made or baking.one_scale(needs, rank, self.writer.rules[0])
        elif row is not None and not self.options.bake:
            way, written = self._for(row, needs, rank)
        return way, {j.unit.name: w for j, w in zip(kept, written, strict=True)}

    def _for(self, row: Runtime, needs: Sequence[Need], rank: int) -> tuple[str, list[Written]]:
        stored = self.writer.readers.get(row.name, False)
        if stored:  # the file itself gives every module its alpha
            return "kept", baking.kept(needs, self.rule)
        return baking.for_runtime(row, needs, rank, self.rule)

    def unit(self, joined: Joined, known: Decided) -> tuple[dict[str, Any], Tensors]:
        """Convert one unit; return what is noted and what is written."""
        unit, ranks, decided = joined.unit, known.ranks, known.written
        pairs = read_joined(joined)
        lazy = self.options.choice.by_spectrum and unit.name not in decided and not decided
        opened = Opened(pairs, ())
        if lazy or ranks[unit.name] < joined.r:
            opened = taken_apart(pairs)
        rank = self.rank(joined, opened) if lazy else ranks[unit.name]
        self._refuse_change(joined, rank, decided.get(unit.name))
        if rank == 0:
            return self._drop(joined, opened), {}
        need = self._needs(joined, rank)
        written = decided.get(unit.name) or self._alone(need)
        if self.form == "kohya":  # its alphas are float32
            written = Written.by_alpha(written.rule, _float32(unit.name, written.lora_alpha), written.r)
        dtypes = (self.options.dtype,) * 2 if self.options.dtype is not None else joined.dtypes
        made, entries = rewrite(joined, opened, need, written, dtypes)
        noted = {
            "left_out": None,
            "modules": [msgspec.to_builtins(e) for e in entries],
            "written": {"r": written.r, "lora_alpha": written.lora_alpha, "scaling": written.scaling}
            | {"rule": written.rule},
        }
        return noted, self.writer.tensors(unit, known.paths[unit.name], made, written)

    def _alone(self, need: Need) -> Written:
        if self.options.one_alpha:
            return baking.same_alpha([need], self.rule, self.options.lora_alpha)[0]
        return baking.kept([need], self.rule)[0]

    def _refuse_change(self, joined: Joined, rank: int, written: Written | None) -> None:
        dora = next((a for a, c in zip(self.sources, self.cargo, strict=True) if c.dora), None)
        if dora is not None and rank < joined.r:
            carrying.refuse_cut(dora.adapter.source, joined.unit)
        if joined.unit.groups > 1 and (rank != joined.unit.r or (written is not None and written.r != rank)):
            carrying.refuse_groups(self.adapter.source, [joined.unit])

    def _narrowed(self) -> bool:
        asked = self.options.dtype
        if asked is None:
            return False
        size = NUMPY[asked].itemsize
        return any(d != asked and NUMPY[d].itemsize >= size for j in self.joined for d in j.dtypes)

    def _drop(self, joined: Joined, opened: Opened) -> dict[str, Any]:
        """Return what is noted of a module that gets rank 0."""
        norm = joined.scaling * math.hypot(*(float(np.linalg.norm(core.sigma)) for core in opened.cores))
        reason = "its update is zero" if norm == 0 else f"rank 0 was asked for; its update of norm {norm:.3g} is gone"
        return {"left_out": reason, "lost": norm, "modules": [], "written": None}

    def _finish(
        self,
        staging: Staging,
        command: tuple[str, ...],
        entries: Sequence[Entry],
        modules: Sequence[ConvertedModule],
        left_out: Sequence[Skipped],
        lost: Sequence[float],
    ) -> ConversionRecord:
        others = self.cargo[0].tensors
        for tensor in others:
            if staging.facts(f"+{tensor.name}") is None:
                staging.put(f"+{tensor.name}", {tensor.name: self.adapter.read_other(tensor.name)}, {})
        changed = {e.unit.name for e in entries} != {u.name for u in units_of(self.adapter)}
        setup = Setup(
            self.adapter, tuple(e.unit for e in entries), {e.unit.name: e.path for e in entries}, others, changed
        )
        result = self.writer.finish(setup, entries)
        keys = [*(e.unit.name for e in entries), *(f"+{t.name}" for t in others)]
        record = self._record(command, entries, modules, left_out, lost, result)
        staging.join(self.writer.file, keys, result.metadata)
        if self.folder:
            for name, text in result.texts.items():
                staging.write(name, text)
            staging.write(RECORD, record.to_json())
        staging.finish()
        return record

    def _record(
        self,
        command: tuple[str, ...],
        entries: Sequence[Entry],
        modules: Sequence[ConvertedModule],
        left_out: Sequence[Skipped],
        lost: Sequence[float],
        result: Result,
    ) -> ConversionRecord:
        whole = math.hypot(*(m.norm for m in modules), *lost)
        wrong = math.hypot(*(m.norm * m.relative_error for m in modules), *lost)
        rules = {e.written.rule for e in entries}
        runtimes = baking.served([e.written for e in entries], self.writer.readers) if self.writer.readers else []
        told = Told(
            adapters=[s.adapter for s in self.sources],
            units=[j.unit for j in self.joined],
            form=self.form,
            runtime=self.options.runtime,
            way=self.way,
            modules=modules,
            entries=entries,
            runtimes=runtimes,
            dora=any(c.dora for c in self.cargo),
            narrowed=self._narrowed(),
            others=[t for t in self.cargo[0].tensors if not carrying.is_magnitude(t.name)],
        )
        return ConversionRecord(
            format=ConversionRecord.FORMAT,
            rankwise=version(),
            created=now(),
            command=command,
            device="cpu",
            seed=None,
            source=without_secrets(self.adapter.source),
            adapters=tuple(Addend(source=without_secrets(s.adapter.source), weight=s.weight) for s in self.sources),
            out=str(self.out),
            source_format=self.adapter.format,
            out_format=self.form,
            rule=next(iter(rules)) if len(rules) == 1 else None,
            choice=self.options.choice.words,
            runtime=None if self.options.runtime is None else self.options.runtime.name,
            baked=self.options.bake or told.way == "baked",
            exact=all(m.exact for m in modules) and not any(lost),
            relative_error=wrong / whole if whole else 0.0,
            params=sum(m.after.r * sum(m.shape) for m in modules),
            modules=tuple(modules),
            carried=tuple(t.name for t in self.cargo[0].tensors),
            left_out=tuple(left_out),
            runtimes=tuple(runtimes),
            notes=tuple(without_secrets(note) for note in (*self.ranks.notes, *notes_of(told), *result.notes)),
        )


def open_adapter(source: Source) -> Adapter:
    """Open an adapter.

    Raises:
        WrongKindError: it is a full checkpoint.
    """
    opened = open_source(source, want="adapter")
    if not isinstance(opened, Adapter):  # `want` refuses checkpoints: this is for the type checker
        opened.close()
        raise WrongKindError(f"{fspath(source)} is a full checkpoint; convert takes adapters")
    return opened


def _open_job(sent: Sent) -> Job:
    return Job([(open_adapter(source), weight) for source, weight in sent.sources], sent.out, sent.options)


def _open_decided(sent: Sent, decided: Decided) -> tuple[Job, Decided]:
    return _open_job(sent), decided


def _rank_of(job: Job, index: int) -> Iterator[int]:
    joined = job.joined[index]
    yield job.rank(joined, taken_apart(read_joined(joined)))


def _unit_of(opened: tuple[Job, Decided], index: int) -> Iterator[tuple[dict[str, Any], Tensors]]:
    job, decided = opened
    yield job.unit(job.joined[index], decided)


def _float32(module: str, alpha: float) -> float:
    """Round an alpha to what kohya's format keeps it in.

    Raises:
        UsageError: it is out of range there.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(alpha))
    if not 0 < rounded < math.inf:
        raise UsageError(
            f"{module}: its alpha of {alpha:.3g} does not fit into float32, in which a kohya file keeps it. Nothing "
            "was written. --bake or --alpha-equals-r folds the scale into B."
        )
    return rounded
