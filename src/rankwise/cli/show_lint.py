"""What `rankwise lint` prints: the scales, then the findings, source by source."""

from __future__ import annotations

from typing import Final

from rankwise.cli.show import escape, plain_console, plain_table
from rankwise.records import LintRecord, LintSource

MOST_ROWS: Final = 20
"""Rows of scales printed for one source."""

_STYLES: Final = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def show_lint(record: LintRecord) -> None:
    """Print a lint record."""
    console = plain_console()
    for index, source in enumerate(record.sources):
        if index:
            console.print()
        _show_source(record, source)
    console.print()
    found = ((record.errors, "error"), (record.warnings, "warning"), (record.infos, "note"))
    words = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in found if n)
    console.print(words or "nothing found")


def _show_source(record: LintRecord, source: LintSource) -> None:
    console = plain_console()
    modules = "" if source.modules is None else f", {source.modules} modules"
    console.print(f"[bold]{escape(source.path)}[/]: {source.kind}{modules}", soft_wrap=True)
    scales = [row for row in record.scales if row.source == source.path]
    if scales:
        heads = ("modules", "r", "alpha", "scale", "rule", *record.runtimes)
        table = plain_table(("group", "left"), *((head, "right") for head in heads))
        for row in scales[:MOST_ROWS]:
            table.add_row(
                escape(row.group),
                "-" if row.modules is None else str(row.modules),
                str(row.r),
                _figure(row.lora_alpha, 6),
                _figure(row.scaling, 4),
                row.rule or "-",
                *(_figure(row.applied[name], 4) for name in record.runtimes),
            )
        console.print(table)
        if len(scales) > MOST_ROWS:
            console.print(f"... and {len(scales) - MOST_ROWS} more (--json has everything)")
    for finding in (f for f in record.findings if f.source == source.path):
        style = _STYLES[finding.level]
        where = "" if finding.line is None or source.kind == "trl" else f"line {finding.line}: "
        text = f"[{style}]{finding.level}[/] \\[{finding.code}] {where}{escape(finding.text)}"
        console.print(text, soft_wrap=True)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
