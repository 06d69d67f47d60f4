"""Planned ranks against one rank for all, by what is recalled: `python lab/allocation.py OUT TUNED [TUNED ...]`.

In: full fine-tunes of the shipped model on facts, seeds 0, 1, ..., as `update_spectra.py --keep` leaves them. Out:
adapters in OUT, cut at the parameters of rank 8 and of rank 16, and a table on stdout: error of the weights and
recalled bits a person, one number a fine-tune.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import rankwise
from rankwise.tuning.tiny import folder as base

PEOPLE, RANKS = 40, (8, 16)


def cut(out: Path, tuned: Path, seed: int, asked: dict[str, Any]) -> tuple[float, float]:
    """Return the relative error of an adapter, and the bits a person that it recalls."""
    record = rankwise.extract(base(), tuned, out, force=True, **asked)
    score = rankwise.recall("rankwise:tiny", out, f"rankwise:facts?n={PEOPLE}&seed={100 + seed}", device="cpu")
    return record.relative_error or 0.0, (score.recall.bits or 0.0) / PEOPLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("tuned", type=Path, nargs="+")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| ranks | as many parameters as rank | error | recalled |\n| --- | --- | --- | --- |")
    for rank in RANKS:
        for name in ("one rank for all", "plan", "plan --relative"):
            found = []
            for seed, tuned in enumerate(args.tuned):
                asked: dict[str, Any] = {"rank": rank}
                if name != "one rank for all":
                    relative = name == "plan --relative"
                    asked = {"plan": rankwise.plan(tuned, base=base(), budget=f"rank:{rank}", relative=relative)}
                found.append(cut(args.out / f"{seed} {name} {rank}", tuned, seed, asked))
            errors, bits = (", ".join(f"{pair[i]:.{3 - 2 * i}f}" for pair in found) for i in (0, 1))
            print(f"| {name} | {rank} | {errors} | {bits} |", flush=True)


if __name__ == "__main__":
    main()
