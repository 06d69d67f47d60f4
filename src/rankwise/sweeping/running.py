"""`sweep`: rank x rule x learning rate x seed, resumable, on one machine or on a Ray cluster.

In: a model, data, a grid. Out: a folder with a run a cell, and a sweep/1 record of what they say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final

import msgspec

from rankwise import errors
from rankwise.errors import AllRunsFailedError, RankwiseError, UsageError, foreign, without_secrets
from rankwise.records import DryRunRecord, Finding, SweepDryRunRecord, SweepRecord, SweepRun, now, to_json, version
from rankwise.sweeping import collecting, folder
from rankwise.sweeping.asking import Asked, settle_sweep
from rankwise.sweeping.cells import METRICS, Ended, Refused, Task, look_ahead, merit_of, metrics_of, train_cell
from rankwise.sweeping.engine import Engine, Needs, Outcome
from rankwise.sweeping.grid import Cell, Grid
from rankwise.sweeping.halving import Setting, halve
from rankwise.sweeping.recording import failed_record, make_record, write_tables
from rankwise.sweeping.sentences import cut
from rankwise.sweeping.settings import Request
from rankwise.tuning.runs import RECORD

GIB: Final = 2**30
SLACK: Final = 1.25
"""On the memory that a dry run counts: the allocator's slack and temporary buffers."""

LIBRARIES: Final = GIB
"""Of torch, transformers, peft and trl in a worker, before the model."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a sweep is, for those who watch.

    Attributes:
        grid: what was asked for.
        rows: name -> the figures of a cell that is over.
        there: number of these that were there before.
        at_once: cells that run at the same time.
        note: what is being done where that is not running cells.
    """

    grid: Grid
    rows: Mapping[str, SweepRun]
    there: int
    at_once: int
    note: str = ""


Progress = Callable[[Standing], None]


@dataclass(slots=True)
class _Sweep:
    """A sweep under way.

    Attributes:
        asked: what was asked for.
        out: its folder.
        work: the function that runs a cell.
        look: the function that looks at one beforehand.
        command: argv for the records.
        progress: is told how far it is.
        read: name -> what is known of the cells that are over.
        there: number of cells that were over before.
        anew: whether the cells in the folder are deleted, once it is known that others can be run.
    """

    asked: Asked
    out: Path
    work: Callable[[Task], Ended] = train_cell
    look: Callable[[Task], bytes | Refused] = look_ahead
    command: tuple[str, ...] = ()
    progress: Progress | None = None
    read: dict[str, collecting.Read] = field(default_factory=dict)
    there: int = 0
    anew: bool = False


def sweep(
    model: str | PathLike[str] | None,
    data: str | PathLike[str] | None,
    *,
    out: str | PathLike[str],
    ranks: Sequence[int] | None = None,
    scaling: str | Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: int | Sequence[int] | None = None,
    seed: int = 0,
    config: str | PathLike[str] | None = None,
    cluster: str | None = None,
    jobs: int | None = None,
    cpus_per_run: float | None = None,
    gpus_per_run: float | None = None,
    memory_per_run: float | None = None,
    device: str | None = None,
    keep_adapters: bool | None = None,
    asha: float | None = None,
    force: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
    **training: Any,
) -> SweepRecord:
    """Train every cell of a grid, and say what the grid says.

    Cells that are over are not run again: the same call goes on where a killed one ended, and a call with more ranks,
    rates or seeds adds to the folder. Failed cells are run again.

    Args:
        model: folder, hub id or `rankwise:tiny`; None where `config` names it.
        data: as in `train`; None where `config` names it.
        out: folder of the sweep, a folder a cell.
        ranks: default 4, 16, 64.
        scaling: rules; default lora, rslora.
        learning_rates: default: train's, a third of it and three times as much.
        seeds: how many, or which; default 3.
        seed: the first, where `seeds` is a number.
        config: YAML file with any of these settings; arguments override it.
        cluster: address of a Ray cluster; None starts Ray on this machine.
        jobs: cells at once; None for as many as CPUs, GPUs and memory allow.
        cpus_per_run: CPU cores of a cell, and its threads; default 1.
        gpus_per_run: GPUs of a cell, or a share of one; default 1 where there are any and `device` is not "cpu".
        memory_per_run: GiB of a cell; default: estimated, where it does not run on a GPU.
        device: "cpu" or "cuda": Ray gives each cell its own GPU. Default: cuda when there is one.
        keep_adapters: keep the adapters too, and not the records alone.
        asha: end the rates that do worse than others of their rule and rank before their last seed, by Ray Tune's ASHA;
            one in so many goes on. None: all seeds of all rates.
        force: begin anew: delete the cells in the folder.
        command: argv to write into the records.
        progress: called with a `Standing` now and then.
        training: flags of `train` that all cells share, such as `epochs=10`.

    Returns:
        A sweep/1 record, which is also in `out`.

    Raises:
        RankwiseError: bad settings, data or model, a folder of another sweep, no cluster; or no run came to its end.
    """
    given = {
        "ranks": ranks,
        "scaling": scaling,
        "learning_rates": learning_rates,
        "seeds": seeds,
        "cluster": cluster,
        "jobs": jobs,
        "cpus_per_run": cpus_per_run,
        "gpus_per_run": gpus_per_run,
        "memory_per_run": memory_per_run,
        "device": device,
        "keep_adapters": keep_adapters,
        "asha": asha,
        **training,
    }
    asked = settle_sweep(model, data, given, seed=seed, config=config)
    words = command if command is not None else (f"rankwise.sweep({asked.request.model!r}, ...)",)
    told = tuple(map(without_secrets, words))
    return run_sweep(_Sweep(asked, Path(fspath(out)), command=told, progress=progress, anew=force))


