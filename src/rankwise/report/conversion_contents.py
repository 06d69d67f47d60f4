"""What stands in the page of a conversion beside the figure: the verdict, key numbers, runtimes, the table of modules.

In: a conversion record. Out: words and tables for the template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from rankwise.records import ConversionRecord, ConvertedModule, ServedScale
from rankwise.report import words
from rankwise.report.drawing import Table, known
from rankwise.report.looks import rule_words
from rankwise.report.table import Cell
from rankwise.report.words import Fact


class Column(NamedTuple):
    """One column of the table: its head, what it means, whether it sorts as a number, its cell and its key."""

    head: str
    meaning: str
    numeric: bool
    text: Callable[[ConvertedModule], str]
    key: Callable[[ConvertedModule], float | str | None]


@dataclass(frozen=True, slots=True)
class ConversionTable:
    """Columns and rows; no column is left out."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: tuple[str, ...] = ()


def _number(head: str, meaning: str, value: Callable[[ConvertedModule], float | None], digits: int = 3) -> Column:
    return Column(head, meaning, True, lambda m: words.number(value(m), digits), lambda m: known(value(m)))


COLUMNS: Final = (
    Column("module", "dotted path of the weight, or the name that the source gives", False, *(lambda m: m.module,) * 2),
    Column(
        "shape",
        "out × in; sorts by their product",
        True,
        lambda m: f"{m.shape[0]} × {m.shape[1]}",
        lambda m: m.shape[0] * m.shape[1],
    ),
    _number("r before", "rank of the factors before", lambda m: m.before.r),
    _number("kept", "directions kept of it", lambda m: m.rank),
    _number("r", "rank as written; past the directions kept it is zeros", lambda m: m.after.r),
    _number("alpha before", "lora_alpha before", lambda m: m.before.lora_alpha, 6),
    _number("alpha", "lora_alpha as written", lambda m: m.after.lora_alpha, 6),
    _number("factor before", "factor on B A before", lambda m: m.before.scaling, 4),
    _number("factor", "factor on B A as written", lambda m: m.after.scaling, 4),
    Column(
        "energy kept",
        "share of the squared Frobenius norm of the update in the directions kept",
        True,
        lambda m: words.share(m.kept_energy_share),
        lambda m: known(m.kept_energy_share),
    ),
    _number("error before cast", "norm(new − old) / norm(old) before rounding", lambda m: m.error_before_cast),
    Column(
        "error as written",
        "the same of the file: after rounding to its dtype, with the scale as written",
        True,
        lambda m: "exact" if m.exact else words.number(m.relative_error),
        lambda m: known(m.relative_error),
    ),
    _number("norm", "Frobenius norm of the update before", lambda m: m.norm),
    Column("dtype", "storage dtype of the factors as written", False, lambda m: m.dtype, lambda m: m.dtype),
)
"""Every column of the table, in order."""


def _cell(column: Column, module: ConvertedModule) -> Cell:
    key = column.key(module)
    return Cell(column.text(module), "" if key is None else str(key))


def conversion_verdict(record: ConversionRecord) -> str:
    """Return one line: whether the function is the same, or what was lost."""
    n = words.count(len(record.modules), "module")
    if record.exact:
        return f"The same update in all of {n}, bit for bit in float32."
    if not record.relative_error:
        return f"The same update in all of {n}; float32 may round products with it in another way."
    exact = sum(m.exact for m in record.modules)
    return (
        f"A relative error of {words.number(record.relative_error)} over {n} together; {exact} of them "
        f"{'is' if exact == 1 else 'are'} the same bit for bit."
    )


def conversion_facts(record: ConversionRecord) -> list[Fact]:
    """Return the key numbers."""
    ranks = sorted({m.after.r for m in record.modules})
    before = sorted({m.before.r for m in record.modules})
    worst = max(record.modules, key=lambda m: m.relative_error, default=None)
    facts: list[Fact] = [
        ("relative error", words.number(record.relative_error), "over all modules, as written"),
        ("rank", _span(ranks), f"before: {_span(before)}"),
        ("parameters", f"{record.params:,}", "entries of the factors, zeros counted"),
        ("rule", "differs" if record.rule is None else rule_words(record.rule), f"{record.out_format} format"),
    ]
    if worst is not None and not worst.exact:
        facts.insert(1, ("worst module", words.number(worst.relative_error), worst.module))
    return facts


def _span(ranks: list[int]) -> str:
    if not ranks:
        return words.UNKNOWN
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _factor(served: ServedScale) -> str:
    if not served.wrong:
        return "refuses the file"
    low, high = words.number(served.lowest), words.number(served.highest)
    return f"{low} × what is meant" if low == high else f"{low} to {high} ×"


def runtime_table(record: ConversionRecord) -> Table | None:
    """Return what runtimes would do with the files, or None where none was judged."""
    if not record.runtimes:
        return None
    rows = []
    for served in record.runtimes:
        rows.append(
            (
                served.runtime,
                _factor(served) if not served.right else "as meant",
                f"{served.wrong:,} of {len(record.modules):,}" if served.wrong else "none",
            )
        )
    return Table(
        "The factor that runtimes would apply", ("runtime", "factor", "modules wrong"), tuple(rows), named=True
    )


def conversion_contents(record: ConversionRecord) -> dict[str, Any]:
    """Return what the template of a conversion needs."""
    return {
        "verdict": conversion_verdict(record),
        "facts": conversion_facts(record),
        "notes": record.notes,
        "runtimes": runtime_table(record),
        "table": ConversionTable(COLUMNS, tuple(tuple(_cell(c, m) for c in COLUMNS) for m in record.modules)),
        "left_out": record.left_out,
        "carried": record.carried,
    }
