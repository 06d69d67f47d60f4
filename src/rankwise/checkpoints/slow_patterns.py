"""Regular expressions that may take forever on a name of sixty letters, told from their text.

In: an expression. Out: why it is refused, or None. Python's `re` backtracks and cannot be given a time limit, so a
repeat inside a repeat, as in `(a+)+b`, is refused before it is tried: no name of a module needs one.
"""

from __future__ import annotations

from typing import Final

LONGEST: Final = 10_000
"""Characters of an expression; the longest that a trainer writes, one name after the other, have a few thousand."""

MOST_REPEATS: Final = 12
"""Repeats without an upper end in one expression; what Unsloth writes has eight."""


def why_slow(expression: str) -> str | None:
    """Return why an expression may take forever, or None.

    Args:
        expression: one that `re` compiles.

    >>> why_slow("(a+)+b")
    'it repeats a repeat'
    >>> why_slow(r"model\\.layers\\.(\\d+)\\.(q|k)_proj") is None
    True
    """
    if len(expression) > LONGEST:
        return f"it has {len(expression):,} characters, more than {LONGEST:,}"
    repeats, open_groups, ended = 0, [False], False  # of each open group: whether it holds a repeat or a choice
    at = 0
    while at < len(expression):
        sign, step = expression[at], 1
        in_group, ended = ended, False
        if sign == "\\":
            step = 2
        elif sign == "[":
            step = _class(expression, at)
        elif sign == "(":
            open_groups.append(False)
            step += expression[at + 1 : at + 2] == "?"  # of `(?:`, no repeat
        elif sign == ")" and len(open_groups) > 1:
            ended = open_groups.pop()
            open_groups[-1] = open_groups[-1] or ended
        elif sign == "|":
            open_groups[-1] = open_groups[-1] or len(open_groups) > 1
        elif (length := _repeat(expression, at)) is not None:
            step, endless = length
            repeats += endless
            if endless and in_group:
                return "it repeats a repeat"
            open_groups[-1] = open_groups[-1] or endless or sign == "?"
            ended = in_group and not endless
        at += step
    return f"it has {repeats} repeats, more than {MOST_REPEATS}" if repeats > MOST_REPEATS else None


def _class(expression: str, at: int) -> int:
    """Return the length of a class of characters such as `[^]x]`."""
    end = at + 1
    end += expression[end : end + 1] == "^"
    end += expression[end : end + 1] == "]"
    while end < len(expression) and expression[end] != "]":
        end += 2 if expression[end] == "\\" else 1
    return end + 1 - at


def _repeat(expression: str, at: int) -> tuple[int, bool] | None:
    """Return the length of a repeat and whether it may be long, or None where none stands there."""
    sign = expression[at]
    if sign in "*+":
        return 1, True
    if sign == "?":
        return 1, False
    if sign != "{":
        return None
    inside, closed, _ = expression[at + 1 :].partition("}")
    low, comma, high = inside.partition(",")
    if not closed or not (low + high).isdecimal():
        return None
    most = high if comma else low
    return len(inside) + 2, most == "" or len(most) > 1
