"""What a row of DATA has to look like: one of three forms, checked field by field.

In: rows as they came. Out: the form they have, and rows of exactly its columns; or what is wrong, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from rankwise.checkpoints.stores import printable
from rankwise.errors import DataFormatError, DataRowError
from rankwise.tuning.data_files import FIELDS

Form = Literal["text", "prompt-completion", "messages"]

FORMS: Final[dict[Form, tuple[str, ...]]] = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
}
"""Form -> the columns that it needs."""

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

FORM_WORDS: Final = '"text", or "prompt" and "completion", or "messages"'

_HINTS: Final[dict[tuple[str, ...], str]] = {
    ("conversations",): (
        'rename "conversations" to "messages", and in each turn "from" to "role" (human: user, gpt: assistant) and '
        '"value" to "content"'
    ),
    ("instruction", "output"): (
        'rename "output" to "completion", and "instruction" (with "input" after it, where there is one) to "prompt"'
    ),
    ("instruction", "response"): 'rename "instruction" to "prompt" and "response" to "completion"',
    ("question", "answer"): 'rename "question" to "prompt" and "answer" to "completion"',
    ("chosen", "rejected"): (
        'preferences are not trained on; for the chosen answers alone rename "chosen" to "messages" or "completion"'
    ),
    ("prompt", "response"): 'rename "response" to "completion"',
    ("input", "output"): 'rename "input" to "prompt" and "output" to "completion"',
    ("role", "content"): 'these are turns of one conversation; a row is a whole one: {"messages": [...]}',
    ("input_ids",): "these are tokens already; give the text they were made of",
    ("content",): 'rename "content" to "text"',
    ("completion",): 'add "prompt" (it may be empty), or rename "completion" to "text"',
    ("prompt",): 'add "completion", or rename "prompt" to "text"',
}
"""Columns of common layouts -> what to do with them; the first that fits is said."""


def complete_forms(columns: Sequence[str]) -> list[Form]:
    """Return the forms whose columns are all there."""
    return [form for form, fields in FORMS.items() if all(name in columns for name in fields)]


def form_words(form: Form) -> str:
    """Return the columns of a form, as messages name them."""
    return " and ".join(f'"{name}"' for name in FORMS[form])


def form_of(row: Mapping[str, object], where: str) -> Form:
    """Return the form of a row. Tables have a null where a row has no such column, so nulls do not count.

    Raises:
        DataFormatError: it has none of the forms, or two.
        DataRowError: it has the columns of a form, and one of them is null.
    """
    columns = tuple(map(str, row))
    found = complete_forms([name for name in columns if row.get(name) is not None])
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise DataFormatError(
            f"{where} has {' as well as '.join(map(form_words, found))}; which of them to train on is unclear. "
            "Leave one form in the file."
        )
    for form in complete_forms(columns):
        name = next(name for name in FORMS[form] if row[name] is None)
        raise DataRowError(f'{where}: "{name}" is null; wanted {_VALUE_WORDS[name]}. Mend the row or take it out.')
    raise no_form(columns, where)


def no_form(columns: Sequence[str], where: str) -> DataFormatError:
    """Return the error for columns of no form, with what to rename where the layout is a common one."""
    shown = ", ".join(f'"{printable(name[:40])}"' for name in columns[:12]) + (", ..." if len(columns) > 12 else "")
    alike = {name: name.strip().lower() for name in columns if name not in FIELDS}
    hint = next(
        (f'rename "{printable(name)}" to "{wanted}"' for name, wanted in alike.items() if wanted in FIELDS), None
    )
    hint = hint or next((words for needs, words in _HINTS.items() if set(needs) <= set(columns)), None)
    return DataFormatError(
        f"{where} has {f'the columns {shown}' if columns else 'no columns'}; wanted {FORM_WORDS}."
        + (f" {hint[0].upper()}{hint[1:]}." if hint else " Rename the columns.")
    )


_VALUE_WORDS: Final = {
    **dict.fromkeys(("text", "prompt", "completion"), "a string"),
    "messages": 'a list of {"role": ..., "content": ...}',
}


def kind_words(value: object) -> str:
    """Return what a value is, in the words of JSON."""
    for kinds, words in (
        (bool, "true or false"), (int | float, "a number"), (str, "a string"), (list | tuple, "a list"),
        (Mapping, "an object"), (bytes, "bytes"), (type(None), "null"),
    ):  # fmt: skip
        if isinstance(value, kinds):
            return words
    return f"a {type(value).__name__}"


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {kind_words(value)}; wanted a string.')
    if "\0" in value:
        raise ValueError(
            f'"{name}" has a NUL character at position {value.index(chr(0)) + 1}. Mend the row or take it out.'
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f'"{name}" has half a surrogate pair (U+{ord(value[error.start]):04X}) at position {error.start + 1}, '
                "which is no character. Mend the row or take it out."
            ) from error
    return value


def _filled(value: object, name: str) -> str:
    text = _string(value, name)
    if not text or text.isspace():
        raise ValueError(f'"{name}" is {"blank" if text else "empty"}, so there is nothing to learn. Take the row out.')
    return text


def _text_row(row: Mapping[str, object]) -> dict[str, Any]:
    return {"text": _filled(row["text"], "text")}


def _pair_row(row: Mapping[str, object]) -> dict[str, Any]:
    return {"prompt": _string(row["prompt"], "prompt"), "completion": _filled(row["completion"], "completion")}


def _chat_row(row: Mapping[str, object]) -> dict[str, Any]:
    turns = row["messages"]
    if not isinstance(turns, list | tuple):
        raise ValueError(f'"messages" is {kind_words(turns)}; wanted {_VALUE_WORDS["messages"]}.')
    if not turns:
        raise ValueError('"messages" is an empty list, so there is nothing to learn. Take the row out.')
    made = [_turn(turn, f"messages[{at}]") for at, turn in enumerate(turns)]
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in made):
        raise ValueError(
            '"messages" has no turn of the role "assistant" with words in it, so there is nothing to learn. '
            "Take the row out."
        )
    return {"messages": made}


def _turn(turn: object, name: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f'"{name}" is {kind_words(turn)}; wanted {{"role": ..., "content": ...}}.')
    if "role" not in turn or "content" not in turn:
        hint = ' Rename "from" to "role" and "value" to "content".' if {"from", "value"} <= set(turn) else ""
        lacks = "role" if "role" not in turn else "content"
        raise ValueError(f'"{name}" has no "{lacks}"; wanted {{"role": ..., "content": ...}}.{hint}')
    if turn.get("tool_calls"):
        raise ValueError(f'"{name}" has "tool_calls", which would be lost: only "role" and "content" are trained on.')
    role = turn["role"]
    if role not in ROLES:
        said = repr(role[:40]) if isinstance(role, str) else kind_words(role)
        same = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
        meant = same.get(role.strip().lower(), role.strip().lower()) if isinstance(role, str) else ""
        hint = f' Did you mean "{meant}"?' if meant in ROLES else ""
        raise ValueError(f'the role of "{name}" is {said}; wanted one of: {", ".join(ROLES)}.{hint}')
    if isinstance(turn["content"], list | tuple):
        raise ValueError(f'"{name}.content" is a list of parts; wanted a string. Images and sounds are not trained on.')
    return {"role": str(role), "content": _string(turn["content"], f"{name}.content")}


CHECKS: Final[dict[Form, Callable[[Mapping[str, object]], dict[str, Any]]]] = {
    "text": _text_row,
    "prompt-completion": _pair_row,
    "messages": _chat_row,
}
"""Form -> the check of its rows."""
