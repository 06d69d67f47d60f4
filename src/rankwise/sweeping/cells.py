"""What a worker does: train one cell and hand its files back.

In: a `Task`, in another process and perhaps on another machine. Out: the files of the run, as bytes: workers and driver
need no common folder.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import socket
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rankwise._version import __version__
from rankwise.records import RunRecord, read_record, to_json
from rankwise.sweeping.collecting import merit, read_bytes
from rankwise.sweeping.grid import Cell
from rankwise.sweeping.settings import Request
from rankwise.tuning.runs import ADAPTER, RECORD

METRICS: Final = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Task:
    """One cell, ready to be run anywhere.

    Attributes:
        request: what all cells share.
        cell: what sets this one apart.
        device: as in train.
        threads: of the arithmetic.
        keep_adapter: whether its weights are handed back.
        staging: folder to work in, or None for the machine's own.
        command: argv for the record.
        version: of rankwise in the driver; a worker on another machine may have another one.
    """

    request: Request
    cell: Cell
    device: str | None = None
    threads: int = 1
    keep_adapter: bool = False
    staging: str | None = None
    command: tuple[str, ...] = ()
    version: str = __version__


@dataclass(frozen=True, slots=True)
class Ended:
    """How a cell ended.

    Attributes:
        files: name -> content, of its folder; no run.json where the run did not get so far.
        error: what ended it, or None.
        trace: where, for a defect.
    """

    files: dict[str, bytes]
    error: str | None = None
    trace: str | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """What is wrong with the input, from a worker: exceptions of ours need not survive pickling."""

    kind: str
    message: str


def _other_version(task: Task) -> str | None:
    """Say that this worker would run other code than the driver's: its figures could not be compared."""
    if task.version == __version__:
        return None
    return (
        f"the worker at {socket.gethostname()} has rankwise {__version__}, and the sweep {task.version}; every node "
        "needs the same (pip install 'rankwise[train,cluster]==" + task.version + "')"
    )


def train_cell(task: Task) -> Ended:
    """Train one cell; whatever goes wrong is in what is returned."""
    if (other := _other_version(task)) is not None:
        return Ended({}, other)
    from rankwise.tuning.training import train

    cell, request = task.cell, task.request
    with _staged(task) as folder:
        out = folder / "run"
        try:
            train(
                request.model,
                request.data,
                out=out,
                **request.settings,
                rank=cell.rank,
                scaling=cell.scaling,
                learning_rate=cell.learning_rate,
                seed=cell.seed,
                device=task.device,
                command=task.command or None,
            )
            error = trace = None
        except Exception as problem:
            error, trace = f"{type(problem).__name__}: {problem}", traceback.format_exc()
        return Ended(_files(out, keep_adapter=task.keep_adapter), error, trace)


def merit_of(name: str, ended: Ended) -> float | None:
    """Return what a cell is compared by before all are over; None where it left no record."""
    return merit(read_bytes(ended.files[RECORD], name, Path(name)).row) if RECORD in ended.files else None


def look_ahead(task: Task) -> bytes | Refused:
    """Return the dry-run/1 record of one cell, or what is wrong with the input."""
    if (other := _other_version(task)) is not None:
        return Refused("ClusterError", other)
    from rankwise.errors import RankwiseError
    from rankwise.tuning.memory import dry_run

    options = {name: value for name, value in task.request.settings.items() if name in _dry_run_takes()}
    cell = task.cell
    with _staged(task):
        try:
            found = dry_run(
                task.request.model,
                task.request.data,
                **options,
                rank=cell.rank,
                scaling=cell.scaling,
                learning_rate=cell.learning_rate,
                seed=cell.seed,
                device=task.device,
            )
        except RankwiseError as error:
            return Refused(type(error).__name__, str(error))
        return to_json(found).encode()


def _dry_run_takes() -> set[str]:
    from rankwise.tuning.options import Options

    return set(Options.__dataclass_fields__)


@contextlib.contextmanager
def _staged(task: Task) -> Iterator[Path]:
    """Give a folder to work in, threads to work with, and a clean slate for the figure of memory."""
    import torch

    torch.set_num_threads(task.threads)
    gc.collect()  # a worker runs one cell after another
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; Linux only
    staging = task.staging if task.staging is not None and os.access(task.staging, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="rankwise-cell.", dir=staging))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _files(out: Path, *, keep_adapter: bool) -> dict[str, bytes]:
    """Return what a run left, checkpoints left out."""
    found = {}
    for path in sorted(out.rglob("*")) if out.is_dir() else ():
        name = path.relative_to(out).as_posix()
        if path.is_file() and not name.startswith(("checkpoint-", ".")) and (keep_adapter or name not in ADAPTER):
            found[name] = path.read_bytes()
    if RECORD in found:
        found[METRICS] = metrics_of(read_record(out / RECORD, RunRecord))
    return found


def metrics_of(record: RunRecord) -> bytes:
    """Return the loss curve and the results of a run, a JSON object a line."""
    rows: list[dict[str, Any]] = [
        {"step": point.step, "loss": point.loss, "learning_rate": point.learning_rate} for point in record.losses
    ]
    recall = record.recall
    rows.append(
        {
            "step": record.steps,
            "status": record.status,
            "loss": record.loss,
            "bits": recall and recall.bits,
            "exact_share": recall and recall.exact_share,
            "bits_per_param": recall and recall.bits_per_param,
            "forgetting": record.forgetting,
            "seconds": record.seconds,
        }
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
