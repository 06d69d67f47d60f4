"""The table of a conversion on the terminal.

In: a record. Out: text.
"""

from __future__ import annotations

from rankwise.cli.show import MOST_ROWS, escape, plain_console, plain_table
from rankwise.records import ConversionRecord, ConvertedModule
from rankwise.records.conversion import Setting


def show_conversion(record: ConversionRecord, *, every: bool) -> None:
    """Print what became of an adapter: a row a module, what was left out, and the notes.

    Args:
        record: what `convert` returned.
        every: print all modules, not the first `MOST_ROWS`.
    """
    console = plain_console()
    what = " + ".join(
        f"{escape(a.source)}" + ("" if a.weight == 1 and len(record.adapters) == 1 else f" x {a.weight:g}")
        for a in record.adapters
    )
    console.print(f"{what} ({record.source_format}) -> {escape(record.out)} ({record.out_format})", soft_wrap=True)
    heads = ("shape", "r", "alpha", "scaling", "kept energy", "error before cast", "error as written")
    table = plain_table(("module", "left"), *((h, "right") for h in heads))
    shown = record.modules if every else record.modules[:MOST_ROWS]
    for m in shown:
        table.add_row(
            escape(m.module),
            f"{m.shape[0]} x {m.shape[1]}",
            rank_words(m),
            _change(_alpha(m.before), _alpha(m.after)),
            _change(f"{m.before.scaling:.4g}", f"{m.after.scaling:.4g}"),
            f"{m.kept_energy_share:.4%}" if m.rank < m.before.r else "all",
            "0" if m.error_before_cast == 0 else f"{m.error_before_cast:.3g}",
            error_words(m),
        )
    console.print(table)
    if len(shown) < len(record.modules):
        console.print(f"... and {len(record.modules) - len(shown)} more (--all prints them, --json has everything)")
    console.print(verdict(record))
    for left in record.left_out:
        console.print(f"left out: {escape(left.module)}: {escape(left.reason)}", soft_wrap=True)
    for note in record.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def rank_words(module: ConvertedModule) -> str:
    """Return what became of a rank: `16 > 8`, or `16 > 4 + 4 zeros` where it was filled."""
    zeros = module.after.r - module.rank
    kept = _change(str(module.before.r), str(module.rank))
    return f"{kept} + {zeros} zeros" if zeros else kept


def error_words(module: ConvertedModule) -> str:
    """Return the error of a module as written."""
    return "exact" if module.exact else f"{module.relative_error:.3g}"


def verdict(record: ConversionRecord) -> str:
    """Return in one line what the whole costs."""
    count = f"{len(record.modules)} modules, {record.params:,} parameters"
    if record.exact:
        return f"{count}: the same update, bit for bit in float32"
    if not record.relative_error:
        return f"{count}: the same update; float32 may round products with it in another way"
    exact = sum(m.exact for m in record.modules)
    return f"{count}: relative error {record.relative_error:.3g} over all ({exact} modules exact)"


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} > {after}"


def _alpha(setting: Setting) -> str:
    return "-" if setting.lora_alpha is None else f"{setting.lora_alpha:.6g}"
