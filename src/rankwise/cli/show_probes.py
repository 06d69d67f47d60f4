"""Tables for probes and counter-tests: records in, text on the terminal out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rankwise.cli.common import PlainConsole
from rankwise.cli.show import escape, plain_console, plain_table, print_findings
from rankwise.records import CounterTestRecord, ProbeGradient, ProbeRecord, ProbeRow

MOST_ROWS: Final = 8
"""Rows and modules printed before the rest is counted only."""


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _parts(console: PlainConsole, record: ProbeRecord) -> None:
    table = plain_table(("bits", "left"), ("all rows", "right"), ("a row", "right"), ("", "left"))
    lines = (
        ("loss of the base", record.base_bits, "on the tokens that are trained on"),
        ("- form and style", record.form_bits, f"held-out rows, rank {record.adaptation_rank} adapter"),
        ("- said by other rows", record.repeated_bits, "the same thing in other words"),
        ("= to learn", record.bits_to_learn, "to know these rows by heart"),
    )
    for name, bits, note in lines:
        table.add_row(name, f"{bits:,.0f}", _number(bits / record.examples), note)
    console.print(table)
    quantiles = ", ".join(f"{float(q):.0%}: {_number(bits)}" for q, bits in record.bits_by_example.items())
    console.print(f"to learn, by row  {quantiles}", soft_wrap=True)
    measured = record.measured_examples
    console.print(
        f"{record.known_rows:,} of {measured:,} rows the base knows once their form is known (1 bit at most), "
        f"{record.repeated_rows:,} only say again what rows before them said",
        soft_wrap=True,
    )


def _rows(console: PlainConsole, title: str, rows: Sequence[ProbeRow]) -> None:
    if not rows:
        return
    heads = ("row", "tokens", "base", "form known", "to learn")
    table = plain_table(*((h, "right") for h in heads), title=title)
    for row in rows:
        table.add_row(
            f"{row.row:,}",
            str(row.tokens),
            _number(row.base_bits),
            _number(row.formed_bits),
            _number(row.news_bits),
        )
    console.print(table)


def _gradient(console: PlainConsole, modules: Sequence[ProbeGradient], *, every: bool) -> None:
    known = [m for m in modules if m.effective_rank is not None]
    if not known:
        return
    heads = ("shape", "norm", "effective", "rank 90 %", "rank 99 %", "coherence")
    table = plain_table(("gradient at the base", "left"), *((h, "right") for h in heads))
    shown = known if every else sorted(known, key=lambda m: -(m.energy or 0.0))[:MOST_ROWS]
    for m in shown:
        mark = " ~" if m.sketched else ""
        table.add_row(
            escape(m.module),
            f"{m.shape[0]} x {m.shape[1]}",
            _number(None if m.energy is None else m.energy**0.5),
            _number(m.effective_rank) + mark,
            f"{m.rank_90}{mark}",
            f"{m.rank_99}{mark}",
            _number(m.coherence),
        )
    console.print(table)
    if len(shown) < len(known):
        console.print(f"the {len(shown)} largest of {len(known)} modules (--all prints them, --json has everything)")
    if any(m.sketched for m in shown):
        console.print("~ of a random sketch: high ranks are too low")


def show_probe(record: ProbeRecord, *, every: bool) -> None:
    """Print a probe: the bits, what holds them, the gradient, the recommendation with its reasons.

    Args:
        record: what `probe` returned.
        every: print all modules and rows.
    """
    console = plain_console()
    rows = "row" if record.examples == 1 else "rows"
    console.print(
        f"{escape(record.data)} on {escape(record.model)}: {record.examples:,} {rows}, {record.target_tokens:,} target "
        f"tokens in the {record.measured_examples:,} looked at",
        soft_wrap=True,
    )
    _parts(console, record)
    ordered = sorted(record.rows, key=lambda row: row.formed_bits)
    few = len(ordered) if every else 3
    if len(ordered) > 2 * few or every:
        _rows(console, "rows that the base knows best", ordered[:few])
        _rows(console, "rows with most to learn", sorted(record.rows, key=lambda row: -row.news_bits)[:few])
    capacity = record.capacity
    low, high = capacity.rank_interval
    console.print(
        f"room: rank {capacity.min_rank} holds {max(0.0, record.bits_to_learn):,.0f} bits at "
        f"{capacity.bits_per_param:.2g} bits a parameter and {capacity.exposures:.3g} exposures ({low} to {high}; "
        f"{escape(capacity.source)})",
        soft_wrap=True,
    )
    _gradient(console, record.gradient, every=every)
    plan = record.recommendation
    first = max(plan.modules, key=lambda module: module.r)
    rate = "-" if plan.learning_rate is None else f"{plan.learning_rate:g}"
    console.print(
        f"\nto start with ({record.job}{', as you said' if record.job_given else ''}): rank {first.r}, {plan.rule}, "
        f"alpha {first.lora_alpha:g} (scale {first.scaling:.3g}), learning rate {rate}; {plan.params:,} parameters",
        soft_wrap=True,
    )
    console.print(escape(plan.why), soft_wrap=True)
    if record.sweep:
        heads = ("rank", "rule", "alpha", "learning rate")
        table = plain_table(*((h, "right") for h in heads), ("what it would tell", "left"))
        for cell in record.sweep:
            table.add_row(
                str(cell.rank), cell.scaling, f"{cell.lora_alpha:g}", f"{cell.learning_rate:g}", escape(cell.why)
            )
        console.print(table)
    console.print()
    for text in record.caveats:
        console.print(f"- {escape(text)}", soft_wrap=True)
    print_findings(console, record.findings)
    console.print(f"{record.seconds:.0f} s")


def show_counter_test(record: CounterTestRecord) -> None:
    """Print a counter-test: what each move gained, and the verdict."""
    console = plain_console()
    console.print(
        f"{escape(record.adapter)} on {escape(record.model)} and {escape(record.data)}: rank {record.rank}, scale "
        f"{record.scaling:.3g}, mean effective rank {_number(record.effective_rank)}",
        soft_wrap=True,
    )
    console.print(
        f"{record.steps} steps of {record.batch_size} rows at {record.learning_rate:g}, {len(record.seeds)} orders "
        f"of the batches; loss {record.start_loss:.4g} before, {record.base_loss:.4g} without the adapter",
        soft_wrap=True,
    )
    heads = ("loss after", "gain over as it is", "95 % interval")
    table = plain_table(("going on", "left"), *((h, "right") for h in heads))
    for move in record.moves:
        interval = (
            "-" if move.gain_interval is None else f"{move.gain_interval[0]:+.4f} to {move.gain_interval[1]:+.4f}"
        )
        gain = "-" if move.gain is None else f"{move.gain:+.4f}"
        table.add_row(escape(move.text), "-" if move.loss is None else f"{move.loss:.4f}", gain, interval)
    console.print(table)
    console.print(f"{record.verdict}: {escape(record.text)}", soft_wrap=True)
    for text in record.caveats:
        console.print(f"- {escape(text)}", soft_wrap=True)
    print_findings(console, record.findings)