def run_sweep(under_way: _Sweep) -> SweepRecord:
    """Run what is to do and write the record.

    Raises:
        RankwiseError: as `sweep`.
    """
    begun = time.perf_counter()
    out, asked = under_way.out, under_way.asked
    folder.check_sweep_folder(out, force=under_way.anew)
    with folder.opened(out) as work:
        under_way.read = {} if under_way.anew else read_there(out, asked.request)
        ended = frozenset() if under_way.anew else folder.ended_early(out, asked.grid, asked.machines.asha)
        todo = [
            cell
            for cell in to_do(asked.grid, {name: read.row for name, read in under_way.read.items()})
            if cell.name not in ended
        ]
        under_way.there = sum(cell.name in under_way.read for cell in asked.grid.cells) - sum(
            cell.name in under_way.read for cell in todo
        )
        _tell(under_way, 1, "starting")
        if todo:
            _run(under_way, todo, work)
            if asked.machines.asha is not None:
                folder.put_ended_early(out, asked.grid, asked.machines.asha, _not_wanted(under_way))
        record = record_of(under_way, time.perf_counter() - begun)
        record = msgspec.structs.replace(record, findings=record.findings + _ended_early(under_way))
        write_tables(out, record)
    if not any(cell.status != "failed" for cell in record.cells):
        first = next((cell.error for cell in record.cells if cell.error), "no reason known")
        raise AllRunsFailedError(
            f"all {len(record.cells)} runs failed; the first: {first}. Their records are in {out}; the same command "
            "runs them again"
        )
    return record


def read_there(out: Path, request: Request) -> dict[str, collecting.Read]:
    """Return what is known of the cells in a folder; refuse those of another sweep.

    Raises:
        UsageError: a cell was run with other settings.
        RecordError: a cell cannot be read.
    """
    found = {}
    for name in collecting.list_cells(out):
        folder.check_same(out, name, request)
        found[name] = collecting.read_cell(out, name)
    return found


def to_do(grid: Grid, rows: Mapping[str, SweepRun]) -> list[Cell]:
    """Return the cells that are not there, and those that failed."""
    return [cell for cell in grid.cells if cell.name not in rows or rows[cell.name].status == "failed"]


def _tell(under_way: _Sweep, at_once: int, note: str = "") -> None:
    if under_way.progress is not None:
        names = {cell.name for cell in under_way.asked.grid.cells}
        rows = {name: read.row for name, read in under_way.read.items() if name in names}
        under_way.progress(Standing(under_way.asked.grid, rows, under_way.there, at_once, note))


