"""What a page is made of: records out of files and folders, each of them once.

In: paths, or records. Out: records with a name each, and findings about the files.
"""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final

import msgspec

from rankwise.errors import RecordError, UsageError
from rankwise.records import Finding, Record, SweepRecord, any_record, read_record, to_json
from rankwise.report.page import PAGES
from rankwise.sweeping import collecting, folder
from rankwise.sweeping.recording import make_record
from rankwise.sweeping.sentences import cut
from rankwise.tuning.runs import RECORD as RUN

MARKS: Final = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

HEAD: Final = 400
"""Bytes of a file in which the `format` of a record stands."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A record and where it is from.

    Attributes:
        name: the path as given, or below a folder that was given; the words of a record that came from Python.
        record: itself.
        digest: of its bytes: two files of one digest are one record.
    """

    name: str
    record: Record
    digest: str


def load(sources: Sequence[str | PathLike[str] | Record]) -> tuple[list[Loaded], list[Finding]]:
    """Read everything that was given.

    Raises:
        RecordError: a file is no record, or a folder holds none.
        UsageError: nothing was given, or a record twice.
    """
    if not sources:
        raise UsageError("report needs records: files that -o wrote, or folders of a sweep, a run or such files")
    found: list[Loaded] = []
    findings: list[Finding] = []
    for place, source in enumerate(sources, start=1):
        if isinstance(source, Record):
            found.append(_checked(Loaded(f"record {place}", source, _digest(to_json(source).encode()))))
            continue
        path = Path(fspath(source))
        if path.is_dir():
            loaded, said = _folder(path)
            found += loaded
            findings += said
        else:
            found.append(_file(path))
    _refuse_twice(found)
    return found, findings


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _refuse_twice(found: Sequence[Loaded]) -> None:
    """Refuse one record under two names: its seed would count twice."""
    seen: dict[str, Loaded] = {}
    for one in found:
        first = seen.setdefault(one.digest, one)
        if first is not one:
            where = f"{one.name} is given twice" if one.name == first.name else f"{first.name} and {one.name} are equal"
            raise UsageError(f"{where}; a record counts once, so leave one out")


