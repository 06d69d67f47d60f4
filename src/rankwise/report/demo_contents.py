"""What stands in the page of the demo, beside the figures: the verdict, what is in the data, the tables of runs.

In: a demo record. Out: words and tables for the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankwise.records import DemoRecord, DemoRun
from rankwise.report import words
from rankwise.report.drawing import Table, known
from rankwise.report.looks import bits_words, facts_runs, rule_words, status_words
from rankwise.report.words import Fact


def _recalled(run: DemoRun) -> str:
    """Return the bits of a run at its rank; a run that is not done is never a bare number."""
    bits = known(run.bits_per_person)
    broken = "" if run.status == "done" else f" ({run.status})"
    return f"{'unknown' if bits is None else bits_words(bits)} at rank {run.rank}{broken}"


def _clause(rule: str, runs: Sequence[DemoRun]) -> str:
    """Return the bits of one rule by rank; the word "recalls" only where every run has them."""
    whole = all(run.status == "done" and known(run.bits_per_person) is not None for run in runs)
    parts = [_recalled(run) for run in runs]
    return f"{rule_words(rule)} recalls {' and '.join(parts)}" if whole else f"{rule_words(rule)}: {', '.join(parts)}"


def demo_verdict(record: DemoRecord) -> str:
    """Return the recalled bits by rule and rank, in one line made from the figures."""
    runs = facts_runs(record.runs)
    fixed = [run for run in runs if run.role == "fixed rate"]
    best = [run for run in runs if run.role == "best rate"]
    if not runs:
        return "This demo holds no run on the facts."
    sentences = []
    if fixed:
        parts = []
        for rule in dict.fromkeys(run.scaling for run in fixed):
            of = [run for run in fixed if run.scaling == rule]
            parts.append(_clause(rule, of))
        sentences.append(
            f"Of {bits_words(record.bits_per_person)} bits a person, at the learning rate "
            f"{words.number(record.learning_rate)} that all share: {'; '.join(parts)}."
        )
    for run in best:
        sentences.append(f"At a rate of its own, {words.number(run.learning_rate)}, {_clause(run.scaling, [run])}.")
    return " ".join(sentences)


def demo_facts(record: DemoRecord) -> list[Fact]:
    """Return what is in the data, and what all runs share."""
    total = record.people * record.bits_per_person
    exposures = f"{record.steps:,} steps of {words.count(record.batch_size, 'example')}"
    return [
        ("people", f"{record.people:,}", f"{record.facts:,} facts that hold bits; {record.data}"),
        ("bits a person", bits_words(record.bits_per_person), f"log2 of the pools; {words.number(total)} bits in all"),
        (
            "what the base scores",
            words.number(record.base_bits_per_person, 2),
            "bits a person; 0 is a model that knows the pools of values and no person",
        ),
        ("model", words.short(record.model), f"{record.model_params:,} parameters"),
        ("a run on the facts", f"{record.steps * record.batch_size:,} examples", exposures),
        ("lora_alpha", words.number(record.lora_alpha), "of every run"),
        ("shared learning rate", words.number(record.learning_rate), "of the runs at a fixed rate"),
        ("best learning rate", words.number(record.best_learning_rate), "of the run at a rate of its own"),
        ("style data", words.count(sum(r.role == "style" for r in record.runs), "run"), record.style_data),
        ("time", words.seconds(record.seconds), f"of the whole demo, {words.count(len(record.runs), 'run')}"),
    ]


def _cells(run: DemoRun) -> tuple[str, ...]:
    return (
        run.name,
        status_words(run.status),
        f"{run.rank}",
        rule_words(run.scaling),
        words.number(run.factor),
        words.number(run.learning_rate),
        f"{run.params:,}",
        bits_words(run.bits_per_person),
        words.share(run.exact_share),
        bits_words(run.paraphrased_bits_per_person),
        words.share(run.paraphrased_exact_share),
        words.number(run.forgetting),
        words.number(run.relative_norm),
        words.number(run.effective_rank),
        words.number(run.rank_90),
        words.number(run.loss),
        words.seconds(run.seconds),
        run.path,
    )


def run_table(caption: str, unit: str, runs: Sequence[DemoRun]) -> Table:
    """Return the table of runs; `unit` is what the bits are counted by."""
    head = (
        "run",
        "status",
        "rank",
        "rule",
        "factor",
        "learning rate",
        "parameters",
        f"bits {unit}",
        "exact",
        "bits, held\u2011out words",
        "exact, held\u2011out words",
        "forgetting",
        "relative norm",
        "effective rank",
        "rank 90\u00a0%",
        "training loss",
        "time",
        "record",
    )
    return Table(caption, head, tuple(_cells(run) for run in runs), named=True)


def run_tables(record: DemoRecord) -> list[Table]:
    """Return the runs on the facts and those on the style data, apart: their bits do not count the same."""
    style = [run for run in record.runs if run.role == "style"]
    tables = []
    if facts := facts_runs(record.runs):
        tables.append(run_table("Runs on the facts", "a person", facts))
    if style:
        tables.append(run_table("Runs on the style data", "an example", style))
    return tables


def demo_contents(record: DemoRecord) -> dict[str, Any]:
    """Return what the template of the demo asks for."""
    return {
        "verdict": demo_verdict(record),
        "caveats": record.caveats,
        "facts": demo_facts(record),
        "tables": run_tables(record),
        "reading": record.reading,
        "best_chosen": record.best_chosen,
        "again": words.command_words(record.command),
    }
