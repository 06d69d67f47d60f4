"""Numbers as people read them, and the sentences at the head of a page.

In: records. Out: words.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from typing import Final

from rankwise.records import (
    ConversionRecord,
    CounterTestRecord,
    DemoRecord,
    ExtractionRecord,
    Finding,
    LintRecord,
    ModuleSpectrum,
    PlanRecord,
    ProbeRecord,
    RecallRecord,
    Record,
    RunRecord,
    SimulationRecord,
    SpectraRecord,
    StabilityRecord,
    SweepRecord,
)
from rankwise.report.drawing import known

UNKNOWN: Final = "–"
"""Stands for what cannot be known from the files: null in the record."""

Fact = tuple[str, str, str]
"""A key number: its name, its value, and a remark (which may be empty)."""


def number(value: float | None, digits: int = 3) -> str:
    """Write a number to so many significant digits, whole numbers in full.

    >>> number(12.345), number(0.000012), number(1234567), number(None)
    ('12.3', '1.2e-05', '1,234,567', '–')
    """
    value = known(value)
    if value is None:
        return UNKNOWN
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}"


def share(value: float | None, digits: int = 3) -> str:
    """Write a share in per cent.

    A share just below one is never written as 100 %.

    >>> share(0.5), share(0.00123), share(0.99985), share(None)
    ('50 %', '0.123 %', '99.98 %', '–')
    """
    value = known(value)
    if value is None:
        return UNKNOWN
    while value < 1 and float(f"{value * 100:.{digits}g}") >= 100 and digits < 8:
        digits += 1
    return f"{value * 100:.{digits}g} %"


def count(n: int, one: str, many: str | None = None) -> str:
    """Write a number of things.

    >>> count(1, "module"), count(2, "module")
    ('1 module', '2 modules')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def span(values: Iterable[float | None], digits: int = 3) -> str:
    """Write the smallest and the largest of the known values."""
    present = sorted(v for v in map(known, values) if v is not None)
    if not present:
        return UNKNOWN
    low, high = number(present[0], digits), number(present[-1], digits)
    return low if low == high else f"{low} to {high}"


def trained(modules: Sequence[ModuleSpectrum]) -> list[ModuleSpectrum]:
    """Return the modules that have a delta: means over ranks leave out those of zero."""
    return [m for m in modules if known(m.energy)]


def short(source: str) -> str:
    """Return the last part of a path or id, for a title.

    >>> short("/runs/a/adapter/"), short("hf://org/name@v1"), short("/")
    ('adapter', 'name@v1', '/')
    """
    return source.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or source


def tails(names: Sequence[str]) -> dict[str, str]:
    """Return, for every path, as few of its last parts as tell it from the others.

    >>> tails(["runs/a/x.json", "runs/b/x.json", "y.json"])
    {'runs/a/x.json': 'a/x.json', 'runs/b/x.json': 'b/x.json', 'y.json': 'y.json'}
    """
    parts = {name: [p for p in name.replace("\\", "/").split("/") if p] or [name] for name in names}
    found = {}
    for name, own in parts.items():
        others = [other for given, other in parts.items() if given != name]
        depth = next((k for k in range(1, len(own)) if all(o[-k:] != own[-k:] for o in others)), len(own))
        found[name] = "/".join(own[-depth:])
    return found


def title(record: Record) -> str:
    """Return the title of a page in words."""
    if isinstance(record, SpectraRecord):
        if record.kind == "adapter":
            return f"What the adapter “{short(record.source)}” is made of"
        base = f"from “{short(record.base)}” " if record.base is not None else ""
        return f"What changed {base}to “{short(record.source)}”"
    if isinstance(record, SimulationRecord):
        return "What a rank keeps of a style update and of a fact update"
    if isinstance(record, PlanRecord):
        return "A rank for every module" + (f" of “{short(record.source)}”" if record.source else "")
    if isinstance(record, ExtractionRecord):
        return f"What an adapter holds of “{short(record.tuned)}”"
    if isinstance(record, ConversionRecord):
        return f"What became of the adapter “{short(record.source)}”"
    if isinstance(record, RunRecord):
        return f"Training on “{short(record.config.data)}”"
    if isinstance(record, RecallRecord):
        who = f"the adapter “{short(record.adapter)}”" if record.adapter is not None else f"“{short(record.model)}”"
        return f"What {who} recalls of “{short(record.data)}”"
    if isinstance(record, LintRecord):
        first = f"“{short(record.sources[0].path)}”" if record.sources else "nothing"
        more = "" if len(record.sources) < 2 else f" and {count(len(record.sources) - 1, 'other')}"
        return f"Ranks, alphas and scales of {first}{more}"
    if isinstance(record, ProbeRecord):
        return f"What there is to learn in “{short(record.data)}”"
    if isinstance(record, CounterTestRecord):
        return f"Was the adapter “{short(record.adapter)}” starved?"
    if isinstance(record, DemoRecord):
        return "What rank, scaling and learning rate do to recalled facts"
    if isinstance(record, StabilityRecord):
        return f"How the branch goes with the rank on “{short(record.config.data)}”"
    if isinstance(record, SweepRecord):
        return f"Rank, rule and learning rate on “{short(record.config.data)}”"
    return record.format


