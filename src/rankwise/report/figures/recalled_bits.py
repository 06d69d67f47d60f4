"""Recalled bits a person against rank: one line a rule at the shared learning rate, and the best rate beside it.

In: a demo record. Out: a figure, or None where it holds no run on the facts.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from rankwise.records import DemoRecord, DemoRun
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, known, layout, level, plain, value_axis
from rankwise.report.looks import (
    bits_words,
    facts_runs,
    fractions,
    hue,
    label_places,
    marker,
    marks_of,
    rule_words,
    run_words,
    spaced,
    status_words,
    symbols,
)

EDGE = 0.26
"""Room left and right of the outermost ranks, as a share of the distance between them."""


def _label(run: DemoRun) -> str:
    broken = "" if run.status == "done" else f" {run.status}"
    return plain(f"{bits_words(run.bits_per_person)}{broken}")


def _trace(name: str, runs: list[DemoRun], shapes: dict[int, str], places: dict[str, str], dash: str) -> Json:
    """Return the runs of one rule: joined where they are done, a gap at each that is not."""
    markers = [marker(run, shapes) for run in runs]
    color = hue(runs[0].scaling)
    return {
        "type": "scatter",
        "mode": "lines+markers+text",
        "name": plain(name),
        "x": [run.rank for run in runs],
        "y": [drawn(run.bits_per_person) for run in runs],
        "line": {"width": 2.5, "color": color, "dash": dash},
        "marker": markers[0] | {"symbol": [m["symbol"] for m in markers]},
        "text": [spaced(_label(run), places[run.name]) for run in runs],
        "textposition": [places[run.name] for run in runs],
        "textfont": {"size": 12, "color": "@ink"},
        "cliponaxis": False,
        "customdata": [plain(f"{run_words(run)}, {run.status}") for run in runs],
        "hovertemplate": "%{customdata}<br>%{y:.2f} bits a person<extra></extra>",
    }


def _rules(runs: list[DemoRun]) -> list[str]:
    return list(dict.fromkeys(run.scaling for run in runs))


def _bridged(runs: list[DemoRun]) -> list[tuple[DemoRun, DemoRun]]:
    """Return the pairs of one rank and rule of which one is at the shared rate and the other at its best."""
    done = [run for run in runs if run.status == "done"]
    fixed, best = ([run for run in done if run.role == role] for role in ("fixed rate", "best rate"))
    return [(a, b) for b in best for a in fixed if (a.rank, a.scaling) == (b.rank, b.scaling)]


def _bridges(runs: list[DemoRun]) -> list[Json]:
    """Return a dotted line from each run at the shared rate to the same rank and rule at its best rate."""
    common: Json = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    return [
        common
        | {
            "x": [a.rank, b.rank],
            "y": [drawn(a.bits_per_person), drawn(b.bits_per_person)],
            "line": {"width": 1.5, "color": hue(b.scaling), "dash": "dot"},
        }
        for a, b in _bridged(runs)
    ]


def _joined(runs: list[DemoRun]) -> list[list[DemoRun]]:
    """Return the stretches of runs to join: a run that is not done stands alone and breaks the line."""
    pieces: list[list[DemoRun]] = [[]]
    for run in runs:
        if run.status == "done":
            pieces[-1].append(run)
        else:
            pieces += [[run], []]
    return [piece for piece in pieces if piece]


def _traces(shown: list[DemoRun], shapes: dict[int, str], places: dict[str, str]) -> list[Json]:
    fixed = [run for run in shown if run.role == "fixed rate"]
    best = [run for run in shown if run.role == "best rate"]
    traces = _bridges(shown)
    for rule in _rules(fixed):
        for place, piece in enumerate(_joined([run for run in fixed if run.scaling == rule])):
            trace = _trace(rule_words(rule), piece, shapes, places, "solid")
            traces.append(trace | {"legendgroup": plain(rule), "showlegend": place == 0})
    for run in best:
        name = f"{rule_words(run.scaling)} at its own rate, {words.number(run.learning_rate)}"
        traces.append(_trace(name, [run], shapes, places, "dot"))
    return traces


def _places(shown: list[DemoRun], top: float) -> dict[str, str]:
    """Return where the number of each run has room."""
    bits = [run.bits_per_person or 0.0 for run in shown]
    logs = [math.log2(max(run.rank, 1)) for run in shown]
    span = (max(logs) - min(logs)) or 1.0
    across = fractions(logs, min(logs) - EDGE * span, max(logs) + EDGE * span)
    upward = fractions(bits, min(0.0, *bits), 1.1 * max(top, *bits))
    at = list(zip(across, upward, strict=True))
    where = dict(zip([id(run) for run in shown], at, strict=True))
    pieces = [_joined([r for r in shown if r.role == "fixed rate" and r.scaling == rule]) for rule in _rules(shown)]
    pairs = [pair for of in pieces for piece in of for pair in pairwise(piece)] + _bridged(shown)
    lines = [(where[id(a)], where[id(b)]) for a, b in pairs]
    found = label_places(at, [_label(run) for run in shown], lines=lines)
    return {run.name: place for run, place in zip(shown, found, strict=True)}


def _axes(shown: list[DemoRun], record: DemoRecord) -> dict[str, Any]:
    ranks = sorted({max(run.rank, 1) for run in shown})
    low, high = math.log10(ranks[0]), math.log10(ranks[-1])
    pad = EDGE * (high - low) or 0.2
    xaxis = axis("rank (log scale)", type="log", tickvals=ranks, ticktext=[str(r) for r in ranks], minor={"ticks": ""})
    xaxis |= {"range": [round(low - pad, 4), round(high + pad, 4)]}
    bits = [run.bits_per_person for run in shown if run.bits_per_person is not None]
    top, top_words = level(record.bits_per_person, f"{bits_words(record.bits_per_person)}: all that the data hold")
    zero, zero_words = level(0.0, "0: no more than the base", dash="solid")
    return {
        "xaxis": xaxis,
        "yaxis": value_axis("bits recalled a person", [record.bits_per_person, *bits]),
        "shapes": [top, zero],
        "annotations": [top_words, zero_words],
    }


def _caption(record: DemoRecord, runs: list[DemoRun]) -> tuple[str, ...]:
    seed = "" if record.seed is None else f", seed {record.seed}"
    base = record.base_bits_per_person
    scored = "" if known(base) is None else f" (which itself scores {words.number(base, 2)})"
    sentences = [
        f"Each mark is one training run on the same {record.people:,} people{seed}, n = {len(runs)}: the bits that the "
        f"tuned model scores above the untuned base{scored}, a person; a fact scores log2(size of its pool) − loss / "
        "ln 2.",
        f"Lines join the runs of one rule at the learning rate that all share, {words.number(record.learning_rate)}; "
        "the shape of a mark is its rank.",
    ]
    if any(run.role == "best rate" for run in runs):
        sentences.append(
            "A dotted line leads from a rank and rule to the same rank and rule at its own learning rate: "
            "its height is what the rate alone changes."
        )
        alone = [rule for rule in _rules(runs) if not any(r.role == "best rate" and r.scaling == rule for r in runs)]
        if alone:
            sentences.append(f"There is no run at a rate of its own for {' and '.join(map(rule_words, alone))}.")
    sentences.append("One run each: how far a mark would move with another seed is not in this figure.")
    return tuple(sentences)


def table(record: DemoRecord, runs: list[DemoRun]) -> Table:
    """Return the bits of each run as a table."""
    head = ("run", "learning rate", "bits a person", "of what the data hold", "status")
    rows = []
    for run in runs:
        bits = known(run.bits_per_person)
        part = (
            words.UNKNOWN if bits is None or not record.bits_per_person else words.share(bits / record.bits_per_person)
        )
        rate = words.number(run.learning_rate)
        rows.append((run_words(run, ""), rate, bits_words(bits), part, status_words(run.status)))
    return Table(f"Bits recalled a person, of {bits_words(record.bits_per_person)}", head, tuple(rows), named=True)


def draw(record: DemoRecord) -> Figure | None:
    """Draw the recalled bits of every run on the facts."""
    runs = facts_runs(record.runs)
    if not runs:
        return None
    shown = [run for run in runs if known(run.bits_per_person) is not None]
    missing = [run for run in runs if known(run.bits_per_person) is None]
    shapes = symbols(run.rank for run in record.runs)
    places = _places(shown, record.bits_per_person) if shown else {}
    axes = _axes(shown or runs, record)
    return Figure(
        name="recalled-bits",
        title="Recalled bits against rank",
        alt="Recalled bits a person against rank, a line a rule: "
        + "; ".join(f"{run_words(run)} {bits_words(run.bits_per_person)}" for run in runs)
        + ".",
        data=tuple(_traces(shown, shapes, places)),
        layout=layout(430, showlegend=True, **axes),
        caption=_caption(record, shown),
        fallback=table(record, runs),
        marks=marks_of(runs, missing),
    )
