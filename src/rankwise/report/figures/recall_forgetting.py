"""Recall against forgetting: what was learnt, and what it cost on text the base already modelled.

In: a demo record. Out: a figure, or None where no run on the facts has both numbers.
"""

from __future__ import annotations

from rankwise.records import DemoRecord, DemoRun
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, drawn, known, layout, level, plain, value_axis
from rankwise.report.looks import (
    bits_words,
    facts_runs,
    fractions,
    label_places,
    marker,
    marks_of,
    rule_words,
    run_words,
    safe,
    spaced,
    status_words,
    symbols,
)


def _label(run: DemoRun) -> str:
    rate = f"\nat its own rate, {words.number(run.learning_rate)}" if run.role == "best rate" else ""
    broken = "" if run.status == "done" else f"\n{run.status}"
    return f"rank {run.rank}, {rule_words(run.scaling)}{rate}{broken}"


def _point(run: DemoRun, shapes: dict[int, str], label: str, place: str) -> Json:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": plain(run.name),
        "x": [drawn(run.forgetting)],
        "y": [drawn(run.bits_per_person)],
        "marker": marker(run, shapes, 12),
        "text": [spaced(safe(label), place)],
        "textposition": place,
        "textfont": {"size": 11.5, "color": "@ink"},
        "cliponaxis": False,
        "showlegend": False,
        "customdata": [safe(f"{run_words(run)}, {run.status}")],
        "hovertemplate": "%{customdata}<br>%{y:.2f} bits a person<br>forgetting %{x:.4f} nats a token<extra></extra>",
    }


def table(runs: list[DemoRun]) -> Table:
    """Return both numbers of each run as a table."""
    head = ("run", "learning rate", "bits a person", "forgetting", "status")
    rows = tuple(
        (
            run_words(run, ""),
            words.number(run.learning_rate),
            bits_words(run.bits_per_person),
            words.number(run.forgetting),
            status_words(run.status),
        )
        for run in runs
    )
    return Table("Recall and forgetting (nats a token)", head, rows, named=True)


def draw(record: DemoRecord) -> Figure | None:
    """Draw every run on the facts as a point: forgetting across, recalled bits upwards."""
    runs = facts_runs(record.runs)
    shown = [r for r in runs if known(r.forgetting) is not None and known(r.bits_per_person) is not None]
    if not shown:
        return None
    shapes = symbols(run.rank for run in record.runs)
    across = value_axis("forgetting, nats a token", [r.forgetting or 0.0 for r in shown])
    upward = value_axis("bits recalled a person", [record.bits_per_person, *(r.bits_per_person or 0.0 for r in shown)])
    xs = fractions([r.forgetting or 0.0 for r in shown], *across["range"])
    ys = fractions([r.bits_per_person or 0.0 for r in shown], *upward["range"])
    labels = [_label(run).replace("\n", "<br>") for run in shown]
    places = label_places(list(zip(xs, ys, strict=True)), labels)
    top, top_words = level(record.bits_per_person, f"{bits_words(record.bits_per_person)}: all that the data hold")
    zero, _ = level(0.0, "", dash="solid")
    upright = {"type": "line", "layer": "below", "yref": "paper", "y0": 0, "y1": 1, "xref": "x", "x0": 0, "x1": 0}
    marked = {"shapes": [top, zero, upright | {"line": zero["line"]}], "annotations": [top_words]}
    traces = [_point(*row) for row in zip(shown, [shapes] * len(shown), map(_label, shown), places, strict=True)]
    return Figure(
        name="recall-forgetting",
        title="Recall against forgetting",
        alt="Recalled bits a person against forgetting, a mark a run.",
        data=tuple(traces),
        layout=layout(430, showlegend=False, xaxis=across, yaxis=upward, margin=_BARE, **marked),
        caption=(
            f"Upwards the bits recalled a person as before; across the rise of the loss on plain text that the base "
            f"already modelled (nats a token, 0 is the base itself), n = {len(shown)} runs.",
            "Of two runs at one height the one further left gave up less of what the base knew; of two above each "
            "other the upper one learnt more at the same cost.",
            "Forgetting is measured on one kind of text: what else may have been lost is not in this figure.",
        ),
        fallback=table(runs),
        marks=marks_of(runs, [run for run in runs if run not in shown]),
    )


_BARE = {"l": 58, "r": 24, "t": 14, "b": 50}
