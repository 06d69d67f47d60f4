"""lint/1: what is wrong with ranks, alphas, rules and patterns, before a training or before serving.

In: findings and scales. Out: the record, and how a script reads it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from rankwise.records.base import Level, Part, Record, data_frame


class LintSource(Part, frozen=True, kw_only=True):
    """One thing that was read.

    Attributes:
        path: as it was given; of a command line the line itself.
        kind: "adapter", "peft-config", "axolotl", "llama-factory" or "trl".
        modules: modules that are known by name, from the tensors or from `--model`; None where only patterns are.
    """

    path: str
    kind: str
    modules: int | None


class LintFinding(Part, frozen=True, kw_only=True):
    """One thing that is wrong, or worth knowing.

    Attributes:
        code: stable, in kebab case.
        level: "error" (the result is not what the config says), "warning" (it probably is not what was meant)
            or "info".
        text: what was seen, with the figure that matters, and what to do.
        source: the path that it was found in.
        key: the key of the config that it hangs on, as that file spells it, or None.
        line: the line of that key, from 1, or None.
        modules: the modules concerned, where they are known by name.
        figure: what `value` is, or None.
        value: the figure that matters.
        runtime: the serving runtime that it is about, or None.
        docs: link to the rule's page.
    """

    code: str
    level: Level
    text: str
    source: str
    key: str | None
    line: int | None
    modules: tuple[str, ...]
    figure: str | None
    value: float | None
    runtime: str | None
    docs: str


class LintScale(Part, frozen=True, kw_only=True):
    """What one group of modules gets.

    Attributes:
        source: the path.
        group: the modules, in words.
        modules: how many there are, or None where their names are not known.
        r: rank.
        lora_alpha: alpha, or None where nothing states one.
        scaling: the factor on B @ A that was, or will be, trained with; None where it cannot be known.
        rule: scaling rule, or None.
        applied: runtime -> the factor that it would apply; None where it would not load the adapter.
    """

    source: str
    group: str
    modules: int | None
    r: int
    lora_alpha: float | None
    scaling: float | None
    rule: str | None
    applied: dict[str, float | None]


class LintRecord(Record, frozen=True, kw_only=True):
    """lint/1: findings about configs and adapters, and the scale that each module really gets.

    Attributes:
        sources: what was read.
        model: where module names were taken from, or None.
        runtimes: the runtimes asked for.
        ignored: the codes that were left out on request.
        scales: a row a group of modules with the same rank, alpha and scale.
        findings: worst first.
        errors: number of findings of that level.
        warnings: number of findings of that level.
        infos: number of findings of that level.
    """

    FORMAT: ClassVar[str] = "rankwise/lint/1"

    sources: tuple[LintSource, ...]
    model: str | None
    runtimes: tuple[str, ...]
    ignored: tuple[str, ...]
    scales: tuple[LintScale, ...]
    findings: tuple[LintFinding, ...]
    errors: int
    warnings: int
    infos: int

    def to_dataframe(self) -> Any:
        """Return one row a finding as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(f) for f in self.findings])

    def __repr__(self) -> str:
        codes = ", ".join(dict.fromkeys(f.code for f in self.findings)) or "none"
        return (
            f"LintRecord({len(self.sources)} sources: {self.errors} errors, {self.warnings} warnings, "
            f"{self.infos} infos; codes: {codes})"
        )
