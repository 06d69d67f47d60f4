"""Tables for plans: records in, text on the terminal out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from rankwise.cli.show import MOST_ROWS, escape, plain_console, plain_table, print_findings
from rankwise.planning.wording import left_out_words
from rankwise.records import LeftOut, PlannedModule, PlanRecord, UniformRank
from rankwise.tuning.groups import group_modules


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:.6g}-{high:.6g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _kept(modules: Sequence[PlannedModule], left_out: Sequence[LeftOut]) -> float | None:
    """Return the share of the energy that a group keeps, what was left out by choice counted as lost."""
    kept = total = 0.0
    for m in modules:
        if m.energy is None or m.kept_energy_share is None:
            return None
        kept += m.energy * m.kept_energy_share
        total += m.energy
    total += sum(item.energy or 0.0 for item in left_out)
    return kept / total if total > 0 else None


def _module_table(record: PlanRecord) -> Table:
    signal = any(m.signal_rank is not None for m in record.modules)
    heads = ("shape", "r", "alpha", "scale", "parameters", "energy kept", *(["signal rank"] * signal))
    table = plain_table(("module", "left"), *((h, "right") for h in heads))
    for m in record.modules:
        mark = " ~" if m.rounding_limited else ""
        cells = [
            escape(m.module),
            f"{m.shape[0]} x {m.shape[1]}",
            str(m.r),
            f"{m.lora_alpha:.6g}",
            f"{m.scaling:.4g}",
            f"{m.r * sum(m.shape):,}",
            _share(m.kept_energy_share) + mark,
        ]
        table.add_row(*cells, *(["-" if m.signal_rank is None else str(m.signal_rank)] * signal))
    return table


def _group_table(record: PlanRecord) -> Table:
    heads = ("modules", "left out", "r", "mean r", "alpha", "scale", "parameters", "of all", "energy kept")
    table = plain_table(("group", "left"), *((h, "right") for h in heads))
    planned = {m.module: m for m in record.modules}
    counted = {item.module: item for item in record.left_out if item.counted}
    for group, names in group_modules([*planned, *counted]).items():
        members = [planned[n] for n in names if n in planned]
        without = [counted[n] for n in names if n in counted]
        params = sum(m.r * sum(m.shape) for m in members)
        cells = ["-"] * 4
        if members:
            cells = [
                _span([m.r for m in members]),
                f"{sum(m.r for m in members) / len(members):.1f}",
                _span([m.lora_alpha for m in members]),
                _span([m.scaling for m in members]),
            ]
        share = _share(params / max(record.params, 1))
        kept = _share(_kept(members, without))
        table.add_row(escape(group), str(len(names)), str(len(without)), *cells, f"{params:,}", share, kept)
    return table


def _error(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g} ({1 - value * value:.2%} of the energy kept)"


def _uniform(row: UniformRank, params: int) -> list[str]:
    return [
        f"uniform rank {row.r}",
        f"{row.params:,}",
        f"{row.params / max(params, 1):.2f}",
        _error(row.relative_error),
    ]


def _comparison(record: PlanRecord) -> Table:
    table = plain_table(("", "left"), ("parameters", "right"), ("of the plan's", "right"), ("relative error", "left"))
    choice = record.choice
    if choice is not None and choice.kind == "rank":
        table.add_row(f"rank {choice.text} everywhere", f"{record.params:,}", "1.00", _error(record.relative_error))
        return table
    table.add_row("this plan", f"{record.params:,}", "1.00", _error(record.relative_error))
    if record.uniform is not None:
        table.add_row(*_uniform(record.uniform, record.params))
    if record.uniform_same_error is not None and record.uniform_same_error != record.uniform:
        table.add_row(*_uniform(record.uniform_same_error, record.params))
    return table


def show_plan(record: PlanRecord, *, every: bool) -> None:
    """Print a plan: ranks by module or by group, what a uniform rank would leave, and why.

    Args:
        record: what `plan` returned.
        every: print all modules, however many there are.
    """
    console = plain_console()
    source = escape(record.source or "no source")
    base = "" if record.base is None or record.kind != "delta" else f" - {escape(record.base)}"
    counted = sum(item.counted for item in record.left_out)
    console.print(
        f"plan for {source}{base}: {len(record.modules)} modules get a rank, {len(record.left_out)} do not"
        + (f" ({counted} by choice)" if counted else "")
        + f"; rule {record.rule}",
        soft_wrap=True,
    )
    grouped = not every and len(record.modules) > MOST_ROWS
    console.print(_group_table(record) if grouped else _module_table(record))
    if grouped:
        console.print("(--all prints every module, --json has everything)")
    elif any(m.rounding_limited for m in record.modules):
        console.print("~ counts rounding noise; read the signal rank beside it")
    console.print()
    console.print(_comparison(record))
    if record.max_lora_rank is not None:
        console.print(f"max_lora_rank to serve with: {record.max_lora_rank}")
    for line in left_out_words(record.left_out):
        console.print(escape(line), soft_wrap=True)
    console.print()
    console.print(escape(record.why), soft_wrap=True)
    print_findings(console, record.findings)
