"""What is written of cells and of a sweep: the record of a cell that left none, and the record and tables of all.

In: rows of cells, and what was asked for. Out: run/1 and sweep/1 records, and files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from rankwise.files import write_texts
from rankwise.records import DryRunRecord, RunRecord, SweepConfig, SweepRecord, SweepRun, now, to_json, version
from rankwise.scaling import scaling as factor_of
from rankwise.sweeping import collecting, folder
from rankwise.sweeping.answers import answer
from rankwise.sweeping.grid import Cell
from rankwise.sweeping.sentences import findings, sentences


def failed_record(template: DryRunRecord, cell: Cell, error: str, command: tuple[str, ...]) -> RunRecord:
    """Return the record of a run that left none of its own."""
    c = template.config
    alpha = c.lora_alpha
    groups = tuple(
        msgspec.structs.replace(
            group,
            r=cell.rank,
            scaling=factor_of(cell.scaling, alpha, cell.rank),
            params=group.params * cell.rank // c.rank,  # rank times (in + out), module by module
        )
        for group in c.groups
    )
    config = msgspec.structs.replace(
        c, rank=cell.rank, scaling=cell.scaling, learning_rate=cell.learning_rate, groups=groups
    )
    return RunRecord(
        format=RunRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=command,
        device=template.device,
        seed=cell.seed,
        config=config,
        status="failed",
        params=template.params * cell.rank // c.rank,
        steps=0,
        tokens=None,
        loss=None,
        recall=None,
        forgetting=None,
        forgetting_detail=None,
        seconds=None,
        peak_memory_bytes=None,
        tokens_per_second=None,
        losses=(),
        health=(),
        findings=(),
        error=error,
    )


def make_record(
    cells: tuple[SweepRun, ...],
    *,
    model: str,
    data: str,
    settings: dict[str, Any],
    digest: str,
    command: tuple[str, ...],
    device: str,
    seconds: float,
    run_here: bool = True,
) -> SweepRecord:
    """Return the record of runs, with all that they say; those of others cannot be run again here."""
    found = answer(cells)
    return SweepRecord(
        format=SweepRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=command,
        device=device,
        seed=min((cell.seed for cell in cells), default=None),
        config=SweepConfig(
            model=model,
            data=data,
            ranks=tuple(sorted({cell.rank for cell in cells})),
            scaling=tuple(sorted({cell.scaling for cell in cells})),
            learning_rates=tuple(sorted({cell.learning_rate for cell in cells})),
            seeds=tuple(sorted({cell.seed for cell in cells})),
            score=found.score,
            settings=settings,
            digest=digest,
        ),
        runs=tuple(cell.path for cell in cells),
        best=found.best,
        cells=cells,
        points=found.points,
        rank_effects=found.effects,
        exponents=found.exponents,
        answers=sentences(found),
        findings=findings(found, cells, run_here=run_here),
        seconds=seconds,
    )


def write_tables(out: Path, record: SweepRecord) -> None:
    """Write the record and the tables of its cells into the folder, over those of earlier calls."""
    csv, parquet = folder.TABLES
    files: dict[Path, str | bytes] = {
        out / folder.RECORD: to_json(record),
        out / csv: collecting.as_csv(record.cells),
    }
    content = collecting.as_parquet(record.cells)
    if content is not None:
        files[out / parquet] = content
    write_texts(files, force=True)
    if content is None:
        (out / parquet).unlink(missing_ok=True)  # of an earlier call, with other rows
