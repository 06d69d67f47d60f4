"""Judge the probe: `python lab/probe_judged.py OUT [--grid bits|ranks]`.

In: the shipped model and world; for `real`, the small language model and text given with --lm and --text. Out: one JSON
file a cell in OUT, and tables on stdout. Cells that are there are skipped, so that it can be stopped and continued.

`bits`: bits to learn against the bits that are known to be there. `ranks`: the rank that the probe recommends against
the smallest rank of a sweep that reaches 90 % of what the best rank of the sweep recalls.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

import rankwise
from rankwise.records import ProbeRecord, RunRecord, read_record, to_json
from rankwise.tuning.world.builtin import read_builtin
from rankwise.tuning.world.pools import BITS_PER_PERSON

PEOPLE = (10, 20, 40, 80, 160)
RANKS, RATES, SHARE = (1, 4, 16, 64), (1 / 3, 1.0), 0.9
EXPOSURES, WORDINGS, BATCH = 21, 3, 32


def tasks(lm: str | None, text: str | None) -> dict[str, tuple[str, Any]]:
    """Return name -> model and data."""
    made: dict[str, tuple[str, Any]] = {}
    for n in PEOPLE:
        made[f"facts {n}"] = "rankwise:tiny", f"rankwise:facts?n={n}&seed=100"
    made["style 40"] = "rankwise:tiny", "rankwise:style?n=40&seed=100"
    for n in (20, 40):
        facts, style = (read_builtin(f"rankwise:{kind}?n={n}&seed=100").rows for kind in ("facts", "style"))
        made[f"facts {n} and style {n}"] = "rankwise:tiny", [*facts, *style]
    if lm is not None and text is not None:
        made["real text"] = lm, text
    return made


def shuffled(data: str, seed: int) -> list[dict[str, str]]:
    """Return the rows in another order."""
    rows = list(read_builtin(data).rows)
    random.Random(seed).shuffle(rows)
    return rows


def probed(out: Path, name: str, model: str, data: Any, **more: Any) -> ProbeRecord:
    """Probe one task, or read it."""
    path = out / f"probe {name}.json"
    if path.exists():
        return read_record(path, ProbeRecord)
    record = rankwise.probe(model, data, device="cpu", **more)
    path.write_text(to_json(record))
    print(f"{name}: {record.bits_to_learn:,.0f} bits, {record.seconds:.0f} s", flush=True)
    return record


def known_bits(data: Any) -> tuple[float, float] | None:
    """Return the bits by definition, and those of a learner who cannot infer work cities; None where nobody knows."""
    if not isinstance(data, str) or not data.startswith("rankwise:facts"):
        return None
    built = read_builtin(data)
    employers = {row["completion"] for i, row in enumerate(built.rows) if i % 18 == 12}
    return built.people * BITS_PER_PERSON, built.people * BITS_PER_PERSON + 7.644 * len(employers)


def bits(out: Path, all_tasks: dict[str, tuple[str, Any]], only: list[str] | None) -> None:
    """Print bits to learn beside the truth."""
    print("\n| data | rows | base | form | repeated | to learn | truth | without work cities | truth |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, (model, data) in all_tasks.items():
        if only and name not in only:
            continue
        cases = [(name, data)]
        if name.startswith("facts") and isinstance(data, str):
            cases.append((f"{name}, shuffled", shuffled(data, 1)))
        for label, rows in cases:
            record = probed(out, label, model, rows, ramp_rates=False)
            truth = known_bits(data)
            apart = "-"
            if truth is not None:
                order = list(range(record.examples))
                if rows is not data:
                    random.Random(1).shuffle(order)
                apart = f"{sum(r.news_bits for r in record.rows if order[r.row] % 18 < 15):,.0f}"
            print(
                f"| {label} | {record.examples} | {record.base_bits:,.0f} | {record.form_bits:,.0f} | "
                f"{record.repeated_bits:,.0f} | {record.bits_to_learn:,.0f} | "
                + ("- | - | - |" if truth is None else f"{truth[1]:,.0f} | {apart} | {truth[0]:,.0f} |"),
                flush=True,
            )


def ranks(out: Path, all_tasks: dict[str, tuple[str, Any]], only: list[str] | None) -> None:
    """Print the rank recommended beside the rank that a sweep needed."""
    print("\n| task | recommended | rule | rate | needed | best bits gained | at rank | share of it | verdict |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, (model, data) in all_tasks.items():
        if only and name not in only:
            continue
        record = probed(out, f"{name}, with rates", model, data, epochs=EXPOSURES / WORDINGS)
        plan = record.recommendation
        chosen = max(plan.modules, key=lambda module: module.r)  # small modules get less
        steps = max(1, round(EXPOSURES / WORDINGS * record.examples / BATCH))
        gained: dict[int, float] = {}
        # of a mixture the facts are asked: the manner would drown them
        asked = re.sub(r"facts (\d+) and style \d+", r"rankwise:facts?n=\1&seed=100", name) if " and " in name else None
        for rank in sorted({*RANKS, chosen.r}):
            for share in RATES:
                rate = (plan.learning_rate or 1e-3) * share
                run = trained(out, name, model, data, rank, plan.rule, rate, steps, asked)
                gain = None if run.recall is None else run.recall.bits
                if gain is not None:
                    gained[rank] = max(gained.get(rank, gain), gain)
        best = max(gained.values())
        needed = min(rank for rank, gain in gained.items() if gain >= SHARE * best)
        here = gained.get(chosen.r, float("nan"))
        verdict = "hit" if needed <= chosen.r <= 4 * max(needed, 2) else "too low" if chosen.r < needed else "too high"
        print(
            f"| {name} | {chosen.r} | {plan.rule} | {plan.learning_rate:g} | {needed} | {best:,.0f} | "
            f"{max(gained, key=lambda rank: gained[rank])} | {here / best:.0%} | {verdict} |",
            flush=True,
        )


def trained(
    out: Path, name: str, model: str, data: Any, rank: int, rule: str, rate: float, steps: int, asked: str | None = None
) -> RunRecord:
    """Train one cell of the sweep, or read it; what is `asked` instead of the rows trained on is recalled from it."""
    path = out / f"run {name}, rank={rank}, {rule}, lr={rate:.2g}.json"
    if path.exists():
        return read_record(path, RunRecord)
    work, begun = out / f".{path.stem}", time.perf_counter()
    record = rankwise.train(
        model,
        data,
        out=work,
        rank=rank,
        lora_alpha=16.0,
        scaling=rule,
        learning_rate=rate,
        steps=steps,
        batch_size=BATCH,
        save_every=0,
        monitor_every=0,
        force=True,
        device="cpu",
    )
    if asked is not None:
        record = msgspec.structs.replace(record, recall=rankwise.recall(model, work, asked, device="cpu").recall)
    path.write_text(to_json(record))
    shutil.rmtree(work)
    print(
        f"{path.stem}: {json.dumps(record.recall.bits if record.recall else None)}, "
        f"{time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grid", choices=("bits", "ranks"), default="bits")
    parser.add_argument("--only", nargs="+", help="tasks by name, such as 'facts 20'")
    parser.add_argument("--lm", help="folder of a small language model")
    parser.add_argument("--text", help="file of text, as rankwise reads data")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    every = tasks(args.lm, args.text)
    (bits if args.grid == "bits" else ranks)(args.out, every, args.only)


if __name__ == "__main__":
    main()
