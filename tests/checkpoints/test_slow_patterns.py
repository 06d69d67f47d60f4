"""Which expressions are refused: those that repeat a repeat, and none that trainers and people write."""

from __future__ import annotations

import pytest

from rankwise.checkpoints.patterns import Pattern
from rankwise.checkpoints.slow_patterns import LONGEST, why_slow

UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+b",
        "(a*)*",
        "(?:a|aa)+x",
        "((ab)*c)*",
        r"(\w+\.?)+X",
        "(a{2,})+",
        "(a{1,50}){1,50}",
        "((a+))+",
        "([^)]+)*",
        "(a+)?+",
        "(a+){2,}",
        "((a+)?)*",
        "(a?a?)*b",
    ],
)
def test_repeated_repeats(expression: str) -> None:
    assert why_slow(expression) == "it repeats a repeat"


@pytest.mark.parametrize(
    "expression",
    [
        "q_proj",
        r"^model\.layers\.0\.self_attn\.q_proj",
        r".*\.layers\.\d+\.(q|k|v)_proj",
        r"(a|b)?\.c+",
        UNSLOTH,
        r"[(+*]+x",
        r"\(a+\)+",
        "(ab)+",
        r"layers\.([0-9]|1[0-9])\..*(q|v)_proj",
        "[]+]+",
        "[^]+*]+",
        "a{2}b",
        "x{y}+",
        r".*(?:layers\.(?:0|1|2))?.*proj",
        "(?P<n>a)+",
        "(?:ab)+",
        "(?:a?)b+",
    ],
)
def test_what_people_write(expression: str) -> None:
    assert why_slow(expression) is None


def test_long_and_many() -> None:
    assert "characters" in (why_slow("a" * (LONGEST + 1)) or "")
    assert "repeats" in (why_slow(".*x" * 40) or "")


def test_broken_text_is_no_crash() -> None:
    for text in ("[", "\\", "(", "a{", "a{,", ")", "[^", "*"):
        why_slow(text)


def test_plain_keys_are_looked_up_as_they_are_compared() -> None:
    """A dot that is not escaped stands for any character but a line break; the end may be followed by one."""
    pattern = Pattern({"q.proj": 1, "0.q_proj": 2, "a.b.c": 3})
    names = {"x.q_proj": (0,), "x.0.q_proj": (0, 1), "x0.q_proj": (0,), "q.proj": (0,), "q\nproj": (), "a.b.c\n": (2,)}
    assert {name: pattern.matches(name) for name in names} == names
