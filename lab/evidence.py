"""Verdicts on published claims, from the records that are there: `python lab/evidence.py RUNS [--spectra FILE ...]`.

In: the folder of run/1 records that `evidence_runs.py` fills, JSON files of `update_spectra.py`, and for claims that
need no training what is computed here (`simulate`, `check`, `convert`, `plan`, `extract`). Out: a table on stdout, and
RUNS/evidence.json with every figure.

A claim gets its bound before it is looked at: it stands in the code beside the figure. "undecided" is said where the
interval over the seeds holds both answers, and where the runs are not there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

import rankwise
from evidence_runs import ALPHA, PEOPLE, RULES, Cell, cells
from rankwise.records import RunRecord, StabilityRecord, read_record, to_json

RANKS, SWEPT = (4, 8, 16, 32, 64, 128), (8, 64, 128)
RATES = tuple(5e-4 * 2**k for k in range(6))


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    claim: str
    what: str
    measured: str
    verdict: str
    data: Any = None


class Runs:
    """The folder of records."""

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        self.folder, self.seeds = folder, tuple(seeds)

    def record(self, cell: Cell) -> RunRecord | None:
        """Return the record of a cell that was run."""
        path = self.folder / f"{cell.name}.json"
        return read_record(path, RunRecord) if path.exists() else None

    def adapter(self, cell: Cell) -> Path | None:
        """Return the folder of a kept adapter."""
        folder = self.folder / "adapters" / cell.name
        return folder if (folder / "adapter_model.safetensors").exists() else None

    def bits(self, rank: int, rule: str, rate: float, **more: Any) -> list[float]:
        """Return the bits recalled, over the seeds that are there; a run that diverged has what its adapter recalls."""
        found = []
        for seed in self.seeds:
            record = self.record(Cell(rank, rule, rate, seed, **more))
            if record is not None and record.recall is not None and record.recall.bits is not None:
                found.append(record.recall.bits)
        return found

    def whole(self, rank: int, rule: str, rates: Sequence[float], **more: Any) -> dict[int, dict[float, float]]:
        """Return seed -> rate -> bits, for the seeds of which every rate is there."""
        found: dict[int, dict[float, float]] = {}
        for seed in self.seeds:
            row = {}
            for rate in rates:
                record = self.record(Cell(rank, rule, rate, seed, **more))
                if record is not None:
                    recall = record.recall
                    row[rate] = recall.bits if recall is not None and recall.bits is not None else 0.0
            if len(row) == len(rates):
                found[seed] = row
        return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % t-interval; infinite of fewer than two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def said(values: Sequence[float], form: str = ".2f") -> str:
    """Write a mean with its interval."""
    mean, low, high = interval(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})" if math.isfinite(low) else f"{mean:{form}} (one seed)"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of a straight line."""
    return float(np.polyfit(np.asarray(x, float), np.asarray(y, float), 1)[0])


def optimum(row: dict[float, float]) -> float:
    """Return the best rate: the top of the parabola in log rate through the best of the grid and its neighbours."""
    rates = sorted(row)
    best = max(range(len(rates)), key=lambda i: row[rates[i]])
    if best in (0, len(rates) - 1):
        return rates[best]
    x = [math.log(rates[i]) for i in (best - 1, best, best + 1)]
    a, b, _ = np.polyfit(x, [row[rates[i]] for i in (best - 1, best, best + 1)], 2)
    return math.exp(min(max(-b / (2 * a), x[0]), x[2])) if a < 0 else rates[best]


def within(low: float, high: float, bound: Callable[[float], bool]) -> str:
    """Say what an interval says of a bound: both its ends, or neither."""
    if bound(low) and bound(high):
        return "reproduced"
    return "refuted" if not bound(low) and not bound(high) else "undecided"


PRINTED = {
    "style": {2: 88.9, 4: 99.2, 8: 99.3, 16: 99.6, 32: 99.9},
    "facts": {2: 7.7, 4: 14.9, 8: 28.3, 16: 50.8, 32: 80.8},
}
"""Energy shares in per cent that the published walk-through prints, by rank."""

