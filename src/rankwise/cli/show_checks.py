"""Tables for checks: a stability record in, text on the terminal out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rankwise.cli.common import PlainConsole
from rankwise.cli.show import escape, plain_console, plain_table, print_findings
from rankwise.records import StabilityCell, StabilityRecord, TransferProof


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _exponent(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.2f}" + ("" if interval is None else f" ({interval[0]:+.2f} to {interval[1]:+.2f})")


def _groups(console: PlainConsole, record: StabilityRecord, cells: Sequence[StabilityCell]) -> None:
    ranks = [str(rank) for rank in record.config.ranks]
    heads = (*(f"r = {rank}" for rank in ranks), "spread", "exponent", "verdict")
    table = plain_table(("rule", "left"), ("group", "left"), *((h, "right") for h in heads))
    for c in cells:
        table.add_row(
            c.rule,
            escape(c.group),
            *(_number(c.relative_rms_by_rank[rank]) for rank in ranks),
            "-" if c.spread is None else f"{c.spread:.2f}x",
            _exponent(c.rms_exponent, c.rms_exponent_ci),
            c.verdict,
        )
    console.print(table)


def _steps(console: PlainConsole, cells: Sequence[StabilityCell]) -> None:
    heads = ("step", "exponent", "of the last change", "of B's gradient", "diverged", "verdict")
    table = plain_table(("rule", "left"), *((h, "right") for h in heads))
    for c in cells:
        table.add_row(
            c.rule,
            str(c.step),
            _exponent(c.rms_exponent, c.rms_exponent_ci),
            _exponent(c.update_exponent, c.update_exponent_ci),
            _exponent(c.grad_B_exponent, c.grad_B_exponent_ci),
            str(c.runs_diverged or "-"),
            c.verdict,
        )
    console.print(table)


def _proof(proof: TransferProof | None) -> str:
    if proof is None:
        return "-"
    how = "tried" if proof.how == "steps" else "worked out"
    return f"rank {proof.rank}: {proof.ratio_before:.2f} -> {_number(proof.ratio_after)}, {how}"


def _rates(console: PlainConsole, record: StabilityRecord, optimizer: str, init: str) -> None:
    found = [t for t in record.transfers if (t.optimizer, t.init) == (optimizer, init)]
    if not found:
        return
    ranks = [str(rank) for rank in record.config.ranks]
    heads = (*(f"r = {rank}" for rank in ranks), f"branch over that of rank {record.config.reference_rank}")
    table = plain_table(("learning rate", "left"), ("step", "right"), *((h, "right") for h in heads))
    for t in found:
        rates = (_number(t.learning_rate_by_rank[rank]) for rank in ranks)
        table.add_row(t.rule, str(t.step), *rates, _proof(t.proof))
    console.print("Learning rates that would make the branch as large at every rank:")
    console.print(table)


def show_check(record: StabilityRecord) -> None:
    """Print the tables of a check, one set an optimizer and init."""
    console = plain_console()
    c = record.config
    console.print(
        f"{escape(c.data)} on {escape(c.model)}: {len(c.target_modules) - len(record.skipped)} modules, alpha "
        f"{c.lora_alpha:g}, {len(c.seeds)} seed{'s' if len(c.seeds) > 1 else ''}, batches of {c.batch_size}",
        soft_wrap=True,
    )
    advice = (record.advice, *record.more_advice)
    for a in advice:
        mine = [cell for cell in record.cells if (cell.optimizer, cell.init) == (a.optimizer, a.init)]
        last = c.steps[-1]
        console.print()
        console.print(
            f"{a.optimizer}, {a.init} init, learning rate {c.learning_rates[a.optimizer]:g}: RMS of the branch over "
            f"that of the frozen output after step {last}, geometric means",
            soft_wrap=True,
        )
        _groups(console, record, [cell for cell in mine if cell.step == last])
        if len(c.steps) > 1:
            console.print("All modules, step by step:")
            _steps(console, [cell for cell in mine if cell.group == "all"])
        _rates(console, record, a.optimizer, a.init)
        console.print(escape(a.text), soft_wrap=True)
    console.print()
    console.print(
        "An exponent e says that a figure goes like r^e, with a 95 % interval over the seeds. Stable: the interval "
        f"lies within {c.band:g} of 0. Collapsing, growing: all of it lies below, above. Undecided: neither. The seeds "
        "are draws of A on the same batches: other data may have another exponent.",
        soft_wrap=True,
    )
    print_findings(console, record.findings)


def show_failing(cells: Sequence[StabilityCell], what: str) -> None:
    """Say on stderr why the command exits with 3."""
    for cell in cells:
        many = f"{cell.runs_diverged} run{'s' if cell.runs_diverged > 1 else ''} had diverged, "
        print(
            f"rankwise: --fail-on {what}: {cell.rule} is {cell.verdict} under {cell.optimizer}, {cell.init} init, "
            f"after step {cell.step}: {many if cell.runs_diverged else ''}"
            f"exponent {_exponent(cell.rms_exponent, cell.rms_exponent_ci)}",
            file=sys.stderr,
        )