def _file(path: Path) -> Loaded:
    """Read a file that was named, which has to be a record.

    Raises:
        RecordError: it is none.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            if head.lstrip()[:1] != b"{":  # weights of many gigabytes are not read to their end to learn that
                what = "it is empty" if not head.strip() else "it is no JSON object"
                if head.startswith(MARKS):
                    what = "it begins with a byte order mark, which some shells write: save it as UTF-8 without one"
                raise RecordError(f"{path} is not a rankwise record: {what}")
            content = head + file.read()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    return _parsed(content, path)


def _parsed(content: bytes, path: Path) -> Loaded:
    try:
        record = any_record(content, str(path))
    except RecordError as error:
        if b'"run_info"' in content and b'"train_info"' in content:
            raise RecordError(
                f"{path} is a result of PEFT's method_comparison; `rankwise sweep --import FOLDER -o DIR` makes a "
                "sweep of such results, and DIR is what report takes"
            ) from error
        raise
    return _checked(Loaded(str(path), record, _digest(content)))


def _checked(one: Loaded) -> Loaded:
    """Refuse what has no page, and a sweep whose grid no axis can show.

    Raises:
        RecordError: it is such a record.
    """
    if type(one.record) not in PAGES:
        raise RecordError(f"{one.name} is {one.record.format}, of which there is no page")
    if isinstance(one.record, SweepRecord):
        for cell in one.record.cells:
            if cell.rank < 1 or not (math.isfinite(cell.learning_rate) and cell.learning_rate > 0):
                raise RecordError(
                    f"{one.name} is no whole sweep/1 record: it has a run of rank {cell.rank} and learning rate "
                    f"{cell.learning_rate:g}"
                )
    return one


# --- folders --------------------------------------------------------------------------------------------------


def _folder(path: Path) -> tuple[list[Loaded], list[Finding]]:
    """Read what a folder holds: a sweep, a run, or files of records.

    Raises:
        RecordError: it holds nothing of these.
    """
    cells = collecting.list_cells(path)
    if cells or (path / folder.RECORD).is_file():
        return _sweep(path, list(cells))
    if (path / RUN).is_file():
        return [_file(path / RUN)], []
    found, strangers = [], []
    for file in _json_files(path):
        content = _read(file)
        if b'"rankwise/' not in content[:HEAD]:
            strangers.append(file.name)
            continue
        kind = msgspec.json.decode(content, type=_Head).format if _is_json(content) else ""
        if kind in NO_PAGE:
            strangers.append(file.name)
        else:
            found.append(_parsed(content, file))
    if not found:
        also = f"; its .json files are no records: {cut(strangers, ', ')}" if strangers else ""
        raise RecordError(f"{path} holds no record of rankwise{also}; give a folder of a sweep, a run or record files")
    if not strangers:
        return found, []
    text = f"{path}: {len(strangers)} of its .json files are not in this page, being no records of results: "
    return found, [Finding(code="files-left-out", level="info", text=f"{text}{cut(strangers, ', ')}.")]


class _Head(msgspec.Struct):
    """Of any record, its kind."""

    format: str


NO_PAGE: Final = ("rankwise/dry-run/1", "rankwise/sweep-dry-run/1", "rankwise/report/1")
"""Kinds that have no page; in a folder they are passed over."""


def _is_json(content: bytes) -> bool:
    try:
        msgspec.json.decode(content, type=_Head)
    except msgspec.DecodeError:
        return False  # the reader of records says what is wrong with it
    return True


def _json_files(path: Path) -> Iterator[Path]:
    try:
        names = sorted(entry for entry in path.iterdir() if entry.suffix == ".json" and entry.is_file())
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    yield from names


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error


def _sweep(path: Path, names: Sequence[str]) -> tuple[list[Loaded], list[Finding]]:
    """Read the folder of a sweep: its record, or one made anew where the runs in the folder are others than its own."""
    told = read_record(path / folder.RECORD, SweepRecord) if (path / folder.RECORD).is_file() else None
    if told is not None and not names:
        return [_checked(Loaded(str(path / folder.RECORD), told, _digest(_read(path / folder.RECORD))))], []
    found = [collecting.read_cell(path, name) for name in names]
    rows = tuple(read.row for read in found)
    if told is not None and told.cells == rows:
        return [_checked(Loaded(str(path), told, _digest(_read(path / folder.RECORD))))], []
    asked = _asked(path, names[0]) if told is None else {}
    record = make_record(
        rows,
        model=told.config.model if told else str(asked.pop("model", "unknown")),
        data=told.config.data if told else str(asked.pop("data", "unknown")),
        settings=told.config.settings if told else asked,
        digest=told.config.digest if told else "",
        command=told.command if told else (),
        device=", ".join(sorted({read.device for read in found})),
        seconds=told.seconds if told else 0.0,
    )
    was = f"sweep.json holds {len(told.cells)}" if told is not None else "there is no sweep.json"
    text = (
        f"{path} holds {len(rows)} runs and {was}: the sweep was stopped or is under way, or runs were added or taken "
        "out. The answers here are made from the runs."
    )
    finding = Finding(code="sweep-unfinished", level="warning", text=text)
    return [Loaded(str(path), record, _digest(str(path.resolve()).encode()))], [finding]


def _asked(path: Path, name: str) -> dict[str, Any]:
    """Return what the runs of a folder share, as the first of them has it."""
    try:
        shared = msgspec.json.decode(_read(path / name / folder.CELL))["shared"]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise RecordError(f"{path / name / folder.CELL} is no record of a cell: {error}") from error
    return dict(shared) if isinstance(shared, dict) else {}