SCALES = {1: (16, 16), 4: (4, 8), 8: (2, 5.657), 16: (1, 4), 32: (0.5, 2.828), 64: (0.25, 2)}
"""Its alpha / r and alpha / sqrt(r) at alpha 16."""


def walk_through() -> list[Finding]:
    """Claims 1 to 3: what the published walk-through prints, made again."""
    record = rankwise.simulate(ranks=[2, 4, 8, 16, 32, 48], seed=42)
    rows = {name: {row.rank: row for row in update.rows} for name, update in record.updates.items()}
    off = max(abs(100 * rows[k][r].energy_share - share) for k, of in PRINTED.items() for r, share in of.items())
    words = f"{100 * rows['style'][8].energy_share:.1f} and {100 * rows['facts'][8].energy_share:.1f} % at rank 8"
    verdict = "reproduced" if off <= 0.05 else "refuted"
    what = "energy of style and facts by rank, as printed"
    made = [Finding("1", what, f"{words}; largest gap {off:.3f} points", verdict, off)]

    errors = {r: (row.scaled_error.lora, row.scaled_error.rslora) for r, row in rows["facts"].items()}
    words = "; ".join(f"rank {r}: {a:.3f} against {b:.3f}" for r, (a, b) in errors.items() if r >= 8)
    worse = all(b > a for a, b in errors.values())
    closed = max(
        abs(value - math.sqrt(max(0.0, 1 - row.energy_share * s * (2 - s))))
        for rank, row in rows["facts"].items()
        for value, s in ((errors[rank][0], 16 / rank), (errors[rank][1], 16 / math.sqrt(rank)))
    )
    words += f"; sqrt(1 - E s (2 - s)) to {closed:.0e}"
    what = "alpha / sqrt(r) repairs the error of alpha / r, in its own measure"
    made.append(Finding("2", what, words, "refuted" if worse else "reproduced", errors))

    found = {row.rank: (row.lora, row.rslora) for row in record.scales}
    gap = max(abs(x - y) for r, row in SCALES.items() for x, y in zip(found[r], row, strict=True))
    words = f"16 to 0.25 and 16 to 2; largest gap {gap:.1e}"
    made.append(
        Finding("3", "scales at alpha 16, rank 1 to 64", words, "reproduced" if gap < 5e-4 else "refuted", found)
    )
    return made


def rounding(seeds: Sequence[int]) -> list[Finding]:
    """Claim 21: bf16 rounding inflates an energy rank, and the signal rank is not fooled."""
    import ml_dtypes
    from safetensors.numpy import save_file

    true, size, share = 8, 1024, 0.001
    plain, signal = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        base = (0.02 * rng.standard_normal((size, size))).astype(ml_dtypes.bfloat16)
        update = rng.standard_normal((size, true)) @ rng.standard_normal((true, size))
        update *= share * np.linalg.norm(base.astype(float)) / np.linalg.norm(update)
        tuned = (base.astype(float) + update).astype(ml_dtypes.bfloat16)
        with tempfile.TemporaryDirectory() as work:
            paths = [Path(work) / f"{name}.safetensors" for name in ("base", "tuned")]
            for path, weight in zip(paths, (base, tuned), strict=True):
                save_file({"model.layers.0.mlp.up_proj.weight": weight}, path)
            module = rankwise.inspect(paths[1], base=paths[0]).modules[0]
        plain.append(module.rank_90 or 0)
        signal.append(module.signal_rank)
    words = f"rank for 90 % {min(plain)} to {max(plain)} of {size}, signal rank {', '.join(map(str, signal))}"
    verdict = "reproduced" if min(plain) > 10 * true and all(s == true for s in signal) else "refuted"
    what = "an update of rank 8 and 0.1 % of the weights reads as rank 345 in bf16"
    return [Finding("21", what, words, verdict, {"rank_90": plain, "signal": signal})]


