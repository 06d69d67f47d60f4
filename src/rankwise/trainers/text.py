"""The text of the files: YAML and Python with a head that says what they are.

In: plain values. Out: text, and values read from text again without running it.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import yaml

from rankwise.errors import ReadBackError
from rankwise.trainers.model import Asked

NO_RATE: Final = (
    "The plan has no learning rate, so none stands here: the trainer's default holds, which was not chosen for these "
    "scales."
)

_SHOWN: Final = 12
"""Kinds of modules that the head of a file lists."""

_WIDTH: Final = 10**9  # of a YAML line: nothing is folded
_COMMENT: Final = 110  # of a line of comment


def scale_lines(modules: Sequence[Asked]) -> list[str]:
    """Return one line for each (rank, scale) of a plan, most frequent first.

    >>> scale_lines([Asked("q", (8, 8), 4, 8.0, 2.0), Asked("v", (8, 8), 4, 8.0, 2.0)])
    ['2 modules of rank 4 at scale 2']
    """
    kinds = Counter((m.r, f"{m.scaling:.6g}") for m in modules).most_common()
    lines = [f"{n} module{'s' if n > 1 else ''} of rank {r} at scale {scale}" for (r, scale), n in kinds[:_SHOWN]]
    more = kinds[_SHOWN:]
    if more:
        ranks = [r for (r, _), _ in more]
        lines.append(f"{sum(n for _, n in more)} modules more, of ranks {min(ranks)} to {max(ranks)}")
    return lines


def comment(lines: Iterable[str]) -> str:
    """Return lines as comments of YAML or Python, whatever they contain."""
    out = []
    for line in lines:
        for part in re.split(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", line):
            out += textwrap.wrap(part, _COMMENT, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in out)


def to_yaml(head: Iterable[str], values: Mapping[str, Any]) -> str:
    """Return a mapping as YAML below a head of comments, keys in the order given."""
    body = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=_WIDTH, default_flow_style=False)
    return comment(head) + str(body)


def read_yaml(file: str, text: str) -> dict[str, Any]:
    """Return the mapping in a YAML text.

    Raises:
        ReadBackError: it is no YAML, or no mapping.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ReadBackError(f"{file} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ReadBackError(f"{file} holds no mapping")
    return found


def read_json(file: str, text: str) -> dict[str, Any]:
    """Return the object in a JSON text.

    Raises:
        ReadBackError: it is no JSON, or no object.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ReadBackError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ReadBackError(f"{file} holds no object")
    return found


def to_call(name: str, function: str, values: Mapping[str, Any]) -> str:
    """Return `name = function(key=value, ...)` as Python, one entry a line.

    >>> print(to_call("lora", "dict", {"r": 8, "rank_pattern": {"^q": 4}}), end="")
    lora = dict(
        r=8,
        rank_pattern={
            '^q': 4,
        },
    )
    """
    return f"{name} = {function}(\n" + "".join(f"    {k}={_python(v, 4)},\n" for k, v in values.items()) + ")\n"


def _python(value: Any, indent: int) -> str:
    """Return a value as Python source; lists and dicts one entry a line."""
    inner, end = " " * (indent + 4), " " * indent
    if isinstance(value, dict) and value:
        return "{\n" + "".join(f"{inner}{k!r}: {_python(v, indent + 4)},\n" for k, v in value.items()) + end + "}"
    if isinstance(value, list) and value and not all(isinstance(v, str) and len(v) < 12 for v in value):
        return "[\n" + "".join(f"{inner}{_python(v, indent + 4)},\n" for v in value) + end + "]"
    return repr(value)


def read_call(file: str, text: str, name: str) -> dict[str, Any]:
    """Return the keyword arguments of the call that is assigned to `name`, without running anything.

    Raises:
        ReadBackError: the text is no Python, or has no such call of plain values.
    """
    try:
        for node in ast.parse(text).body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Call)
                and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
            ):
                return {str(k.arg): ast.literal_eval(k.value) for k in node.value.keywords}
    except (SyntaxError, ValueError) as error:
        raise ReadBackError(f"{file} cannot be read again: {error}") from error
    raise ReadBackError(f"{file} assigns no call to {name}")


def read_constant(file: str, text: str, name: str) -> Any:
    """Return the plain value that is assigned to `name`, without running anything.

    Raises:
        ReadBackError: the text is no Python, or has no such assignment.
    """
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return ast.literal_eval(node.value)
    except (SyntaxError, ValueError) as error:
        raise ReadBackError(f"{file} cannot be read again: {error}") from error
    raise ReadBackError(f"{file} assigns nothing to {name}")
