"""What stands in the page of a sweep beside the figures: its answer in one sentence, caveats, the table of runs.

In: a sweep record. Out: words and tables for the template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from rankwise.records import RankEffect, SweepRecord, SweepRun
from rankwise.report import words
from rankwise.report.drawing import known
from rankwise.report.looks import rule_words, status_words
from rankwise.report.sweep_looks import estimate_words, rate_label, rate_words, score_of
from rankwise.report.table import Cell
from rankwise.report.words import Fact

VERDICTS: Final = {"helps": "helps", "hurts": "hurts", "undecided": "is undecided"}


def widest(record: SweepRecord, rule: str) -> RankEffect | None:
    """Return the effect from the lowest rank to the highest, each at its best rate; the record puts it first."""
    return next((e for e in record.rank_effects if e.scaling == rule and e.at == "best"), None)


def _change(effect: RankEffect, record: SweepRecord) -> str:
    """Write what a higher rank changes: from what to what, and the difference with its sign."""
    by, found = score_of(record), effect.difference

    def one(value: float) -> str:
        return words.share(value) if by.unit.startswith("share") else words.number(value)

    def signed(value: float) -> str:
        points = by.unit.startswith("share")  # a difference of shares in per cent would read as a ratio
        size = f"{words.number(100 * abs(value))} points" if points else one(abs(value))
        return f"{'−' if value < 0 else '+'}{size}"

    if found.mean is None:
        return "no seed in common"
    ends = [
        _mean_at(record, effect.scaling, rank, rate)
        for rank, rate in ((effect.low_rank, effect.low_learning_rate), (effect.high_rank, effect.high_learning_rate))
    ]
    low, high = ends
    values = by.name if low is None or high is None else f"{by.name} {one(low)} → {one(high)}"
    if found.ci is None:
        return f"{values}; {signed(found.mean)}, one seed and no interval"
    return f"{values}; {signed(found.mean)}, 95 % interval {signed(found.ci[0])} to {signed(found.ci[1])}"


def _mean_at(record: SweepRecord, rule: str, rank: int, rate: float) -> float | None:
    at = (rule, rank, rate)
    return next((known(p.score.mean) for p in record.points if (p.scaling, p.rank, p.learning_rate) == at), None)


def _rule_clause(record: SweepRecord, rule: str, *, with_ranks: bool, again: bool) -> str:
    """Write what was found under one rule; `again` leaves out a verdict that stands before it already."""
    effect = widest(record, rule)
    if effect is None:
        return f"cannot be told under {rule_words(rule)}: fewer than two ranks have a rate with all seeds done"
    ends = (effect.low_rank, effect.high_rank)
    best = [b for b in record.best if b.scaling == rule and b.rank in ends]
    only = [str(b.rank) for b in best if b.edge == "only"]
    note = f"; only one rate was tried at rank {' and '.join(only)}" if only else ""
    if any(b.on_edge and b.edge != "only" for b in best):
        note += "; a best rate lies on the grid’s edge"
    ranks = f" from rank {effect.low_rank} to {effect.high_rank}" if with_ranks else ""
    verdict = "" if again else f"{VERDICTS[effect.verdict]} "
    return f"{verdict}under {rule_words(rule)}{ranks} ({_change(effect, record)}{note})"


def sweep_verdict(record: SweepRecord) -> str:
    """Return the answer of a sweep in one sentence: whether raising the rank helps, under each rule."""
    done = sum(cell.status == "done" for cell in record.cells)
    if not done:
        return f"None of {words.count(len(record.cells), 'run')} came to its end: there is no answer."
    if len(record.config.ranks) < 2:
        return _one_rank(record)
    effects = {rule: widest(record, rule) for rule in record.config.scaling}
    known_ = [e for e in effects.values() if e is not None]
    ends = {(e.low_rank, e.high_rank) for e in known_}
    alike = len({None if e is None else e.verdict for e in effects.values()}) == 1 and bool(known_)
    clauses = [
        _rule_clause(record, rule, with_ranks=len(ends) > 1, again=alike and place > 0)
        for place, rule in enumerate(effects)
    ]
    shared = f" from {known_[0].low_rank} to {known_[0].high_rank}" if len(ends) == 1 else ""
    seeds = {e.difference.n for e in known_ if e.difference.ci is not None}
    over = f" and over {words.span(seeds)} seeds" if seeds else ""
    told = (" and " if alike else ", and ").join(clauses)
    return f"Raising the rank{shared} {told}, each rank at its own best learning rate{over}."


def _one_rank(record: SweepRecord) -> str:
    by = score_of(record)
    best = [b for b in record.best if known(b.score.mean) is not None]
    told = "; ".join(
        f"{estimate_words(b.score, by)} under {rule_words(b.scaling)} at its best learning rate, "
        f"{rate_words(b.learning_rate or 0.0)}{', on the edge of those tried' if b.on_edge else ''}"
        for b in best
    )
    return f"One rank was tried, {record.config.ranks[0]}: {by.name} {told or 'unknown'}."


def _best_fact(record: SweepRecord) -> Fact:
    """Return the setting with the best mean, which is where a reader would start."""
    by = score_of(record)
    found = [b for b in record.best if known(b.score.mean) is not None and b.learning_rate is not None]
    if not found:
        return ("best mean", words.UNKNOWN, "no setting has all its seeds done")
    lower = record.config.score == "loss"
    first = min(found, key=lambda b: (b.score.mean or 0.0) * (1 if lower else -1))
    edge = "; the rate lies on the grid’s edge" if first.on_edge else ""
    setting = f"rank {first.rank}, {rule_words(first.scaling)} at {_whole(rate_words(first.learning_rate or 0.0))}"
    return (f"best mean: {by.name}", setting, f"{estimate_words(first.score, by)}{edge}")


def sweep_facts(record: SweepRecord) -> list[Fact]:
    """Return the key numbers of a sweep."""
    c = record.config
    states = Counter(cell.status for cell in record.cells)
    ended = ", ".join(f"{n:,} {status}" for status, n in sorted(states.items()))
    seeds = [p.done for p in record.points if p.done]
    return [
        _best_fact(record),
        ("runs", f"{len(record.cells):,}", ended),
        ("ranks", words.span(c.ranks), f"{len(c.ranks)}: {_list(map(str, c.ranks))}"),
        ("learning rates", f"{len(c.learning_rates)}", _whole(_list(map(rate_label, c.learning_rates)))),
        ("seeds of a setting", words.span(seeds), "that came to their end"),
        ("compared by", score_of(record).name, score_of(record).unit),
        ("training", words.seconds(_total(record)), "of all runs together"),
    ]


def _whole(text: str) -> str:
    """Return text in which no line breaks inside of 3e-4."""
    return text.replace("-", "-\u2060")


def _total(record: SweepRecord) -> float | None:
    times = [cell.seconds for cell in record.cells if known(cell.seconds) is not None]
    return sum(t for t in times if t is not None) if times else None


def _list(texts: Any, most: int = 8) -> str:
    named = list(texts)
    return ", ".join(named) if len(named) <= most else f"{', '.join(named[: most - 1])}, …, {named[-1]}"


class Column(NamedTuple):
    """One column of the table of runs: its head, what it means, whether it sorts as a number, its cell and its key."""

    head: str
    meaning: str
    numeric: bool
    text: Callable[[SweepRun], str]
    key: Callable[[SweepRun], float | str | None]


@dataclass(frozen=True, slots=True)
class RunTable:
    """Columns and rows, and the heads of the columns left out because nothing is known there."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: tuple[str, ...]