def gradient_norms(runs: Runs) -> list[Finding]:
    """Claim 4: under alpha / r gradient norms fall with the rank, under alpha / sqrt(r) they stay."""
    path = runs.folder / "check gradients.json"
    if not path.exists():
        record = rankwise.check(
            "rankwise:tiny",
            f"rankwise:facts?n={PEOPLE}&seed=100",
            ranks=RANKS,
            scaling=RULES,
            steps=(1, 5, 20, 60),
            seeds=5,
            learning_rate=1e-3,
            lora_alpha=ALPHA,
            device="cpu",
        )
        path.write_text(to_json(record))
    record = read_record(path, StabilityRecord)
    made = []
    for rule, published in (("lora", -0.5), ("rslora", 0.0)):
        found = [c for c in record.cells if c.rule == rule and c.group == "all" and c.grad_B_exponent is not None]
        words = ", ".join(f"{c.grad_B_exponent:+.2f} at step {c.step}" for c in found)
        near = [abs((c.grad_B_exponent or 0.0) - published) <= 0.1 for c in found]
        verdict = "reproduced" if all(near) else "reproduced at the start only" if near[0] else "refuted"
        what = f"gradient norm of B goes like r^{published:g} under {rule}"
        made.append(Finding("4", what, words, verdict, {c.step: c.grad_B_exponent for c in found}))
    return made


def rank_helps(runs: Runs) -> list[Finding]:
    """Claim 5: more rank helps under alpha / sqrt(r) and not under alpha / r."""
    made = []
    for rule, expected in (("lora", False), ("rslora", True)):
        slopes = []
        for seed in runs.seeds:
            rows = [runs.record(Cell(rank, rule, 1e-3, seed)) for rank in RANKS]
            if all(row is not None and row.recall is not None for row in rows):
                bits = [row.recall.bits / PEOPLE for row in rows]  # type: ignore[union-attr, operator]
                slopes.append(slope([math.log2(r) for r in RANKS], bits))
        if slopes:
            _, low, high = interval(slopes)
            verdict = within(low, high, (lambda e: e > 0.5) if expected else (lambda e: e < 0.5))
            what = f"{'more' if expected else 'no more'} recall with rank 4 to 128 under {rule}, at 1e-3"
            made.append(Finding("5", what, f"{said(slopes)} bits a person for each doubling", verdict, slopes))
    gains = {}
    for rule in RULES:
        low, high = (runs.whole(rank, rule, RATES) for rank in (SWEPT[0], SWEPT[-1]))
        gains[rule] = [(max(high[s].values()) - max(low[s].values())) / PEOPLE for s in low if s in high]
    for rule, values in gains.items():
        if values:
            _, least, most = interval(values)
            verdict = within(least, most, (lambda e: e > 1) if rule == "rslora" else (lambda e: e < 1))
            what = f"the same, rank 128 over rank 8, each at its best rate, {rule}"
            made.append(Finding("5", what, f"{said(values, '+.1f')} bits a person", verdict, values))
    return made


def best_rates(runs: Runs) -> list[Finding]:
    """Claims 6 and 8: how the best rate goes with the rank."""
    made = []
    for rule, expected in (("lora", 0.0), ("rslora", -0.25), ("unscaled", -0.5)):
        ranks, rates = (SWEPT, RATES) if rule != "unscaled" else ((8, 64), tuple(1.25e-4 * 2**k for k in range(5)))
        rows = {rank: runs.whole(rank, rule, rates) for rank in ranks}
        seeds = [s for s in runs.seeds if all(s in rows[rank] for rank in ranks)]
        if not seeds:
            continue
        best = {s: {rank: optimum(rows[rank][s]) for rank in ranks} for s in seeds}
        edge = any(best[s][r] in (rates[0], rates[-1]) for s in seeds for r in ranks)
        found = [slope([math.log(r) for r in ranks], [math.log(best[s][r]) for r in ranks]) for s in seeds]
        _, low, high = interval(found)
        means = {r: statistics.geometric_mean(best[s][r] for s in seeds) for r in ranks}
        words = ", ".join(f"{means[r]:.1e} at {r}" for r in ranks) + (" (on the edge of the grid)" if edge else "")
        if rule == "lora":
            folds = [max(best[s].values()) / min(best[s].values()) for s in seeds]
            _, a, b = interval(folds)
            verdict = within(max(a, 1.0), b, lambda e: e < 2)
            what = "best rate of alpha / r within a factor of two, ranks 8 to 128"
            made.append(Finding("6", what, f"factor {said(folds)}: {words}", verdict, best))
        if low <= expected <= high:  # an interval that holds everything says nothing
            verdict = "reproduced" if high - low < 0.5 and not edge else "undecided"
        else:
            verdict = "undecided" if edge else "refuted"
        what = f"best rate goes like r^{expected:g} under {rule}"
        made.append(Finding("8", what, f"r^{said(found, '+.2f')}: {words}", verdict, found))
    return made


