"""The folder of a sweep: one folder a cell, there when the cell is over and not before.

In: a path, files of cells. Out: folders that a kill at any moment leaves whole or not there at all.

    DIR/rank=64,scaling=rslora,lr=0.001,seed=0/run.json       run/1
                                               metrics.jsonl  the loss curve, a row a point; the results in the last
                                               cell.json      what was asked for, and its digest
                                               health.jsonl   what the monitor saw
                                               adapter_*      with --keep-adapters
    DIR/sweep.json, results.csv (results.parquet)             made from the cells by every call
    DIR/.sweep/                                               the lock, and cells under way
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from rankwise.errors import OutputError, OutputExistsError, RecordError, UsageError
from rankwise.files import write_text
from rankwise.sweeping.grid import Cell, Grid, cell_of
from rankwise.sweeping.settings import Request

RECORD: Final = "sweep.json"
TABLES: Final = ("results.csv", "results.parquet")
CELL: Final = "cell.json"
HIDDEN: Final = ".sweep"
ASHA: Final = "asha.json"
WORK: Final = "work"


def check_sweep_folder(out: Path, *, force: bool, imported: bool = False) -> None:
    """Refuse a folder that cannot be the sweep's. Nothing is changed.

    Args:
        out: the folder.
        force: whether what is in it may be replaced.
        imported: whether the sweep is one of imported results, which has a record and no runs.

    Raises:
        OutputExistsError: it holds something else than a sweep.
        UsageError: it holds imported results, which no run of ours could be added to.
        OutputError: it is a file, or may not be written to.
    """
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file; a folder was meant. Nothing was written.")
        strangers = sorted(path.name for path in out.iterdir() if not _ours(path.name)) if out.is_dir() else []
        if strangers and not (out / HIDDEN).is_dir() and not (out / RECORD).is_file():
            raise OutputExistsError(str(out))
        if strangers and force:
            raise OutputError(
                f"{out} holds more than a sweep ({', '.join(strangers[:3])}); --force replaces a sweep and deletes "
                "nothing else. Choose another folder. Nothing was written."
            )
        there = next(path for path in (out, *out.resolve().parents) if path.exists())
        cells = out.is_dir() and any(cell_of(path.name) is not None for path in out.iterdir())
        if (out / RECORD).is_file() and not (out / HIDDEN).is_dir() and not cells and not (force or imported):
            raise UsageError(
                f"{out / RECORD} was imported and is of no runs in {out}; a sweep in this folder would replace it. "
                "Choose another folder, or pass --force."
            )
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
    if not os.access(there, os.W_OK) or not there.is_dir():
        raise OutputError(f"{out} cannot be written: no permission to write into {there}.")


def _ours(name: str) -> bool:
    return name in (RECORD, HIDDEN, *TABLES) or cell_of(name) is not None


@contextlib.contextmanager
def opened(out: Path) -> Iterator[Path]:
    """Make the folder and hold it; give the place for cells under way, empty.

    The lock goes with the process, however that ends.

    Raises:
        UsageError: another sweep is at work in it.
        OutputError: it cannot be written to.
    """
    work = out / HIDDEN / WORK
    lock = _lock(out)
    try:
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.close()


def begin_anew(out: Path) -> None:
    """Delete the cells of a sweep, and first what was made from them.

    Raises:
        OutputError: they cannot be deleted.
    """
    try:
        for name in (RECORD, *TABLES, f"{HIDDEN}/{ASHA}"):
            (out / name).unlink(missing_ok=True)
        for path in sorted(out.iterdir()):
            if cell_of(path.name) is not None:
                shutil.rmtree(path)
    except OSError as error:
        raise OutputError(f"{out} cannot be emptied: {error.strerror or error}.") from error


def _lock(out: Path) -> IO[str]:
    """Make the folder and hold it until the file is closed or the process ends, however it does."""
    import fcntl  # not on Windows, where Ray's support is partial as well

    try:
        (out / HIDDEN).mkdir(parents=True, exist_ok=True)
        lock = (out / HIDDEN / "lock").open("w")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise UsageError(f"another sweep is at work in {out}; wait for it, or choose another folder") from None
        raise OutputError(f"{out} cannot be locked: {error.strerror or error}.") from error
    return lock


def put_cell(out: Path, cell: Cell, files: Mapping[str, bytes], request: Request) -> None:
    """Write the files of a cell beside its place and rename the folder into it.

    Raises:
        OutputError: the disk is full, or may not be written to.
    """
    place = out / cell.name
    try:
        part = Path(tempfile.mkdtemp(prefix="cell.", dir=out / HIDDEN / WORK))
        part.chmod(0o777 & ~_mask())
        for name, content in {**files, CELL: told(request, cell)}.items():
            target = part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if place.exists():  # a failed one, run again
            place.rename(part.with_name(part.name + ".old"))
        part.rename(place)
    except OSError as error:
        raise OutputError(f"{place} cannot be written: {error.strerror or error}.") from error


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def told(request: Request, cell: Cell) -> bytes:
    """Return what a cell's folder says of what was asked for."""
    asked = {
        "digest": request.digest,
        "rank": cell.rank,
        "scaling": cell.scaling,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "shared": request.shared,
    }
    return (json.dumps(asked, indent=1) + "\n").encode()


def check_same(out: Path, name: str, request: Request) -> None:
    """Refuse a cell that was run with other settings; the first that differs is named.

    Raises:
        UsageError: it was.
        RecordError: what it was run with cannot be read.
    """
    path = out / name / CELL
    try:
        asked = json.loads(path.read_bytes())
        digest, shared = asked["digest"], asked["shared"]
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read: {error.strerror or error}; take its folder away to run it anew"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is no record of a cell: {error}; take its folder away to run it anew") from error
    if digest == request.digest:
        return
    for key in (*request.shared, *shared):
        was, now = shared.get(key), request.shared.get(key)
        if was != now:
            raise UsageError(
                f"{out / name} was run with {key.replace('_', ' ')} {_short(was)}, not {_short(now)}; the runs of a "
                "sweep share all settings but the grid's. Choose another folder, or begin this one anew with --force."
            )
    raise UsageError(f"{out / name} was run with other settings (digest {digest}, not {request.digest})")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def ended_early(out: Path, grid: Grid, factor: float | None) -> frozenset[str]:
    """Return the cells that ASHA, asked the same before, did not want; none where it was asked something else."""
    try:
        noted = json.loads((out / HIDDEN / ASHA).read_bytes())
        return frozenset(noted["not_run"]) if noted["asked"] == _asked(grid, factor) else frozenset()
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def put_ended_early(out: Path, grid: Grid, factor: float, not_run: Sequence[str]) -> None:
    """Note the cells that ASHA did not want, so that the same command again has nothing to do.

    Raises:
        OutputError: the disk is full, or may not be written to.
    """
    noted = {"asked": _asked(grid, factor), "not_run": list(not_run)}
    write_text(out / HIDDEN / ASHA, json.dumps(noted), force=True)


def _asked(grid: Grid, factor: float | None) -> dict[str, Any]:
    lists = (grid.ranks, grid.scaling, grid.learning_rates, grid.seeds)
    return {"factor": factor, "grid": [list(values) for values in lists]}
