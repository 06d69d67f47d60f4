"""What stands in the page of an extraction beside the figures: caveat, verdict, key numbers, what is left out, modules.

In: an extraction record. Out: words and tables for the template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from rankwise.records import Calibration, ExtractedModule, ExtractionRecord
from rankwise.report import words
from rankwise.report.drawing import Table, known
from rankwise.report.looks import rule_words
from rankwise.report.table import Cell
from rankwise.report.words import Fact

CAVEAT: Final = (
    "The error of a weight is not the error of its outputs, nor of what the model can do. Inputs are far from spread "
    "evenly over all directions, errors of many layers add up or cancel, and skills such as arithmetic may hang on "
    "directions that hold little energy. Evaluate the base with this adapter beside the tuned model before it takes "
    "its place; `--calibration` measures outputs and losses on texts."
)

CHOICES: Final = {
    "rank": "one rank for all modules: {}",
    "energy": "the smallest rank that keeps {} of each module's energy",
    "relative-error": "the smallest rank whose relative error is at most {} in each module",
    "signal": "the directions above the noise edge of each module",
    "plan": "the plan {}",
}


class Column(NamedTuple):
    """One column of the table: its head, what it means, whether it sorts as a number, its cell and its key."""

    head: str
    meaning: str
    numeric: bool
    text: Callable[[ExtractedModule], str]
    key: Callable[[ExtractedModule], float | str | None]


@dataclass(frozen=True, slots=True)
class ExtractionTable:
    """Columns and rows, and the heads of the columns left out because nothing is known there."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: tuple[str, ...]


def _number(head: str, meaning: str, value: Callable[[ExtractedModule], float | None], digits: int = 3) -> Column:
    return Column(head, meaning, True, lambda m: words.number(value(m), digits), lambda m: known(value(m)))


COLUMNS: Final = (
    Column("module", "dotted path of the weight on the base", False, *(lambda m: m.module,) * 2),
    Column("kind", "of layer", False, lambda m: m.kind, lambda m: m.kind),
    Column(
        "shape",
        "out × in; sorts by their product",
        True,
        lambda m: f"{m.shape[0]} × {m.shape[1]}",
        lambda m: m.shape[0] * m.shape[1],
    ),
    _number("r", "rank", lambda m: m.r),
    _number("alpha", "lora_alpha", lambda m: m.lora_alpha, 6),
    _number("factor", "factor on B A that follows from rank, alpha and rule", lambda m: m.scaling, 4),
    _number("relative norm", "‖ΔW‖ / ‖W‖", lambda m: m.relative_norm),
    _number("error", "‖ΔW − s B A‖ / ‖ΔW‖ of the factors on file", lambda m: m.relative_error),
    _number(
        "before cast", "the same before the factors were rounded to their dtype", lambda m: m.relative_error_uncast
    ),
    _number("best possible", "no factors of this rank leave less; certified", lambda m: m.least_relative_error),
    Column(
        "energy kept",
        "1 − error²",
        True,
        lambda m: words.share(m.kept_energy_share),
        lambda m: known(m.kept_energy_share),
    ),
    _number("output error", "the error on the inputs that held-out texts give", lambda m: m.output_error),
    _number(
        "output error, plain", "the same of the factors with the least weight error", lambda m: m.output_error_plain
    ),
    Column("route", "how the factors were found", False, lambda m: m.route, lambda m: m.route),
    Column("notes", "", False, lambda m: "; ".join(m.notes) or words.UNKNOWN, lambda m: "; ".join(m.notes) or None),
)
"""Every column of the table, in order."""


def _cell(column: Column, module: ExtractedModule) -> Cell:
    key = column.key(module)
    return Cell(column.text(module), "" if key is None else str(key))


def extraction_table(record: ExtractionRecord) -> ExtractionTable:
    """Return the table of all modules, without the columns in which nothing is known."""
    kept = tuple(c for c in COLUMNS if any(c.key(m) is not None for m in record.modules))
    rows = tuple(tuple(_cell(c, m) for c in kept) for m in record.modules)
    lost = tuple(c.head for c in COLUMNS if c not in kept and c.head != "notes")
    return ExtractionTable(kept, rows, lost)