def _noise_verdict(limited: int, modules: Sequence[ModuleSpectrum]) -> str:
    ranks = [m.signal_rank for m in trained(modules) if m.signal_rank is not None]
    above = f" Above the noise edge stand {number(statistics.fmean(ranks))} directions a module." if ranks else ""
    return (
        f"Rounding hides part of this update: in {limited} of {count(len(modules), 'module')} the energy ranks "
        f"count rounding noise.{above}"
    )


def spectra_verdict(record: SpectraRecord) -> str:
    """Return one line: what this update is, or what stands in the way of knowing it."""
    summary, modules = record.summary, record.modules
    errors = [f.code for f in summary.findings if f.level == "error"]
    if not modules:
        return f"Nothing was measured: {count(len(record.skipped), 'weight')} left out, for the reasons below."
    if errors:
        return f"{count(len(errors), 'finding')} of level error ({', '.join(errors)}): settle that before the figures."
    limited = sum(m.rounding_limited for m in modules)
    if 2 * limited >= len(modules):
        return _noise_verdict(limited, modules)
    mean = known(summary.rank_90_mean)
    if mean is None:
        return "The rank that holds 90 % of the energy is not known for every module: some lists were cut off."
    longest = span(m.r if m.r is not None else min(m.shape) for m in modules)
    wide = known(summary.effective_rank_mean)
    effective = "" if wide is None else f", and the mean effective rank is {number(wide)}"
    return f"On average {number(mean)} of {longest} directions hold 90 % of a module's energy{effective}."


def spectra_facts(record: SpectraRecord) -> list[Fact]:
    """Return the key numbers of a spectra page."""
    summary, modules = record.summary, record.modules
    moved = trained(modules)
    aside = f"over {count(len(moved), 'module')} with a delta"
    limited = sum(m.rounding_limited for m in modules)
    noisy = f"{aside}; counts rounding noise in {limited}" if limited else aside
    facts: list[Fact] = [
        ("modules", f"{summary.modules:,}", f"{count(len(record.skipped), 'weight')} left out"),
        ("mean rank for 90 % of the energy", number(summary.rank_90_mean), noisy),
        ("mean effective rank", number(summary.effective_rank_mean), noisy),
        ("parameters of the weights measured", f"{summary.params:,}", "out × in, summed; not those of the factors"),
    ]
    norms = [n for m in modules if (n := known(m.relative_norm)) is not None]
    if norms:
        remark = f"‖ΔW‖ / ‖W‖ a module; {span(norms)}; n = {len(norms)}"
        facts.append(("median relative norm", number(statistics.median(norms)), remark))
    if record.kind == "delta":
        value = share(limited / len(modules)) if modules else UNKNOWN
        facts.append(("modules limited by rounding", value, f"{limited} of {len(modules)}"))
        ranks = [m.signal_rank for m in moved if m.signal_rank is not None]
        if ranks:
            remark = f"values above the noise edge; {span(ranks)}; n = {len(ranks)}"
            facts.append(("mean signal rank", number(statistics.fmean(ranks)), remark))
    elif modules:
        facts.append(("rank r of the factors", span(m.r for m in modules), "as stored"))
        facts.append(("scaling of B A", span(m.scaling for m in modules), _rules(modules)))
    return facts


def _rules(modules: Sequence[ModuleSpectrum]) -> str:
    rules = sorted({m.rule for m in modules if m.rule is not None})
    unknown = sum(m.scaling is None for m in modules)
    aside = f"; not known for {unknown}, taken as 1" if unknown else ""
    return (f"rule: {', '.join(rules)}" if rules else "rule not known") + aside


