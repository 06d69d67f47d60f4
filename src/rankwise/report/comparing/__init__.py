"""Several records of one kind beside each other: what differs, in a table and in figures laid over each other.

In: records of one kind, with a letter each. Out: a `Part` of a page. Which of them is better is not said: the figures
of one record each have no interval over anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from rankwise.records import PlanRecord, RecallRecord, Record, RunRecord, SpectraRecord, StabilityRecord
from rankwise.report import page, words
from rankwise.report.comparing import plans, runs, spectra, stability
from rankwise.report.comparing.common import Compared, Extra, cut, letters
from rankwise.report.composite import COMMANDS, Part
from rankwise.report.drawing import Table

MOST_COMPARED: Final = 6
"""Records that hues and dashes can tell apart."""

EXTRAS: Final[dict[type[Record], Callable[[Sequence[Compared[Any]]], Extra]]] = {
    SpectraRecord: spectra.extra,
    PlanRecord: plans.extra,
    RunRecord: runs.extra,
    RecallRecord: runs.extra,
    StabilityRecord: stability.extra,
}
"""Kind of record -> what its comparison has beside the table of key numbers."""

Facts = dict[str, str]


def _facts(record: Record) -> Facts:
    """Return what the page of a record says in key numbers and settings, by name."""
    _, fill = page.page_of(record)
    values = fill(record)
    told: Facts = {}
    for name in ("recall_facts", "forgetting_facts", "facts"):
        told |= {fact[0]: fact[1] for fact in values.get(name) or ()}
    for name in ("config", "settings"):
        told |= dict(values.get(name) or ())
    return told | {"device": record.device, "seed": words.UNKNOWN if record.seed is None else str(record.seed)}


def _which(compared: Sequence[Compared[Any]]) -> Table:
    rows = tuple((c.letter, c.name, c.record.created[:16].replace("T", " ")) for c in compared)
    return Table("The records", ("", "file", "created (UTC)"), rows, named=True)


def compare(records: Sequence[tuple[Record, str]]) -> Part:
    """Return the part that compares records of one kind.

    Args:
        records: two to `MOST_COMPARED` of them, and the name of the file of each.
    """
    compared = letters(records)
    facts = [_facts(c.record) for c in compared]
    names = list(dict.fromkeys(name for told in facts for name in told))
    rows = [(name, *(cut(told.get(name, words.UNKNOWN)) for told in facts)) for name in names]
    whole = {name: [told.get(name, words.UNKNOWN) for told in facts] for name in names}
    more = EXTRAS.get(type(compared[0].record))
    extra = Extra() if more is None else more(compared)
    rows += [(row[0], *map(cut, row[1:])) for row in extra.rows]
    whole |= {row[0]: list(row[1:]) for row in extra.rows}
    differs = [row for row in rows if len(set(whole[row[0]])) > 1]  # cut words may be equal where whole ones are not
    same = [f"{row[0]} {row[1]}" for row in rows if row not in differs and row[1] != words.UNKNOWN]
    kind = compared[0].record.FORMAT.split("/")[1]
    n = words.count(len(compared), f"record of {COMMANDS.get(kind, kind)}", f"records of {COMMANDS.get(kind, kind)}")
    verdict = extra.verdict or f"{len(differs)} of {len(rows)} figures and settings differ."
    return Part(
        kind="comparison",
        title=f"{n} beside each other",
        verdict=verdict,
        template="comparison.html",
        values={
            "which": _which(compared),
            "differs": Table("Figures and settings", ("", *(c.letter for c in compared)), tuple(differs), named=True),
            "same": same,
            "tables": extra.tables,
            "reading": extra.reading,
        },
        figures=extra.figures,
        files=tuple(c.name for c in compared),
    )