def early_curves(runs: Runs) -> list[Finding]:
    """Claim 7: under alpha / r the first steps look alike at every rank."""
    made = []
    for rule in RULES:
        apart, fallen = [], []
        for seed in runs.seeds:
            pair = [runs.record(Cell(rank, rule, 1e-3, seed)) for rank in (16, 128)]
            if all(record is not None for record in pair):
                curves = [
                    {p.step: p.loss for p in record.losses if p.step <= 40 and p.loss is not None}  # type: ignore[union-attr]
                    for record in pair
                ]
                steps = sorted(set(curves[0]) & set(curves[1]))
                apart.append(max(abs(curves[0][s] - curves[1][s]) for s in steps))
                fallen.append(curves[0][steps[0]] - curves[0][steps[-1]])
        if apart:
            ratio = [a / f for a, f in zip(apart, fallen, strict=True)]
            _, low, high = interval(ratio)
            what = f"loss of the first 40 steps alike at ranks 16 and 128 under {rule}"
            verdict = within(low, high, lambda e: e < 0.1)
            words = f"largest gap over the fall of the loss: {said(ratio)}"
            made.append(Finding("7", what, words, verdict, {"apart": apart, "fallen": fallen}))
    return made


def after_tuning(runs: Runs) -> list[Finding]:
    """Claim 11: with a rate of its own, each rule does as well."""
    made = []
    for rank in SWEPT:
        rows = {rule: runs.whole(rank, rule, RATES) for rule in RULES}
        made += _gap("11", f"rank {rank}: the rules within 2 % of each other, each at its best rate", rows)
    return made


def _gap(claim: str, what: str, rows: dict[str, dict[int, dict[float, float]]]) -> list[Finding]:
    """Say by how much the best of alpha / sqrt(r) lies above the best of alpha / r, over the seeds that have both."""
    seeds = [seed for seed in rows["lora"] if seed in rows["rslora"]]
    gaps = [100 * (max(rows["rslora"][s].values()) / max(rows["lora"][s].values()) - 1) for s in seeds]
    if not gaps:
        return []
    _, low, high = interval(gaps)
    verdict = within(low, high, lambda e: abs(e) <= 2) if not low < -2 < 2 < high else "undecided"
    return [Finding(claim, what, f"alpha / sqrt(r) ahead by {said(gaps, '+.0f')} %", verdict, gaps)]


def spectra(files: Sequence[Path]) -> list[Finding]:
    """Claim 13: a change of style has a narrower update than facts."""
    from update_spectra import at_norm

    made = []
    for file in files:
        found = json.loads(file.read_text())
        for label in ("equal steps", "equal norm"):
            gaps = []
            for seed in found["style"]:
                ends = [found[k][seed][-1]["norm"] for k in ("style", "facts")]
                style, facts = (
                    found[k][seed][-1] if label == "equal steps" else at_norm(found[k][seed], min(ends))
                    for k in ("style", "facts")
                )
                gaps.append(100 * (style["top8"] - facts["top8"]))
            _, low, high = interval(gaps)
            what = f"style's update narrower than facts', {label}, {file.stem}"
            words = f"{said(gaps, '+.1f')} points more of the energy in the top 8"
            made.append(Finding("13", what, words, within(low, high, lambda e: e > 1), gaps))
    return made


