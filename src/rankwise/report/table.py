"""The table of modules: one row a module, every column with a number to sort by.

In: a spectra record. Out: columns and cells as words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from rankwise.records import ModuleSpectrum, SpectraRecord
from rankwise.report import words
from rankwise.report.drawing import known


class Column(NamedTuple):
    """One column: its head, what it means, whether it sorts as a number, its cell and what it sorts by."""

    head: str
    meaning: str
    numeric: bool
    text: Callable[[ModuleSpectrum], str]
    key: Callable[[ModuleSpectrum], float | str | None]


class Cell(NamedTuple):
    """Words to show, and what to sort by: an empty string where nothing is known."""

    text: str
    key: str


@dataclass(frozen=True, slots=True)
class ModuleTable:
    """Columns and rows of the table, and the heads of the columns left out because nothing is known there."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: tuple[str, ...]


def _number(head: str, meaning: str, value: Callable[[ModuleSpectrum], float | None]) -> Column:
    return Column(head, meaning, True, lambda m: words.number(value(m)), lambda m: known(value(m)))


COLUMNS: Final = (
    Column("module", "dotted path of the weight", False, lambda m: m.module, lambda m: m.module),
    Column(
        "shape",
        "out × in; sorts by their product",
        True,
        lambda m: f"{m.shape[0]} × {m.shape[1]}",
        lambda m: m.shape[0] * m.shape[1],
    ),
    Column("dtype", "storage dtype", False, lambda m: m.dtype, lambda m: m.dtype),
    _number("r", "rank of the factors", lambda m: m.r),
    _number("alpha", "lora_alpha", lambda m: m.lora_alpha),
    _number("scaling", "factor on B A", lambda m: m.scaling),
    Column("rule", "lora: alpha / r; rslora: alpha / √r", False, lambda m: m.rule or words.UNKNOWN, lambda m: m.rule),
    _number("energy", "squared Frobenius norm of ΔW", lambda m: m.energy),
    _number("stable rank", "energy / σ₁²", lambda m: m.stable_rank),
    _number("effective rank", "exp of the entropy of σ² / energy", lambda m: m.effective_rank),
    _number("rank 90\u00a0%", "smallest rank holding 90 % of the energy", lambda m: m.rank_90),
    _number("rank 99\u00a0%", "smallest rank holding 99 % of the energy", lambda m: m.rank_99),
    _number("relative norm", "‖ΔW‖ / ‖W‖", lambda m: m.relative_norm),
    Column(
        "unchanged",
        "share of the entries that are equal bit by bit in base and tuned",
        True,
        lambda m: words.share(m.unchanged_share),
        lambda m: known(m.unchanged_share),
    ),
    _number("noise edge", "largest singular value that rounding alone would produce", lambda m: m.noise_edge),
    _number("signal rank", "number of singular values above the noise edge", lambda m: m.signal_rank),
    Column(
        "warnings",
        "codes of the findings that concern the module",
        False,
        lambda m: ", ".join(m.warnings) or words.UNKNOWN,
        lambda m: ", ".join(m.warnings) or None,
    ),
)
"""Every column of the table, in order."""


def _cell(column: Column, module: ModuleSpectrum) -> Cell:
    key = column.key(module)
    return Cell(column.text(module), "" if key is None else str(key))


def module_table(record: SpectraRecord) -> ModuleTable:
    """Return the table of a record, without the columns in which no module has a value."""
    kept = [c for c in COLUMNS if not record.modules or any(c.key(m) is not None for m in record.modules)]
    rows = tuple(tuple(_cell(c, m) for c in kept) for m in record.modules)
    return ModuleTable(tuple(kept), rows, tuple(c.head for c in COLUMNS if c not in kept))
