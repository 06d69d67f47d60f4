"""What stands in the pages of a probe and of a counter-test, beside the figures: verdicts, key numbers, tables.

In: a record. Out: words and tables for the templates.
"""

from __future__ import annotations

from typing import Any, Final

from rankwise.records import CounterTestRecord, ProbeRecord
from rankwise.report import words
from rankwise.report.drawing import Table
from rankwise.report.words import Fact

MOST_ROWS: Final = 10

JOBS: Final = {
    "facts": "have to be stored to be known",
    "style": "are a matter of manner: hardly anything in them is news",
    "nothing": "are known to the base already",
}


def probe_verdict(record: ProbeRecord) -> str:
    """Return how much there is to learn, and what to start with."""
    plan = record.recommendation
    first = max(plan.modules, key=lambda module: module.r)
    asked = " (as you said)" if record.job_given else ""
    rate = words.number(plan.learning_rate)
    start = f"Start with rank {first.r}, {plan.rule}, alpha {words.number(first.lora_alpha)}, learning rate {rate}"
    end = "." if record.decided else "; the evidence does not decide, and three runs would."
    return (
        f"{words.number(record.bits_to_learn)} bits to learn of the {words.number(record.base_bits)} that these "
        f"rows cost the base. They {JOBS[record.job]}{asked}. {start}{end}"
    )


def probe_facts(record: ProbeRecord) -> list[Fact]:
    """Return the key numbers of a probe."""
    looked = f"of {record.measured_examples:,} rows looked at"
    capacity = record.capacity
    low, high = capacity.rank_interval
    return [
        ("bits to learn", words.number(record.bits_to_learn), "to know all rows by heart"),
        ("loss of the base", words.number(record.base_bits), "bits, on the tokens that are trained on"),
        ("form and style", words.number(record.form_bits), "bits that a small adapter saved on held-out rows"),
        ("said by other rows", words.number(record.repeated_bits), "bits that earlier rows about the same thing save"),
        ("bits a row", words.number(record.bits_to_learn / record.examples), f"{record.examples:,} rows"),
        ("known rows", f"{record.known_rows:,}", f"1 bit at most once the form is known; {looked}"),
        ("repeated rows", f"{record.repeated_rows:,}", f"1 bit at most after the rows before; {looked}"),
        ("rank that holds the bits", f"{capacity.min_rank:,}", f"{low:,} to {high:,} by the sources"),
    ]


def parts_table(record: ProbeRecord) -> Table:
    """Return the rows that the base knows best, and those with most to learn."""
    head = ("row", "tokens", "base", "form known", "to learn")
    most = sorted(record.rows, key=lambda row: -row.news_bits)[:MOST_ROWS]
    cells = tuple(
        (
            f"{row.row:,}",
            str(row.tokens),
            words.number(row.base_bits),
            words.number(row.formed_bits),
            words.number(row.news_bits),
        )
        for row in most
    )
    return Table("The rows with most to learn, in bits", head, cells)


def known_table(record: ProbeRecord) -> Table:
    """Return the rows that the base knows best."""
    least = sorted(record.rows, key=lambda row: row.formed_bits)[:MOST_ROWS]
    cells = tuple((f"{r.row:,}", str(r.tokens), words.number(r.base_bits), words.number(r.formed_bits)) for r in least)
    return Table("The rows that the base knows best, in bits", ("row", "tokens", "base", "form known"), cells)


def gradient_table(record: ProbeRecord) -> Table:
    """Return the gradient of every module."""
    head = ("module", "shape", "norm", "effective rank", "rank 90 %", "rank 99 %", "coherence")
    cells = tuple(
        (
            g.module,
            f"{g.shape[0]} × {g.shape[1]}",
            words.number(None if g.energy is None else g.energy**0.5),
            words.number(g.effective_rank) + (" (sketch)" if g.sketched else ""),
            f"{g.rank_90:,}",
            f"{g.rank_99:,}",
            words.number(g.coherence),
        )
        for g in record.gradient
    )
    return Table(f"Gradient at the base, over {words.count(record.gradient_examples, 'row')}", head, cells, named=True)


def sweep_table(record: ProbeRecord) -> Table | None:
    """Return the runs to try, or None where the evidence decides."""
    if not record.sweep:
        return None
    head = ("rank", "rule", "alpha", "learning rate", "what it would tell")
    cells = tuple(
        (f"{c.rank:,}", c.scaling, words.number(c.lora_alpha), words.number(c.learning_rate), c.why)
        for c in record.sweep
    )
    return Table("Three runs that would decide", head, cells)


def probe_contents(record: ProbeRecord) -> dict[str, Any]:
    """Return what fills the page of a probe."""
    return {
        "verdict": probe_verdict(record),
        "caveats": record.caveats,
        "findings": record.findings,
        "counted": words.counted(record.findings),
        "facts": probe_facts(record),
        "why": record.recommendation.why,
        "source": record.capacity.source,
        "sweep": sweep_table(record),
        "rows": parts_table(record),
        "known": known_table(record),
        "gradient": gradient_table(record),
    }


def move_table(record: CounterTestRecord) -> Table:
    """Return what each move gained."""
    head = ("going on", "loss after", "gain over as it is", "95 % interval")
    cells = tuple(
        (
            m.text,
            words.number(m.loss, 4),
            words.number(m.gain),
            words.UNKNOWN
            if m.gain_interval is None
            else f"{words.number(m.gain_interval[0])} to {words.number(m.gain_interval[1])}",
        )
        for m in record.moves
    )
    return Table("Loss on rows that were trained on, nats a token", head, cells, named=True)


def counter_contents(record: CounterTestRecord) -> dict[str, Any]:
    """Return what fills the page of a counter-test."""
    return {
        "verdict": f"{record.verdict[0].upper()}{record.verdict[1:]}. {record.text}",
        "caveats": record.caveats,
        "findings": record.findings,
        "counted": words.counted(record.findings),
        "facts": [
            ("rank of the adapter", f"{record.rank:,}", f"mean effective rank {words.number(record.effective_rank)}"),
            ("scale on B A", words.number(record.scaling), "the largest"),
            ("learning rate", words.number(record.learning_rate), f"{record.optimizer}, as it is continued"),
            ("steps", f"{record.steps:,}", f"of {record.batch_size:,} rows, in each of {len(record.seeds)} orders"),
            (
                "loss before",
                words.number(record.start_loss, 4),
                f"{record.judged_examples:,} of {record.examples:,} rows",
            ),
            ("loss of the base", words.number(record.base_loss, 4), "without the adapter"),
        ],
        "moves": move_table(record),
    }