def densities(runs: Runs) -> list[Finding]:
    """Claims 14 and 15: bits a parameter."""
    made = []
    ratios, tables = [], {}
    for seed in runs.seeds:
        best = {}
        for cell in cells("targets", [seed]):
            record = runs.record(cell)
            if record is not None and record.recall is not None:
                density = record.recall.bits_per_param or 0.0
                best[cell.targets] = max(best.get(cell.targets, 0.0), density)
        if len(best) == 2:
            attention, mlp = best.values()
            ratios.append(mlp / attention)
            tables[seed] = {"+".join(k): v for k, v in best.items()}
    if ratios:
        _, low, high = interval(ratios)
        words = f"MLP over attention {said(ratios)}, 42 exposures, at 3e-3"
        verdict = within(low, high, lambda e: 1.5 <= e <= 2.5) if not low < 1.5 < 2.5 < high else "undecided"
        made.append(Finding("14", "a parameter of the MLP holds twice the bits", words, verdict, tables))
    steps: dict[int, float] = {}
    for seed in runs.seeds:
        for cell in cells("capacity", [seed]):
            record = runs.record(cell)
            if record is not None and record.recall is not None and record.recall.bits_per_param is not None:
                steps[cell.steps] = max(steps.get(cell.steps, -math.inf), record.recall.bits_per_param)
    if steps:
        times = {s: round(s * 32 / 600) for s in steps}
        words = ", ".join(f"{times[s]} exposures {steps[s]:.2f}" for s in sorted(steps))
        most = max(steps.values())
        made.append(
            Finding(
                "14, 15",
                "1.7 to 2.8 bits a LoRA parameter; 1 at 100 exposures, 2 at 1000",
                f"bits a parameter of 2,048: {words}",
                "reproduced" if most >= 1.7 else "undecided",
                {times[s]: v for s, v in steps.items()},
            )
        )
    return made


def memory_law(runs: Runs) -> list[Finding]:
    """Claims 16 and 17: bits against rank, and bits a parameter."""
    made = []
    for rule in RULES:
        fits, powers, densest = [], [], []
        for seed in runs.seeds:
            rows = [runs.record(Cell(rank, rule, 1e-3, seed)) for rank in RANKS]
            if all(row is not None and row.recall is not None for row in rows):
                bits = [math.log(max(row.recall.bits, 1e-9)) for row in rows]  # type: ignore[union-attr, type-var]
                x = [math.log(r) for r in RANKS]
                powers.append(slope(x, bits))
                fits.append(float(np.corrcoef(x, bits)[0, 1] ** 2))
                density = [row.recall.bits_per_param or 0.0 for row in rows]  # type: ignore[union-attr]
                densest.append(RANKS[density.index(max(density))])
        if fits:
            _, low, high = interval(fits)
            words = f"power {said(powers)}, R^2 {said(fits, '.3f')}"
            verdict = within(low, min(high, 1.0), lambda e: e > 0.98)
            made.append(Finding("16", f"recall is a power of the rank (R^2 > 0.98) under {rule}", words, verdict, fits))
            words = "densest at rank " + ", ".join(map(str, densest))
            verdict = "reproduced" if all(r <= 16 for r in densest) else "refuted"
            made.append(Finding("17", f"most bits a parameter at rank 4 to 16, {rule}", words, verdict, densest))
    return made


def intruders(runs: Runs) -> list[Finding]:
    """Claim 18: new directions among the largest of the tuned weights fall with the rank and rise with the scale."""
    from rankwise.tuning.models import load_model

    model = load_model("rankwise:tiny", device="cpu").model
    weights = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    counts: dict[str, list[float]] = {}
    for cell in cells("kept", list(runs.seeds)):
        folder = runs.adapter(cell)
        if folder is None or cell.rate != 3e-3:
            continue
        counts.setdefault(f"{cell.rule} {cell.rank}", []).append(_intruders(folder, weights))
    if not counts:
        return []
    words = ", ".join(f"{name}: {statistics.fmean(v):.2f}" for name, v in counts.items())
    made = []
    for rule in RULES:
        seeds = min((len(counts.get(f"{rule} {r}", [])) for r in (4, 8, 64)), default=0)
        if not seeds:
            continue
        steps = [counts[f"{rule} 64"][i] - counts[f"{rule} 4"][i] for i in range(seeds)]
        _, low, high = interval(steps)
        what = f"intruder dimensions fall from rank 4 to 64 under {rule}, at 3e-3"
        measured = f"{said(steps, '+.2f')} a matrix ({words})"
        made.append(Finding("18", what, measured, within(low, high, lambda e: e < 0), counts))
    return made


