"""`extract`: a LoRA adapter out of a full fine-tune, one module in memory at a time.

In: two checkpoints, and how ranks are chosen. Out: an adapter folder that PEFT loads, and an extraction/1 record that
says what every module lost and what is not in the adapter at all.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final

from rankwise.adapters import summing
from rankwise.adapters.choosing import Choice, choose
from rankwise.adapters.layout import Spot, is_old_expert, names_on_base, shortest_targets, spot_of, task_type
from rankwise.adapters.leftovers import Leftovers, Rest
from rankwise.adapters.peft_folder import CONFIG, WEIGHTS, peft_config
from rankwise.adapters.staging import Staging, check_out
from rankwise.adapters.units import DTYPE_NAMES, Made, Moments, Unit, Working
from rankwise.checkpoints import open_source
from rankwise.checkpoints.experts import wrapping_order
from rankwise.checkpoints.locate import everywhere, identity
from rankwise.checkpoints.model import Adapter, Checkpoint
from rankwise.deltas import (
    Pair,
    Selection,
    align_names,
    module_of,
    modules_in,
    pair_checkpoints,
    pair_memory,
    selection,
)
from rankwise.errors import NothingToMeasureError, UsageError, WrongKindError, without_secrets
from rankwise.linalg import checked_device, default_device
from rankwise.records import Calibration, ExtractionRecord, PlanRecord, now, to_json, version
from rankwise.spreading import Work, Workers, device_of_workers, spread

Source = str | PathLike[str]
Progress = Callable[[str, int, int], None]
"""Called with (module, number done, number in all) before each module."""

SAMPLES: Final = 64

RECORD: Final = "extraction.json"
"""The record's name inside the adapter's folder."""


def extract(
    base: Source,
    tuned: Source,
    out: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
    relative_error: float | None = None,
    signal: bool = False,
    plan: Source | PlanRecord | None = None,
    scaling: str | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    modules: str | None = None,
    skip: str | None = None,
    embeddings: bool = False,
    lm_head: bool = False,
    save_whole: bool = False,
    calibration: str | None = None,
    calibration_samples: int | None = None,
    device: str | None = None,
    seed: int = 0,
    cluster: str | None = None,
    force: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ExtractionRecord:
    """Write a LoRA adapter that turns the base into the tuned model, as far as low rank can.

    Exactly one of `rank`, `energy`, `relative_error`, `signal` and `plan` chooses the ranks. The error of every
    module is within 1.001 of the best that its rank allows, before the cast to `dtype`, and is measured again after
    it. A killed run leaves nothing that loads; the same call then goes on where it was.

    Args:
        base: the checkpoint before fine-tuning: folder, file, hub id or URL. Written into the config as given.
        tuned: the checkpoint after it.
        out: folder of the adapter.
        rank: one rank for all modules; cut to the smaller side of small ones.
        energy: share of each module's energy to keep, in (0, 1].
        relative_error: largest relative error of each module before the cast, in (0, 1).
        signal: keep the directions above the noise edge: for pairs stored in 16 bits.
        plan: a plan/1 record or its file: rank, alpha and rule of each module.
        scaling: rule: "lora" (the default), "rslora" or "unscaled".
        lora_alpha: alpha of all modules. None is the rank. The factors make up for it.
        dtype: of the factors: "float32", "float16" or "bfloat16"; None keeps each module's own.
        modules: regular expression; only modules whose path it is found in.
        skip: regular expression; not the modules whose path it is found in.
        embeddings: adapt embedding tables that changed.
        lm_head: adapt the output head if it changed.
        save_whole: store whole what changed and low rank cannot carry (norms, resized tables).
        calibration: texts; minimise the error of the outputs on them, not that of the weights.
        calibration_samples: number of texts to measure inputs on; None is 64.
        device: "cpu" or a torch device for the products; None means cuda where there is one, and with `cluster` cpu.
        seed: of the randomised route.
        cluster: address of a Ray cluster: its workers read the checkpoints and make the factors, the same as here.
            "local" starts one on this machine. Both checkpoints must be readable under their names on every node.
        force: replace an adapter that is at `out`.
        command: argv to write into the record.
        progress: called before each module.

    Returns:
        An extraction/1 record; it lies in the folder too, as extraction.json.

    Raises:
        RankwiseError: a source cannot be read, the options do not go together, `out` cannot be written.
    """
    if plan is not None and not isinstance(plan, PlanRecord):
        plan = fspath(plan)
    choice = choose(
        rank=rank,
        energy=energy,
        relative_error=relative_error,
        signal=signal,
        plan=plan,
        rule=scaling,
        lora_alpha=lora_alpha,
    )
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPE_NAMES)}; got {dtype!r}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must be from 0 to {2**63 - 1}, got {seed}")
    if calibration is None and calibration_samples is not None:
        raise UsageError("--calibration-samples needs --calibration DATA: without it no inputs are measured")
    if calibration is not None and cluster is not None:
        raise UsageError(
            "--calibration runs the base model on this machine and keeps what it measures here; leave out --cluster"
        )
    wanted = selection(modules, skip)
    check_out(Path(out), force=force, folder=True)
    if cluster is not None:
        chosen = device_of_workers(device)
    else:
        chosen = default_device() if device is None else checked_device(device)
    options: dict[str, Any] = {
        "rule": choice.rule,
        "lora_alpha": lora_alpha,
        "dtype": dtype,
        "modules": modules,
        "skip": skip,
        "embeddings": embeddings,
        "lm_head": lm_head,
        "save_whole": save_whole,
        "device": chosen,
        "seed": seed,
    }
    words = tuple(command) if command is not None else _call(base, tuned, out, choice, {**options, "cluster": cluster})
    with contextlib.ExitStack() as stack:
        before, after = (stack.enter_context(_checkpoint(source)) for source in (base, tuned))
        job = Job(before, after, Path(out), choice, options, wanted, force, words, progress, cluster)
        if calibration is None:
            return job.run(None, None)
        samples = SAMPLES if calibration_samples is None else calibration_samples
        from rankwise.adapters.calibration import calibrated

        return calibrated(job, fspath(base), fspath(tuned), calibration, samples=samples)


def _work_on(working: Working, unit: Unit) -> Iterator[tuple[Made, dict[str, Any]]]:
    yield working.work(unit)


def _open_working(base: str, tuned: str, wanted: Selection, choice: Choice, options: Mapping[str, Any]) -> Working:
    checked_device(str(options["device"]))
    return Working(_checkpoint(base), _checkpoint(tuned), wanted, choice, options, None)


def _memory(unit: Unit) -> int:
    return max(pair_memory(pair) for pair, _ in unit.members)


def _checkpoint(source: Source) -> Checkpoint:
    opened = open_source(source, want="checkpoint")
    if isinstance(opened, Adapter):  # `want` refuses adapters: this is for the type checker
        opened.close()
        raise WrongKindError(f"{fspath(source)} is an adapter; extract compares two full checkpoints")
    return opened


def _call(base: Source, tuned: Source, out: Source, choice: Choice, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Spell a call from Python as the command that does the same."""
    words = ["rankwise", "extract", fspath(base), fspath(tuned), fspath(out), f"--{choice.kind}"]
    words += [] if choice.wanted is None else [str(choice.wanted)]
    for name, value in options.items():
        flag = "--scaling" if name == "rule" else f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value and not (name == "rule" and (choice.plan is not None or value == "lora")):
            words += [flag, str(value)]
    return tuple(without_secrets(word) for word in words)


