"""What all commands share: their common flags, their outputs, and how errors become exit codes."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Group, Parameter
from rich.console import Console

from rankwise.errors import UsageError, without_secrets

if TYPE_CHECKING:
    from rankwise.records import (
        ConversionRecord,
        CounterTestRecord,
        ExtractionRecord,
        LintRecord,
        PlanRecord,
        ProbeRecord,
        RecallRecord,
        SimulationRecord,
        SpectraRecord,
        StabilityRecord,
    )

EXIT_OK: Final = 0
EXIT_DEFECT: Final = 1
EXIT_INPUT: Final = 2
EXIT_CHECK_FAILED: Final = 3
EXIT_INTERRUPTED: Final = 130

OUTPUT: Final = Group("Output", sort_key=90)


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, slots=True)
class Output:
    """Flags of every command that makes a record.

    Attributes:
        json: Put the record on stdout instead of the table, and nothing else.
        out: Write the record to this path, as JSON.
        report: Also write a self-contained page to this path.
        force: Overwrite files that exist.
        quiet: Show no progress.
    """

    json: Annotated[bool, Parameter(name="--json", negative="")] = False
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None
    report: Path | None = None
    force: Annotated[bool, Parameter(negative="")] = False
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="")] = False


def whole_numbers(_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    """Turn `4,16,64` and `4 16 64` into the same numbers."""
    words = [word for token in tokens for word in token.value.replace(",", " ").split()]
    try:
        numbers = tuple(int(word) for word in words)
    except ValueError:
        raise UsageError(
            f"{tokens[0].keyword}: wanted whole numbers such as 4,16,64; got {' '.join(words)!r}"
        ) from None
    if not numbers:
        raise UsageError(f"{tokens[0].keyword}: wanted at least one whole number, such as 4,16,64")
    return numbers


Numbers = Annotated[
    tuple[int, ...], Parameter(consume_multiple=True, converter=whole_numbers, n_tokens=-1, negative="")
]
"""A list of whole numbers, with commas or spaces."""


def whole_number(_: Any, tokens: Sequence[Any]) -> int:
    """Take a whole number as it is written: 0.99 is no rank, and is not rounded to one."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise UsageError(f"{tokens[0].keyword}: wanted a whole number; got {tokens[0].value!r}") from None


Whole = Annotated[int, Parameter(converter=whole_number)]
"""One whole number; the parser itself would round."""


def words_of(_: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    """Turn `a,b` and `a b` into the same words; a comma inside a regular expression's braces stays."""
    return tuple(word for token in tokens for word in re.split(r",(?![^{]*\})|\s+", token.value.strip()) if word)


Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True, converter=words_of, n_tokens=-1, negative="")]
"""A list of words, with commas or spaces."""


class PlainConsole(Console):
    """The console of tables and help: a reader that goes away is the entry point's affair, not rich's."""

    def on_broken_pipe(self) -> None:
        """Raise, where rich would exit with 1."""
        raise BrokenPipeError


def printable(text: str) -> str:
    """Return text without control characters: names in a file must not steer the terminal."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") else f"\\x{ord(c):02x}" for c in text)


def argv() -> tuple[str, ...]:
    """Return the command as it was typed, with the program's plain name and without the secrets of URLs."""
    return ("rankwise", *(without_secrets(word) for word in sys.argv[1:]))


def check_outputs(output: Output) -> None:
    """Refuse taken or impossible output paths before the work is done."""
    from rankwise.files import check_writable

    paths = [path for path in (output.out, output.report) if path is not None]
    if len(paths) == 2 and paths[0].resolve() == paths[1].resolve():
        raise UsageError(f"--out and --report both name {paths[0]}; give each its own path")
    for path in paths:
        check_writable(path, force=output.force)


def write_outputs(
    record: ExtractionRecord
    | SpectraRecord
    | SimulationRecord
    | PlanRecord
    | ConversionRecord
    | RecallRecord
    | LintRecord
    | StabilityRecord
    | ProbeRecord
    | CounterTestRecord,
    output: Output,
) -> None:
    """Write the record and the page where they were asked for, and the record to stdout with --json."""
    from rankwise.files import write_texts
    from rankwise.records import to_json

    texts: dict[Path, str] = {}
    if output.report is not None:
        from rankwise.report import render_page

        texts[output.report] = render_page(record)
    if output.out is not None:
        texts[output.out] = to_json(record)
    write_texts(texts, force=output.force)
    if output.json:
        sys.stdout.write(to_json(record))


def saved(output: Output) -> None:
    """Say on stderr which files were written."""
    if output.quiet:
        return
    for path in (output.out, output.report):
        if path is not None:
            print(f"wrote {path}", file=sys.stderr)