def _number(head: str, meaning: str, value: Callable[[SweepRun], float | None]) -> Column:
    return Column(head, meaning, True, lambda r: words.number(value(r)), lambda r: known(value(r)))


def _share(head: str, meaning: str, value: Callable[[SweepRun], float | None]) -> Column:
    return Column(head, meaning, True, lambda r: words.share(value(r)), lambda r: known(value(r)))


def run_name(run: SweepRun) -> str:
    """Name a run by its place in the grid."""
    return f"{run.scaling} rank {run.rank} rate {rate_words(run.learning_rate)} seed {run.seed}"


COLUMNS: Final = (
    Column("run", "rule, rank, learning rate and seed", False, run_name, run_name),
    Column("status", "how it ended", False, lambda r: status_words(r.status), lambda r: r.status),
    _number("alpha", "lora_alpha", lambda r: r.lora_alpha),
    _number("bits", "recalled above the base", lambda r: r.bits),
    _share("exact", "share of the facts right to the last token", lambda r: r.exact_share),
    _share("exact, other words", "the same, asked in held-out words", lambda r: r.paraphrased_exact_share),
    _number("bits a parameter", "recalled bits a trainable parameter", lambda r: r.bits_per_param),
    _number("forgetting", "nats a token", lambda r: r.forgetting),
    _number("loss", "last training loss, nats a token", lambda r: r.loss),
    _number("parameters", "trainable", lambda r: r.params),
    _number("steps", "optimizer steps done", lambda r: r.steps),
    Column("time", "of training", True, lambda r: words.seconds(r.seconds), lambda r: known(r.seconds)),
    Column("error", "why it is not done", False, lambda r: _short(r.error), lambda r: r.error),
)
"""Every column of the table, in order."""


def _short(text: str | None, most: int = 60) -> str:
    if not text:
        return words.UNKNOWN
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def run_table(record: SweepRecord) -> RunTable:
    """Return the table of all runs, without the columns in which nothing is known."""
    kept = [c for c in COLUMNS if any(c.key(run) is not None for run in record.cells)]
    rows = []
    for run in record.cells:
        cells = [(c.text(run), c.key(run)) for c in kept]
        rows.append(tuple(Cell(text, "" if key is None else str(key)) for text, key in cells))
    return RunTable(tuple(kept), tuple(rows), tuple(c.head for c in COLUMNS if c not in kept))


def settings_rows(record: SweepRecord) -> list[tuple[str, str]]:
    """Return what all runs share."""
    c = record.config
    rows = [("model", c.model), ("data", c.data), ("seeds", _list(map(str, c.seeds)))]
    return rows + [(name, words.UNKNOWN if value is None else str(value)) for name, value in c.settings.items()]


def sweep_contents(record: SweepRecord) -> dict[str, Any]:
    """Return what the template of a sweep asks for."""
    return {
        "verdict": sweep_verdict(record),
        "findings": record.findings,
        "counted": words.counted(record.findings),
        "answers": [text.replace("sqrt(r)", "√r") for text in record.answers],  # as the figures write it
        "facts": sweep_facts(record),
        "table": run_table(record),
        "settings": settings_rows(record),
    }