def _run(under_way: _Sweep, todo: Sequence[Cell], work: Path) -> None:
    """Run cells on Ray and put each into its place as it ends."""
    machines = under_way.asked.machines
    gpus = 0.0 if machines.device == "cpu" else machines.gpus_per_run
    memory = None if machines.memory_per_run is None else round(machines.memory_per_run * GIB)
    with Engine(machines.cluster, Needs(machines.cpus_per_run, gpus, memory), machines.jobs) as engine:
        tasks = dict(_tasks(under_way, todo, engine.needs.threads, work))
        widest = max(todo, key=lambda cell: cell.rank)
        _tell(under_way, 1, "looking at model and data")
        template = _template(engine.call(under_way.look, tasks[widest.name]))
        _check_data(under_way, template)
        if under_way.anew:
            folder.begin_anew(under_way.out)
        if memory is None and not engine.needs.gpus:
            engine.with_memory(round(template.memory.total * SLACK) + LIBRARIES)
        at_once = min(engine.capacity(), len(todo))
        _tell(under_way, at_once)

        def keep(outcome: Outcome) -> None:
            _keep(under_way, template, tasks[outcome.key].cell, outcome)
            _tell(under_way, at_once)

        if machines.asha is not None:
            _halve(under_way, engine, tasks, machines.asha, keep, work)
            return
        for outcome in engine.map(under_way.work, tasks):
            keep(outcome)


def _keep(under_way: _Sweep, template: DryRunRecord, cell: Cell, outcome: Outcome) -> None:
    """Put what a cell came to into its place."""
    ended = outcome.value if isinstance(outcome.value, Ended) else Ended({}, outcome.error or "nothing came back")
    files = ended.files
    if RECORD not in files:
        record = failed_record(template, cell, foreign(ended.error or "it left no record"), under_way.command)
        files = {**files, RECORD: to_json(record).encode(), METRICS: metrics_of(record)}
    if ended.trace is not None:
        files = {**files, "traceback.txt": foreign(ended.trace).encode("utf-8", "backslashreplace")}
    folder.put_cell(under_way.out, cell, files, under_way.asked.request)
    under_way.read[outcome.key] = collecting.read_cell(under_way.out, outcome.key)


def _halve(
    under_way: _Sweep,
    engine: Engine,
    tasks: Mapping[str, Task],
    factor: float,
    keep: Callable[[Outcome], None],
    work: Path,
) -> None:
    """Run what ASHA asks for: the best rates so far first, then those in the middle of the list."""
    grid = under_way.asked.grid
    known = {name: collecting.merit(read.row) for name, read in under_way.read.items() if name not in tasks}
    middle = (len(grid.learning_rates) - 1) / 2

    def turn(cells: tuple[Cell, ...]) -> tuple[float, float]:
        scores = [score for cell in cells if (score := known.get(cell.name)) is not None]
        place = grid.learning_rates.index(cells[0].learning_rate)
        return (-sum(scores) / len(scores) if scores else math.inf, abs(place - middle))

    settings = sorted(
        (
            tuple(Cell(seed, rank, rule, rate) for seed in grid.seeds)
            for rank in grid.ranks
            for rule in grid.scaling
            for rate in grid.learning_rates
        ),
        key=turn,
    )
    halve(
        engine,
        under_way.work,
        tasks,
        [
            Setting(
                (cells[0].scaling, cells[0].rank), tuple(c.name for c in cells if c.name in known or c.name in tasks)
            )
            for cells in settings
        ],
        score=merit_of,
        known=known,
        factor=factor,
        keep=keep,
        folder=work,
    )


def _not_wanted(under_way: _Sweep) -> list[str]:
    """Return the cells that ASHA ended before; a setting with a failed cell is not over."""
    failed = {
        (row.scaling, row.rank, row.learning_rate)
        for row in (read.row for read in under_way.read.values())
        if row.status == "failed"
    }
    return [
        cell.name
        for cell in under_way.asked.grid.cells
        if cell.name not in under_way.read and (cell.scaling, cell.rank, cell.learning_rate) not in failed
    ]


def _ended_early(under_way: _Sweep) -> tuple[Finding, ...]:
    """Say which settings ASHA ended."""
    if under_way.asked.machines.asha is None:
        return ()
    grid = under_way.asked.grid
    ran: dict[tuple[int, str, float], list[SweepRun]] = {}
    for cell in grid.cells:
        ran.setdefault((cell.rank, cell.scaling, cell.learning_rate), [])
        if cell.name in under_way.read:
            ran[cell.rank, cell.scaling, cell.learning_rate].append(under_way.read[cell.name].row)
    named = [
        f"rank {rank}, {rule}, {rate:g} after {len(rows)}"
        for (rank, rule, rate), rows in ran.items()
        if len(rows) < len(grid.seeds) and not any(row.status in ("diverged", "interrupted") for row in rows)
    ]
    if not named:
        return ()
    text = (
        f"ASHA ended {len(named)} of {len(ran)} settings before the last of {len(grid.seeds)} seeds: {cut(named)}. "
        "They are not called best, and are compared with nothing."
    )
    return (Finding(code="settings-ended-early", level="info", text=text),)


