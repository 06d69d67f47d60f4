"""Lint records for pages and round trips: findings of every level, unknown figures, and nothing found."""

from __future__ import annotations

from typing import Any

from rankwise.records import LintFinding, LintRecord, LintScale, LintSource

HEAD: dict[str, Any] = {
    "format": LintRecord.FORMAT,
    "rankwise": "0.1",
    "created": "2026-11-24T00:00:00+00:00",
    "command": ("rankwise", "lint", "a", "b.yml"),
    "device": "cpu",
    "seed": None,
}

DOCS = "https://rankwise.readthedocs.io/en/latest/reference/lints.html#"


def finding(code: str, level: Any, **fields: Any) -> LintFinding:
    """Return a finding with everything else unknown."""
    plain: dict[str, Any] = {"text": f"`{code}` was seen.", "source": "a", "key": None, "line": None, "modules": ()}
    plain |= {"figure": None, "value": None, "runtime": None, "docs": DOCS + code}
    return LintFinding(code=code, level=level, **(plain | fields))


def lint_record(**fields: Any) -> LintRecord:
    """Return a record with one finding a level and two groups."""
    found = (
        finding(
            "runtime-scale", "error", modules=("l.0.q",), figure="applied over trained", value=0.25, runtime="vllm"
        ),
        finding("small-scale", "warning", source="b.yml", key="lora_alpha", line=3, figure="scaling", value=0.0625),
        finding("untrained", "info"),
    )
    scales = (
        LintScale(
            source="a", group="q, v", modules=2, r=4, lora_alpha=8.0, scaling=2.0, rule="lora", applied={"vllm": 0.5}
        ),
        LintScale(
            source="b.yml",
            group="all modules",
            modules=None,
            r=256,
            lora_alpha=None,
            scaling=None,
            rule=None,
            applied={"vllm": None},
        ),
    )
    plain: dict[str, Any] = HEAD | {
        "sources": (
            LintSource(path="a", kind="adapter", modules=2),
            LintSource(path="b.yml", kind="trl", modules=None),
        ),
        "model": None,
        "runtimes": ("vllm",),
        "ignored": (),
        "scales": scales,
        "findings": found,
        "errors": 1,
        "warnings": 1,
        "infos": 1,
    }
    return LintRecord(**(plain | fields))


RECORDS: dict[str, LintRecord] = {
    "lint": lint_record(),
    "clean lint": lint_record(findings=(), errors=0, warnings=0, infos=0),
    "lint of nothing adapted": lint_record(scales=(), findings=(finding("no-lora", "info"),), errors=0, warnings=0),
}
