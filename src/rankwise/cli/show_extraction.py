"""The table of an extraction for people."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.cli.show import MOST_ROWS, escape, plain_console, plain_table, print_findings
from rankwise.records import ExtractedModule, ExtractionRecord


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}" if value >= 1e-5 else f"{value:.1e}"


def _table(modules: Sequence[ExtractedModule]) -> object:
    calibrated = any(m.output_error is not None for m in modules)
    heads = ["shape", "r", "alpha", "rel. norm", "error", "before cast", "best possible"]
    heads += ["output error", "without calibration"] if calibrated else []
    table = plain_table(("module", "left"), *((h, "right") for h in heads))
    for m in modules:
        cells = [
            escape(m.module),
            f"{m.shape[0]} x {m.shape[1]}",
            str(m.r),
            f"{m.lora_alpha:g}",
            _error(m.relative_norm),
            _error(m.relative_error),
            _error(m.relative_error_uncast),
            _error(m.least_relative_error),
        ]
        table.add_row(*cells, *([_error(m.output_error), _error(m.output_error_plain)] if calibrated else []))
    return table


def show_extraction(record: ExtractionRecord, *, every: bool) -> None:
    """Print what was extracted: a row a module, what is not in the adapter, the findings.

    Args:
        record: what `extract` returned.
        every: print all modules, not the first `MOST_ROWS`.
    """
    console = plain_console()
    console.print(
        f"{escape(record.tuned)} - {escape(record.base)}: {len(record.modules)} modules, {record.params:,} parameters, "
        f"{record.dtype or 'dtypes of the weights'}, {record.rule}",
        soft_wrap=True,
    )
    shown = record.modules if every else record.modules[:MOST_ROWS]
    console.print(_table(shown))
    if len(shown) < len(record.modules):
        console.print(f"... and {len(record.modules) - len(shown)} more (--all prints them, --json has everything)")
    console.print("error: norm(dW - scaling B A) / norm(dW) of the weights; it is no error of outputs")
    if record.relative_error is not None:
        console.print(f"over these modules together: {_error(record.relative_error)}")
    if record.carried_energy_share is not None:
        unknown = sum(n.energy is None for n in record.left_out)
        console.print(
            f"of the squared norm of all that changed the adapter carries {record.carried_energy_share:.2%}"
            f"{f' ({unknown} tensors without a norm not counted)' if unknown else ''}; "
            f"{len(record.whole)} modules stored whole, {len(record.left_out)} tensors left out, "
            f"{record.unchanged} unchanged",
            soft_wrap=True,
        )
    c = record.calibration
    if c is not None:
        console.print(
            f"output error on {c.held_out} held-out texts of {escape(c.data)}: {_error(c.output_error)}, without "
            f"calibration {_error(c.output_error_plain)} (fitted to the inputs of the {c.inputs} model on "
            f"{c.samples} others)",
            soft_wrap=True,
        )
        losses = (("base", c.base_loss), ("tuned", c.tuned_loss), ("adapter", c.adapter_loss), ("plain", c.plain_loss))
        known = ", ".join(f"{name} {loss:.4f}" for name, loss in losses if loss is not None)
        if known:
            console.print(f"loss on {c.held_out} held-out texts, nats a token: {known}", soft_wrap=True)
        lowered = c.loss_difference_lowered
        if c.loss_difference is not None and c.loss_difference_plain is not None and lowered is not None:
            console.print(
                f"off the tuned model's loss by {c.loss_difference:.4f} a token, without calibration by "
                f"{c.loss_difference_plain:.4f} at the same ranks: {abs(lowered):.1%} "
                f"{'lower' if lowered >= 0 else 'higher'}",
                soft_wrap=True,
            )
    print_findings(console, record.findings)
    console.print(f"adapter: {escape(record.out)}")
