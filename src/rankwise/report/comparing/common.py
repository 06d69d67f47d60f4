"""What all comparisons share: letters and looks of the records, and how long words are cut.

In: records and their files. Out: small pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from rankwise.records import Record
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, plain

R = TypeVar("R", bound=Record)

HUES: Final = ("@first", "@second", "@third")
DASHES: Final = ("solid", "dash")
SYMBOLS: Final = ("circle", "diamond", "square", "triangle-up", "cross", "star")

MOST_WORDS: Final = 56
"""Characters of a cell."""


MOST_LETTERS: Final = 28
"""Characters of a name in a legend, the last ones of a longer name."""


@dataclass(frozen=True, slots=True)
class Compared(Generic[R]):
    """One record of a comparison.

    Attributes:
        letter: A, B, ...: how figures call it.
        name: of its file.
        record: itself.
        place: 0, 1, ...
        short: as much of the name as tells it from the others.
    """

    letter: str
    name: str
    record: R
    place: int
    short: str

    @property
    def label(self) -> str:
        """Return how a legend calls it."""
        long = len(self.short) > MOST_LETTERS
        return plain(f"{self.letter}: {'…' + self.short[1 - MOST_LETTERS :] if long else self.short}")

    @property
    def color(self) -> str:
        """Return its hue."""
        return HUES[self.place % len(HUES)]

    def look(self, *, size: int = 8) -> Json:
        """Return line and markers in its hue; past the third record the dashes differ."""
        dash = DASHES[self.place // len(HUES) % len(DASHES)]
        return {
            "name": self.label,
            "line": {"width": 2.5, "color": self.color, "dash": dash},
            "marker": {"size": size, "color": self.color, "symbol": SYMBOLS[self.place % len(SYMBOLS)]},
        }


@dataclass(frozen=True, slots=True)
class Extra:
    """What a kind of record adds to its comparison.

    Attributes:
        verdict: the comparison in a sentence, or "".
        rows: more rows of the table: a name, and a text for each record.
        figures: laid over each other.
        tables: below the figures.
        reading: sentences at the end.
    """

    verdict: str = ""
    rows: tuple[tuple[str, ...], ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    reading: tuple[str, ...] = ()


def letters(records: Sequence[tuple[Any, str]]) -> list[Compared[Any]]:
    """Give every record its letter."""
    short = words.tails([name for _, name in records])
    return [Compared("ABCDEF"[k], name, record, k, short[name]) for k, (record, name) in enumerate(records)]


def cut(text: str) -> str:
    """Return a text that fits a cell: long ones lose their middle.

    >>> cut("short"), len(cut("x" * 500))
    ('short', 56)
    """
    half = (MOST_WORDS - 3) // 2
    return text if len(text) <= MOST_WORDS else f"{text[: MOST_WORDS - half - 3]} … {text[-half:]}"
