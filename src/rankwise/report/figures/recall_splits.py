"""Recall in the words of the training data, in held-out words and of facts held out, each beside the base.

In: a run or recall record. Out: a figure, or None where recall was not measured.
"""

from __future__ import annotations

from rankwise.records import Recall, RecallRecord, RecallScore, RunRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, known, layout, share_axis

PANEL = 210
"""Height of one of the two panels in px."""

GAP = 100
"""Height between them in px."""


def splits(recall: Recall) -> dict[str, RecallScore]:
    """Return what was asked -> its score, without what was not."""
    found = {"training words": recall, "held-out words": recall.paraphrases, "never trained": recall.held_out}
    return {name: score for name, score in found.items() if score is not None}


def per_fact(value: float | None, facts: int) -> float | None:
    """Return a sum over facts as a mean, or None."""
    return value / facts if value is not None and known(value) is not None and facts else None


def _bars(name: str, color: str, values: list[float | None], names: list[str], hover: str, **more: object) -> Json:
    marker: Json = {"color": color, "line": {"width": 1, "color": color}}
    if color == "@thin":
        marker |= {"pattern": {"shape": "/", "size": 6, "solidity": 0.25, "bgcolor": "@surface", "fgcolor": color}}
    return {
        "type": "bar",
        "name": name,
        "x": names,
        "y": [drawn(v) for v in values],
        "marker": marker,
        "hovertemplate": hover,
        "textposition": "outside",
        "textfont": {"size": 11, "color": "@ink"},
        "cliponaxis": False,
    } | more


def _broken(name: str) -> str:
    """Break a name at its blanks: three names side by side have 90 px each on a phone."""
    return name.replace(" ", "<br>")


def _label(name: str, score: RecallScore) -> str:
    """Return what stands under a bar of bits: what was asked, and the number."""
    bits, possible = (per_fact(v, score.facts) for v in (score.bits, score.bits_possible))
    of = "" if possible is None else f" of {words.number(possible)}"
    return f"{_broken(name)}<br>{'unknown' if bits is None else words.number(bits)}{of}"


def _traces(found: dict[str, RecallScore], pools: bool) -> list[Json]:
    names, scores = list(found), list(found.values())
    bits = [per_fact(s.bits, s.facts) for s in scores]
    possible = [per_fact(s.bits_possible, s.facts) for s in scores]
    shares: list[float | None] = [s.exact_share for s in scores]
    base = [s.base_exact_share for s in scores]
    exact = "%{x}: %{y:.1%} exact<extra>%{fullData.name}</extra>"
    gained = "%{x}: %{y:.3f} bits a fact above the base<extra></extra>"
    lines = {"width": 2.5, "color": "@ink"}
    label = "bits recalled" if pools else "bits of loss saved"
    below = {"xaxis": "x2", "yaxis": "y2"}
    return [
        _bars(label, "@first", bits, names, gained, showlegend=False, width=0.36),
        {
            "type": "scatter",
            "mode": "markers",
            "name": "all there is",
            "x": names,
            "y": [drawn(v) for v in possible],
            "marker": {"symbol": "line-ew-open", "size": 34, "color": "@ink", "line": lines},
            "hovertemplate": "%{x}: %{y:.3f} bits a fact in all<extra></extra>",
        },
        _bars("tuned", "@first", shares, names, exact, text=[words.share(s, 2) for s in shares], **below),
        _bars("base", "@thin", base, names, exact, text=[words.share(s, 2) for s in base], **below),
    ]


def table(found: dict[str, RecallScore]) -> Table:
    """Return the scores as a table."""
    head = ("asked", "facts", "bits", "possible", "bits a fact", "base, bits", "exact", "base, exact")
    rows = tuple(
        (
            name,
            f"{s.facts:,}",
            words.number(s.bits),
            words.number(s.bits_possible),
            words.number(per_fact(s.bits, s.facts)),
            words.number(s.base_bits),
            words.share(s.exact_share),
            words.share(s.base_exact_share),
        )
        for name, s in found.items()
    )
    return Table("Recall by what was asked", head, rows, named=True)


def _axes(found: dict[str, RecallScore]) -> Json:
    inner = 2 * PANEL + GAP
    low = round(PANEL / inner, 4)
    values = [
        v
        for s in found.values()
        for v in (per_fact(s.bits, s.facts), per_fact(s.bits_possible, s.facts))
        if v is not None
    ]
    bottom, top = min([0.0, *values]), max([0.0, *values]) or 1.0
    across = axis("", type="category", showgrid=False, ticks="", tickangle=0)
    return {
        "xaxis": across | {"anchor": "y", "tickvals": list(found), "ticktext": [_label(*row) for row in found.items()]},
        "xaxis2": across | {"anchor": "y2", "tickvals": list(found), "ticktext": [_broken(name) for name in found]},
        "yaxis": axis("bits a fact above the base", range=[drawn(1.1 * bottom), drawn(1.1 * top)], nticks=6)
        | {"domain": [round((PANEL + GAP) / inner, 4), 1], "zeroline": True, "zerolinecolor": "@line"},
        "yaxis2": share_axis("exact answers") | {"domain": [0, low], "range": [0, 1.15]},
        "barmode": "group",
        "bargap": 0.35,
        "bargroupgap": 0.08,
    }


def caption_of(recall: Recall, found: dict[str, RecallScore]) -> tuple[str, ...]:
    """Return how to read the scores: with pools, and without."""
    thing = "facts" if recall.kind == "pools" else "completions"
    asked = [f"{s.facts:,} {thing} in {n}" if n.endswith("words") else f"{s.facts:,} {n}" for n, s in found.items()]
    above = (
        "Above: bits a fact that the tuned model scores more than the base; a fact scores log2(size of its pool) − "
        "loss / ln 2, and the bar across is all that a fact holds, the log2."
        if recall.kind == "pools"
        else "Above: bits that a completion costs less than with the base (its loss / ln 2); the bar across is what it "
        "would be at a loss of zero. No pool of answers is known here, so that this counts the form of an answer too."
    )
    sentences = [
        f"{above} Below: the share that greedy decoding gets right to the last token, beside the base (hatched).",
        f"Asked: n = {', '.join(asked)}.",
    ]
    if recall.paraphrases is not None:
        sentences.append(f"Held-out words ask for the same {thing} in sentences that are in no training data.")
    if recall.held_out is not None:
        sentences.append("What is scored on what was never trained is learnt about the form of an answer alone.")
    return tuple(sentences)


def draw(record: RunRecord | RecallRecord) -> Figure | None:
    """Draw bits a fact and exact recall of each split."""
    if record.recall is None:
        return None
    found = splits(record.recall)
    lost = [name for name, score in found.items() if known(score.bits) is None]
    plot = layout(2 * PANEL + GAP + 90, showlegend=True, margin={"l": 62, "r": 18, "t": 40, "b": 60}, **_axes(found))
    return Figure(
        name="recall-splits",
        title="Recall by what was asked",
        alt=f"Bits a fact and share of exact answers for {', '.join(found)}, tuned beside base.",
        data=tuple(_traces(found, record.recall.kind == "pools")),
        layout=plot,
        caption=caption_of(record.recall, found),
        fallback=table(found),
        marks=(f"The bits recalled are unknown: {', '.join(lost)}.",) if lost else (),
    )
