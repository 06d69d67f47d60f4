"""DATA -> examples: rows of one of three forms, checked one by one, and what they come to in tokens.

In: a path, URL, hub id, live dataset or list. Out: `Examples`, or one message that names the row and says what to do.
"""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, overload

from rankwise.checkpoints.stores import printable
from rankwise.errors import (
    ChatTemplateError,
    DataFormatError,
    DataRowError,
    NoDataError,
    TooLongError,
    UsageError,
    without_secrets,
)
from rankwise.tuning.data_files import Part
from rankwise.tuning.data_rows import (
    CHECKS,
    FORM_WORDS,
    FORMS,
    Form,
    complete_forms,
    form_of,
    form_words,
    kind_words,
    no_form,
)
from rankwise.tuning.data_sources import dataset_part, parts_of
from rankwise.tuning.encoding import IGNORED, encode

if TYPE_CHECKING:
    from rankwise.tuning.world.builtin import BuiltIn


class Places(Sequence[str]):
    """Where each row stood ("train.jsonl, line 17"), put into words when it is asked for.

    A million rows take 8 MB.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._units: list[str] = []
        self._numbers = array("Q")

    def begin(self, unit: str) -> None:
        """Let the rows that follow be of a new part; `unit` is what stands before their number."""
        self._starts.append(len(self._numbers))
        self._units.append(unit)

    def add(self, number: int) -> None:
        """Note the place of the next row."""
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        number = self._numbers[index]
        part = bisect_right(self._starts, index % len(self)) - 1
        return f"{self._units[part]} {number}"


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows to learn from, all of one form.

    Attributes:
        name: the data as it was given, without the secrets of a URL: it goes into records.
        form: which of the three.
        rows: one dict a row, with exactly the columns of the form.
        places: where each row stood, for messages.
    """

    name: str
    form: Form
    rows: tuple[dict[str, Any], ...]
    places: Sequence[str] = field(compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)


def builtin_examples(builtin: BuiltIn) -> Examples:
    """Return the rows of a data set of the built-in world as examples.

    >>> from rankwise.tuning.world.builtin import read_builtin
    >>> made = builtin_examples(read_builtin("rankwise:facts?n=2"))
    >>> made.form, made.places[0]
    ('prompt-completion', 'rankwise:facts?n=2&seed=0, row 1')
    """
    places = [f"{builtin.name}, row {i}" for i in range(1, len(builtin.rows) + 1)]
    form: Form = "text" if "text" in builtin.rows[0] else "prompt-completion"
    return Examples(name=builtin.name, form=form, rows=builtin.rows, places=places)