def extraction_verdict(record: ExtractionRecord) -> str:
    """Return in two sentences what the adapter carries, and what is missing."""
    carried = known(record.carried_energy_share)
    share = "" if carried is None else f", {words.share(carried)} of the squared norm of all that changed"
    error = words.number(record.relative_error)
    first = f"{words.count(len(record.modules), 'module')} with a relative weight error of {error} together{share}."
    left = len(record.left_out)
    second = (
        f" {words.count(left, 'tensor')} that changed {'is' if left == 1 else 'are'} not in the adapter."
        if left
        else " Nothing that changed is missing."
    )
    return first + second


def extraction_facts(record: ExtractionRecord) -> list[Fact]:
    """Return the key numbers."""
    worst = max(record.modules, key=lambda m: m.relative_error)
    unknown = sum(n.energy is None for n in record.left_out)
    wanted = words.share(record.wanted) if isinstance(record.wanted, float) else str(record.wanted)
    facts: list[Fact] = [
        ("relative error", words.number(record.relative_error), "of the weights, all modules together, after the cast"),
        ("worst module", words.number(worst.relative_error), worst.module),
        ("rank", words.span(m.r for m in record.modules), CHOICES[record.choice].format(wanted)),
        (
            "parameters",
            f"{record.params:,}",
            f"{record.dtype or 'dtypes of the weights'}; what is stored whole counted",
        ),
        ("rule", rule_words(record.rule), f"factor on B A: {words.span(m.scaling for m in record.modules)}"),
        (
            "carried",
            words.share(record.carried_energy_share),
            "of the squared norm of all that changed"
            + (f"; {words.count(unknown, 'tensor')} without a norm not counted" if unknown else ""),
        ),
        ("unchanged tensors", f"{record.unchanged:,}", "equal bit by bit; not in the adapter"),
    ]
    return facts


def calibration_facts(c: Calibration) -> list[Fact]:
    """Return what calibration brought."""
    facts: list[Fact] = [
        ("output error", words.number(c.output_error), f"root mean square of {words.count(c.modules, 'module')}"),
        ("without calibration", words.number(c.output_error_plain), "at the same ranks"),
        ("texts", f"{c.samples:,}", f"{c.tokens:,} tokens of {c.data}; errors and losses are of {c.held_out} others"),
        ("inputs", f"of the {c.inputs} model", "what the factors are fitted to"),
    ]
    losses = (("base", c.base_loss), ("tuned", c.tuned_loss), ("adapter", c.adapter_loss), ("plain", c.plain_loss))
    names = {"plain": "adapter without calibration"}
    facts += [
        (f"loss, {names.get(name, name)}", words.number(loss, 4), f"nats a token, {c.held_out} held-out texts")
        for name, loss in losses
        if known(loss) is not None
    ]
    lowered = c.loss_difference_lowered
    if lowered is not None:
        facts.append(
            (
                "off the tuned loss",
                words.number(c.loss_difference),
                f"nats, mean over tokens whatever the sign; without calibration "
                f"{words.number(c.loss_difference_plain)} at the same ranks: {words.share(abs(lowered))} "
                + ("lower" if lowered >= 0 else "higher"),
            )
        )
    return facts


def left_table(record: ExtractionRecord) -> Table | None:
    """Return what changed and is not in the adapter, the largest first."""
    rows = tuple(
        (n.module, n.reason, words.number(n.relative_norm))
        for n in sorted(record.left_out, key=lambda n: -(n.relative_norm or 0.0))
    )
    return (
        Table("Changed, and not in the adapter", ("tensor", "why", "‖Δ‖ / ‖base‖"), rows, named=True) if rows else None
    )


def whole_table(record: ExtractionRecord) -> Table | None:
    """Return what is stored whole."""
    rows = tuple((w.module, ", ".join(w.tensors), f"{w.params:,}", words.number(w.relative_norm)) for w in record.whole)
    head = ("module", "tensors", "parameters", "‖Δ‖ / ‖base‖")
    return Table("Stored whole (modules_to_save)", head, rows, named=True) if rows else None


def extraction_contents(record: ExtractionRecord) -> dict[str, Any]:
    """Return what the template of an extraction needs."""
    return {
        "caveat": CAVEAT,
        "verdict": extraction_verdict(record),
        "findings": record.findings,
        "counted": words.counted(record.findings),
        "facts": extraction_facts(record),
        "calibration": [] if record.calibration is None else calibration_facts(record.calibration),
        "left": left_table(record),
        "whole": whole_table(record),
        "table": extraction_table(record),
    }
