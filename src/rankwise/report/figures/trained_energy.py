"""Energy captured against rank of the trained adapters: facts beside style.

In: a demo record. Out: a figure, or None where no run has a spectrum.
"""

from __future__ import annotations

from rankwise.records import DemoRecord, DemoRun
from rankwise.report import words
from rankwise.report.drawing import (
    Figure,
    Json,
    Table,
    drawn,
    known,
    layout,
    marked_shares,
    plain,
    rank_axis,
    share_axis,
)
from rankwise.report.looks import facts_runs, hue, marks_of, run_words, status_words, symbols


def shares_of(run: DemoRun) -> dict[int, float]:
    """Return rank -> mean share of the energy, where it is known."""
    pairs = ((int(rank), known(share)) for rank, share in run.energy_by_rank.items() if rank.isdecimal() and int(rank))
    return {rank: share for rank, share in sorted(pairs) if share is not None}


def _name(run: DemoRun) -> str:
    kind = "style" if run.role == "style" else "facts"
    rate = " at {}" if run.role == "best rate" else ""
    return f"{kind}: {run_words(run, rate)}" + ("" if run.status == "done" else f" ({run.status})")


def _line(run: DemoRun, shapes: dict[int, str]) -> Json:
    shares = shares_of(run)
    style = run.role == "style"
    color = "@ink" if style else hue(run.scaling)
    dash = "dash" if style else "dot" if run.role == "best rate" else "solid"
    symbol = shapes[run.rank] if run.status == "done" else "x"
    return {
        "type": "scatter",
        "mode": "lines+markers" if run.status == "done" else "markers",
        "name": plain(_name(run)),
        "x": list(shares),
        "y": [drawn(share) for share in shares.values()],
        "line": {"width": 2, "color": color, "dash": dash},
        "marker": {"size": 8, "color": color, "symbol": symbol},
        "hovertemplate": "rank %{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
    }


def table(runs: list[DemoRun]) -> Table:
    """Return the shares as a table: a row a run, a column a rank."""
    ranks = sorted({rank for run in runs for rank in shares_of(run)})
    head = ("run", "learning rate", *(f"rank {rank}" for rank in ranks), "status")
    rows = []
    for run in runs:
        shares = shares_of(run)
        cells = tuple(words.share(shares.get(rank)) for rank in ranks)
        kind = "style" if run.role == "style" else "facts"
        name = f"{kind}: {run_words(run, '')}"
        rows.append((name, words.number(run.learning_rate), *cells, status_words(run.status)))
    return Table("Mean share of the energy by rank", head, tuple(rows), named=True)


def draw(record: DemoRecord) -> Figure | None:
    """Draw the mean share of the energy against rank for every trained adapter."""
    runs = facts_runs(record.runs) + [run for run in record.runs if run.role == "style"]
    shown = [run for run in runs if shares_of(run)]
    if not shown:
        return None
    shapes = symbols(run.rank for run in record.runs)
    longest = max(max(shares_of(run)) for run in shown)
    return Figure(
        name="trained-energy",
        title="Energy captured against rank, facts beside style",
        alt="Mean share of the energy against rank for each trained adapter; lines at 90 % and 99 %.",
        data=tuple(_line(run, shapes) for run in shown),
        layout=layout(
            480,
            showlegend=True,
            xaxis=rank_axis(longest),
            yaxis=share_axis("share of the energy"),
            **marked_shares((0.9, 0.99)),
        ),
        caption=(
            f"Mean over the modules of an adapter (no unit), n = {len(shown)} adapters: the share of the squared "
            "Frobenius norm of scaling\u00a0·\u00a0B\u00a0A that its largest directions up to a rank hold.",
            "An adapter of rank r reaches 100 % at r whatever it learnt: read lines of one rank and one rule "
            "together. A run on the style data may have had other steps than one on the facts: side by side their "
            "lines illustrate, and are no comparison at equal steps or equal norm.",
            "A line that rises early does not say that few directions were enough: they may be all that a small "
            "scaling or learning rate let grow.",
        ),
        fallback=table(runs),
        marks=marks_of(runs, [run for run in runs if run not in shown]),
    )
