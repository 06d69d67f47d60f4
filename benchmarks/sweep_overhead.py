"""What `rankwise sweep` costs over the bare runs, and what listing a thousand cells costs.

    python benchmarks/sweep_overhead.py [--steps 700] [--cells 4] [--jobs 1]

The bare runs are calls of `rankwise.train`, one after another in one process that has imported everything: the same
cells, flags and threads. The overhead is the sweep's wall time (Ray's start and stop, the look ahead, workers' imports,
writing) over the sum of the bare runs' wall times, divided by --jobs. Choose --steps so that a bare run takes about a
minute. The listing writes 1,000 records of the size that a real one has and reads them back.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import msgspec

import rankwise
from rankwise.sweeping.collecting import collect
from rankwise.sweeping.grid import Cell, make_grid
from rankwise.sweeping.recording import make_record

MODEL, DATA = "rankwise:tiny", "rankwise:facts?n=40"
RATES = (1e-3, 3e-3)


def overhead(folder: Path, steps: int, cells: int, jobs: int) -> None:
    """Print the walls of a sweep and of its runs without it."""
    import torch

    torch.set_num_threads(1)
    shared = {"steps": steps, "device": "cpu"}
    grid = make_grid((16,), ("rslora",), RATES, tuple(range(max(1, cells // len(RATES)))))
    warm = time.perf_counter()
    rankwise.train(MODEL, DATA, out=folder / "warm", rank=16, steps=1, device="cpu", save_every=0)
    print(f"imports and a first step: {time.perf_counter() - warm:.1f} s (not counted)")
    walls = []
    for k, cell in enumerate(grid.cells):
        begun = time.perf_counter()
        rankwise.train(
            MODEL, DATA, out=folder / str(k), rank=cell.rank, scaling=cell.scaling, learning_rate=cell.learning_rate,
            seed=cell.seed, save_every=0, **shared,
        )  # fmt: skip
        walls.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    record = rankwise.sweep(
        MODEL, DATA, out=folder / "sweep", ranks=grid.ranks, scaling=grid.scaling, learning_rates=grid.learning_rates,
        seeds=grid.seeds, jobs=jobs, **shared,
    )  # fmt: skip
    wall = time.perf_counter() - begun
    assert all(cell.status == "done" for cell in record.cells)
    bare = sum(walls)
    print(f"{len(walls)} runs of {statistics.median(walls):.1f} s (median), together {bare:.1f} s")
    print(f"sweep, {jobs} at once: {wall:.1f} s, {wall * jobs / bare - 1:+.1%} over the bare runs")
    inside = sum(cell.seconds or 0.0 for cell in record.cells)
    print(f"training alone inside the sweep: {inside:.1f} s; a call with nothing to do:", end=" ", flush=True)
    begun = time.perf_counter()
    rankwise.sweep(
        MODEL, DATA, out=folder / "sweep", ranks=grid.ranks, scaling=grid.scaling, learning_rates=grid.learning_rates,
        seeds=grid.seeds, **shared,
    )  # fmt: skip
    print(f"{time.perf_counter() - begun:.2f} s")


def listing(folder: Path, number: int) -> None:
    """Print what listing and collecting many cells takes."""
    template = rankwise.train(MODEL, DATA, out=folder / "one", rank=4, steps=60, device="cpu", save_every=0)
    seeds = tuple(range(number // 20))
    for cell in make_grid((4, 8, 16, 32, 64), ("lora", "rslora"), RATES, seeds).cells:
        _write(folder, cell, template)
    size = (folder / "many" / Cell(0, 4, "lora", RATES[0]).name / "run.json").stat().st_size
    begun = time.perf_counter()
    rows = collect(folder / "many")
    read = time.perf_counter() - begun
    begun = time.perf_counter()
    make_record(
        rows, model=MODEL, data=DATA, settings={}, digest="", command=(), device="cpu", seconds=0.0
    ).to_json()  # fmt: skip
    answered = time.perf_counter() - begun
    print(f"{len(rows)} cells of {size / 1024:.0f} KiB: listed and read in {read:.2f} s, answered in {answered:.2f} s")


def _write(folder: Path, cell: Cell, template: rankwise.RunRecord) -> None:
    config = msgspec.structs.replace(
        template.config, rank=cell.rank, scaling=cell.scaling, learning_rate=cell.learning_rate
    )
    place = folder / "many" / cell.name
    place.mkdir(parents=True)
    (place / "run.json").write_text(msgspec.structs.replace(template, config=config, seed=cell.seed).to_json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--listed", type=int, default=1000)
    parser.add_argument("--only", choices=("overhead", "listing"))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rankwise-bench."))
    try:
        if args.only != "listing":
            overhead(folder, args.steps, args.cells, args.jobs)
        if args.only != "overhead":
            listing(folder, args.listed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
