"""Recalled bits against rank, rule and learning rate: `python lab/facts_study.py OUT [--seeds 0 1 2] [--grid GRID]`.

In: nothing but the shipped model and world. Out: one run/1 record a cell in OUT, and a table on stdout. Cells that are
there are skipped, so that a study can be stopped and continued, and two can share a folder (--part 0/2, --part 1/2).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import rankwise
from rankwise.records import RunRecord, read_record, to_json

PEOPLE, STEPS, BATCH, ALPHA = 40, 160, 32, 16.0
RULES = ("lora", "rslora")
GRIDS = {
    "rates": [(rank, rule, rate) for rank in (64, 8) for rule in RULES for rate in (3e-4, 1e-3, 3e-3, 1e-2)]
    + [(64, "lora", 5e-3)],
    "ranks": [(rank, rule, 1e-3) for rule in RULES for rank in (4, 16, 32, 128)],
    # the rate that was best at rank 64, carried to the other ranks
    "best": [(rank, "lora", 5e-3) for rank in (4, 8, 16, 32, 128)]
    + [(rank, "rslora", 3e-3) for rank in (4, 16, 32, 128)],
}


def cell(out: Path, rank: int, rule: str, rate: float, seed: int, people: int, steps: int) -> RunRecord:
    """Train one cell, or read it."""
    path = out / f"rank={rank},scaling={rule},lr={rate:g},n={people},steps={steps},seed={seed}.json"
    if path.exists():
        return read_record(path, RunRecord)
    work = out / f".{path.stem}"
    begun = time.perf_counter()
    record = rankwise.train(
        "rankwise:tiny",
        f"rankwise:facts?n={people}&seed={100 + seed}",
        out=work,
        rank=rank,
        lora_alpha=ALPHA,
        scaling=rule,
        learning_rate=rate,
        steps=steps,
        batch_size=BATCH,
        save_every=0,
        seed=seed,
        force=True,
        device="cpu",
    )
    path.write_text(to_json(record))
    shutil.rmtree(work)
    print(f"{path.stem}: {line(record)} {time.perf_counter() - begun:.0f} s", flush=True)
    return record


def line(record: RunRecord) -> str:
    """Say what came out in a few figures."""
    recall = record.recall
    if recall is None or recall.bits is None or not recall.people or recall.paraphrases is None:
        return record.status
    other = recall.paraphrases
    return (
        f"{record.status} {recall.bits / recall.people:.1f} bits ({recall.exact_share:.0%}), paraphrased "
        f"{(other.bits or 0) / recall.people:.1f} ({other.exact_share:.0%}), forgetting {record.forgetting:+.3f}, "
        f"loss {record.loss:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grid", choices=GRIDS, default="rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--part", default="0/1", help="I/N: only every N-th cell, from the I-th on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, args.part.split("/"))
    todo = [(seed, *c) for seed in args.seeds for c in GRIDS[args.grid]][part::parts]
    for seed, rank, rule, rate in todo:
        cell(args.out, rank, rule, rate, seed, args.people, args.steps)
    if parts > 1:
        return
    print("\n| rank | rule | learning rate | bits a person | exact | paraphrased, exact | forgetting | status |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for rank, rule, rate in GRIDS[args.grid]:
        records = [cell(args.out, rank, rule, rate, seed, args.people, args.steps) for seed in args.seeds]
        bits = [r.recall.bits / args.people for r in records if r.recall and r.recall.bits is not None]
        exact = [r.recall.exact_share for r in records if r.recall]
        other = [r.recall.paraphrases.exact_share for r in records if r.recall and r.recall.paraphrases]
        lost = [r.forgetting for r in records if r.forgetting is not None]
        states = ", ".join(sorted({r.status for r in records}))
        cells = (rank, rule, f"{rate:g}", *map(_spread, (bits, exact, other, lost)), states)
        print("| " + " | ".join(map(str, cells)) + " |")


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
