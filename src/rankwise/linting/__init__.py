"""Mistakes in rank, alpha, rule and patterns, and what a serving runtime would do with them.

In: adapters, configs, scripts or command lines. Out: a lint/1 record. Nothing here imports torch; of an
adapter the headers are read, and as many B as it takes to see that one is not zero.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Final

from rankwise.errors import UsageError
from rankwise.linting.groups import groups_of
from rankwise.linting.names import model_modules
from rankwise.linting.reading import read_subject
from rankwise.linting.rules.serving import applied
from rankwise.linting.subject import Hit, Subject
from rankwise.linting.table import LINTS
from rankwise.linting.texts import line_of
from rankwise.records import Level, LintFinding, LintRecord, LintScale, LintSource, now, version
from rankwise.runtimes import Runtime
from rankwise.runtimes import runtime as runtime_of

__all__ = ["DOCS", "LINTS", "lint"]

DOCS: Final = "https://rankwise.readthedocs.io/en/latest/reference"

_ORDER: Final[dict[Level, int]] = {"error": 0, "warning": 1, "info": 2}

Source = str | os.PathLike[str]


def lint(
    sources: Source | Sequence[Source],
    /,
    *,
    runtime: str | Sequence[str] = (),
    model: Source | None = None,
    ignore: str | Sequence[str] = (),
    command: Sequence[str] | None = None,
) -> LintRecord:
    """Find mistakes in ranks, alphas, rules and patterns, and tell the scale that each module really gets.

    Args:
        sources: one or several of: the folder, file, hub id or URL of an adapter; an adapter_config.json; an axolotl or
            LLaMA-Factory YAML; a YAML, script or command line of TRL.
        runtime: names in `rankwise.runtimes.RUNTIMES`, to be told what they would do.
        model: the base model; its module names, from headers alone, are what patterns and targets are tried on.
        ignore: codes of findings to leave out.
        command: argv, for the record; the call itself where it is None.

    Returns:
        A lint/1 record, worst findings first.

    Raises:
        UsageError: no source, or an unknown runtime or code.
        RankwiseError: a source cannot be read.

    >>> record = lint("trl sft --use_peft --lora_r 256 --lora_alpha 16 --learning_rate 2e-5")
    >>> [(f.code, f.value) for f in record.findings]
    [('trl-r256-alpha16', 0.0625)]
    """
    named = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not named:
        raise UsageError("nothing to lint: give at least one adapter, config or command line")
    asked = [runtime_of(name) for name in dict.fromkeys(_words(runtime))]
    ignored = tuple(dict.fromkeys(_words(ignore)))
    _check_codes(ignored)
    shapes, config = (None, None) if model is None else model_modules(os.fsdecode(model))
    findings: list[LintFinding] = []
    scales: list[LintScale] = []
    read: list[LintSource] = []
    for source in named:
        subject = read_subject(os.fsdecode(source), shapes, config)
        names = None if subject.modules is None else len(subject.modules)
        read.append(LintSource(path=subject.path, kind=subject.kind, modules=names))
        scales.extend(_scales(subject, asked))
        findings.extend(f for f in _findings(subject, asked) if f.code not in ignored)
    findings.sort(key=lambda f: _ORDER[f.level])
    levels = [f.level for f in findings]
    return LintRecord(
        format=LintRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else ("rankwise", "lint", *(os.fsdecode(s) for s in named)),
        device="cpu",
        seed=None,
        sources=tuple(read),
        model=None if model is None else os.fsdecode(model),
        runtimes=tuple(row.name for row in asked),
        ignored=ignored,
        scales=tuple(scales),
        findings=tuple(findings),
        errors=levels.count("error"),
        warnings=levels.count("warning"),
        infos=levels.count("info"),
    )


def _words(given: str | Sequence[str]) -> list[str]:
    """Return words out of a list or a text with commas."""
    parts = [given] if isinstance(given, str) else given
    return [word for part in parts for word in part.replace(",", " ").split()]


def _check_codes(codes: Sequence[str]) -> None:
    """Refuse codes that look like a slip of those of the table; others may be the readers' own."""
    for code in codes:
        near = difflib.get_close_matches(code, LINTS, n=1, cutoff=0.8)
        if code not in LINTS and near:
            raise UsageError(f"there is no finding {code!r}; did you mean {near[0]}?")


def _scales(subject: Subject, asked: Sequence[Runtime]) -> Iterator[LintScale]:
    for group in groups_of(subject):
        yield LintScale(
            source=subject.path,
            group=group.label,
            modules=None if group.modules is None else len(group.modules),
            r=group.r,
            lora_alpha=group.lora_alpha,
            scaling=group.scaling,
            rule=group.rule,
            applied={row.name: applied(subject, group, row) for row in asked},
        )


def _findings(subject: Subject, asked: Sequence[Runtime]) -> Iterator[LintFinding]:
    for noticed in subject.noticed:
        yield LintFinding(
            code=noticed.code,
            level=noticed.level,
            text=noticed.text,
            source=subject.path,
            key=None,
            line=None,
            modules=(),
            figure=None,
            value=None,
            runtime=None,
            docs=f"{DOCS}/findings.html#{noticed.code}",
        )
    for code, rule in LINTS.items():
        if rule.check is not None and not (asked and code == "scale-differs-by-runtime"):
            for hit in rule.check(subject):
                yield _finding(subject, code, rule.level, hit, None)
        if rule.check_runtime is not None:
            for row in asked:
                for hit in rule.check_runtime(subject, row):
                    yield _finding(subject, code, rule.level, hit, row.name)


def _finding(subject: Subject, code: str, level: Level, hit: Hit, name: str | None) -> LintFinding:
    key = None if hit.role is None else subject.keys.get(hit.role)
    return LintFinding(
        code=code,
        level=hit.level or level,
        text=hit.text,
        source=subject.path,
        key=key,
        line=None if key is None else line_of(subject.text, key),
        modules=hit.modules,
        figure=hit.figure,
        value=hit.value,
        runtime=name,
        docs=f"{DOCS}/lints.html#{code}",
    )
