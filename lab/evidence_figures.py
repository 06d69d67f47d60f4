"""Figures of the table of evidence: `python lab/evidence_figures.py RUNS FOLDER [--report FILE.html]`.

In: the folder of run/1 records that `evidence_runs.py` fills. Out: PNG pictures in FOLDER, drawn from a sweep/1
record of each of two grids, left in RUNS; with --report the page of both.

Each seed has people of its own, so the cells of a setting differ in data as well as in chance. They are read as one
sweep over seeds here: an interval is over both.

Needs a Chromium on the path.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

import rankwise
from evidence_runs import cells
from rankwise.records import RunRecord, SweepRecord, read_record, to_json
from rankwise.reporting.grids import gather
from rankwise.reporting.reading import Loaded

PICTURES = {"ranks": ("sweep-answer",), "rates": ("sweep-rates", "sweep-forgetting")}
"""Grid of `evidence_runs.py` -> figures that are drawn of it."""


def sweep_of(runs: Path, grid: str) -> SweepRecord:
    """Return the runs of a grid as one sweep."""
    found = []
    for cell in cells(grid, [0, 1, 2]):
        path = runs / f"{cell.name}.json"
        if path.exists():
            record = read_record(path, RunRecord)
            one = msgspec.structs.replace(record.config, data="rankwise:facts?n=40&seed=100 + seed", data_digest="")
            found.append(Loaded(path.stem, msgspec.structs.replace(record, config=one), path.stem))
    return gather(found, ("lab/evidence_figures.py",))[0][0].record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    records = {grid: sweep_of(args.runs, grid) for grid in PICTURES}
    for grid, record in records.items():
        (args.runs / f"sweep {grid}.json").write_text(to_json(record))
        for sentence in record.answers:
            print(f"{grid}: {sentence}")
        figures = rankwise.figures(record)
        for name in PICTURES[grid]:
            target = args.folder / f"evidence-{name.removeprefix('sweep-')}.png"
            target.write_bytes(figures[name].to_image())
            print(f"wrote {target} ({target.stat().st_size // 1024} kB)")
    if args.report is not None:
        rankwise.report(*records.values(), out=args.report, force=True)


if __name__ == "__main__":
    main()
