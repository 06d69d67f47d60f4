"""Exact recall of each run, asked in the words of the training data and in words held out of it.

In: a demo record. Out: a figure, or None where it holds no run on the facts.
"""

from __future__ import annotations

from rankwise.records import DemoRecord, DemoRun
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, known, layout
from rankwise.report.looks import facts_runs, hue, marker, marks_of, run_words, safe, status_words, symbols


def _joint(place: int, run: DemoRun) -> Json:
    ends = [drawn(run.exact_share), drawn(run.paraphrased_exact_share)]
    line = {"width": 2, "color": hue(run.scaling)}
    look: Json = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False, "line": line}
    return look | {"x": ends, "y": [place, place]}


def _mark(place: int, run: DemoRun, shapes: dict[int, str], *, paraphrased: bool) -> Json:
    name = "in words held out of training" if paraphrased else "in the words of the training data"
    look = marker(run, shapes, 12)
    if paraphrased:
        look |= {"color": "@surface", "line": {"width": 2, "color": look["color"]}}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [drawn(run.paraphrased_exact_share if paraphrased else run.exact_share)],
        "y": [place],
        "marker": look,
        "cliponaxis": False,
        "showlegend": False,
        "customdata": [safe(f"{run_words(run)}, {run.status}\nasked {name}")],
        "hovertemplate": "%{customdata}: %{x:.1%}<extra></extra>",
    }


def _key(name: str, symbol: str) -> Json:
    """Return a legend entry in no rule's hue: filled and open are the same for all."""
    marks = {"size": 11, "symbol": symbol, "color": "@muted", "line": {"width": 2, "color": "@muted"}}
    return {"type": "scatter", "mode": "markers", "name": name, "x": [None], "y": [None], "marker": marks}


def _unknown(place: int, run: DemoRun) -> Json:
    """Return the words in place of the marks of a run whose shares are unknown."""
    words_there = "unknown" if run.status == "done" else f"{run.status}, unknown"
    font = {"size": 11, "color": "@muted"}
    return {"x": 0, "y": place, "text": words_there, "xanchor": "left", "showarrow": False, "font": font}


def table(runs: list[DemoRun]) -> Table:
    """Return the shares of each run as a table."""
    head = ("run", "learning rate", "training words", "held-out words", "status")
    rows = tuple(
        (
            run_words(run, ""),
            words.number(run.learning_rate),
            words.share(run.exact_share),
            words.share(run.paraphrased_exact_share),
            status_words(run.status),
        )
        for run in runs
    )
    return Table("Share of the facts recalled to the last token", head, rows, named=True)


def draw(record: DemoRecord) -> Figure | None:
    """Draw both shares of every run on the facts, a row each."""
    runs = facts_runs(record.runs)
    if not runs:
        return None
    missing = [run for run in runs if known(run.exact_share) is None and known(run.paraphrased_exact_share) is None]
    shapes = symbols(run.rank for run in record.runs)
    names = [safe(run_words(run, "\nat {}")) for run in runs]
    rows = axis("", tickvals=list(range(len(runs))), ticktext=names, showgrid=False, ticks="")
    rows |= {"range": [len(runs) - 0.5, -0.5], "showline": False, "tickfont": {"size": 11}}
    ticks = [0, 0.25, 0.5, 0.75, 1]
    shares = axis("exact, % of the facts", range=[-0.04, 1.04], tickvals=ticks, tickangle=0)
    shares |= {"ticktext": [f"{tick * 100:g}" for tick in ticks]}
    traces = [_joint(place, run) for place, run in enumerate(runs)]
    for place, run in enumerate(runs):
        traces += [_mark(place, run, shapes, paraphrased=asked) for asked in (False, True)]
    traces += [_key("asked in training words", "circle"), _key("asked in held-out words", "circle-open")]
    return Figure(
        name="exact-recall",
        title="Asked in other words",
        alt="Share of the facts recalled exactly, a row a run, asked in training words and in held-out words.",
        data=tuple(traces),
        layout=layout(
            130 + 46 * len(runs),
            showlegend=True,
            xaxis=shares,
            yaxis=rows,
            annotations=[_unknown(place, run) for place, run in enumerate(runs) if run in missing],
        ),
        caption=(
            f"Share of the facts about {record.people:,} people that greedy decoding gets right to the last token "
            f"(no unit), n = {len(runs)} runs: filled marks ask in sentences of the training data, open ones in "
            "sentences that were never trained on.",
            "The line between the two marks of a run is what is lost by asking in other words.",
            "Hues are rules and shapes ranks, as in the figure before. An exact answer is not the only trace of a "
            "fact: bits count the probability of the right one too.",
        ),
        fallback=table(runs),
        marks=marks_of(runs, missing),
    )
