"""Bits a LoRA parameter holds, over exposures: `python lab/probe_calibration.py OUT [--grid GRID] [--seeds 0]`.

In: nothing but the shipped model and world. Out: one run/1 record a cell in OUT, and a table on stdout: for each number
of exposures the most bits a parameter that any cell reached. `rankwise.tuning.probing.capacity` carries that table.
Cells that are there are skipped, so that it can be stopped and continued.

An exposure is one sentence that states the fact. A fact stands in three sentences of the data, so that E exposures are
E / 3 passes over them.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import rankwise
from rankwise.records import RunRecord, read_record, to_json

ROWS_PER_PERSON, WORDINGS, BATCH, ALPHA = 18, 3, 32, 16.0


@dataclass(frozen=True)
class Cell:
    """One run."""

    people: int
    rank: int
    rule: str
    rate: float
    exposures: int
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps that give every fact its exposures."""
        return math.ceil(self.exposures / WORDINGS * self.people * ROWS_PER_PERSON / BATCH)

    @property
    def name(self) -> str:
        """Of its file."""
        return (
            f"n={self.people},rank={self.rank},scaling={self.rule},lr={self.rate:g},"
            f"exposures={self.exposures},seed={self.seed}"
        )


GRIDS = {
    # rank 1, the fewest parameters there are: room binds as early as it can
    "short": [(40, 1, "lora", rate, 21) for rate in (1e-3, 3e-3, 1e-2)] + [(40, 1, "lora", 3e-3, 9)],
    "long": [(160, 1, "lora", 3e-3, 21), (80, 1, "lora", 3e-3, 60), (160, 1, "lora", 3e-3, 60)],
    "more": [(n, rank, "lora", 3e-3, e) for n in (160, 320) for rank in (1, 2) for e in (9, 60, 210)],
}


def run_cell(out: Path, cell: Cell) -> RunRecord:
    """Train one cell, or read it."""
    path = out / f"{cell.name}.json"
    if path.exists():
        return read_record(path, RunRecord)
    work, begun = out / f".{path.stem}", time.perf_counter()
    record = rankwise.train(
        "rankwise:tiny",
        f"rankwise:facts?n={cell.people}&seed={100 + cell.seed}",
        out=work,
        rank=cell.rank,
        lora_alpha=ALPHA,
        scaling=cell.rule,
        learning_rate=cell.rate,
        steps=cell.steps,
        batch_size=BATCH,
        save_every=0,
        monitor_every=0,
        seed=cell.seed,
        force=True,
        device="cpu",
    )
    path.write_text(to_json(record))
    shutil.rmtree(work)
    print(f"{cell.name}: {figures(cell, record)} {time.perf_counter() - begun:.0f} s", flush=True)
    return record


def figures(cell: Cell, record: RunRecord) -> str:
    """Say what came out."""
    recall = record.recall
    if recall is None or recall.bits is None or recall.bits_per_param is None:
        return record.status
    return (
        f"{record.status} {recall.bits / cell.people:.1f} bits a person ({recall.exact_share:.0%} exact), "
        f"{recall.bits_per_param:.4f} bits a parameter of {record.params:,}, forgetting {record.forgetting:+.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grid", choices=GRIDS, nargs="+", default=["short"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cells = [Cell(*row, seed) for grid in args.grid for seed in args.seeds for row in GRIDS[grid]]
    best: dict[int, tuple[float, Cell, RunRecord]] = {}
    for cell in cells:
        record = run_cell(args.out, cell)
        density = record.recall.bits_per_param if record.recall else None
        if density is not None and density > best.get(cell.exposures, (-math.inf, cell, record))[0]:
            best[cell.exposures] = density, cell, record
    print("\n| exposures | people | rank | learning rate | bits a person | exact | bits a parameter | forgetting |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for exposures, (density, cell, record) in sorted(best.items()):
        assert record.recall is not None
        print(
            f"| {exposures} | {cell.people} | {cell.rank} | {cell.rate:g} | "
            f"{(record.recall.bits or 0) / cell.people:.1f} | {record.recall.exact_share:.0%} | {density:.3f} | "
            f"{record.forgetting:+.2f} |"
        )


if __name__ == "__main__":
    main()
