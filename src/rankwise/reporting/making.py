"""The page out of any records: which parts it has, in which order, and what it says at its head.

In: paths or records. Out: a page, figures by name, a report/1 record.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from rankwise.errors import UsageError
from rankwise.files import check_writable, write_texts
from rankwise.records import Finding, Record, ReportFile, ReportPart, ReportRecord, RunRecord, SweepRecord, now, version
from rankwise.report import words
from rankwise.report.comparing import MOST_COMPARED, compare
from rankwise.report.composite import COMMANDS, Part, part_of, render_parts
from rankwise.report.drawing import Figure, Table
from rankwise.report.page import render_page
from rankwise.reporting.grids import gather
from rankwise.reporting.reading import Loaded, load
from rankwise.reporting.saving import Saving
from rankwise.sweeping.sentences import cut

MOST_ALONE: Final = 12
"""Records of one kind that get a part each: past that nobody reads a page, and it grows by a megabyte a record."""

OTHER_FILES: Final = (".json", ".jsonl", ".csv", ".png", ".svg", ".pdf", ".safetensors", ".parquet", ".yaml")
"""Suffixes of files that are no page: a slip of the hand, which --force would make a loss."""

Source = str | PathLike[str] | Record


@dataclass(frozen=True, slots=True)
class Made:
    """What a page is to hold.

    Attributes:
        title: of the page.
        verdict: the sentence under it.
        parts: in reading order.
        loaded: what it is made from.
        findings: about the files.
    """

    title: str
    verdict: str
    parts: tuple[Part, ...]
    loaded: tuple[Loaded, ...]
    findings: tuple[Finding, ...]


def make_parts(sources: Sequence[Source], command: Sequence[str]) -> Made:
    """Read the sources and decide on the parts.

    Raises:
        RankwiseError: as `load`.
    """
    loaded, findings = load(sources)
    runs = [one for one in loaded if isinstance(one.record, RunRecord)]
    grids, alone, said = gather(runs, command)
    findings += said
    parts = [part_of(one.record, (one.name,)) for one in loaded if isinstance(one.record, SweepRecord)]
    titles = Counter(words.title(grid.record) for grid in grids)
    for place, grid in enumerate(grids, start=1):
        title = words.title(grid.record)
        parts.append(
            part_of(grid.record, grid.files, title=title if titles[title] == 1 else f"{title}, settings {place}")
        )
    kinds: dict[type[Record], list[Loaded]] = defaultdict(list)
    in_grids = {id(one) for one in runs} - {id(one) for one in alone}
    for one in loaded:
        if id(one) not in in_grids:
            kinds[type(one.record)].append(one)
    for kind, members in kinds.items():
        if 2 <= len(members) <= MOST_COMPARED:
            parts.append(compare([(one.record, one.name) for one in members]))
        if kind is not SweepRecord:
            parts += [part_of(one.record, (one.name,)) for one in members[:MOST_ALONE]]
        findings += _left_out(kind, members)
    return Made(_title(parts, loaded), _verdict(parts), tuple(parts), tuple(loaded), tuple(findings))


def _left_out(kind: type[Record], members: Sequence[Loaded]) -> list[Finding]:
    word = COMMANDS.get(kind.FORMAT.split("/")[1], kind.FORMAT)
    told = []
    if len(members) > MOST_COMPARED:
        text = f"{len(members)} records of {word} are too many to compare; give {MOST_COMPARED} or fewer of them."
        told.append(Finding(code="too-many-to-compare", level="info", text=text))
    if len(members) > MOST_ALONE and kind is not SweepRecord:
        text = (
            f"{len(members) - MOST_ALONE} of {len(members)} records of {word} have no part in this page, which shows "
            f"{MOST_ALONE} of a kind: {cut([one.name for one in members[MOST_ALONE:]], ', ')}."
        )
        told.append(Finding(code="records-left-out", level="warning", text=text))
    return told


def _title(parts: Sequence[Part], loaded: Sequence[Loaded]) -> str:
    if len(parts) == 1 or parts[0].kind == "sweep":
        return parts[0].title
    kinds = Counter(COMMANDS.get(kind := one.record.FORMAT.split("/")[1], kind) for one in loaded)
    return "Records of " + ", ".join(f"{kind} ({n})" if n > 1 else kind for kind, n in kinds.items())


def _verdict(parts: Sequence[Part]) -> str:
    first = parts[0]
    if first.kind != "comparison":
        return first.verdict
    short = words.tails(first.files)
    named = ", ".join(f"{'ABCDEF'[k]} is “{short[name]}”" for k, name in enumerate(first.files))
    return f"{named}. {first.verdict}"


def _files(made: Made) -> Table:
    shown: dict[str, list[str]] = defaultdict(list)
    for place, part in enumerate(made.parts, start=1):
        for name in part.files:
            shown[name].append(str(place))
    rows = tuple(
        (one.name, one.record.format, one.record.created, ", ".join(shown[one.name]) or words.UNKNOWN)
        for one in made.loaded
    )
    return Table("Files, and the parts they are in", ("file", "record", "created", "part"), rows, named=True)


def page_of(made: Made, command: Sequence[str]) -> str:
    """Return the page. One record alone has the page that its own command writes."""
    first = made.loaded[0]
    if len(made.loaded) == 1 and len(made.parts) == 1 and not made.findings:
        return render_page(first.record)  # type: ignore[arg-type]  # `load` refuses what has no page
    provenance = [
        ("command", words.command_words(command) or words.UNKNOWN),
        ("rankwise", version()),
        ("created", now()),
    ]
    return render_parts(
        made.title, made.verdict, made.parts, files=_files(made), notes=made.findings, provenance=provenance
    )


def record_of(made: Made, command: Sequence[str], out: Path | None) -> ReportRecord:
    """Return what stands in a page as a record."""
    return ReportRecord(
        format=ReportRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command),
        device="cpu",
        seed=None,
        title=made.title,
        verdict=made.verdict,
        files=tuple(
            ReportFile(path=one.name, format=one.record.format, created=one.record.created) for one in made.loaded
        ),
        parts=tuple(
            ReportPart(
                kind=part.kind,
                title=part.title,
                verdict=part.verdict,
                files=part.files,
                figures=tuple(figure.name for figure in part.figures),
            )
            for part in made.parts
        ),
        findings=made.findings,
        out=None if out is None else str(out),
    )


def _refuse_place(path: Path, sources: Sequence[Source]) -> None:
    """Refuse a place for the page that would cost a record, or that a page is not looked for at.

    Raises:
        UsageError: the path is one of the sources, or has the suffix of another kind of file.
    """
    if path.suffix.lower() in OTHER_FILES:
        raise UsageError(f"{path} is no place for a page: give a name such as {path.with_suffix('.html')}")
    for source in sources:
        if isinstance(source, str | PathLike) and path.exists() and Path(source).exists() and path.samefile(source):
            raise UsageError(f"{path} is a record that the page is made from; give the page another name")


def make_report(
    sources: Sequence[Source],
    *,
    out: str | PathLike[str],
    saving: Saving | None,
    force: bool,
    command: Sequence[str] | None,
) -> ReportRecord:
    """Write the page, and the figures beside it; see `rankwise.report`."""
    path = Path(fspath(out))
    _refuse_place(path, sources)
    check_writable(path, force=force)
    if saving is not None:
        saving.check()
    names = ", ".join(repr(fspath(s)) if isinstance(s, str | PathLike) else repr(s) for s in sources)
    told = tuple(command) if command is not None else (f"rankwise.report({names}, out={str(path)!r})",)
    made = make_parts(sources, told)
    files: dict[Path, str | bytes] = {path: page_of(made, told)}
    if saving is not None:
        files |= saving.files(_by_name(made.parts), force=force)
    write_texts(files, force=force)
    return record_of(made, told, path)


def figures_by_name(sources: Sequence[Source]) -> dict[str, Figure]:
    """Return the figures of all parts; see `rankwise.figures`."""
    return _by_name(make_parts(sources, ("rankwise.figures(...)",)).parts)


def _by_name(parts: Sequence[Part]) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    times: Counter[str] = Counter()
    for part in parts:
        for figure in part.figures:
            times[figure.name] += 1
            found[figure.name if times[figure.name] == 1 else f"{figure.name}-{times[figure.name]}"] = figure
    return found