def read_data(data: object, *, split: str = "train", limit: int | None = None) -> Examples:
    """Read examples, and refuse what cannot be learnt from.

    A text file holds documents parted by blank lines; without a blank line between two others, one a line. In a folder
    the files are read in the order of their names; where names tell splits, those of `split` alone.

    Args:
        data: path of a file or folder, hub id `org/name[@revision]`, URL, live `datasets.Dataset` or list of dicts.
        split: of a data set on the hub, a `DatasetDict`, or a folder whose files are named after splits.
        limit: stop after that many rows; those after it are not looked at. None reads all.

    Raises:
        RankwiseError: and nothing else, whatever lies there: SourceNotFoundError, AccessError, DataFormatError,
            DataRowError, NoDataError, UsageError, MissingDependencyError.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be 1 or more, got {limit}")
    name, parts = _opened(data, split)
    rows: list[dict[str, Any]] = []
    places = Places()
    form: Form | None = None
    for part in parts:
        try:
            before = len(rows)
            form = _take(part, form, rows, places, limit)
        finally:
            part.close()
        if len(rows) == before:
            raise NoDataError(
                f"{part.label} has no rows; nothing can be learnt from it. Look at how it was made, or take it out."
            )
        if limit is not None and len(rows) >= limit:
            break
    if form is None:
        raise NoDataError(f"{name} has no rows; nothing can be learnt from it.")
    return Examples(name, form, tuple(rows), places)


def _opened(data: object, split: str) -> tuple[str, Iterator[Part]]:
    """Return the name of the data and its parts."""
    if isinstance(data, str | os.PathLike):
        name = os.fsdecode(data)
        return without_secrets(name), parts_of(name, split)
    if isinstance(data, list | tuple):
        return f"a list of {len(data)} rows", iter([Part("the list", "row", enumerate(data, start=1))])
    live = sys.modules.get("datasets")  # whoever holds a dataset has imported it
    if live is not None and isinstance(data, live.DatasetDict | live.IterableDatasetDict):
        if split not in data:
            raise UsageError(f"the {type(data).__name__} has no split {split!r}; it has: {', '.join(map(str, data))}")
        data = data[split]
    if live is not None and isinstance(data, live.Dataset | live.IterableDataset):
        label = f"the {type(data).__name__}"
        return f"a datasets.{type(data).__name__}", iter([dataset_part(data, label)])
    more = "; of a data frame: frame.to_dict('records')" if hasattr(data, "to_dict") else ""
    raise UsageError(
        f"data is of the type {type(data).__name__}; wanted a path, a hub id, a URL, a datasets.Dataset or a list of "
        f"dicts{more}"
    )


def _take(part: Part, form: Form | None, rows: list[dict[str, Any]], places: Places, limit: int | None) -> Form | None:
    """Check the rows of a part and append them; return the form they have."""
    unit = f"{part.label}, {part.unit}"
    places.begin(unit)
    if part.columns is not None and not complete_forms(part.columns):
        raise no_form(part.columns, part.label)
    known: set[tuple[str, ...]] = set()  # the columns of rows that were seen to have the form
    for number, row in part.rows:
        if not isinstance(row, Mapping):
            raise DataRowError(f"{unit} {number} is {kind_words(row)}; wanted an object with {FORM_WORDS}.")
        columns = tuple(row)
        if form is None or columns not in known or any(row[name] is None for name in FORMS[form]):
            found = form_of(row, f"{unit} {number}")
            if form is not None and found != form:
                raise DataFormatError(
                    f"{unit} {number} has {form_words(found)}, and {places[0]} has {form_words(form)}; all rows need "
                    "the same form. Train on one of them, or rename columns."
                )
            form = found
            if len(complete_forms(columns)) == 1:  # else a null decides, row by row
                known.add(columns)
        try:
            rows.append(CHECKS[form](row))
        except ValueError as error:
            raise DataRowError(f"{unit} {number}: {error}") from error
        places.add(number)
        if limit is not None and len(rows) >= limit:
            break
    return form


_SLICE: Final = 1000
"""Rows that are tokenised at once: fast tokenizers work on many in parallel, and the tokens are not kept."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What examples come to in tokens.

    Attributes:
        examples: rows.
        tokens: of all rows, as far as the context reaches.
        target_tokens: those of them that are trained on. The first of a row never is: nothing predicts it.
        longest: tokens of the longest row, before it is cut.
        truncated: rows that are cut.
        mean: tokens a row, as far as the context reaches.
    """

    examples: int
    tokens: int
    target_tokens: int
    longest: int
    truncated: int
    mean: float


def check_examples(examples: Examples, tokenizer: Any, max_length: int | None) -> TokenCounts:
    """Count tokens as training will see them, and refuse rows of which nothing would be trained on.

    Args:
        examples: the rows.
        tokenizer: of transformers.
        max_length: tokens of a row that are kept; None keeps all.

    Raises:
        TooLongError: the prompt of a row fills the context.
        DataRowError: a row has no token to learn.
        ChatTemplateError: there is no chat template, or it raises.
        UsageError: `max_length` is below 2.
    """
    if max_length is not None and max_length < 2:
        raise UsageError(f"max_length must be 2 or more, got {max_length}: the first token of a row is not trained on")
    if examples.form == "messages" and not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            f"{printable(examples.name)} has messages, and the tokenizer has no chat template to put them into text. "
            "Take the tokenizer of a chat model, set tokenizer.chat_template, or use prompt and completion."
        )
    allowed = sys.maxsize if max_length is None else max_length
    tokens = targets = longest = truncated = 0
    too_long: list[tuple[int, int]] = []
    for start in range(0, len(examples.rows), _SLICE):
        ids, labels = _encoded(examples, start, tokenizer)
        for row, (got, wanted) in enumerate(zip(ids, labels, strict=True), start=start):
            kept = min(len(got), allowed)
            learnt = _learnt(wanted, kept)
            if not learnt:
                first = next((at for at, label in enumerate(wanted) if at and label != IGNORED), None)
                if first is None:
                    raise DataRowError(
                        f"{examples.places[row]}: the tokenizer makes {len(got)} tokens of it, and none of them can be "
                        "trained on. Take the row out."
                    )
                too_long.append((row, first))
            tokens += kept
            targets += learnt
            longest = max(longest, len(got))
            truncated += len(got) > allowed
    if too_long:
        raise _too_long(examples, too_long, allowed)
    return TokenCounts(len(examples), tokens, targets, longest, truncated, tokens / len(examples))


def _learnt(labels: Sequence[int], kept: int) -> int:
    """Return how many of the first `kept` tokens are trained on."""
    return kept - 1 - labels[1:kept].count(IGNORED) if kept else 0


def _too_long(examples: Examples, rows: Sequence[tuple[int, int]], allowed: int) -> TooLongError:
    row, length = rows[0]
    before = "prompt" if examples.form == "prompt-completion" else "conversation before the answer"
    more = f" So it is with {len(rows):,} of {len(examples):,} rows, the longest with {max(n for _, n in rows):,}."
    return TooLongError(
        f"{examples.places[row]}: the {before} takes {length:,} tokens, and max_length is {allowed:,}, so nothing of "
        f"what follows it would be trained on.{more if len(rows) > 1 else ''} Raise max_length if the model's context "
        "allows, or shorten these rows or take them out."
    )


def _encoded(examples: Examples, start: int, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    part = Examples(examples.name, examples.form, examples.rows[start : start + _SLICE], ())
    try:
        made = encode(part, tokenizer, sys.maxsize)
    except Exception as error:
        if examples.form != "messages":
            raise
        for row, given in enumerate(part.rows, start=start):  # which of them was it?
            try:
                encode(Examples(examples.name, examples.form, (given,), ()), tokenizer, sys.maxsize)
            except Exception as inner:
                words = printable(" ".join(str(inner).split()))[:300]
                raise ChatTemplateError(
                    f"{examples.places[row]}: the chat template of the tokenizer fails on this conversation "
                    f"({type(inner).__name__}): {words}. Mend the row, or give another template."
                ) from error
        raise
    return made["input_ids"], made["labels"]
