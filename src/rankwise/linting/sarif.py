"""A lint record as SARIF 2.1.0, which code hosts show beside the lines that are meant.

In: a lint/1 record. Out: a JSON document.
Source: OASIS, Static Analysis Results Interchange Format 2.1.0, sections 3.13 (document) to 3.30 (region).
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any, Final
from urllib.parse import quote

from rankwise.linting.table import LINTS
from rankwise.records import LintFinding, LintRecord

SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"
HOME: Final = "https://rankwise.readthedocs.io"

_LEVELS: Final = {"error": "error", "warning": "warning", "info": "note"}


def to_sarif(record: LintRecord) -> str:
    """Return the findings as SARIF text: one run, a rule for every code that was found, a result a finding."""
    codes = list(dict.fromkeys(f.code for f in record.findings))
    run = {
        "tool": {
            "driver": {
                "name": "rankwise",
                "informationUri": HOME,
                "semanticVersion": record.rankwise,
                "rules": [_rule(code, next(f for f in record.findings if f.code == code)) for code in codes],
            }
        },
        "invocations": [{"executionSuccessful": True, "commandLine": " ".join(record.command)}],
        "columnKind": "utf16CodeUnits",
        "results": [_result(finding, codes.index(finding.code)) for finding in record.findings],
    }
    made = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    text = json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _rule(code: str, first: LintFinding) -> dict[str, Any]:
    rule = LINTS.get(code)
    return {
        "id": code,
        "shortDescription": {"text": rule.summary if rule else code.replace("-", " ")},
        "help": {"text": f"What it means, and what to do: {first.docs}"},
        "helpUri": first.docs,
        "defaultConfiguration": {"level": _LEVELS[rule.level if rule else first.level]},
    }


def _result(finding: LintFinding, index: int) -> dict[str, Any]:
    made: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": _LEVELS[finding.level],
        "message": {"text": finding.text},
    }
    extra = {"key": finding.key, "runtime": finding.runtime, "figure": finding.figure, "value": finding.value}
    kept = {name: value for name, value in extra.items() if value is not None}
    if kept:
        made["properties"] = kept
    place = _location(finding)
    if place:
        made["locations"] = [place]
    return made


def _location(finding: LintFinding) -> dict[str, Any]:
    """Return where a finding lies: the config, its line, and the modules by name."""
    place: dict[str, Any] = {}
    uri = _uri(finding.source)
    if uri is not None:
        place["physicalLocation"] = {"artifactLocation": {"uri": uri}}
        if finding.line is not None:
            place["physicalLocation"]["region"] = {"startLine": finding.line}
    if finding.modules:
        place["logicalLocations"] = [{"fullyQualifiedName": name, "kind": "module"} for name in finding.modules[:100]]
    return place


def _uri(source: str) -> str | None:
    """Return a source as a URI: relative where it was given so; None for a command line, which lies nowhere."""
    if "://" in source:
        return source
    path = Path(source)
    try:
        if path.is_dir():
            config = path / "adapter_config.json"
            path = config if config.is_file() else path
        elif not path.is_file():
            return None
    except (OSError, ValueError):
        return None
    if path.is_absolute():
        return path.as_uri()
    return quote(PurePath(path).as_posix(), errors="surrogateescape")
