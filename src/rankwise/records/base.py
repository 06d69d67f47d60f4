"""What all records share: their parts, their head, and JSON that is readable without torch.

In: numbers and words. Out: frozen structs and their JSON; a reader that refuses what it does not know.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from typing import Any, ClassVar, Literal, Self, TypeVar

import msgspec

from rankwise._version import __version__
from rankwise.errors import MissingDependencyError, RecordError

Level = Literal["info", "warning", "error"]


def version() -> str:
    """Return the version of rankwise."""
    return __version__


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a record: all fields by name, unknown fields refused."""


class Finding(Part, frozen=True, kw_only=True):
    """One thing worth saying about a source.

    Attributes:
        code: stable, in kebab case; its page is `docs/reference/findings.md#code`.
        level: "info", "warning" or "error".
        text: what was seen, in which modules, and what it means.
    """

    code: str
    level: Level
    text: str


class Skipped(Part, frozen=True, kw_only=True):
    """A weight that was left out, and why."""

    module: str
    reason: str


class Record(Part, frozen=True, kw_only=True):
    """What every record begins with.

    Attributes:
        format: "rankwise/KIND/1".
        rankwise: version that wrote it.
        created: UTC, ISO 8601.
        command: argv of the command, or the call spelled as one.
        device: where the numbers were computed.
        seed: of the random numbers that went into it.
    """

    FORMAT: ClassVar[str] = ""

    format: str
    rankwise: str
    created: str
    command: tuple[str, ...]
    device: str
    seed: int | None

    def to_json(self) -> str:
        """Return the record as JSON text, one field a line, numbers finite or null."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a record back; refuses another kind, a newer format and unknown fields.

        Raises:
            RecordError: the text is not such a record.
        """
        return from_json(text, cls)


def data_frame(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a pandas DataFrame."""
    try:
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingDependencyError("pandas", "dev", "to_dataframe()") from error
    return pd.DataFrame(rows)


R = TypeVar("R", bound=Record)


def _finite(value: Any) -> Any:
    """Replace what JSON has no word for: NaN and infinities by None, lone surrogates by their escape."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):  # a path whose bytes are not UTF-8 has lone surrogates, which JSON cannot hold
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def to_json(record: Record) -> str:
    """Return a record as indented JSON; every number is a finite float or null."""
    plain = _finite(msgspec.to_builtins(record))
    return msgspec.json.format(msgspec.json.encode(plain), indent=1).decode() + "\n"


def _no_number(word: str) -> float:
    """Refuse what Python reads as a number and JSON does not know."""
    raise ValueError(f"it holds {word}, where a record has a finite number or null")


def from_json(text: str | bytes, kind: type[R], where: str = "the record") -> R:
    """Read a record of one kind.

    Args:
        text: JSON.
        kind: the class wanted.
        where: the file's name, for messages.

    Raises:
        RecordError: not JSON, another kind, a newer format, an unknown field or a value of a wrong type.
    """
    try:
        head = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is not JSON: {error}") from error
    found = head.get("format") if isinstance(head, dict) else None
    if not isinstance(found, str) or not found.startswith("rankwise/"):
        raise RecordError(f"{where} is not a rankwise record: it has no field `format` of the form rankwise/KIND/1")
    if found != kind.FORMAT:
        wanted_kind, wanted_version = kind.FORMAT.split("/")[1:3]
        found_kind, _, found_version = found.removeprefix("rankwise/").partition("/")
        newer = re.fullmatch("[0-9]{1,9}", found_version) is not None and int(found_version) > int(wanted_version)
        if found_kind == wanted_kind and newer:
            raise RecordError(
                f"{where} is {found}, newer than the {kind.FORMAT} that rankwise {version()} reads; "
                "update rankwise: pip install -U rankwise"
            )
        raise RecordError(f"{where} is {found}; wanted {kind.FORMAT}")
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise RecordError(f"{where} is not a whole {kind.FORMAT} record: {error}") from error
