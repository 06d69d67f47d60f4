"""Does the rate that `check` carries over from rank 8 suit ranks 64 and 128? `python lab/transferred_rate.py OUT`.

In: nothing but the shipped model and world. Out: one run/1 record a cell and one stability/1 record a rule in OUT, and
a table on stdout. Under each rule the learning rate is swept on a grid of factors of two at every rank (recalled bits,
mean over the seeds); `check` starts from the best rate of rank 8 and carries it over; the last column says whether what
it gives lies within a factor of two of the best of the sweep. A best rate on the grid's edge is marked: it may lie
beyond.
Cells that are there are skipped, so that a study can be stopped and continued, and two can share a folder (--part 0/2,
--part 1/2). `--quick` is for seeing that it works.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import rankwise
from facts_study import ALPHA, BATCH, PEOPLE, RULES, STEPS, cell
from rankwise.records import RunRecord, StabilityRecord, read_record, to_json

REFERENCE, RANKS = 8, (8, 64, 128)
RATES = tuple(5e-4 * 2**k for k in range(6))
"""5e-4 to 1.6e-2: the first study found 5e-3 best for alpha / r at rank 64, and 1e-3 to 3e-3 for alpha / sqrt(r)."""


def bits(record: RunRecord) -> float:
    """Return the recalled bits; a run that diverged has what its last good adapter recalls."""
    return 0.0 if record.recall is None or record.recall.bits is None else record.recall.bits


def check(out: Path, rule: str, rate: float, people: int, steps: tuple[int, ...], seeds: int) -> StabilityRecord:
    """Carry a rate over, or read what was carried over."""
    path = out / f"check,scaling={rule},lr={rate:g},n={people},steps={steps[-1]}.json"
    if path.exists():
        return read_record(path, StabilityRecord)
    record = rankwise.check(
        "rankwise:tiny",
        f"rankwise:facts?n={people}&seed=100",
        ranks=RANKS,
        scaling=rule,
        learning_rate=rate,
        lora_alpha=ALPHA,
        reference_rank=REFERENCE,
        batch_size=BATCH,
        steps=steps,
        seeds=seeds,
        device="cpu",
    )
    path.write_text(to_json(record))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--part", default="0/1", help="I/N: only every N-th cell, from the I-th on, and no table")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rates, taken, draws = RATES, (1, 2, 5, 10, 20), 5
    if args.quick:
        rates, taken, draws, args.seeds, args.people, args.steps = RATES[1:5:3], (1, 2), 2, [0], 3, 2
    args.out.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, args.part.split("/"))
    todo = [(seed, rank, rule, rate) for seed in args.seeds for rule in RULES for rank in RANKS for rate in rates]
    for seed, rank, rule, rate in todo[part::parts]:
        cell(args.out, rank, rule, rate, seed, args.people, args.steps)
    if parts > 1:
        return
    print("\n| rule | rank | best of the sweep | bits there | carried over | bits of the nearest rate | within 2 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rule in RULES:
        found = {
            (rank, rate): statistics.fmean(
                bits(cell(args.out, rank, rule, rate, seed, args.people, args.steps)) for seed in args.seeds
            )
            for rank in RANKS
            for rate in rates
        }
        best = {rank: max(rates, key=lambda rate: found[rank, rate]) for rank in RANKS}
        record = check(args.out, rule, best[REFERENCE], args.people, taken, draws)
        (transfer,) = record.transfers
        for rank in RANKS:
            carried = transfer.learning_rate_by_rank[str(rank)]
            nearest = min(rates, key=lambda rate: max(rate / carried, carried / rate))
            edge = " (edge)" if best[rank] in (rates[0], rates[-1]) else ""
            ratio = carried / best[rank]
            within = "yes" if 0.5 <= ratio <= 2 else "no"
            print(
                f"| {rule} | {rank} | {best[rank]:g}{edge} | {found[rank, best[rank]] / args.people:.1f} "
                f"| {carried:.3g} | {found[rank, nearest] / args.people:.1f} | {within} ({ratio:.2f}) |"
            )
        print(f"\n{record.advice.text}\n")


if __name__ == "__main__":
    main()
