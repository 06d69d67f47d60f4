"""How each kind of data file becomes rows.

In: the name of a file and its bytes. Out: a part, whose rows come one at a time, each with the number of its line or
row. What a row has to look like is for `data` to say. pyarrow is imported only for .parquet.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO, Any, Final, Literal, NoReturn

from rankwise.checkpoints.stores import os_error, printable
from rankwise.errors import DataFormatError, DataRowError, MissingDependencyError, RankwiseError

FIELDS: Final = ("text", "prompt", "completion", "messages")
"""The columns that any of the forms of DATA reads; all others are left in the file."""

BATCH: Final = 1000
"""Rows that are turned from Arrow to Python at once."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file, table or list of rows.

    Attributes:
        label: how messages name it.
        unit: what the numbers of its rows count.
        rows: number and row, as they come; to be read once.
        columns: the names of its columns, where they are known before the first row.
        close: to be called when no more rows are wanted.
    """

    label: str
    unit: Literal["line", "row"]
    rows: Iterator[tuple[int, object]]
    columns: tuple[str, ...] | None = None
    close: Callable[[], None] = lambda: None


def needed(package: str, why: str) -> Any:
    """Import a package of the extra "train".

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(getattr(error, "name", None) or package, "train", why) from error


_KNOWN_OTHERS: Final = {
    "a pickle, which can run code when it is opened": (
        ".pkl",
        ".pickle",
        ".pt",
        ".pth",
        ".bin",
        ".joblib",
        ".npy",
        ".npz",
    ),
    "compressed; unpack it first": (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"),
    "an Arrow file, as Dataset.save_to_disk writes; write it with Dataset.to_parquet": (".arrow", ".feather"),
    "a table; write it as .parquet or .jsonl": (".csv", ".tsv", ".xlsx", ".xls"),
}


def kind_of(name: str) -> Callable[[str, IO[bytes]], Part]:
    """Return the reader for a file of that name.

    Raises:
        DataFormatError: there is none.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in KINDS:
        return KINDS[suffix]
    known = next((words for words, suffixes in _KNOWN_OTHERS.items() if suffix in suffixes), None)
    what = f"is {known}" if known else f"has the ending {suffix!r}" if suffix else "has no ending that tells its format"
    raise DataFormatError(f"{printable(name)} {what}; data is read from {wanted()}.")


def wanted() -> str:
    """Return the files that are read, in words."""
    return ", ".join(KINDS) + " files"


def part_of(name: str, opened: Callable[[], IO[bytes]]) -> Part:
    """Return the rows of a file. Its name is looked at before it is opened.

    Raises:
        DataFormatError: the ending of its name is not one of `KINDS`.
    """
    read = kind_of(name)
    file = opened()
    try:
        return replace(read(printable(name), file), close=file.close)
    except BaseException:
        file.close()
        raise


def _json_lines(label: str, file: IO[bytes]) -> Part:
    def rows() -> Iterator[tuple[int, object]]:
        with _reading(label):
            for number, line in enumerate(file, start=1):
                stripped = (_without_mark(line) if number == 1 else line).rstrip(b"\r\n")
                if not stripped or stripped.isspace():
                    continue
                row = _parsed(stripped, f"{label}, line {number}")
                if number == 1 and isinstance(row, list):
                    raise DataFormatError(
                        f"{label} begins with a JSON list; a .jsonl file has one object a line. Name it .json."
                    )
                yield number, row

    return Part(label, "line", rows())


def _json(label: str, file: IO[bytes]) -> Part:
    def rows() -> Iterator[tuple[int, object]]:
        with _reading(label):
            data = _without_mark(file.read())
        if not data or data.isspace():
            return
        found = _parsed(data, label, lines=True)
        if isinstance(found, dict):
            lists = [value for value in found.values() if isinstance(value, list)]
            if len(lists) != 1 or any(field in found for field in FIELDS):
                raise DataFormatError(
                    f"{label} holds one object with {_listed(list(found))}; wanted a list of rows, or an object with "
                    "one list of rows in it. A single row also stands in a list: [{...}]."
                )
            found = lists[0]
        if not isinstance(found, list):
            raise DataFormatError(f"{label} holds a JSON {type(found).__name__}; wanted a list of objects.")
        yield from enumerate(found, start=1)

    return Part(label, "row", rows())


def _text(label: str, file: IO[bytes]) -> Part:
    """Read documents parted by blank lines; without a blank line between two others, one a line."""

    def rows() -> Iterator[tuple[int, object]]:
        with _reading(label):
            data = _without_mark(file.read())
        lines = _decoded(data, label, lines=True).replace("\r\n", "\n").split("\n")
        full = [bool(line) and not line.isspace() for line in lines]
        if not any(full):
            return
        last = len(full) - full[::-1].index(True)
        parted = not all(full[full.index(True) : last])
        start = None
        for at, filled in enumerate([*full[:last], False]):
            if filled and start is None:
                start = at
            if start is not None and (not filled or not parted):
                yield start + 1, {"text": "\n".join(lines[start : at if parted else at + 1])}
                start = None

    return Part(label, "line", rows())


def _parquet(label: str, file: IO[bytes]) -> Part:
    with _reading(label):
        parquet = needed("pyarrow.parquet", f"reading {label}")
        try:
            table = parquet.ParquetFile(file)
            names = tuple(map(str, table.schema_arrow.names))
        except Exception as error:  # pyarrow raises ArrowInvalid, OSError and others for a broken file
            raise _broken_table(error, label) from error
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataFormatError(f"{label} has two columns named {printable(twice)!r}; rename one.")

    def rows() -> Iterator[tuple[int, object]]:
        wanted = [name for name in names if name in FIELDS]
        number = 0
        with _reading(label):
            batches = table.iter_batches(BATCH, columns=wanted)
            while True:
                try:
                    batch = next(batches, None)
                    found = [] if batch is None else batch.to_pylist()
                except Exception as error:
                    raise _broken_table(error, label) from error
                if batch is None:
                    return
                yield from enumerate(found, start=number + 1)
                number += len(found)

    return Part(label, "row", rows(), names)


KINDS: Final[dict[str, Callable[[str, IO[bytes]], Part]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _text,
}
"""Ending of a file's name -> its reader."""


@contextmanager
def _reading(label: str) -> Iterator[None]:
    """Say in our words what the system says when a file cannot be read to its end."""
    try:
        yield
    except OSError as error:
        raise os_error(error, label) from error


def _broken_table(error: Exception, label: str) -> RankwiseError:
    words = printable(" ".join(str(error).split()))[:300] or type(error).__name__
    return DataFormatError(f"{label} is no whole parquet file: {words}. Copy or download it again.")


def _without_mark(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that Windows programs write


def _decoded(data: bytes, where: str, *, lines: bool = False) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        at = error.start - data.rfind(b"\n", 0, error.start)
        what = "it looks like UTF-16" if wide else f"byte 0x{data[error.start]:02x} at position {at}"
        number = data.count(b"\n", 0, error.start) + 1
        place = f"{where}, line {number}" if lines and not wide else where
        raise DataRowError(f"{place} is not UTF-8 text ({what}). Save the file as UTF-8.") from error


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return made


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_constant=_no_constant
)  # made once: a third of the time


def _parsed(data: bytes, where: str, *, lines: bool = False) -> object:
    try:
        return _DECODER.decode(_decoded(data, where, lines=lines))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            raise DataFormatError(
                f"{where} is not one JSON value: another begins at line {error.lineno}. If it has one object a line, "
                "name it .jsonl."
            ) from error
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataRowError(f"{where} is not JSON: {printable(error.msg)} at {at}. Mend it or take it out.") from error
    except RecursionError as error:
        raise DataRowError(f"{where} is not JSON that can be read: nested too deep. Take it out.") from error
    except ValueError as error:  # a key twice, NaN, a number of thousands of digits
        words = printable(" ".join(str(error).split()))[:200]
        raise DataRowError(f"{where} is not strict JSON: {words}. Mend it or take it out.") from error


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(str(name)[:40]) for name in names[:8]) or "nothing in it"
    return printable(shown) + (", ..." if len(names) > 8 else "")
