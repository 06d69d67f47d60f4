"""What stands in the page of a lint record: the verdict, the scales and the findings.

In: a lint record. Out: words and tables for the template.
"""

from __future__ import annotations

from typing import Any

from rankwise.records import LintRecord
from rankwise.report import words
from rankwise.report.drawing import Table


def lint_contents(record: LintRecord) -> dict[str, Any]:
    """Return the parts of the page."""
    return {"verdict": _verdict(record), "table": _scales(record), "findings": record.findings}


def _verdict(record: LintRecord) -> str:
    what = words.count(len(record.sources), "source")
    if not record.findings:
        return f"Nothing found in {what}."
    levels = ((record.errors, "error"), (record.warnings, "warning"), (record.infos, "note"))
    return f"{', '.join(words.count(n, word) for n, word in levels if n)} in {what}."


def _scales(record: LintRecord) -> Table:
    head = ("group", "source", "modules", "r", "alpha", "scale", "rule", *(f"{n} applies" for n in record.runtimes))
    rows = []
    for row in record.scales:
        cells = (
            row.group,
            words.short(row.source),
            "–" if row.modules is None else str(row.modules),
            str(row.r),
            words.number(row.lora_alpha),
            words.number(row.scaling, 4),
            row.rule or "–",
            *(words.number(row.applied[name], 4) for name in record.runtimes),
        )
        rows.append(cells)
    return Table("The factor on B A of every group of modules", head, tuple(rows), named=True)
