"""The runs behind the table of evidence: `python lab/evidence_runs.py OUT --grid GRID [GRID ...]`.

In: the shipped model and world; for `elements`, the folder and the rows that `small_lm.py` and `elements.py` make
(--lm, --rows). Out: one run/1 record a cell in OUT, and the adapters of the grid `kept`. Cells that are there are
skipped, so that it can be stopped and continued, and several can share a folder (--part 0/2, --part 1/2).

Cells of 40 people and 160 steps have the names that `facts_study.py` and `transferred_rate.py` give them.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import rankwise
from facts_study import line
from rankwise.records import RunRecord, read_record, to_json

PEOPLE, STEPS, BATCH, ALPHA = 40, 160, 32, 16.0
RULES = ("lora", "rslora")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Cell:
    """One run."""

    rank: int
    rule: str
    rate: float
    seed: int
    people: int = PEOPLE
    steps: int = STEPS
    targets: tuple[str, ...] = ()
    data: str = "facts"
    keep: bool = False

    @property
    def name(self) -> str:
        """Of its record."""
        more = "" if self.data == "facts" else f",data={self.data}"
        more += f",targets={'+'.join(self.targets)}" if self.targets else ""
        size = f"n={self.people}," if self.data == "facts" else ""
        return f"rank={self.rank},scaling={self.rule},lr={self.rate:g},{size}steps={self.steps},seed={self.seed}{more}"


def exposures(people: int, times: int) -> int:
    """Return the steps that state each fact so often; a person has 18 rows, a fact three wordings."""
    return -(-times * people * 6 // BATCH)


def _rates() -> Iterator[Cell]:
    for rank in (8, 64, 128):
        for rule in RULES:
            for k in range(6):
                yield Cell(rank, rule, 5e-4 * 2**k, 0)


def _ranks() -> Iterator[Cell]:
    for rule in RULES:
        for rank in (4, 8, 16, 32, 64, 128):
            yield Cell(rank, rule, 1e-3, 0)


def _unscaled() -> Iterator[Cell]:
    """Factor alpha at every rank: eight times that of alpha / sqrt(r) at rank 64."""
    for rank in (8, 64):
        for k in range(5):
            yield Cell(rank, "unscaled", 1.25e-4 * 2**k, 0)


def _kept() -> Iterator[Cell]:
    for rank in (4, 8, 64):
        for rule in RULES:
            yield Cell(rank, rule, 3e-3, 0, keep=True)
    yield Cell(64, "rslora", 1e-3, 0, keep=True)
    yield Cell(32, "rslora", 3e-3, 0, keep=True)
    yield Cell(8, "rslora", 5e-3, 0, keep=True)


def _targets() -> Iterator[Cell]:
    """As many parameters on attention as on the MLP: 4 x 6 x 256 and 3 x 4 x 512 a layer; the same scale."""
    for rank, targets in ((6, ATTENTION), (4, MLP)):
        yield Cell(rank, "rslora", 3e-3, 0, steps=exposures(PEOPLE, 42), targets=targets)


def _capacity() -> Iterator[Cell]:
    """2,048 parameters, so that room can bind: rank 1 on `down_proj` alone."""
    for times in (9, 21, 60, 210):
        for rate in (3e-3, 1e-2):
            yield Cell(1, "lora", rate, 0, people=100, steps=exposures(100, times), targets=("down_proj",))


def _elements() -> Iterator[Cell]:
    for rate in (3e-3, 1e-2):
        for rank in (4, 64):
            for rule in RULES:
                yield Cell(rank, rule, rate, 0, steps=300, data="elements")


GRIDS: dict[str, Callable[[], Iterator[Cell]]] = {
    "rates": _rates,
    "ranks": _ranks,
    "unscaled": _unscaled,
    "kept": _kept,
    "targets": _targets,
    "capacity": _capacity,
    "elements": _elements,
}


def cells(grid: str, seeds: list[int]) -> list[Cell]:
    """Return the cells of a grid, one seed after the other."""
    return [Cell(**{**vars(cell), "seed": seed}) for seed in seeds for cell in GRIDS[grid]()]


def run(out: Path, cell: Cell, lm: str | None = None, rows: str | None = None) -> RunRecord | None:
    """Train one cell, or read it; None where its model or rows were not given."""
    path, adapter = out / f"{cell.name}.json", out / "adapters" / cell.name
    if path.exists() and (not cell.keep or (adapter / "adapter_model.safetensors").exists()):
        return read_record(path, RunRecord)
    if cell.data != "facts" and (lm is None or rows is None):
        return None
    work = adapter if cell.keep else out / f".{cell.name}"
    facts = cell.data == "facts"
    begun = time.perf_counter()
    record = rankwise.train(
        "rankwise:tiny" if facts else lm,
        f"rankwise:facts?n={cell.people}&seed={100 + cell.seed}" if facts else rows,
        out=work,
        rank=cell.rank,
        lora_alpha=ALPHA,
        scaling=cell.rule,
        learning_rate=cell.rate,
        steps=cell.steps,
        batch_size=BATCH,
        target_modules=list(cell.targets) or None,
        save_every=0,
        seed=cell.seed,
        force=True,
        device="cpu",
    )
    path.write_text(to_json(record))
    if not cell.keep:
        shutil.rmtree(work)
    said = line(record) if facts else f"{record.status} loss {record.loss:.3f} {record.recall and record.recall.bits}"
    print(f"{cell.name}: {said} {time.perf_counter() - begun:.0f} s", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grid", choices=GRIDS, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--part", default="0/1", help="I/N: only every N-th cell, from the I-th on")
    parser.add_argument("--lm", help="folder of the small language model")
    parser.add_argument("--rows", help="rows about the elements")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, args.part.split("/"))
    todo = [cell for grid in args.grid for cell in cells(grid, args.seeds)]
    for cell in todo[part::parts]:
        run(args.out, cell, args.lm, args.rows)


if __name__ == "__main__":
    main()
