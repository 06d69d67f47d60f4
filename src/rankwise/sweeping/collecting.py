"""Many run/1 records, read for the few figures that are compared.

In: the folder of a sweep. Out: a row a cell, in the order of the grid; the same as a table in a file.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rankwise.errors import RecordError
from rankwise.records import RunRecord, Status, SweepRun
from rankwise.sweeping.grid import Cell, cell_of
from rankwise.tuning.runs import RECORD


class _Config(msgspec.Struct):
    """Of a run's config, what a row needs; msgspec skips the rest without building it."""

    rank: int
    scaling: str
    lora_alpha: float
    learning_rate: float
    data_digest: str


class _Score(msgspec.Struct):
    exact_share: float | None


class _Recall(msgspec.Struct):
    bits: float | None
    bits_possible: float | None
    bits_per_param: float | None
    exact_share: float | None
    paraphrases: _Score | None


class _Run(msgspec.Struct):
    """Of a run/1 record, what a row needs: neither the health nor the loss curve."""

    format: str
    device: str
    seed: int
    config: _Config
    status: Status
    params: int
    steps: int
    tokens: int | None
    loss: float | None
    recall: _Recall | None
    forgetting: float | None
    seconds: float | None
    peak_memory_bytes: int | None
    tokens_per_second: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Read:
    """What one record holds.

    Attributes:
        row: the figures.
        data_digest: of the data it was trained on.
        device: it was trained on.
    """

    row: SweepRun
    data_digest: str
    device: str


_DECODER = msgspec.json.Decoder(_Run)


def list_cells(out: Path) -> dict[str, Cell]:
    """Return the cells that are in a folder, by name, in the order of the grid. One listing, no file is opened."""
    try:
        with os.scandir(out) as entries:
            found = [cell for entry in entries if (cell := cell_of(entry.name)) is not None and entry.is_dir()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RecordError(f"{out} cannot be read: {error.strerror or error}") from error
    return {cell.name: cell for cell in sorted(found, key=lambda c: (c.scaling, c.rank, c.learning_rate, c.seed))}


def read_cell(out: Path, name: str) -> Read:
    """Return the figures of one cell. One file is opened.

    Raises:
        RecordError: it is no run/1 record, or one of another cell.
    """
    path = out / name / RECORD
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read: {error.strerror or error}; take its folder away to run it anew"
        ) from error
    return read_bytes(content, name, path)


def read_bytes(content: bytes, name: str, path: Path) -> Read:
    """Return the figures of one cell from the bytes of its record.

    Raises:
        RecordError: it is no run/1 record, or one of another cell.
    """
    try:
        run = _DECODER.decode(content)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise RecordError(f"{path} is no whole run/1 record: {error}; take its folder away to run it anew") from error
    if run.format != RunRecord.FORMAT:
        raise RecordError(f"{path} is {run.format}; wanted {RunRecord.FORMAT}")
    c = run.config
    if Cell(run.seed, c.rank, c.scaling, c.learning_rate).name != name:
        raise RecordError(
            f"{path} holds rank {c.rank}, {c.scaling}, learning rate {c.learning_rate:g}, seed {run.seed}, which is "
            "not what its folder's name says; give the folder its name back, or take it away"
        )
    return Read(row_of(run, f"{name}/{RECORD}"), c.data_digest, run.device)


def row_of(run: RunRecord | _Run, path: str) -> SweepRun:
    """Return the figures of a run that are compared."""
    recall, config = run.recall, run.config
    return SweepRun(
        path=path,
        rank=config.rank,
        scaling=config.scaling,
        lora_alpha=config.lora_alpha,
        learning_rate=config.learning_rate,
        seed=run.seed or 0,
        status=run.status,
        params=run.params,
        steps=run.steps,
        tokens=run.tokens,
        loss=run.loss,
        bits=recall.bits if recall else None,
        bits_possible=recall.bits_possible if recall else None,
        bits_per_param=recall.bits_per_param if recall else None,
        exact_share=recall.exact_share if recall else None,
        paraphrased_exact_share=recall.paraphrases.exact_share if recall and recall.paraphrases else None,
        forgetting=run.forgetting,
        seconds=run.seconds,
        peak_memory_bytes=run.peak_memory_bytes,
        tokens_per_second=run.tokens_per_second,
        error=run.error,
    )


def merit(row: SweepRun) -> float | None:
    """Return what settings are compared by before all runs are over, higher is better; None of a failed run."""
    if row.status == "failed":
        return None
    if row.status != "done":
        return -math.inf
    loss = None if row.loss is None else -row.loss
    return next((value for value in (row.bits, row.exact_share, loss) if value is not None), None)


def collect(out: Path, names: Iterable[str] | None = None) -> tuple[SweepRun, ...]:
    """Return the rows of all cells in a folder, or of those named."""
    return tuple(read_cell(out, name).row for name in (list_cells(out) if names is None else names))


def as_csv(cells: Sequence[SweepRun]) -> str:
    """Return the rows as CSV, a heading first; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SweepRun.__struct_fields__)
    for cell in cells:
        writer.writerow(["" if value is None else value for value in msgspec.structs.astuple(cell)])
    return text.getvalue()


def as_parquet(cells: Sequence[SweepRun]) -> bytes | None:
    """Return the rows as Parquet, or None where pyarrow is not installed (it comes with `datasets`)."""
    try:
        import pyarrow as pa  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import pyarrow.parquet as pq  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    kinds = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    rows = [msgspec.structs.asdict(cell) for cell in cells]
    columns: dict[str, Any] = {}
    for field in msgspec.structs.fields(SweepRun):
        options = getattr(field.type, "__args__", (field.type,))
        kind = next((kinds[option] for option in options if option in kinds), pa.string())
        columns[field.name] = pa.array([row[field.name] for row in rows], type=kind)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())
