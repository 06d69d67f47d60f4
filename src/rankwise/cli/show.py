"""Tables and progress for people: records in, text on the terminal out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self, TextIO

from rich.markup import escape as escape_markup
from rich.table import Table

from rankwise.cli.common import PlainConsole, printable
from rankwise.records import Finding, ModuleSpectrum, SimulationRecord, SpectraRecord

MOST_ROWS: Final = 40
"""Modules printed before the rest is counted only."""

PIPE_WIDTH: Final = 140
"""Columns where stdout is no terminal and has no width of its own."""


def escape(text: str) -> str:
    """Return text that neither rich nor the terminal takes for an instruction."""
    return escape_markup(printable(text))


def plain_console(stream: TextIO | None = None) -> PlainConsole:
    """Return a console that changes nothing in what it is given; stdout where no stream is named."""
    file = sys.stdout if stream is None else stream
    return PlainConsole(highlight=False, file=file, width=None if file.isatty() else PIPE_WIDTH)


class Bar:
    """A progress line on stderr; nothing where stderr is no terminal or with --quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __call__(self, module: str, done: int, total: int) -> None:
        """Show that `done` of `total` modules are finished and `module` is next."""
        if self._shown:
            sys.stderr.write(f"\r\x1b[K{done}/{total}  {printable(module[:80])}")
            sys.stderr.flush()

    def say(self, what: str, done: int, total: int) -> None:
        """Show what is being done, and how far it is."""
        self(what, done, total)

    def clear(self) -> None:
        """Wipe the line, so that something else can be printed."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _whole(value: int | None) -> str:
    return "-" if value is None else str(value)


def _norm(module: ModuleSpectrum) -> str:
    return "-" if module.energy is None else f"{module.energy**0.5:.3g}"


def plain_table(*columns: tuple[str, str], title: str | None = None) -> Table:
    """Return an empty table without lines."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name, justify in columns:
        table.add_column(name, justify="left" if justify == "left" else "right", overflow="fold")
    return table


def _adapter_table(modules: Sequence[ModuleSpectrum]) -> Table:
    heads = ("shape", "r", "alpha", "scaling", "norm", "stable rank", "effective", "rank 90 %", "rank 99 %")
    relative = any(m.relative_norm is not None for m in modules)
    table = plain_table(("module", "left"), *((h, "right") for h in heads), *([("rel. norm", "right")] * relative))
    for m in modules:
        cells = [
            escape(m.module),
            f"{m.shape[0]} x {m.shape[1]}",
            _whole(m.r),
            _number(m.lora_alpha, 6),
            _number(m.scaling, 4),
            _norm(m),
            _number(m.stable_rank),
            _number(m.effective_rank),
            _whole(m.rank_90),
            _whole(m.rank_99),
        ]
        table.add_row(*cells, *([_share(m.relative_norm)] * relative))
    return table


def _delta_table(modules: Sequence[ModuleSpectrum]) -> Table:
    heads = (
        "shape",
        "norm",
        "rel. norm",
        "unchanged",
        "effective",
        "rank 90 %",
        "rank 99 %",
        "noise edge",
        "signal rank",
    )
    table = plain_table(("module", "left"), *((h, "right") for h in heads))
    for m in modules:
        mark = " ~" if m.rounding_limited else ""
        table.add_row(
            escape(m.module),
            f"{m.shape[0]} x {m.shape[1]}",
            _norm(m),
            "-" if m.relative_norm is None else f"{m.relative_norm:.3%}",
            _share(m.unchanged_share),
            _number(m.effective_rank) + mark,
            _whole(m.rank_90) + mark,
            _whole(m.rank_99) + mark,
            _number(m.noise_edge),
            _whole(m.signal_rank),
        )
    return table


_STYLES: Final = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def print_findings(console: PlainConsole, findings: Sequence[Finding]) -> None:
    """Print findings, a line each."""
    for finding in findings:
        style = _STYLES[finding.level]
        console.print(f"[{style}]{finding.level}[/] \\[{finding.code}] {escape(finding.text)}", soft_wrap=True)


def show_spectra(record: SpectraRecord, *, every: bool) -> None:
    """Print the spectra of a record: a row a module, the means, the findings.

    Args:
        record: what `inspect` returned.
        every: print all modules, not the first `MOST_ROWS`.
    """
    console = plain_console()
    what = escape(record.source) if record.base is None else f"{escape(record.source)} - {escape(record.base)}"
    if record.kind == "adapter":
        what = f"adapter {escape(record.source)}"
    summary = record.summary
    console.print(f"{what}: {summary.modules} modules, {len(record.skipped)} skipped", soft_wrap=True)
    shown = record.modules if every else record.modules[:MOST_ROWS]
    if shown:
        console.print(_adapter_table(shown) if record.kind == "adapter" else _delta_table(shown))
    if len(shown) < len(record.modules):
        console.print(f"... and {len(record.modules) - len(shown)} more (--all prints them, --json has everything)")
    if any(m.rounding_limited for m in shown):
        console.print("~ counts rounding noise; read the signal rank instead")
    curve = ", ".join(f"{rank}: {_share(share)}" for rank, share in summary.energy_by_rank.items() if share is not None)
    if curve:
        console.print(f"mean energy share by rank  {curve}", soft_wrap=True)
    effective, ninety = _number(summary.effective_rank_mean), _number(summary.rank_90_mean)
    console.print(f"mean effective rank {effective}, mean rank for 90 % {ninety}")
    print_findings(console, summary.findings)


def show_simulation(record: SimulationRecord) -> None:
    """Print a simulation: the scalings, and a table an update."""
    console = plain_console()
    table = plain_table(("rank", "right"), ("alpha / r", "right"), ("alpha / sqrt(r)", "right"), title="Scalings")
    for scale in record.scales:
        table.add_row(str(scale.rank), f"{scale.lora:.4g}", f"{scale.rslora:.4g}")
    console.print(table)
    for name, update in record.updates.items():
        title = (
            f"\n{escape(name)} ({escape(update.planted)}): rank for 90 % of the energy {update.rank_90}, "
            f"for 99 % {update.rank_99}, stable rank {_number(update.stable_rank)}"
        )
        heads = ("energy", "truncation error", "x alpha / r", "closed form", "x alpha / sqrt(r)", "closed form")
        table = plain_table(("rank", "right"), *((h, "right") for h in heads), title=title)
        for row in update.rows:
            table.add_row(
                str(row.rank),
                f"{row.energy_share:.1%}",
                f"{row.truncation_error:.3f}",
                f"{row.scaled_error.lora:.3f}",
                f"{row.closed_form.lora:.3f}",
                f"{row.scaled_error.rslora:.3f}",
                f"{row.closed_form.rslora:.3f}",
            )
        console.print(table)
    console.print()
    for note in record.notes:
        console.print(escape(note), soft_wrap=True)
