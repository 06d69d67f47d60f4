"""One page out of several parts: what a record's own page shows, in a part of a larger one.

In: parts, each a template with what fills it. Out: one HTML document in which no two ids are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup

from rankwise.records import Finding, Record
from rankwise.report import page, words
from rankwise.report.drawing import Figure, Table

IDS: Final = re.compile(r'( (?:id|for|aria-labelledby|data-(?:figure|plot|save|drawn|table|filters|counts))=")([^"]+")')
"""Attributes that name an id. Text cannot look like one: templates escape its quotes."""

HEADINGS: Final = re.compile(r"<(/?)h([23])\b")

COMMANDS: Final = {
    "spectra": "inspect",
    "simulation": "simulate",
    "plan": "plan",
    "conversion": "convert",
    "extraction": "extract",
    "run": "train",
    "recall": "recall",
    "lint": "lint",
    "demo": "demo",
    "probe": "probe",
    "counter-test": "check --adapter",
    "stability": "check",
    "sweep": "sweep",
}
"""Kind of record -> the command that makes it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a page.

    Attributes:
        kind: a word over the heading: the command that made it, or "comparison".
        title: heading.
        verdict: the part in a sentence.
        template: what sets it.
        values: what fills the template.
        figures: its figures, in reading order.
        files: names of the files it was made from.
    """

    kind: str
    title: str
    verdict: str
    template: str
    values: dict[str, Any]
    figures: tuple[Figure, ...]
    files: tuple[str, ...]


def part_of(record: Record, files: Sequence[str], *, title: str | None = None) -> Part:
    """Return the part that shows one record, as its own page does.

    Raises:
        RecordError: there is no page for this kind of record.
    """
    template, fill = page.page_of(record)
    values = fill(record)
    kind = record.FORMAT.split("/")[1]
    return Part(
        kind=COMMANDS.get(kind, kind),
        title=title or words.title(record),
        verdict=str(values.get("verdict", "")),
        template=template,
        values=values,
        figures=tuple(page.figures_of(record)),
        files=tuple(files),
    )


def _within(html: str, prefix: str, lower: int) -> Markup:
    """Return a part's document with ids of its own, and headings so many levels down."""
    named = IDS.sub(lambda found: found[1] + " ".join(prefix + name for name in found[2].split(" ")), html)
    return Markup(HEADINGS.sub(lambda found: f"<{found[1]}h{int(found[2]) + lower}", named))


def render_parts(
    title: str,
    verdict: str,
    parts: Sequence[Part],
    *,
    files: Table,
    notes: Sequence[Finding],
    provenance: Sequence[tuple[str, str]],
) -> str:
    """Return one self-contained HTML document.

    Args:
        title: of the page.
        verdict: the sentence under it; a part with the same one does not repeat it.
        parts: in reading order.
        files: what the page was made from.
        notes: what there is to say of the files.
        provenance: name and value, a row each.
    """
    shown, specs, numbered = [], [], 1
    short = words.tails([name for part in parts for name in part.files])
    for place, part in enumerate(parts, start=1):
        prefix = f"p{place}-"
        numbers = {f.name: number for number, f in enumerate(part.figures, start=numbered)}
        numbered += len(part.figures)
        figures = {f.name: f for f in part.figures}
        html = page.render(part.template, layout="part.html", figures=figures, numbers=numbers, **part.values)
        specs += [(prefix + f.name, f.spec()) for f in part.figures]
        own = "" if part.verdict == verdict else part.verdict
        lower = 1 if len(parts) > 1 else 0
        of = short[part.files[0]] if len(part.files) == 1 else words.count(len(part.files), "record")
        shown.append(
            {"kind": part.kind, "of": of, "title": part.title, "verdict": own, "html": _within(html, prefix, lower)}
        )
    return page.render(
        "report.html",
        title=title,
        verdict=verdict,
        parts=shown,
        files=files,
        notes=notes,
        specs=specs,
        provenance=provenance,
    )