def simulation_verdict(record: SimulationRecord) -> str:
    """Return one line: how many directions each update needs."""
    parts = [f"{name} {update.rank_90}" for name, update in record.updates.items()]
    if not parts:
        return "The record holds no update."
    return f"Rank that holds 90 % of the energy: {', '.join(parts)}, of {record.size} directions each."


def simulation_facts(record: SimulationRecord) -> list[Fact]:
    """Return the key numbers of a simulation page."""
    facts: list[Fact] = []
    for name, update in record.updates.items():
        facts.append((f"{name}: rank for 90 % / 99 %", f"{update.rank_90} / {update.rank_99}", update.planted))
        remark = f"stable rank {number(update.stable_rank)}"
        facts.append((f"{name}: effective rank", number(update.effective_rank), remark))
    facts.append(("lora_alpha", number(record.lora_alpha), "of both scalings"))
    noise = f"iid noise of standard deviation {record.noise:g}"
    facts.append(("size and noise", f"{record.size} × {record.size}", noise))
    return facts


def seconds(value: float | None) -> str:
    """Write a duration.

    >>> seconds(0.25), seconds(75.0), seconds(7322.0), seconds(None)
    ('0.25 s', '1 min 15 s', '2 h 2 min', '–')
    """
    value = known(value)
    if value is None:
        return UNKNOWN
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def counted(findings: Sequence[Finding]) -> str:
    """Return how many findings there are of each level.

    >>> counted([])
    'none'
    """
    levels = [f.level for f in findings]
    parts = [count(levels.count("error"), "error"), count(levels.count("warning"), "warning")]
    parts.append(count(levels.count("info"), "note"))
    return ", ".join(p for p in parts if not p.startswith("0 ")) or "none"


def command_words(command: Sequence[str]) -> str:
    """Write a command as one would type it; a call from Python stands as it is.

    >>> command_words(["rankwise", "inspect", "a b"]), command_words(["rankwise.inspect('a b')"])
    ("rankwise inspect 'a b'", "rankwise.inspect('a b')")
    """
    return command[0] if len(command) == 1 and "(" in command[0] else shlex.join(command)


def _sources(record: Record) -> list[tuple[str, str]]:
    """Return what went into a record, by name."""
    if isinstance(record, SpectraRecord):
        return [("source", record.source), ("base", UNKNOWN if record.base is None else record.base)]
    if isinstance(record, PlanRecord):
        return [("source", record.source or UNKNOWN), ("base", record.base or UNKNOWN)]
    if isinstance(record, ExtractionRecord):
        return [("base", record.base), ("tuned", record.tuned), ("adapter", record.out)]
    if isinstance(record, ConversionRecord):
        adapters = ", ".join(f"{a.source} × {a.weight:g}" if a.weight != 1 else a.source for a in record.adapters)
        return [("adapter", adapters), ("written to", record.out)]
    if isinstance(record, RunRecord):
        return [("model", record.config.model), ("data", record.config.data)]
    if isinstance(record, RecallRecord):
        adapter = UNKNOWN if record.adapter is None else record.adapter
        return [("model", record.model), ("adapter", adapter), ("data", record.data)]
    if isinstance(record, LintRecord):
        return [("sources", ", ".join(s.path for s in record.sources)), ("model", record.model or UNKNOWN)]
    if isinstance(record, ProbeRecord):
        return [("model", record.model), ("data", record.data)]
    if isinstance(record, CounterTestRecord):
        return [("model", record.model), ("adapter", record.adapter), ("data", record.data)]
    if isinstance(record, DemoRecord):
        return [("model", record.model), ("data", record.data), ("style data", record.style_data)]
    if isinstance(record, StabilityRecord | SweepRecord):
        return [("model", record.config.model), ("data", record.config.data)]
    return []


def provenance(record: Record) -> list[tuple[str, str]]:
    """Return where a record comes from: command, version, device, seed, time."""
    rows = [("command", command_words(record.command) or UNKNOWN), *_sources(record)]
    rows += [
        ("record", record.format),
        ("rankwise", record.rankwise),
        ("device", record.device),
        ("seed", UNKNOWN if record.seed is None else str(record.seed)),
        ("created", record.created),
    ]
    return rows
