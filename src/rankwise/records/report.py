"""report/1: which records a page was made from, and what stands in it.

In: names and words. Out: the record.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from rankwise.records.base import Finding, Part, Record, data_frame


class ReportFile(Part, frozen=True, kw_only=True):
    """One record that went into the page.

    Attributes:
        path: as given, or below a folder that was given.
        format: "rankwise/KIND/1"; the folder of a sweep is one sweep/1.
        created: when the record was made.
    """

    path: str
    format: str
    created: str


class ReportPart(Part, frozen=True, kw_only=True):
    """One part of the page.

    Attributes:
        kind: the command that made it, or "comparison".
        title: its heading.
        verdict: what it says in a sentence, or "".
        files: paths of the records it shows.
        figures: names of its figures, in reading order.
    """

    kind: str
    title: str
    verdict: str
    files: tuple[str, ...]
    figures: tuple[str, ...]


class ReportRecord(Record, frozen=True, kw_only=True):
    """report/1: one page out of any records.

    Attributes:
        title: of the page.
        verdict: the sentence under it: the answer of a sweep, where there is one.
        files: what it was made from.
        parts: what stands in it, in reading order.
        findings: what there is to say of the files: repeated runs, files left out.
        out: path of the page, or None where none was written.
    """

    FORMAT: ClassVar[str] = "rankwise/report/1"

    title: str
    verdict: str
    files: tuple[ReportFile, ...]
    parts: tuple[ReportPart, ...]
    findings: tuple[Finding, ...]
    out: str | None

    def to_dataframe(self) -> Any:
        """Return one row a part as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(part) for part in self.parts])

    def __repr__(self) -> str:
        return f"ReportRecord({self.out!r}: {len(self.parts)} parts out of {len(self.files)} records; {self.verdict})"
