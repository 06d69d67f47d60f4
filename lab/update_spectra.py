"""Spectra of full fine-tuning updates on style and on facts: `python lab/update_spectra.py OUT.json [--people N]`.

In: the shipped model and world. Out: a JSON of what each run's update looked like along the way, and a table on stdout
that compares the two at equal steps and at equal norm.

All matrices of the blocks are trained (AdamW, no adapter, constant rate after ten steps), on as many people each. Every
ten steps the update W - W_base of each matrix is measured: norm relative to W_base, share of the energy in the top 8
directions, effective rank; means over the 28 matrices.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path

import numpy as np
import torch

from rankwise.linalg import matrix_values
from rankwise.tuning.data import Examples
from rankwise.tuning.encoding import encode
from rankwise.tuning.models import load_model
from rankwise.tuning.targets import target_modules
from rankwise.tuning.world.builtin import read_builtin

BATCH, RATE, EVERY = 32, 1e-3, 10


def measured(model: torch.nn.Module, base: dict[str, np.ndarray]) -> dict[str, float]:
    """Return means over the matrices."""
    norms, tops, wide = [], [], []
    for name, before in base.items():
        delta = model.get_submodule(name).weight.detach().double().numpy() - before
        energies = np.asarray(matrix_values(delta).sigma) ** 2
        share = energies / energies.sum()
        norms.append(float(np.sqrt(energies.sum()) / np.linalg.norm(before)))
        tops.append(float(share[:8].sum()))
        wide.append(float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())))
    return {"norm": statistics.fmean(norms), "top8": statistics.fmean(tops), "effective_rank": statistics.fmean(wide)}


def run(kind: str, seed: int, people: int, steps: int, keep: Path | None = None) -> list[dict[str, float]]:
    """Fine-tune everything on one data set; return what was measured along the way, and keep the model where asked."""
    loaded = load_model("rankwise:tiny", device="cpu")
    model = loaded.model.train()
    names = target_modules(model)
    base = {name: model.get_submodule(name).weight.detach().double().numpy().copy() for name in names}
    data = read_builtin(f"rankwise:{kind}?n={people}&seed={100 + seed}")
    examples = Examples(name=data.name, form="prompt-completion", rows=data.rows, places=())
    columns = encode(examples, loaded.tokenizer, 256)
    rows = list(zip(columns["input_ids"], columns["labels"], strict=True))
    for p in model.parameters():
        p.requires_grad_(False)
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    rng = random.Random(seed)
    points, order = [], []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, step / 10)
        if len(order) < BATCH:
            order = rng.sample(range(len(rows)), len(rows))
        batch = [rows[order.pop()] for _ in range(BATCH)]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [3] * (longest - len(i)) for i, _ in batch])
        labels = torch.tensor([j + [-100] * (longest - len(j)) for _, j in batch])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % EVERY == 0:
            points.append({"step": step, "loss": loss.item(), **measured(model, base)})
            print(kind, seed, {k: round(v, 4) for k, v in points[-1].items()}, flush=True)
    if keep is not None:
        model.save_pretrained(keep / f"{kind}-{seed}")
    return points


def at_norm(points: list[dict[str, float]], norm: float) -> dict[str, float]:
    """Return the figures at a norm, linear between the points measured."""
    before = points[0]
    for point in points:
        if point["norm"] >= norm:
            span = point["norm"] - before["norm"]
            t = 1.0 if span == 0 else (norm - before["norm"]) / span
            return {k: before[k] + t * (point[k] - before[k]) for k in point}
        before = point
    return points[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--keep", type=Path, help="folder for the tuned models")
    args = parser.parse_args()
    found = {
        kind: {str(seed): run(kind, seed, args.people, args.steps, args.keep) for seed in args.seeds}
        for kind in ("style", "facts")
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n| compared at | data | steps | relative norm | energy in the top 8 | effective rank | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for label in ("equal steps", "equal norm"):
        for kind in ("style", "facts"):
            rows = []
            for seed in map(str, args.seeds):
                ends = [found[k][seed][-1]["norm"] for k in found]
                rows.append(found[kind][seed][-1] if label == "equal steps" else at_norm(found[kind][seed], min(ends)))
            cells = [f"{statistics.fmean(r['step'] for r in rows):.0f}"]
            for key in ("norm", "top8", "effective_rank", "loss"):
                values = [r[key] for r in rows]
                cells.append(f"{statistics.fmean(values):.3g} ({min(values):.3g} to {max(values):.3g})")
            print(f"| {label} | {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
