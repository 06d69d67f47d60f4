"""What stands in the page of a check beside the figures: the verdict, advice, groups, learning rates.

In: a stability record. Out: words and tables for the template.
"""

from __future__ import annotations

from typing import Any

from rankwise.records import StabilityRecord, Transfer
from rankwise.report import words
from rankwise.report.drawing import Table
from rankwise.report.figures.stability import exponent_text
from rankwise.report.looks import rule_words
from rankwise.report.words import Fact


def stability_verdict(record: StabilityRecord) -> str:
    """Return in a sentence what became of every rule after the last step."""
    if not record.verdicts:
        return "Nothing was measured."
    parts: dict[tuple[str, str], list[str]] = {}
    for v in record.verdicts:
        told = f"{rule_words(v.rule)} is {v.verdict} ({exponent_text(v.exponent, v.exponent_ci)})"
        parts.setdefault((v.optimizer, v.init), []).append(told)
    step = words.count(record.verdicts[0].step, "step")
    return " ".join(
        f"{optimizer}, {init} init, after {step}: {', '.join(told)}." for (optimizer, init), told in parts.items()
    )


def stability_facts(record: StabilityRecord) -> list[Fact]:
    """Return the key numbers."""
    c = record.config
    facts: list[Fact] = []
    for a in (record.advice, *record.more_advice):
        value = words.UNKNOWN if a.exponent is None else f"r^−{a.exponent:.2f}".replace("−-", "")
        interval = "" if a.exponent_ci is None else f"g from {a.exponent_ci[0]:.2f} to {a.exponent_ci[1]:.2f}; "
        step = "" if a.step is None else f"after {words.count(a.step, 'step')}"
        facts.append((f"flat scale, {a.optimizer}, {a.init}", value, interval + step))
    modules = len(c.target_modules) - len(record.skipped)
    facts += [
        ("ranks", ", ".join(map(str, c.ranks)), f"alpha {words.number(c.lora_alpha)}"),
        ("modules", f"{modules:,}", f"{len(record.skipped)} left out"),
        ("seeds", str(len(c.seeds)), "draws of A, nested over ranks; the same batches"),
        ("measured on", f"{c.measured_tokens:,} tokens", f"batches of {words.count(c.batch_size, 'example')}"),
        ("band", f"±{c.band:g}", "of the exponent"),
        ("time", words.seconds(record.seconds), "of all of it"),
    ]
    return facts


def group_table(record: StabilityRecord) -> Table:
    """Return the exponents of all groups after the last step."""
    last = record.config.steps[-1]
    rows = tuple(
        (
            f"{c.group}: {rule_words(c.rule)}, {c.optimizer}, {c.init}",
            f"{c.modules:,}",
            exponent_text(c.rms_exponent, c.rms_exponent_ci),
            words.UNKNOWN if c.spread is None else f"{words.number(c.spread)}×",
            c.verdict,
        )
        for c in record.cells
        if c.step == last
    )
    head = ("group", "modules", "exponent", "largest / smallest", "verdict")
    return Table(f"Groups of modules after {words.count(last, 'step')}", head, rows, named=True)


def _proof(transfer: Transfer) -> tuple[str, str]:
    proof = transfer.proof
    if proof is None:
        return words.UNKNOWN, words.UNKNOWN
    how = "tried" if proof.how == "steps" else "worked out"
    after = words.number(proof.ratio_after)
    return f"rank {proof.rank}, {how}", f"{words.number(proof.ratio_before)} → {after}"


def rate_table(record: StabilityRecord) -> Table:
    """Return the learning rates that would make the branch as large at every rank."""
    ranks = [str(rank) for rank in record.config.ranks]
    rows = []
    for t in record.transfers:
        rates = (words.number(t.learning_rate_by_rank[rank]) for rank in ranks)
        rows.append((f"{rule_words(t.rule)}, {t.optimizer}, {t.init}, step {t.step}", *rates, *_proof(t)))
    head = ("learning rate", *(f"r = {rank}" for rank in ranks), "at", "branch over the reference's")
    return Table(f"Learning rates carried over from rank {record.config.reference_rank}", head, tuple(rows), named=True)


def config_rows(record: StabilityRecord) -> list[tuple[str, str]]:
    """Return what was asked for, every default written out."""
    c = record.config
    return [
        ("rules", ", ".join(c.scaling)),
        ("optimizers", ", ".join(f"{name} at {words.number(rate)}" for name, rate in c.learning_rates.items())),
        ("init", ", ".join(c.init)),
        ("steps", ", ".join(map(str, c.steps))),
        ("seeds", ", ".join(map(str, c.seeds))),
        ("lora_alpha", words.number(c.lora_alpha)),
        ("cut at", f"{c.max_length:,} tokens"),
        ("gradient checkpointing", "yes" if c.gradient_checkpointing else "no"),
        ("dtype of the base", c.dtype),
        ("target modules", ", ".join(c.target_modules) or words.UNKNOWN),
    ]


def stability_contents(record: StabilityRecord) -> dict[str, Any]:
    """Return what the template asks for."""
    return {
        "verdict": stability_verdict(record),
        "facts": stability_facts(record),
        "advice": [a.text for a in (record.advice, *record.more_advice)],
        "findings": record.findings,
        "counted": words.counted(record.findings),
        "groups": group_table(record),
        "rates": rate_table(record),
        "config": config_rows(record),
        "skipped": record.skipped,
    }