class Job:
    """One extraction: everything it depends on, and the run of it."""

    def __init__(
        self,
        before: Checkpoint,
        after: Checkpoint,
        out: Path,
        choice: Choice,
        options: Mapping[str, Any],
        wanted: Selection,
        force: bool,
        command: tuple[str, ...],
        progress: Progress | None,
        cluster: str | None = None,
    ) -> None:
        self.before, self.after, self.out = before, after, out
        self.choice, self.options, self.wanted = choice, options, wanted
        self.force, self.command, self.progress, self.cluster = force, command, progress, cluster
        self.base_name, self.tuned_name = (without_secrets(c.source) for c in (before, after))

    def elsewhere(self, out: Path) -> Job:
        """Return the same job for another place."""
        return Job(
            self.before, self.after, out, self.choice, self.options, self.wanted, False, self.command, self.progress
        )

    def description(self, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return everything the result depends on, as JSON."""
        planned = None if self.choice.plan is None else sorted((m.module, m.r, m.scaling) for m in self._planned())
        return {
            "rankwise": version(),
            "base": identity(self.before.source),
            "tuned": identity(self.after.source),
            "names": [self.base_name, self.tuned_name],
            "choice": [self.choice.kind, self.choice.wanted, planned],
            "options": dict(self.options),
            "calibration": None if calibration is None else dict(calibration),
        }

    def _planned(self) -> Iterator[Any]:
        return iter((self.choice.plan or {}).values())

    def run(self, moments: Moments | None, calibration: Mapping[str, Any] | None) -> ExtractionRecord:
        """Extract into `out`.

        Args:
            moments: module -> second moment of its inputs, for those that are calibrated.
            calibration: what they were measured on, for the description of the job.
        """
        pairing = pair_checkpoints(self.before, self.after, self.wanted)
        aligned = align_names(self.before.names(), self.after.names())
        on_base, differ = names_on_base(aligned)
        held = set(on_base.values())
        config = self.before.config or self.after.config
        spots = {p.tuned_name: spot_of(p, on_base[p.tuned_name], held, config) for p in pairing.pairs}
        leftovers = Leftovers(self.before, self.after, aligned, on_base, self.wanted, pairing.skipped)
        units = self._units(pairing.pairs, spots, leftovers)
        self._check_plan(pairing.pairs)
        self._check_rule(units)
        with contextlib.ExitStack() as stack:
            workers = stack.enter_context(spread(self.cluster, "--cluster"))
            staging = stack.enter_context(Staging(self.out, self.description(calibration), force=self.force))
            stack.enter_context(staging.cut_short(UsageError))
            made = self._work(units, staging, moments, workers)
            if not any(m.placed for m in made):
                rest = leftovers.take([], None, workers)
                staging.discard()
                raise NothingToMeasureError(self._nothing(made, rest))
            placed = [p for m in made for p in m.placed]
            rest = leftovers.take(placed, staging if self.options["save_whole"] else None, workers)
            alone = set(self.before.names()) - set(aligned.values())
            paths = {module_of(name) for name in held | alone} | {s.tied for s in spots.values() if s.tied}
            settings = peft_config(
                placed,
                self.choice.rule,
                base=self.base_name,
                task_type=task_type(config),
                modules_to_save=[w.module for w in rest.whole],
                targets=shortest_targets(placed, paths),
            )
            record = self._record(made, rest, settings, summing.Names(differ, pairing, self.before, self.after))
            staging.join(WEIGHTS, [*(m.key for m in made if m.placed), *rest.keys])
            staging.write(CONFIG, json.dumps(settings, indent=2) + "\n")
            staging.write(RECORD, to_json(record))
            staging.finish()
        return record

    def _units(self, pairs: Sequence[Pair], spots: Mapping[str, Spot], leftovers: Leftovers) -> list[Unit]:
        """Group the pairs: each by itself, the parameters of one module of experts together."""
        groups: dict[str, list[Pair]] = {}
        for pair in pairs:
            spot = spots[pair.tuned_name]
            off = spot.unfit
            asked = self.choice.asks_for(pair.module)
            if spot.embedding and not (asked or self.options["embeddings"]):
                off = "an embedding table: --embeddings adapts it"
            if spot.head and not (asked or self.options["lm_head"]):
                off = "the output head: --lm-head adapts it"
            if off:
                leftovers.reasons[pair.tuned_name] = off
                continue
            key = spot.name.rpartition(".")[0] if spot.kind == "expert" else spot.name
            groups.setdefault(key, []).append(pair)
        units = []
        for key, members in groups.items():
            names = [spots[p.tuned_name].name.rpartition(".")[2] for p in members]
            order = wrapping_order(names) if spots[members[0].tuned_name].kind == "expert" else names
            if order is None:
                reason = "experts whose parameters are not known to rankwise: it cannot tell how PEFT nests them"
                leftovers.reasons.update({p.tuned_name: reason for p in members})
                continue
            members = [p for _, p in sorted(zip(names, members, strict=True), key=lambda pair: order.index(pair[0]))]
            leftovers.handled.update(p.tuned_name for p in members)
            units.append(Unit(key, tuple((p, spots[p.tuned_name]) for p in members)))
        return units

    def _work(self, units: Sequence[Unit], staging: Staging, moments: Moments | None, workers: Workers) -> list[Made]:
        """Go through the units; what an earlier run of the same job has left is taken as it is."""
        working = Working(self.before, self.after, self.wanted, self.choice, self.options, moments)
        work = Work(_work_on, working, self._elsewhere, gpu=self.options["device"] != "cpu")
        todo = [unit for unit in units if staging.facts(unit.key) is None]
        results = workers.flat_map(work, todo, name=lambda unit: unit.key, memory=_memory)
        total = sum(len(modules_in(pair, self.wanted)) for unit in units for pair, _ in unit.members)
        done = 0
        made = []
        for unit in units:
            facts = staging.facts(unit.key)
            if facts is not None:
                made.append(Made.from_facts(unit.key, facts))
            else:
                if self.progress is not None:
                    self.progress(unit.key, done, total)
                result, tensors = next(results)
                if result.placed:
                    staging.put(unit.key, tensors, result.facts())
                made.append(result)
            done += sum(len(modules_in(pair, self.wanted)) for pair, _ in unit.members)
        return made

    def _elsewhere(self) -> Callable[[], Working]:
        sources = everywhere(self.before.source), everywhere(self.after.source)
        return partial(_open_working, *sources, self.wanted, self.choice, dict(self.options))

    def _check_plan(self, pairs: Sequence[Pair]) -> None:
        """Every module of a plan must be there: a plan of another model would else extract nothing, in silence."""
        if self.choice.plan is None:
            return
        there = {name for pair in pairs for name in modules_in(pair, self.wanted)}
        lacking = [m.module for m in self._planned() if m.r and m.module not in there and self.wanted.wants(m.module)]
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise UsageError(
                f"the plan names {', '.join(lacking[:3])}{more}, which the two checkpoints do not both hold as a "
                f"weight; they have {', '.join(sorted(there)[:3])}, ..."
            )

    def _check_rule(self, units: Sequence[Unit]) -> None:
        """Refuse what PEFT would load at another scale without a word."""
        old = [unit.key for unit in units if is_old_expert(unit.key)]
        if old and self.choice.rule == "rslora":
            raise UsageError(
                f"{old[0]}: the experts are stored one by one. PEFT with transformers 5 joins two of them and doubles "
                "rank and alpha, which under rslora makes their scale sqrt(2) times too large. Use --scaling lora"
            )

    def _nothing(self, made: Sequence[Made], rest: Rest) -> str:
        unchanged = sum(m.unchanged for m in made) + rest.unchanged
        left = [*(n for m in made for n in m.left_out), *rest.left_out]
        text = "there is nothing to extract: "
        if left:
            text += f"{len(left)} of the tensors asked for changed and are left out"
            text += f", the first: {left[0].module}: {left[0].reason}"
        elif unchanged:
            text += f"all {unchanged} tensors asked for are equal in both checkpoints"
        else:
            text += "no tensor of both checkpoints is asked for; look at --modules and --skip"
        return text + ". Nothing was written."

    def _record(
        self, made: Sequence[Made], rest: Rest, settings: Mapping[str, Any], names: summing.Names
    ) -> ExtractionRecord:
        extracted = tuple(m for unit in made for m in unit.modules)
        left_out = (*(n for unit in made for n in unit.left_out), *rest.left_out)
        energy = math.fsum(e for unit in made for e, _ in unit.energies)
        missed = math.fsum(r for unit in made for _, r in unit.energies)
        changed = energy + math.fsum(n.energy for n in left_out if n.energy is not None) + rest.whole_energy
        carried = energy - missed + rest.whole_energy
        dtypes = sorted({d for unit in made for d in unit.dtypes})
        findings = summing.findings(extracted, left_out, self.choice, names, carried / changed if changed else None)
        return ExtractionRecord(
            format=ExtractionRecord.FORMAT,
            rankwise=version(),
            created=now(),
            command=self.command,
            device=str(self.options["device"]),
            seed=int(self.options["seed"]),
            base=self.base_name,
            tuned=self.tuned_name,
            out=str(self.out),
            choice=self.choice.kind,
            wanted=self.choice.wanted,
            rule=self.choice.rule,
            dtype=dtypes[0] if len(dtypes) == 1 else None,
            params=sum(unit.params for unit in made) + sum(w.params for w in rest.whole),
            relative_error=math.sqrt(missed / energy) if energy > 0 else None,
            carried_energy_share=max(carried / changed, 0.0) if changed > 0 else None,
            modules=extracted,
            whole=tuple(rest.whole),
            left_out=left_out,
            unchanged=sum(unit.unchanged for unit in made) + rest.unchanged,
            target_modules=tuple(settings["target_modules"]),
            calibration=None,
            findings=findings,
        )


def with_calibration(record: ExtractionRecord, calibration: Calibration) -> ExtractionRecord:
    """Return the record with what calibration brought."""
    import msgspec

    return msgspec.structs.replace(record, calibration=calibration)
