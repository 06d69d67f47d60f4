"""What `report` prints: the parts of the page, and what there is to say of its files."""

from __future__ import annotations

from rankwise.cli.show import escape, plain_console, plain_table, print_findings
from rankwise.records import ReportRecord


def show_report(record: ReportRecord) -> None:
    """Print the sentence at the head of the page, a row a part, and the findings."""
    console = plain_console()
    console.print(escape(record.verdict), soft_wrap=True)
    console.print()
    table = plain_table(("part", "right"), ("from", "left"), ("records", "right"), ("figures", "right"), ("", "left"))
    for place, part in enumerate(record.parts, start=1):
        table.add_row(str(place), escape(part.kind), str(len(part.files)), str(len(part.figures)), escape(part.title))
    console.print(table)
    print_findings(console, record.findings)