def _tasks(under_way: _Sweep, todo: Sequence[Cell], threads: int, work: Path) -> Iterator[tuple[str, Task]]:
    machines = under_way.asked.machines
    for cell in todo:
        yield (
            cell.name,
            Task(
                request=under_way.asked.request,
                cell=cell,
                device=machines.device,
                threads=threads,
                keep_adapter=machines.keep_adapters,
                staging=str(work.resolve()) if machines.cluster is None else None,
                command=under_way.command,
            ),
        )


def _template(looked: bytes | Refused) -> DryRunRecord:
    """Return what a cell would be; raise what is wrong with the input, as if it had been found here."""
    if isinstance(looked, Refused):
        kind = getattr(errors, looked.kind, UsageError)
        if not (isinstance(kind, type) and issubclass(kind, RankwiseError)):
            kind = UsageError
        error = kind.__new__(kind)  # some classes make their words from parts, which are not at hand
        Exception.__init__(error, looked.message)
        raise error
    return DryRunRecord.from_json(looked)


def _check_data(under_way: _Sweep, template: DryRunRecord) -> None:
    """Refuse data that have changed under their name since the cells in the folder were run."""
    for name, read in under_way.read.items():
        if read.row.status != "failed" and read.data_digest != template.config.data_digest:
            raise UsageError(
                f"{under_way.out / name} was trained on other data: {under_way.asked.request.data} has changed since "
                f"(digest {read.data_digest}, now {template.config.data_digest}). Choose another folder, or begin this "
                "one anew with --force."
            )


def record_of(under_way: _Sweep, seconds: float) -> SweepRecord:
    """Return the record of all cells in the folder, those of earlier calls included."""
    order = sorted(under_way.read.values(), key=lambda r: (r.row.scaling, r.row.rank, r.row.learning_rate, r.row.seed))
    cells = tuple(read.row for read in order)
    devices = sorted({read.device for read in order})
    request = under_way.asked.request.public
    return make_record(
        cells,
        model=request.model,
        data=request.data,
        settings=request.settings,
        digest=request.digest,
        command=under_way.command,
        device=", ".join(devices),
        seconds=seconds,
    )


def dry_sweep(asked: Asked, out: Path | None, *, command: Sequence[str] = ()) -> SweepDryRunRecord:
    """Say what a sweep would be, in this process and without Ray. Nothing is written.

    Raises:
        RankwiseError: as `sweep`.
    """
    request, grid = asked.request.public, asked.grid
    rows = {}
    if out is not None:
        folder.check_sweep_folder(out, force=False)
        rows = {name: read.row for name, read in read_there(out, request).items()}
    todo = to_do(grid, rows)
    left = set(todo)
    widest = max(grid.cells, key=lambda cell: cell.rank)
    template = _template(look_ahead(Task(asked.request, widest, device=asked.machines.device)))
    per_rank = {rank: template.params * rank // template.config.rank for rank in grid.ranks}
    tokens = round(template.tokens * template.epochs)
    known = [row.seconds for row in rows.values() if row.status == "done" and row.seconds is not None]
    return SweepDryRunRecord(
        format=SweepDryRunRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command),
        device=template.device,
        seed=grid.seeds[0],
        model=request.model,
        data=request.data,
        cells=tuple(cell.name for cell in grid.cells),
        there=tuple(cell.name for cell in grid.cells if cell not in left),
        settings=request.settings,
        params_by_rank={str(rank): params for rank, params in per_rank.items()},
        base_params=template.base_params,
        steps=template.config.steps,
        tokens=tokens,
        memory_bytes=template.memory.total,
        flops=float(sum(tokens * (4 * template.base_params + 6 * per_rank[cell.rank]) for cell in todo)),
        seconds=sum(known) / len(known) * len(todo) if known else None,
    )
