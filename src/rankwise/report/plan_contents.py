"""What stands in the page of a plan beside the figures: the verdict, the comparison, key numbers, the table of modules.

In: a plan record. Out: words and tables for the template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from rankwise.records import PlannedModule, PlanRecord, UniformRank
from rankwise.report import words
from rankwise.report.drawing import Table, known
from rankwise.report.looks import rule_words
from rankwise.report.table import Cell
from rankwise.report.words import Fact

SHORT: Final = {"budget": "budget", "energy": "energy", "relative_error": "relative error", "signal": "noise edge"}


class Column(NamedTuple):
    """One column of the table: its head, what it means, whether it sorts as a number, its cell and its key."""

    head: str
    meaning: str
    numeric: bool
    text: Callable[[PlannedModule], str]
    key: Callable[[PlannedModule], float | str | None]


@dataclass(frozen=True, slots=True)
class PlanTable:
    """Columns and rows, and the heads of the columns left out because nothing is known there."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: tuple[str, ...]


def _number(head: str, meaning: str, value: Callable[[PlannedModule], float | None], digits: int = 3) -> Column:
    return Column(head, meaning, True, lambda m: words.number(value(m), digits), lambda m: known(value(m)))


def params_of(module: PlannedModule) -> int:
    """Return the parameters of A and B of one module."""
    return module.r * sum(module.shape)


COLUMNS: Final = (
    Column("module", "dotted path of the weight", False, lambda m: m.module, lambda m: m.module),
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
    _number("parameters", "of A and B: r × (out + in)", params_of),
    Column(
        "energy kept",
        "share of the squared Frobenius norm of ΔW in the first r directions",
        True,
        lambda m: words.share(m.kept_energy_share),
        lambda m: known(m.kept_energy_share),
    ),
    _number("energy", "squared Frobenius norm of ΔW", lambda m: m.energy),
    _number("signal rank", "number of singular values above the noise edge", lambda m: m.signal_rank),
    Column(
        "rounding",
        "whether energy past the signal rank is rounding noise",
        False,
        lambda m: "limited" if m.rounding_limited else words.UNKNOWN,
        lambda m: "limited" if m.rounding_limited else None,
    ),
    Column("shared rank", "group with one rank", False, lambda m: m.group or words.UNKNOWN, lambda m: m.group),
    _number(
        "weight", "factor on the squared error in what was minimised", lambda m: m.weight if m.weight != 1 else None
    ),
)
"""Every column of the table, in order."""


def _cell(column: Column, module: PlannedModule) -> Cell:
    key = column.key(module)
    return Cell(column.text(module), "" if key is None else str(key))


def plan_table(record: PlanRecord) -> PlanTable:
    """Return the table of all modules with a rank, without the columns in which nothing is known."""
    kept = tuple(c for c in COLUMNS if not record.modules or any(c.key(m) is not None for m in record.modules))
    rows = tuple(tuple(_cell(c, m) for c in kept) for m in record.modules)
    return PlanTable(kept, rows, ())


def error_words(value: float | None) -> str:
    """Write a relative error."""
    return words.number(value)


def plan_verdict(record: PlanRecord) -> str:
    """Return one line: what the plan costs and leaves, and what a uniform rank does."""
    n = words.count(len(record.modules), "module")
    error = known(record.relative_error)
    left = "" if error is None else f" leave a relative error of {words.number(error)}"
    if record.choice is not None and record.choice.kind == "rank":
        return f"Rank {record.choice.text} in {n}: {record.params:,} parameters{left}."
    said = f"{record.params:,} parameters in {n}{left}."
    flat, same = record.uniform, record.uniform_same_error
    if flat is not None and known(flat.relative_error) is not None:
        said += (
            f" One rank for all leaves {words.number(flat.relative_error)} (rank {flat.r}, {flat.params:,} parameters)"
        )
        said += (
            "." if same is None or same == flat else f", and needs rank {same.r}, {same.params:,}, to leave no more."
        )
    return said


def _row(name: str, params: int, error: float | None, record: PlanRecord) -> tuple[str, ...]:
    value = known(error)
    kept = None if value is None else 1 - value * value
    times = f"{params / record.params:.2f}" if record.params else words.UNKNOWN
    return (name, f"{params:,}", times, error_words(value), words.share(kept))


def comparison(record: PlanRecord) -> Table:
    """Return plan and uniform ranks side by side."""
    head = ("", "parameters", "of the plan's", "relative error", "energy kept")
    rows = [_row("this plan", record.params, record.relative_error, record)]
    flat: list[UniformRank] = []
    if record.choice is None or record.choice.kind != "rank":
        flat = [u for u in (record.uniform, record.uniform_same_error) if u is not None]
    rows += [_row(f"uniform rank {u.r}", u.params, u.relative_error, record) for u in dict.fromkeys(flat)]
    return Table("The plan, and one rank in all of its modules", head, tuple(rows), named=True)


COMPARISON_NOTE: Final = (
    "Uniform ranks are whole (and multiples, where the plan's are): the first is the largest within the same budget "
    "(or the plan's own cost, where no budget was set), the second the smallest that leaves no more. Relative error is "
    "‖ΔW − ΔW_r‖ / ‖ΔW‖ over all of these modules; those left out by choice count with all of their energy. It is the "
    "error of a best approximation of these updates, and not a prediction of what training at these ranks would reach."
)


def plan_facts(record: PlanRecord) -> list[Fact]:
    """Return the key numbers of a plan."""
    ranks = [m.r for m in record.modules]
    counted = sum(item.counted for item in record.left_out)
    rank = f"mean {words.number(sum(ranks) / len(ranks))}" if ranks else ""
    choice = record.choice
    facts: list[Fact] = [
        ("modules with a rank", f"{len(ranks):,}", f"{words.count(len(record.left_out), 'module')} left out"),
        ("rank", words.span(ranks), rank),
        ("parameters", f"{record.params:,}", "" if record.budget is None else f"of {record.budget:,} allowed"),
        ("rule", record.rule, rule_words(record.rule)),
        ("lora_alpha", words.span((m.lora_alpha for m in record.modules), 6), "follows the rank"),
        ("factor on B A", words.span((m.scaling for m in record.modules), 4), "of every module"),
        (
            "learning rate",
            words.number(record.learning_rate),
            "" if record.learning_rate is not None else "a spectrum does not say it",
        ),
    ]
    if choice is not None:
        value = choice.text or "all above it"
        facts.insert(0, ("chosen by", SHORT.get(choice.kind, choice.kind), f"{value}; {counted} left out by it"))
    best = record.optimality
    if best is not None:
        remark = (
            "no allowed ranks are better" if best.exact else f"none keep more than {words.share(best.share_bound, 6)}"
        )
        facts.append(("energy kept, as counted", words.share(best.kept_share), remark))
    if record.max_lora_rank is not None:
        facts.append(("max_lora_rank", str(record.max_lora_rank), "to serve with"))
    return facts


def plan_contents(record: PlanRecord) -> dict[str, Any]:
    """Return what the template of a plan asks for."""
    return {
        "verdict": plan_verdict(record),
        "comparison": comparison(record),
        "comparison_note": COMPARISON_NOTE,
        "findings": record.findings,
        "counted": words.counted(record.findings),
        "facts": plan_facts(record),
        "why": record.why,
        "table": plan_table(record),
        "left_out": record.left_out,
    }
