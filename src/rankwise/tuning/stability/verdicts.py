"""What the exponents come to: a verdict for each group and step.

In: fits. Out: cells of the record, and the line to read first.
"""

from __future__ import annotations

from typing import Any, Final

from rankwise.records import Finding, StabilityCell, StabilityVerdict, Verdict
from rankwise.tuning.stability.exponents import Fit, exponent
from rankwise.tuning.stability.settings import Cell, Grid
from rankwise.tuning.stability.statistics import Kind, Measured, by_rank

FITTED: Final = ("rms", "update", "grad_A", "grad_B", "loss")
"""Statistics with an exponent of their own; that of `relative` is that of `rms`, since the frozen output is the same
at every rank."""


BENT: Final = 1.1
"""A stable rule is called bent over the ranks where the spread is that many times what the band allows."""


def verdict_of(fit: Fit, band: float, *, diverged: int) -> Verdict:
    """Judge an exponent by its interval.

    >>> [verdict_of(Fit(0.0, ends, 5), 0.1, diverged=0) for ends in ((-0.1, 0.1), (0.11, 0.2), (-0.3, -0.2), (0, 0.2))]
    ['stable', 'growing', 'collapsing', 'undecided']
    """
    if fit.interval is None or diverged:
        return "undecided"
    low, high = fit.interval
    if low > band:
        return "growing"
    if high < -band:
        return "collapsing"
    return "stable" if -band <= low and high <= band else "undecided"


def cells_of(measured: Measured) -> tuple[StabilityCell, ...]:
    """Return a cell a rule, optimizer, init, group and step."""
    grid = measured.grid
    return tuple(
        _cell(measured, kind, group, step) for kind in grid.kinds() for group in measured.groups for step in grid.steps
    )


def _cell(measured: Measured, kind: Kind, group: str, step: int) -> StabilityCell:
    grid = measured.grid
    rule, optimizer, init = kind
    logs = {name: measured.logs(kind, step, group, name) for name in (*FITTED, "relative")}
    fits = {name: exponent(grid.ranks, logs[name].values) for name in FITTED}
    relative = by_rank(logs["relative"], grid.ranks)
    sizes = [value for value in relative.values() if value]
    diverged = measured.diverged(kind, step)
    fitted: dict[str, Any] = {}
    for name, fit in fits.items():
        fitted |= {f"{name}_exponent": fit.mean, f"{name}_exponent_ci": fit.interval}
    return StabilityCell(
        rule=rule,
        optimizer=optimizer,
        init=init,
        learning_rate=grid.rates[optimizer],
        group=group,
        step=step,
        modules=logs["rms"].modules,
        runs_diverged=diverged,
        seeds=fits["rms"].seeds,
        relative_rms_by_rank=relative,
        update_rms_by_rank=by_rank(logs["update"], grid.ranks),
        spread=max(sizes) / min(sizes) if sizes else None,
        verdict=verdict_of(fits["rms"], grid.band, diverged=diverged),
        **fitted,
    )


def last_verdicts(grid: Grid, cells: tuple[StabilityCell, ...]) -> tuple[StabilityVerdict, ...]:
    """Return the verdict on all modules after the last step."""
    return tuple(
        StabilityVerdict(
            rule=c.rule,
            optimizer=c.optimizer,
            init=c.init,
            step=c.step,
            exponent=c.rms_exponent,
            exponent_ci=c.rms_exponent_ci,
            verdict=c.verdict,
        )
        for c in cells
        if c.group == "all" and c.step == grid.steps[-1]
    )


def _bent(measured: Measured, kind: Kind) -> list[Finding]:
    """Say where the figures over the ranks move by more than a law within the band could: the line is flat, they not.

    The interval is that of a slope. It narrows with the seeds however badly a straight line fits.
    """
    grid = measured.grid
    allowed = (grid.ranks[-1] / grid.ranks[0]) ** grid.band
    found: list[tuple[int, float]] = []
    for step in grid.steps:
        cell = _cell(measured, kind, "all", step)
        if cell.verdict == "stable" and cell.spread is not None and cell.spread > allowed * BENT:
            found.append((step, cell.spread))
    if not found:
        return []
    step, spread = max(found, key=lambda hit: hit[1])
    text = (
        f"Under {', '.join(kind)} the exponent after step {step} is stable, and yet the branch differs by a factor of "
        f"{spread:.2f} between ranks, where a power law within the band allows {allowed:.2f}: it rises and falls over "
        "these ranks. Read the figures by rank, or check fewer ranks."
    )
    return [Finding(code="bent-over-ranks", level="warning", text=text)]


def findings_of(measured: Measured, diverged: dict[Cell, int]) -> tuple[Finding, ...]:
    """Name what stands in the way of a verdict."""
    grid, found = measured.grid, []
    for kind in grid.kinds():
        mine = {cell: step for cell, step in diverged.items() if cell.kind == kind}
        if not mine:
            continue
        ranks = sorted({cell.rank for cell in mine})
        rate = grid.rates[kind[1]]
        text = (
            f"{len(mine)} of {len(grid.ranks) * len(grid.seeds)} runs under {', '.join(kind)} diverged at learning "
            f"rate {rate:g}: rank {', '.join(map(str, ranks))}, the first at step {min(mine.values())}. From there on "
            "the verdict is undecided. Give a smaller --learning-rate to compare later steps."
        )
        found.append(Finding(code="diverged-in-check", level="warning", text=text))
    if len(grid.seeds) < 2:
        text = "One seed gives no interval, so that every verdict is undecided. Give --seeds 5."
        found.append(Finding(code="too-few-seeds", level="info", text=text))
    found += [bent for kind in grid.kinds() for bent in _bent(measured, kind)]
    silent = measured.silent()
    if silent:
        text = (
            f"No gradient reaches {len(silent)} of {len(measured.modules)} modules, first {silent[0]}: their branch "
            "stays at zero, and they are in no figure."
        )
        found.append(Finding(code="silent-modules", level="warning", text=text))
    return tuple(found)
