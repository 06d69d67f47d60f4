"""What a sweep prints: the live table on stderr, the answers on stdout."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Group
from rich.table import Table

from rankwise.cli.show import escape, plain_console, plain_table, print_findings
from rankwise.records import Estimate, Score, SweepBest, SweepDryRunRecord, SweepPoint, SweepRecord, SweepRun

if TYPE_CHECKING:
    from rankwise.sweeping.running import Standing

MARKS = {"done": "+", "diverged": "x", "failed": "!", "interrupted": "-"}
HEADINGS: dict[Score, str] = {"bits": "recalled bits", "exact_share": "exact", "loss": "training loss"}


class Watch:
    """The live table of a sweep on stderr; nothing where stderr is no terminal or with --quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._live: Any = None
        self._begun = time.monotonic()

    def __enter__(self) -> Self:
        if self._shown:
            from rich.live import Live

            console = plain_console(sys.stderr)
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        return self

    def say(self, standing: Standing) -> None:
        """Show how far the sweep is."""
        if self._live is not None:
            seconds = time.monotonic() - self._begun
            self._live.update(Group(line(standing, seconds), standing_table(standing)), refresh=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def line(standing: Standing, seconds: float) -> str:
    """Say in one line how far a sweep is."""
    total = len(standing.grid.cells)
    states = Counter(row.status for row in standing.rows.values())
    told = [f"{sum(states.values())} of {total} runs over"]
    told += [f"{number} {status}" for status, number in sorted(states.items()) if status != "done"]
    if standing.there:
        told.append(f"{standing.there} there before")
    if standing.note:
        told.append(standing.note)
    else:
        told.append(f"{min(standing.at_once, total - sum(states.values()))} at once")
    return f"{', '.join(told)}, {seconds:.0f} s"


def standing_table(standing: Standing) -> Table:
    """Return a row a rule and rank, a column a rate: a mark a seed, and the mean of what is done."""
    grid = standing.grid
    table = plain_table(("rule", "left"), ("rank", "right"), *((f"{rate:g}", "left") for rate in grid.learning_rates))
    for rule in grid.scaling:
        for rank in grid.ranks:
            cells = []
            for rate in grid.learning_rates:
                rows = [
                    row
                    for row in standing.rows.values()
                    if (row.scaling, row.rank, row.learning_rate) == (rule, rank, rate)
                ]
                cells.append(_marks(rows, len(grid.seeds)))
            table.add_row(rule, str(rank), *cells)
    return table


def _marks(rows: Sequence[SweepRun], seeds: int) -> str:
    marks = "".join(MARKS[row.status] for row in rows).ljust(seeds, ".")
    known = [
        value for row in rows if row.status == "done" and (value := row.bits if row.bits is not None else row.loss)
    ]
    return f"{marks} {sum(known) / len(known):.3g}" if known else marks


def _estimate(found: Estimate, by: Score | None = None) -> str:
    """Write a mean and half the width of its interval, which lies on both sides alike."""
    if found.mean is None:
        return "-"
    scale, digits, unit = (100.0, ".1f", "%") if by == "exact_share" else (1.0, ".3g", "")

    def one(value: float, digits: str) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{digits}}"

    mean = one(scale * found.mean, digits) + unit
    if found.ci is None:
        return mean
    half = scale * (found.ci[1] - found.ci[0]) / 2
    return f"{mean} ± {one(half, '.1f' if unit else '.2g' if half < 100 else '.0f')}"


def _best_table(best: Sequence[SweepBest], by: Score) -> Table:
    heads = ("rank", "params", "best rate", HEADINGS[by], "bits/param", "forgetting")
    table = plain_table(("rule", "left"), *((h, "right") for h in heads))
    for b in best:
        table.add_row(
            b.scaling,
            str(b.rank),
            "-" if b.params is None else f"{b.params:,}",
            "-" if b.learning_rate is None else f"{b.learning_rate:g}" + (f" ({b.edge})" if b.edge else ""),
            _estimate(b.score, by),
            _estimate(b.bits_per_param),
            _estimate(b.forgetting),
        )
    return table


MOST_MARKS = 6
"""Runs of a setting that are shown by a mark each; more are counted."""


def _ended(p: SweepPoint) -> str:
    """Say how the runs of a setting ended, in the marks of the live table."""
    counts = {"done": p.done, "diverged": p.diverged, "failed": p.failed}
    if p.runs <= MOST_MARKS:
        return "".join(MARKS[status] * number for status, number in counts.items())
    return " ".join(f"{number}{MARKS[status]}" for status, number in counts.items() if number)


def _point_table(points: Sequence[SweepPoint], by: Score) -> Table:
    heads = ("rank", "rate", "runs", HEADINGS[by], "loss", "forgetting", "front")
    table = plain_table(("rule", "left"), *((h, "right") for h in heads))
    for p in points:
        table.add_row(
            p.scaling,
            str(p.rank),
            f"{p.learning_rate:g}",
            _ended(p),
            _estimate(p.score, by),
            _estimate(p.loss),
            _estimate(p.forgetting),
            "*" if p.on_front else "",
        )
    return table


MOST_POINTS = 40
"""Settings printed before the rest is counted only."""


def show_sweep(record: SweepRecord, out: Path) -> None:
    """Print the answers first, and then what they rest on."""
    console = plain_console()
    c = record.config
    states = Counter(cell.status for cell in record.cells)
    told = ", ".join(f"{number} {status}" for status, number in sorted(states.items()))
    console.print(f"{escape(c.data)} on {escape(c.model)}: {len(record.cells)} runs: {told}", soft_wrap=True)
    for sentence in record.answers:
        console.print(f"- {escape(sentence)}", soft_wrap=True)
    console.print()
    console.print(_best_table(record.best, c.score))
    console.print()
    console.print(_point_table(record.points[:MOST_POINTS], c.score))
    if len(record.points) > MOST_POINTS:
        console.print(f"... and {len(record.points) - MOST_POINTS} more in sweep.json and results.csv")
    console.print(
        "Means over seeds ± half of a 95 % t-interval, each for itself: about one in twenty leaves out the truth. "
        "best rate: in brackets where it lies on the edge of the rates tried. runs: + done, x diverged, ! failed or "
        "stopped. front: no other setting is better in both recall and forgetting, by the means.",
        soft_wrap=True,
    )
    print_findings(console, record.findings)
    console.print(f"sweep.json and results.csv: {escape(str(out))}", soft_wrap=True)


def show_dry_sweep(record: SweepDryRunRecord) -> None:
    """Print the cells of a sweep that is not run, and what they would cost."""
    console = plain_console()
    there = set(record.there)
    for name in record.cells:
        console.print(name + ("  (there)" if name in there else ""))
    todo = len(record.cells) - len(there)
    params = ", ".join(f"rank {rank} {number:,}" for rank, number in record.params_by_rank.items())
    console.print(
        f"{len(record.cells)} runs, {todo} to do; {record.steps} steps of training each, {record.tokens:,} tokens"
    )
    console.print(f"parameters: {params}; of the base {record.base_params:,}", soft_wrap=True)
    console.print(f"memory of a run at the highest rank: {record.memory_bytes / 2**20:,.0f} MiB, libraries not counted")
    console.print(f"to train them all: {record.flops:.3g} FLOP, measuring not counted")
    if record.seconds is not None:
        console.print(f"at the pace of the runs that are there: {record.seconds:,.0f} s of training, one after another")
    elif todo:
        console.print("time: not known; run one cell into the folder, and this says how long the others would take")