def _intruders(folder: Path, weights: dict[str, np.ndarray], top: int = 10, bound: float = 0.5) -> float:
    """Return the mean count over the matrices: top left singular vectors whose cosine with every old one is small."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = []
    for name in tensors:
        if not name.endswith("lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        base = weights[f"{module}.weight"]
        b = tensors[name.replace("lora_A", "lora_B")].astype(float)
        tuned = base + config["lora_alpha"] / root * (b @ tensors[name].astype(float))
        old, new = (np.linalg.svd(w, full_matrices=False)[0] for w in (base, tuned))
        found.append(int((np.abs(new[:, :top].T @ old).max(axis=1) < bound).sum()))
    return statistics.fmean(found)


def squeezed(runs: Runs) -> list[Finding]:
    """Claim 19: train at a high rank and cut, against training at the low rank."""
    gains, rows = [], {}
    for seed in runs.seeds:
        high = runs.adapter(Cell(64, "rslora", 1e-3, seed)), runs.adapter(Cell(32, "rslora", 3e-3, seed))
        direct = [runs.record(Cell(8, "rslora", rate, seed)) for rate in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)]
        best = max((r.recall.bits or 0.0 for r in direct if r is not None and r.recall is not None), default=None)
        cut = []
        for folder in high:
            if folder is not None:
                out = runs.folder / "cut" / folder.name
                if not out.exists():
                    out.parent.mkdir(exist_ok=True)
                    rankwise.convert(folder, out, rank=8)
                facts = f"rankwise:facts?n={PEOPLE}&seed={100 + seed}"
                score = rankwise.recall("rankwise:tiny", out, facts, device="cpu")
                cut.append(score.recall.bits or 0.0)
        if best is not None and cut:
            rows[seed] = {"direct": best / PEOPLE, "cut": [c / PEOPLE for c in cut]}
            gains.append((max(cut) - best) / PEOPLE)
    if not gains:
        return []
    _, low, high_end = interval(gains)
    what = "rank 32 or 64 cut to 8 recalls more than rank 8, each at its best rate tried"
    return [Finding("19", what, f"{said(gains, '+.1f')} bits a person", within(low, high_end, lambda e: e > 0), rows)]


def allocation(runs: Runs, tuned: Sequence[Path]) -> list[Finding]:
    """Claim 20: ranks by energy against one rank, from a full fine-tuning on facts, as many parameters."""
    errors, gains, rows = [], [], {}
    from rankwise.tuning.tiny import folder as base

    for seed, folder in enumerate(tuned):
        work = runs.folder / "allocation" / folder.name
        work.mkdir(parents=True, exist_ok=True)
        made = {}
        planned = rankwise.plan(folder, base=base(), budget="rank:8")
        for name, asked in (("plan", {"plan": planned}), ("one", {"rank": 8})):
            out = work / name
            record = rankwise.extract(base(), folder, out, force=True, **asked)
            data = f"rankwise:facts?n={PEOPLE}&seed={100 + seed}"
            score = rankwise.recall("rankwise:tiny", out, data, device="cpu")
            made[name] = {"error": record.relative_error, "bits": (score.recall.bits or 0.0) / PEOPLE}
        rows[seed] = made
        errors.append(100 * (made["plan"]["error"] / made["one"]["error"] - 1))
        gains.append(made["plan"]["bits"] - made["one"]["bits"])
    if not gains:
        return []
    _, low, high = interval(gains)
    words = f"error {said(errors, '+.1f')} %, recall {said(gains, '+.1f')} bits a person"
    what = "planned ranks recall more than rank 8 everywhere"
    return [Finding("20", what, words, within(low, high, lambda e: e > 0), rows)]


def foreseen(runs: Runs) -> list[Finding]:
    """Claim 22: the check sees a rate that will diverge before a whole run."""
    made = []
    for rule, rate in (("rslora", 1.6e-2), ("rslora", 2e-3), ("lora", 1.6e-2), ("lora", 4e-3)):
        path = runs.folder / f"check {rule} {rate:g}.json"
        if not path.exists():
            record = rankwise.check(
                "rankwise:tiny",
                f"rankwise:facts?n={PEOPLE}&seed=100",
                ranks=(8, 64, 128),
                scaling=rule,
                steps=(1, 5, 20),
                seeds=3,
                batch_size=32,
                learning_rate=rate,
                lora_alpha=ALPHA,
                device="cpu",
            )
            path.write_text(to_json(record))
        record = read_record(path, StabilityRecord)
        gone = {c.step: c.runs_diverged for c in record.cells if c.group == "all" and c.rule == rule}
        real = [runs.record(Cell(64, rule, rate, seed)) for seed in runs.seeds]
        states = [r.status for r in real if r is not None]
        made.append((rule, rate, gone, states))
    words = "; ".join(
        f"{a} at {b:g}: {max(g.values())} of 9 runs diverged in 20 steps, whole runs {s}" for a, b, g, s in made
    )
    right = [(max(g.values()) > 0) == ("diverged" in s) for _, _, g, s in made if s]
    verdict = "undecided" if not right else "reproduced" if all(right) else "refuted"
    rows = [list(map(str, each)) for each in made]
    return [Finding("22", "a rate that diverges shows in twenty steps", words, verdict, rows)]


def elements(runs: Runs) -> list[Finding]:
    """Claims 5 and 11 on the small real language model."""
    rates = (3e-3, 1e-2)
    made = []
    for rule in RULES:
        rows = {rank: runs.whole(rank, rule, rates, steps=300, data="elements") for rank in (4, 64)}
        seeds = [s for s in rows[4] if s in rows[64]]
        fixed = [rows[64][s][3e-3] / rows[4][s][3e-3] for s in seeds]
        best = [max(rows[64][s].values()) / max(rows[4][s].values()) for s in seeds]
        if seeds:
            words = f"{said(fixed)} at 3e-3, {said(best)} each at the better of two rates"
            _, low, high = interval(fixed)
            verdict = within(low, high, (lambda e: e > 1.1) if rule == "rslora" else (lambda e: e < 1.1))
            what = f"bits gained at rank 64 over rank 4, {rule}, elements"
            made.append(Finding("5, real", what, words, verdict, rows))
    for rank in (4, 64):
        rows = {rule: runs.whole(rank, rule, rates, steps=300, data="elements") for rule in RULES}
        made += _gap("11, real", f"rank {rank}: the rules within 2 %, each at the better of two rates, elements", rows)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--spectra", type=Path, nargs="*", default=[])
    parser.add_argument("--tuned", type=Path, nargs="*", default=[], help="fully fine-tuned models, seeds 0, 1, ...")
    args = parser.parse_args()
    runs = Runs(args.runs, args.seeds)
    found = [
        *walk_through(),
        *gradient_norms(runs),
        *rank_helps(runs),
        *best_rates(runs),
        *early_curves(runs),
        *after_tuning(runs),
        *spectra(args.spectra),
        *densities(runs),
        *memory_law(runs),
        *intruders(runs),
        *squeezed(runs),
        *allocation(runs, args.tuned),
        *rounding(args.seeds),
        *foreseen(runs),
        *elements(runs),
    ]
    (args.runs / "evidence.json").write_text(json.dumps([asdict(f) for f in found], indent=1, default=str) + "\n")
    print("| claim | what | measured | verdict |\n| --- | --- | --- | --- |")
    for f in found:
        print(f"| {f.claim} | {f.what} | {f.measured} | {f.verdict} |")


if __name__ == "__main__":
    main()
